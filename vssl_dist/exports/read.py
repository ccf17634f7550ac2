"""Reading an export back: its card, its backbone, and the parts that lie beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors
from safetensors.torch import load_file
from torch import Tensor, nn

from vssl_dist.durable import sha256
from vssl_dist.errors import ConfigError, ExportError
from vssl_dist.exports.card import Card
from vssl_dist.exports.write import (
    HEAD,
    ONLINE,
)
from vssl_dist.models.backbones import build_backbone, check_name
from vssl_dist.models.linear_probe import Probe
from vssl_dist.run_folder import card_of, part_of
from vssl_dist.text import printable

__all__ = [
    "check_shapes",
    "load_beside",
    "load_export",
    "load_online",
    "read_card",
    "read_card_file",
]


def load_export(path: Path) -> tuple[nn.Module, Card]:
    """Open an exported backbone by its weights and the card beside them.

    Args:
        path: The ``.safetensors`` file; the card is the ``.json`` file of the same name.

    Returns:
        The backbone in eval mode on the CPU, ``(B, 3, H, W)`` to ``(B, D)``, and the card.

    Raises:
        ExportError: One line: a file is missing, is none of ours, or is damaged.
    """
    card = read_card(path)
    try:
        same = sha256(path) == card.sha256
        weights = load_file(path)
    except OSError as error:
        raise ExportError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (safetensors.SafetensorError, KeyError) as error:  # a key: of an unknown type
        raise ExportError(f"{path}: damaged, or not safetensors ({error})") from error
    if not same:
        raise ExportError(f"{path}: its bytes are not those its card was written for; export again")
    try:
        backbone, _ = build_backbone(card.backbone, card.image_size)
    except ConfigError as error:
        raise ExportError(f"{card_of(path)}: {error}") from error
    check_shapes(path, weights, backbone.state_dict(), card.backbone)
    backbone.load_state_dict(weights)
    return backbone.eval(), card


def check_shapes(
    path: Path, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], name: str
) -> None:
    """Refuse tensors that are not those of the network that the card names.

    Args:
        path: Where ``given`` was read.
        given: What the file holds.
        wanted: What a network of that name holds.
        name: Of that network.

    Raises:
        ExportError: A tensor is missing, foreign, or of another shape.
    """
    shapes = [{key: tensor.shape for key, tensor in each.items()} for each in (given, wanted)]
    wrong = sorted(k for k in shapes[0] | shapes[1] if shapes[0].get(k) != shapes[1].get(k))
    if wrong:
        raise ExportError(
            f"{path}: its weights are not those of {name} as the card says "
            f"({len(wrong)} tensors differ, such as {wrong[0]})"
        )


def read_card(path: Path) -> Card:
    """Read the card of an export and check it as a whole.

    Raises:
        ExportError: One line: there is no export or card, or it is none of ours.
    """
    if not path.is_file():
        raise ExportError(f"{path}: there is no such export")
    if path.name.startswith((f"{HEAD}-", f"{ONLINE}-")):
        raise ExportError(f"{path}: is no backbone; name the backbone-STEP file beside it")
    place = card_of(path)
    try:
        return read_card_file(place)
    except FileNotFoundError as error:
        raise ExportError(f"{path}: its card {place.name} is missing; export again") from error
    except OSError as error:
        raise ExportError(f"{place}: the card cannot be read ({error.strerror})") from error


def read_card_file(place: Path) -> Card:
    """Read a card, of a backbone that can be built.

    Raises:
        ExportError: One line with the file and what is wrong with it.
        OSError: It cannot be read.
    """
    card = Card.read(place)
    try:
        check_name(card.backbone)
    except ConfigError as error:
        raise ExportError(f"{place}: {error}") from error
    return card


def load_beside(path: Path, part: str) -> dict[str, Tensor] | None:
    """The tensors of another part of an export.

    Args:
        path: The backbone's ``.safetensors`` file.
        part: Such as ``"head"``.

    Returns:
        None if the card names no such part: the run has none, or is from before it was exported.

    Raises:
        ExportError: One line: it is missing, damaged, or not what the card was written for.
    """
    digest = read_card(path).parts.get(part)
    if digest is None:
        return None
    place = part_of(path, part)
    try:
        if not place.is_file():
            raise OSError("no such file")
        tensors = load_file(place)
    except (OSError, safetensors.SafetensorError, KeyError) as error:
        raise ExportError(f"{place}: missing or damaged ({error}); export again") from error
    if sha256(place) != digest:
        raise ExportError(
            f"{place}: its bytes are not those its card was written for; export again"
        )
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise ExportError(f"{place}: is damaged, not all of it is finite; use an earlier export")
    return tensors


def load_online(path: Path) -> Probe | None:
    """The online probe of an export, as it was at that step.

    Args:
        path: The backbone's ``.safetensors`` file.

    Returns:
        None if the export's card names none.

    Raises:
        ExportError: One line: it is missing, damaged, or not what the card says.
    """
    tensors = load_beside(path, ONLINE)
    if tensors is None:
        return None
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    floats = all(tensor.is_floating_point() for tensor in tensors.values())
    match shapes:
        case {"weight": (_, classes), "bias": (same,)} if (
            floats and classes == same and len(shapes) == 2
        ):
            return Probe(**tensors)
    raise ExportError(f"{part_of(path, ONLINE)}: holds no probe but {_listed(shapes)}")


def _listed(shapes: dict[str, tuple[int, ...]]) -> str:
    few = (f"{name[:60]} {shape}" for name, shape in sorted(shapes.items())[:3])
    return printable(", ".join(few) or "nothing")
