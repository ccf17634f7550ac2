"""Cards of exports, as a training states them and as nobody may."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from vssl_dist.config import Normalisation
from vssl_dist.exports.card import (
    CARD_FORMAT,
    Card,
    CardBlock,
    ConfigBlock,
    ExportDescription,
    PortableCard,
)

AnyBlock = TypeVar("AnyBlock", bound=CardBlock)


def description(**changes: Any) -> ExportDescription:
    """What a training says, with other values."""
    return ExportDescription.model_validate(
        {
            "format": CARD_FORMAT,
            "run": "tiny",
            "step": 7,
            "method": "vje",
            "backbone": "resnet18",
            "image_size": 96,
            "normalise": Normalisation(mean=(0, 0, 0), std=(1, 1, 1)),
            "train": Path("data/train"),
            "val": None,
        }
        | changes
    )


def card_text(sha256: str, **changes: Any) -> str:
    """The card of weights that nobody looks at."""
    card = Card.model_validate(description(**changes).as_json() | {"sha256": sha256})
    return json.dumps(card.as_json())


def portable_card(**changes: Any) -> PortableCard:
    """The card of an export in a format of others, with other values."""
    facts = {"sha256": "ab" * 32, "config": {"licence": None}, "width": 512}
    return PortableCard.model_validate(description().as_json() | facts | changes)


def unchecked_card(**changes: Any) -> PortableCard:
    """One whose values are not looked at."""
    values = dict(portable_card()) | changes
    return _unchecked(PortableCard, values | {"config": _unchecked(ConfigBlock, values["config"])})


def _unchecked(model: type[AnyBlock], values: dict[str, Any]) -> AnyBlock:
    block = model.model_construct(**values)
    block._keys = tuple(values)
    return block
