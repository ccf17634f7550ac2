"""An exported backbone in the formats of others, each opened again and compared before it counts.

- ``torch_export``: a ``.pt2`` program for ``torch.export.load``.
- ``onnx``: an ONNX model (needs the extra ``onnx``).
- ``torchvision``: a folder for a hub whose model card holds the lines that open it with torchvision
  alone, stem for small images included.
- ``timm``: a folder that ``timm.create_model("local-dir:FOLDER")`` opens, and from the Hugging Face
  hub, to which it may be uploaded as it is, ``timm.create_model("hf-hub:NAME")``.

All of them take normalised images and hold the export's card, normalisation included, with the
figures of the evaluations that lie beside it; the folders also say them in a ``README.md``, the
hub's model card.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vssl_dist.durable import refuse_link_out_of_folder, sync_to_disk
from vssl_dist.errors import ExportError
from vssl_dist.exports.card import PortableCard
from vssl_dist.exports.model_card import format_model_card, read_evaluation_figures
from vssl_dist.exports.read import load_export, read_buildable_card
from vssl_dist.models.backbones import SMALL_IMAGE, is_torchvision
from vssl_dist.models.names import NARROW, TIMM
from vssl_dist.text import printable
from vssl_dist.vision import timm, torchvision

_MAX_RELATIVE_DIFFERENCE = 1e-4
_EXAMPLE_BATCH_SIZE = 3
_CARD_FILE_NAME, _WEIGHTS_FILE_NAME = "card.json", "model.safetensors"
_FORMAT_FILE_NAMES = {_CARD_FILE_NAME, _WEIGHTS_FILE_NAME, "README.md", "config.json"}
"""Files of the formats that are folders."""
_TORCHVISION_USAGE = """import torch, torchvision
from safetensors.torch import load_file

backbone = torchvision.models.{name}()
backbone.fc = torch.nn.Identity()
{stem}backbone.load_state_dict(load_file("model.safetensors"))
features = backbone.eval()(images)  # (B, 3, H, W) to (B, D)"""
_SMALL_IMAGE_USAGE = """\
backbone.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)  # for small images
backbone.maxpool = torch.nn.Identity()
"""
_TIMM_USAGE = """import timm

backbone = timm.create_model("local-dir:FOLDER", pretrained=True)  # or "hf-hub:NAME"
features = backbone.eval()(images)  # (B, 3, H, W) to (B, D)"""


def convert_export(export: Path, format_name: str, folder: Path | None = None) -> Path:
    """Write an export in another format; the features are the same, or nothing is written.

    Args:
        export: The ``.safetensors`` file.
        format_name: One of `EXPORT_FORMATS`.
        folder: Where to; beside the export if None.

    Returns:
        The file or folder ``backbone-STEP.pt2``, ``.onnx``, ``-torchvision`` or ``-timm``.

    Raises:
        ExportError: One line: the export is damaged, the format cannot hold it, something is not
            installed, the features differ, or what is there already is not ours to replace.
        OSError: It cannot be written.
    """
    backbone, own_card = load_export(export)
    with torch.inference_mode():
        width = backbone(_example_images(own_card.image_size)).shape[1]
    card = PortableCard.model_validate(
        own_card.as_json()
        | {"width": width, "evaluations": read_evaluation_figures(export, own_card)}
    )
    write_format, suffix = EXPORT_FORMATS[format_name]
    converted_path = (folder or export.parent) / f"{export.stem}{suffix}"
    _check_replaceable(converted_path)
    converted_path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(converted_path.parent, os.W_OK | os.X_OK):
        raise ExportError(
            f"{converted_path.parent}: cannot be written to: name another folder, with --out"
        )
    partial_path = converted_path.with_name(f".tmp-{uuid4().hex[:12]}{suffix}")
    try:
        reopened = write_format(backbone, card, partial_path)
        _check_same_features(backbone, reopened, card, f"{converted_path.name} as {format_name}")
        _replace_converted(partial_path, converted_path)
    finally:
        _remove_partial(partial_path)
    return converted_path


def _check_same_features(
    backbone: nn.Module,
    reopened_network: Callable[[Tensor], Tensor],
    card: PortableCard,
    converted_name: str,
) -> None:
    """Refuse a network whose features differ from those of the export."""
    generator = torch.Generator().manual_seed(1)
    # Another batch size than the one that was traced, lest that be a constant of the program.
    images = torch.randn(
        _EXAMPLE_BATCH_SIZE + 2, 3, card.image_size, card.image_size, generator=generator
    )
    with torch.inference_mode():
        expected_features, features = backbone(images), reopened_network(images)
    relative_difference = float(
        (features - expected_features).abs().max() / expected_features.abs().max().clamp_min(1e-12)
    )
    if (
        features.shape != expected_features.shape
        or not relative_difference <= _MAX_RELATIVE_DIFFERENCE
    ):
        raise ExportError(
            f"{converted_name}: its features differ by {relative_difference:.1e} of the "
            "largest: not written"
        )


def _example_images(side: int) -> Tensor:
    return torch.zeros(_EXAMPLE_BATCH_SIZE, 3, side, side)


def _trace_program(backbone: nn.Module, card: PortableCard) -> torch.export.ExportedProgram:
    batch_dimension = torch.export.Dim("batch", min=1)
    return torch.export.export(
        backbone, (_example_images(card.image_size),), dynamic_shapes=({0: batch_dimension},)
    )


def _write_torch_export(
    backbone: nn.Module, card: PortableCard, path: Path
) -> Callable[[Tensor], Tensor]:
    program = _trace_program(backbone, card)
    torch.export.save(program, path, extra_files={_CARD_FILE_NAME: json.dumps(card.as_json())})
    loaded_program: Callable[[Tensor], Tensor] = torch.export.load(path).module()
    return loaded_program


