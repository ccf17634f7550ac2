"""The card of an export: what weights say of themselves, as a typed and versioned JSON file.

Whoever trains writes it through `Card`, whoever evaluates reads it through `Card`.  Anybody may
have written the file, so it is checked as a whole before it is used.  Cards without ``format`` are
those of earlier versions: they have the same keys, as far as they go.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypedDict

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ModelWrapValidatorHandler,
    PlainSerializer,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from vssl_dist.config import Normalisation, RunConfig
from vssl_dist.config.fields import FilePath, Finite, Positive, Side, as_tuple
from vssl_dist.config.schema import RunName
from vssl_dist.errors import ExportError
from vssl_dist.jsonfile import OneLineText, StepNumber, describe_first_error, read_json
from vssl_dist.text import printable

CARD_FORMAT: Final = "vssl-dist/card-1"
NO_LICENCE_STATEMENT = "none was given; the terms of the training images may reach these weights"
_NUMBERED_FORMAT_PATTERN = re.compile(r"vssl-dist/card-([1-9][0-9]{0,8})")
_MAX_NESTING_DEPTH = 16


def _check_path_length(path: Path) -> Path:
    if "\0" in str(path) or len(str(path)) > 4096:
        raise ValueError("is no path that a file can have")
    return path


def _check_nesting_depth(value: Any) -> Any:
    values_at_depth, depth = [value], 0
    while values_at_depth:
        if depth > _MAX_NESTING_DEPTH:
            raise ValueError("is nested beyond reason")
        containers = [item for item in values_at_depth if isinstance(item, dict | list)]
        values_at_depth = [
            item
            for container in containers
            for item in (container.values() if isinstance(container, dict) else container)
        ]
        depth += 1
    return value


def _refuse_null(value: Any) -> Any:
    if value is None:
        raise ValueError("must be left out, not null")
    return value


ShortName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
"""A name of something in this program."""
Sha256Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PartDigest = Annotated[Sha256Digest | None, BeforeValidator(_refuse_null)]
"""Digest of a part that an export may lack."""
ShardFolder = Annotated[
    FilePath, AfterValidator(_check_path_length), PlainSerializer(str, return_type=str)
]
"""Folder of shards: anywhere, because it is only read."""


class CardBlock(BaseModel):
    """A block of a card, written as it was read: the keys that it had, in their order.

    Keys of other versions are kept and not used.
    """

    model_config = ConfigDict(
        strict=True,
        extra="allow",
        frozen=True,
        use_attribute_docstrings=True,
        ser_json_inf_nan="constants",
    )
    __pydantic_extra__: dict[str, JsonValue]
    _keys: tuple[str, ...] = PrivateAttr(default=())

    @model_validator(mode="wrap")
    @classmethod
    def _note_keys(cls, values: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        validated_block = validate(values)
        if isinstance(values, Mapping):
            validated_block._keys = tuple(values)
        return validated_block

    @model_serializer(mode="wrap")
    def _as_noted(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A default that is not written down may be another one in the next version.
        values = dump(self)
        return {key: values[key] for key in self._keys}

    def as_json(self) -> dict[str, Any]:
        """Return the keys that were given, as JSON values."""
        return self.model_dump(mode="json")


class DataBlock(CardBlock):
    """The run's block ``data``, as far as evaluations use it."""

    bank: ShardFolder | None = None
    backend: Literal["dali", "reference"] = "dali"
    timeout_s: Annotated[Finite, Field(gt=0)] = 120.0
    views: Annotated[
        tuple[dict[str, JsonValue], ...], BeforeValidator(as_tuple), Field(max_length=64)
    ] = ()


class MethodBlock(CardBlock):
    """The run's block ``method``; the other keys are that method's own."""

    name: ShortName


class TaskBlock(CardBlock):
    """One of the run's evaluations; the other keys are that task's own."""

    task: ShortName


class ConfigBlock(CardBlock):
    """The run's configuration, as far as evaluations use it."""

    method: MethodBlock | None = None
    data: DataBlock = DataBlock()
    evaluations: Annotated[tuple[TaskBlock, ...], BeforeValidator(as_tuple)] = ()
    licence: OneLineText | None = None


class WeightsOrigin(TypedDict):
    """Origin of weights: training data and code."""

    fingerprint: str
    """Digest of the training data's manifest."""
    versions: dict[str, str]
    """What computed the weights: packages and commit."""


