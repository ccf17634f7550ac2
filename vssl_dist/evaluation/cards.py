"""Cards of exports, which anybody may have written: checked as a whole before they are used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from vssl_dist.config import ConfigError, Normalisation
from vssl_dist.config.fields import FilePath, Finite, Side, as_tuple
from vssl_dist.config.schema import RunName
from vssl_dist.data.shards import DataError
from vssl_dist.evaluation.jsonfile import Line, Step, first_complaint, read_json
from vssl_dist.models.backbones import check_name

_MAX_DEPTH = 16


class ExportError(DataError):
    """An export cannot be used; the message is one line with the file and the remedy."""


def _short_path(path: Path) -> Path:
    if "\0" in str(path) or len(str(path)) > 4096:
        raise ValueError("is no path that a file can have")
    return path


def _shallow(value: Any) -> Any:
    level, depth = [value], 0
    while level:
        if depth > _MAX_DEPTH:
            raise ValueError("is nested beyond reason")
        inner = [each.values() if isinstance(each, dict) else each for each in level
                 if isinstance(each, dict | list)]  # fmt: skip
        level, depth = [one for each in inner for one in each], depth + 1
    return value


Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
"""A name of something in this program."""
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Folder = Annotated[FilePath, AfterValidator(_short_path)]
"""Of shards: anywhere, because it is only read."""


class _Facts(BaseModel):
    """Keys of other versions are let be: they are not used."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Data(_Facts):
    bank: Folder | None = None
    backend: Literal["dali", "reference"] = "dali"
    timeout_s: Annotated[Finite, Field(gt=0)] = 1.0
    views: Annotated[
        tuple[dict[str, Any], ...], BeforeValidator(as_tuple), Field(max_length=64)
    ] = ()


class _Task(_Facts):
    task: Word


class _Method(_Facts):
    name: Word


class _Config(_Facts):
    data: _Data = _Data()
    method: _Method | None = None
    evaluations: Annotated[tuple[_Task, ...], BeforeValidator(as_tuple)] = ()
    licence: Line | None = None


class Card(_Facts):
    """What an export says of itself."""

    run: RunName
    step: Step
    backbone: Annotated[str, Field(pattern=r"^(timm:)?[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")]
    image_size: Side
    normalise: Normalisation
    train: Folder
    val: Folder | None
    sha256: Digest
    head_sha256: Digest = "0" * 64
    online_sha256: Digest = "0" * 64
    method: Word = "unknown"
    branch: Word = "student"
    licence: Line = "unknown"
    fingerprint: Line = "unknown"
    versions: Annotated[dict[Line, Line], Field(max_length=100)] = {}
    metrics: Annotated[dict[Line, float], Field(max_length=10_000)] = {}
    config: Annotated[_Config, BeforeValidator(_shallow)] = _Config()


def card_at(place: Path) -> dict[str, Any]:
    """The card in a file.

    Raises:
        ExportError: One line with the file and what is wrong with it.
        OSError: It cannot be read.
    """
    try:
        raw = read_json(place)
    except ValueError as error:
        raise ExportError(f"{place}: the card is damaged ({error}); export again") from error
    names = Card.model_fields
    needed = {name for name, field in names.items() if field.is_required()}
    missing = sorted(needed - raw.keys()) if isinstance(raw, dict) else ["everything"]
    if missing:
        raise ExportError(f"{place}: not a card of ours, it lacks {', '.join(missing)}")
    card: dict[str, Any] = raw
    try:
        Card.model_validate(card)
        check_name(card["backbone"])
    except ValidationError as error:
        raise ExportError(f"{place}: not a card of ours: {first_complaint(error)}") from error
    except ConfigError as error:
        raise ExportError(f"{place}: {error}") from error
    return card
