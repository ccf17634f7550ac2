"""Reading an export back: its card, its backbone, and the parts that lie beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors
from safetensors.torch import load_file
from torch import Tensor, nn

from vssl_dist.durable import file_sha256
from vssl_dist.errors import ConfigError, ExportError
from vssl_dist.exports.card import Card
from vssl_dist.exports.write import HEAD_PART, ONLINE_PART
from vssl_dist.models.backbones import build_backbone, check_name
from vssl_dist.models.linear_probe import Probe
from vssl_dist.run_folder import card_path_of, part_path_of
from vssl_dist.text import printable

__all__ = [
    "check_tensor_shapes",
    "load_export",
    "load_export_part",
    "load_online_probe",
    "read_buildable_card",
    "read_card",
]


def load_export(export_path: Path) -> tuple[nn.Module, Card]:
    """Open an exported backbone by its weights and the card beside them.

    Args:
        export_path: The ``.safetensors`` file; the card is the ``.json`` file of the same name.

    Returns:
        The backbone in eval mode on the CPU, ``(B, 3, H, W)`` to ``(B, D)``, and the card.

    Raises:
        ExportError: One line: a file is missing, is none of ours, or is damaged.
    """
    card = read_card(export_path)
    try:
        is_intact = file_sha256(export_path) == card.sha256
        weights = load_file(export_path)
    except OSError as error:
        raise ExportError(f"{export_path}: cannot be read ({error.strerror or error})") from error
    except (safetensors.SafetensorError, KeyError) as error:  # a key: of an unknown type
        raise ExportError(f"{export_path}: damaged, or not safetensors ({error})") from error
    if not is_intact:
        raise ExportError(
            f"{export_path}: its bytes are not those its card was written for; export again"
        )
    try:
        backbone, _ = build_backbone(card.backbone, card.image_size)
    except ConfigError as error:
        raise ExportError(f"{card_path_of(export_path)}: {error}") from error
    check_tensor_shapes(export_path, weights, backbone.state_dict(), card.backbone)
    backbone.load_state_dict(weights)
    return backbone.eval(), card


def check_tensor_shapes(
    path: Path,
    tensors: Mapping[str, Tensor],
    expected_tensors: Mapping[str, Tensor],
    network_name: str,
) -> None:
    """Refuse tensors that are not those of the network that the card names.

    Args:
        path: Where ``tensors`` were read.
        tensors: What the file holds.
        expected_tensors: What a network of that name holds.
        network_name: Name of that network.

    Raises:
        ExportError: A tensor is missing, foreign, or of another shape.
    """
    shapes_of_both = [
        {key: tensor.shape for key, tensor in weights.items()}
        for weights in (tensors, expected_tensors)
    ]
    differing_names = sorted(
        tensor_name
        for tensor_name in shapes_of_both[0] | shapes_of_both[1]
        if shapes_of_both[0].get(tensor_name) != shapes_of_both[1].get(tensor_name)
    )
    if differing_names:
        raise ExportError(
            f"{path}: its weights are not those of {network_name} as the card says "
            f"({len(differing_names)} tensors differ, such as {differing_names[0]})"
        )


def read_card(export_path: Path) -> Card:
    """Read the card of an export and check it as a whole.

    Raises:
        ExportError: One line: there is no export or card, or it is none of ours.
    """
    if not export_path.is_file():
        raise ExportError(f"{export_path}: there is no such export")
    if export_path.name.startswith((f"{HEAD_PART}-", f"{ONLINE_PART}-")):
        raise ExportError(f"{export_path}: is no backbone; name the backbone-STEP file beside it")
    card_path = card_path_of(export_path)
    try:
        return read_buildable_card(card_path)
    except FileNotFoundError as error:
        raise ExportError(
            f"{export_path}: its card {card_path.name} is missing; export again"
        ) from error
    except OSError as error:
        raise ExportError(f"{card_path}: the card cannot be read ({error.strerror})") from error


def read_buildable_card(card_path: Path) -> Card:
    """Read a card, of a backbone that can be built.

    Raises:
        ExportError: One line with the file and what is wrong with it.
        OSError: It cannot be read.
    """
    card = Card.read(card_path)
    try:
        check_name(card.backbone)
    except ConfigError as error:
        raise ExportError(f"{card_path}: {error}") from error
    return card


def load_export_part(export_path: Path, part_name: str) -> dict[str, Tensor] | None:
    """Load the tensors of another part of an export.

    Args:
        export_path: The backbone's ``.safetensors`` file.
        part_name: Such as ``"head"``.

    Returns:
        None if the card names no such part: the run has none, or is from before it was exported.

    Raises:
        ExportError: One line: it is missing, damaged, or not what the card was written for.
    """
    part_digest = read_card(export_path).parts.get(part_name)
    if part_digest is None:
        return None
    part_path = part_path_of(export_path, part_name)
    try:
        if not part_path.is_file():
            raise OSError("no such file")
        tensors = load_file(part_path)
    except (OSError, safetensors.SafetensorError, KeyError) as error:
        raise ExportError(f"{part_path}: missing or damaged ({error}); export again") from error
    if file_sha256(part_path) != part_digest:
        raise ExportError(
            f"{part_path}: its bytes are not those its card was written for; export again"
        )
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise ExportError(
            f"{part_path}: is damaged, not all of it is finite; use an earlier export"
        )
    return tensors


def load_online_probe(export_path: Path) -> Probe | None:
    """Load the online probe of an export, as it was at that step.

    Args:
        export_path: The backbone's ``.safetensors`` file.

    Returns:
        None if the export's card names none.

    Raises:
        ExportError: One line: it is missing, damaged, or not what the card says.
    """
    tensors = load_export_part(export_path, ONLINE_PART)
    if tensors is None:
        return None
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    all_floating_point = all(tensor.is_floating_point() for tensor in tensors.values())
    match shapes:
        case {"weight": (_, classes), "bias": (bias_classes,)} if (
            all_floating_point and classes == bias_classes and len(shapes) == 2
        ):
            return Probe(**tensors)
    raise ExportError(
        f"{part_path_of(export_path, ONLINE_PART)}: holds no probe but {_list_shapes(shapes)}"
    )


def _list_shapes(shapes: dict[str, tuple[int, ...]]) -> str:
    examples = (f"{name[:60]} {shape}" for name, shape in sorted(shapes.items())[:3])
    return printable(", ".join(examples) or "nothing")