class ExportDescription(CardBlock):
    """What a training says of weights that it exports."""

    format: Literal["vssl-dist/card-1"] | None = None
    """Version of the card; cards of earlier versions have none."""
    run: RunName
    """Name of the run."""
    step: StepNumber
    """Optimizer steps that the weights have been trained for."""
    method: ShortName = "unknown method"
    """Name of the method that trained them."""
    backbone: Annotated[str, Field(pattern=r"^(timm:)?[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")]
    """Name of the network, as in ``method.backbone``."""
    branch: ShortName = "student"
    """Whose backbone it is, ``student`` or ``teacher``."""
    image_size: Side
    """Side of the images in pixels."""
    normalise: Normalisation
    """``mean`` and ``std`` of each channel: images in [0, 1] less the mean, over the latter."""
    train: ShardFolder
    """Folder of the training shards."""
    val: ShardFolder | None
    """Folder of the held-out shards; null: the run has none."""
    licence: OneLineText = "unknown"
    """Licence of the weights, in one line."""
    config: Annotated[ConfigBlock, BeforeValidator(_check_nesting_depth)] = ConfigBlock()
    """Configuration of the run, whole."""
    fingerprint: OneLineText = "unknown"
    """Digest of the training data's manifest."""
    versions: Annotated[dict[OneLineText, OneLineText], Field(max_length=100)] = {}
    """What computed the weights: packages and commit."""
    metrics: Annotated[dict[OneLineText, float], Field(max_length=10_000)] = {}
    """Figures of the training at that step."""

    @classmethod
    def of(
        cls,
        cfg: RunConfig,
        step: int,
        branch: str,
        origin: WeightsOrigin,
        metrics: Mapping[str, float],
    ) -> Self:
        """Describe weights of a run.

        Args:
            cfg: The run.
            step: Optimizer steps that it has done.
            branch: Whose backbone is exported.
            origin: Whence the weights come.
            metrics: How well they do.
        """
        # It stands in tables and in the front matter of hubs: one line of characters that show.
        licence = cfg.licence and printable(cfg.licence)
        return cls(
            format=CARD_FORMAT,
            run=cfg.name,
            step=step,
            method=cfg.method.name,
            backbone=cfg.method.backbone,
            branch=branch,
            image_size=cfg.data.image_size,
            normalise=cfg.data.normalise,
            train=cfg.data.train,
            val=cfg.data.val,
            licence=licence or NO_LICENCE_STATEMENT,
            config=ConfigBlock.model_validate(cfg.model_dump(mode="json") | {"licence": licence}),
            **origin,
            metrics=dict(metrics),
        )


class Card(ExportDescription):
    """What an export says of itself: a description and the digests of the export's files."""

    head_sha256: PartDigest = None
    """SHA-256 of ``head-STEP.safetensors``, where the method infers a posterior."""
    online_sha256: PartDigest = None
    """SHA-256 of ``online-STEP.safetensors``, where a probe learnt beside the method."""
    sha256: Sha256Digest
    """SHA-256 of ``backbone-STEP.safetensors``."""

    @property
    def parts(self) -> dict[str, str]:
        """Digests of the files beside the backbone's, by the name of the part."""
        digest_by_part = {"head": self.head_sha256, "online": self.online_sha256}
        return {part: digest for part, digest in digest_by_part.items() if digest is not None}

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a card and check it as a whole.

        Raises:
            ExportError: One line with the file and what is wrong with it.
            OSError: It cannot be read.
        """
        try:
            raw_card = read_json(path)
        except ValueError as error:
            raise ExportError(f"{path}: the card is damaged ({error}); export again") from error
        if isinstance(raw_card, dict) and raw_card.get("format", CARD_FORMAT) != CARD_FORMAT:
            raise ExportError(f"{path}: {_describe_wrong_format(raw_card['format'])}")
        fields = cls.model_fields.items()
        required_keys = {name for name, field in fields if field.is_required()}
        missing_keys = (
            sorted(required_keys - raw_card.keys())
            if isinstance(raw_card, dict)
            else ["everything"]
        )
        if missing_keys:
            raise ExportError(f"{path}: not a card of ours, it lacks {', '.join(missing_keys)}")
        try:
            return cls.model_validate(raw_card)
        except ValidationError as error:
            raise ExportError(
                f"{path}: not a card of ours: {describe_first_error(error)}"
            ) from error


class PortableCard(Card):
    """The card of an export in a format of others."""

    width: Positive
    """Width of the features."""
    evaluations: dict[str, dict[str, float]] = {}
    """Figures of the evaluations that lay beside the export, by task."""


def _describe_wrong_format(value: object) -> str:
    if isinstance(value, str) and _NUMBERED_FORMAT_PATTERN.fullmatch(value):
        return f"the card has format {value}, newer than {CARD_FORMAT}: update vssl-dist to read it"
    shown_value = printable(json.dumps(value)[:60])
    return f"not a card of ours: format: {shown_value} is not {CARD_FORMAT}"