def _write_onnx(backbone: nn.Module, card: PortableCard, path: Path) -> Callable[[Tensor], Tensor]:
    missing_packages = [
        package for package in ("onnx", "onnxscript", "onnxruntime") if find_spec(package) is None
    ]
    if missing_packages:
        raise ExportError(
            f"onnx: {', '.join(missing_packages)} not installed: pip install '.[onnx]'"
        )
    import onnx
    import onnxruntime

    program = torch.onnx.export(
        backbone,
        (_example_images(card.image_size),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        input_names=["images"],
        output_names=["features"],
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, {_CARD_FILE_NAME: json.dumps(card.as_json())})
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run_session(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])

    return run_session


def _write_torchvision_folder(
    backbone: nn.Module, card: PortableCard, path: Path
) -> Callable[[Tensor], Tensor]:
    name, is_small = card.backbone, card.image_size <= SMALL_IMAGE
    if not is_torchvision(name):
        raise ExportError(f"torchvision: it has no {name}")
    usage = _TORCHVISION_USAGE.format(name=name, stem=_SMALL_IMAGE_USAGE if is_small else "")
    _write_hub_folder(path, backbone, card, format_model_card(card, usage, "pytorch"))
    reopened: nn.Module = torchvision().models.get_model(name, weights=None)
    reopened.fc = nn.Identity()
    if is_small:
        reopened.conv1, reopened.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    reopened.load_state_dict(load_file(path / _WEIGHTS_FILE_NAME))
    return reopened.eval()


def _write_hub_folder(
    path: Path, backbone: nn.Module, card: PortableCard, readme_text: str
) -> None:
    path.mkdir()
    save_file(backbone.state_dict(), path / _WEIGHTS_FILE_NAME)
    (path / _CARD_FILE_NAME).write_text(json.dumps(card.as_json(), indent=1))
    (path / "README.md").write_text(readme_text)


def _write_timm_folder(
    backbone: nn.Module, card: PortableCard, path: Path
) -> Callable[[Tensor], Tensor]:
    name, image_side = card.backbone.removeprefix(TIMM), card.image_size
    pretrained_cfg: dict[str, Any] | None = getattr(backbone, "pretrained_cfg", None)
    layer_names = pretrained_cfg or {"first_conv": "conv1", "classifier": "fc"}
    if pretrained_cfg is None and (
        name in NARROW or image_side <= SMALL_IMAGE or not timm().is_model(name)
    ):
        raise ExportError(f"timm: it has no {card.backbone} for {image_side}-pixel images")
    has_fixed_size = bool(layer_names.get("fixed_input_size"))
    timm_config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": card.width,
        "model_args": {"img_size": image_side} if has_fixed_size else {},
        "pretrained_cfg": {
            "tag": f"{card.run}-{card.step}",
            "input_size": [3, image_side, image_side],
            "fixed_input_size": has_fixed_size,
            "num_classes": 0,
            **card.normalise.model_dump(mode="json"),
            "first_conv": layer_names.get("first_conv"),
            "classifier": layer_names.get("classifier"),
        },
    }
    _write_hub_folder(path, backbone, card, format_model_card(card, _TIMM_USAGE, "timm"))
    (path / "config.json").write_text(json.dumps(timm_config, indent=1))
    loaded_network: nn.Module = timm().create_model(f"local-dir:{path}", pretrained=True)
    return loaded_network.eval()


def _check_replaceable(path: Path) -> None:
    """See that nothing is there, or what `convert_export` once put there.

    Raises:
        ExportError: Something else is, or more.
        OSError: A link out of the folder is.
    """
    refuse_link_out_of_folder(path)
    if path.is_symlink() or (path.exists() and not path.is_dir() and not path.is_file()):
        raise ExportError(f"{path}: is there already and no export: move it away")
    if not path.is_dir():
        return
    foreign_files = sorted(file.name for file in path.iterdir() if not _is_own_file(file))
    try:
        read_buildable_card(path / _CARD_FILE_NAME)
    except (OSError, ExportError):
        foreign_files = foreign_files or [f"no {_CARD_FILE_NAME} of an export"]
    if foreign_files:
        raise ExportError(
            f"{path}: holds {printable(foreign_files[0])}, which would be lost: move it away"
        )


def _is_own_file(file: Path) -> bool:
    return file.name in _FORMAT_FILE_NAMES and file.is_file() and not file.is_symlink()


def _replace_converted(partial_path: Path, path: Path) -> None:
    for file in (
        [*partial_path.iterdir(), partial_path] if partial_path.is_dir() else [partial_path]
    ):
        sync_to_disk(file)
    if path.is_dir():
        _check_replaceable(path)
        for file in sorted(path.iterdir(), key=lambda file: file.name == _CARD_FILE_NAME):
            file.unlink()
        path.rmdir()
    partial_path.rename(path)
    sync_to_disk(path.parent)


def _remove_partial(partial_path: Path) -> None:
    """Delete what this process wrote, under a random name."""
    if partial_path.is_dir():
        shutil.rmtree(partial_path)
    else:
        partial_path.unlink(missing_ok=True)


WriteFormat = Callable[[nn.Module, PortableCard, Path], Callable[[Tensor], Tensor]]
"""Writes a backbone and its card to a path, and opens what it wrote."""
EXPORT_FORMATS: dict[str, tuple[WriteFormat, str]] = {
    "torch_export": (_write_torch_export, ".pt2"),
    "onnx": (_write_onnx, ".onnx"),
    "torchvision": (_write_torchvision_folder, "-torchvision"),
    "timm": (_write_timm_folder, "-timm"),
}
