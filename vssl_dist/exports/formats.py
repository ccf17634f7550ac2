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

from vssl_dist.durable import refuse_link_out_of_folder, sync
from vssl_dist.errors import ExportError
from vssl_dist.exports.card import PortableCard
from vssl_dist.exports.model_card import evaluation_figures, model_card
from vssl_dist.exports.read import load_export, read_card_file
from vssl_dist.models.backbones import SMALL_IMAGE, is_torchvision
from vssl_dist.models.names import NARROW, TIMM
from vssl_dist.text import printable
from vssl_dist.vision import torchvision

_TOLERANCE = 1e-4
_BATCH = 3
_CARD, _WEIGHTS = "card.json", "model.safetensors"
_FILES = {_CARD, _WEIGHTS, "README.md", "config.json"}
"""Files of the formats that are folders."""
_BY_TORCHVISION = """import torch, torchvision
from safetensors.torch import load_file

backbone = torchvision.models.{name}()
backbone.fc = torch.nn.Identity()
{stem}backbone.load_state_dict(load_file("model.safetensors"))
features = backbone.eval()(images)  # (B, 3, H, W) to (B, D)"""
_STEM = """backbone.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)  # for small images
backbone.maxpool = torch.nn.Identity()
"""
_BY_TIMM = """import timm

backbone = timm.create_model("local-dir:FOLDER", pretrained=True)  # or "hf-hub:NAME"
features = backbone.eval()(images)  # (B, 3, H, W) to (B, D)"""


def convert(export: Path, format_name: str, folder: Path | None = None) -> Path:
    """Write an export in another format; the features are the same, or nothing is written.

    Args:
        export: The ``.safetensors`` file.
        format_name: One of `FORMATS`.
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
        width = backbone(_example(own_card.image_size)).shape[1]
    card = PortableCard.model_validate(
        own_card.as_json() | {"width": width, "evaluations": evaluation_figures(export, own_card)}
    )
    write, suffix = FORMATS[format_name]
    path = (folder or export.parent) / f"{export.stem}{suffix}"
    _check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ExportError(f"{path.parent}: cannot be written to: name another folder, with --out")
    partial = path.with_name(f".tmp-{uuid4().hex[:12]}{suffix}")
    try:
        reopened = write(backbone, card, partial)
        _compare(backbone, reopened, card, f"{path.name} as {format_name}")
        _replace(partial, path)
    finally:
        _remove(partial)
    return path


def _compare(
    backbone: nn.Module, reopened: Callable[[Tensor], Tensor], card: PortableCard, name: str
) -> None:
    """Refuse a network whose features differ from those of the export."""
    random = torch.Generator().manual_seed(1)
    # Another batch size than the one that was traced, lest that be a constant of the program.
    images = torch.randn(_BATCH + 2, 3, card.image_size, card.image_size, generator=random)
    with torch.inference_mode():
        expected, features = backbone(images), reopened(images)
    error = float((features - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    if features.shape != expected.shape or not error <= _TOLERANCE:
        raise ExportError(f"{name}: its features differ by {error:.1e} of the largest: not written")


def _example(side: int) -> Tensor:
    return torch.zeros(_BATCH, 3, side, side)


def _program(backbone: nn.Module, card: PortableCard) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(backbone, (_example(card.image_size),), dynamic_shapes=({0: batch},))


def _torch_export(
    backbone: nn.Module, card: PortableCard, path: Path
) -> Callable[[Tensor], Tensor]:
    program = _program(backbone, card)
    torch.export.save(program, path, extra_files={_CARD: json.dumps(card.as_json())})
    loaded: Callable[[Tensor], Tensor] = torch.export.load(path).module()
    return loaded


def _onnx(backbone: nn.Module, card: PortableCard, path: Path) -> Callable[[Tensor], Tensor]:
    missing = [n for n in ("onnx", "onnxscript", "onnxruntime") if find_spec(n) is None]
    if missing:
        raise ExportError(f"onnx: {', '.join(missing)} not installed: pip install '.[onnx]'")
    import onnx
    import onnxruntime

    program = torch.onnx.export(
        backbone,
        (_example(card.image_size),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        input_names=["images"],
        output_names=["features"],
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, {_CARD: json.dumps(card.as_json())})
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])

    return run


def _torchvision(backbone: nn.Module, card: PortableCard, path: Path) -> Callable[[Tensor], Tensor]:
    name, is_small = card.backbone, card.image_size <= SMALL_IMAGE
    if not is_torchvision(name):
        raise ExportError(f"torchvision: it has no {name}")
    usage = _BY_TORCHVISION.format(name=name, stem=_STEM if is_small else "")
    _folder(path, backbone, card, model_card(card, usage, "pytorch"))
    reopened: nn.Module = torchvision().models.get_model(name, weights=None)
    reopened.fc = nn.Identity()
    if is_small:
        reopened.conv1, reopened.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    reopened.load_state_dict(load_file(path / _WEIGHTS))
    return reopened.eval()


def _folder(path: Path, backbone: nn.Module, card: PortableCard, text: str) -> None:
    path.mkdir()
    save_file(backbone.state_dict(), path / _WEIGHTS)
    (path / _CARD).write_text(json.dumps(card.as_json(), indent=1))
    (path / "README.md").write_text(text)


def _timm(backbone: nn.Module, card: PortableCard, path: Path) -> Callable[[Tensor], Tensor]:
    torchvision()  # timm imports it, and must find it open
    import timm

    name, side = card.backbone.removeprefix(TIMM), card.image_size
    pretrained_cfg: dict[str, Any] | None = getattr(backbone, "pretrained_cfg", None)
    layers = pretrained_cfg or {"first_conv": "conv1", "classifier": "fc"}
    if pretrained_cfg is None and (
        name in NARROW or side <= SMALL_IMAGE or not timm.is_model(name)
    ):
        raise ExportError(f"timm: it has no {card.backbone} for {side}-pixel images")
    has_fixed_size = bool(layers.get("fixed_input_size"))
    settings = {
        "architecture": name,
        "num_classes": 0,
        "num_features": card.width,
        "model_args": {"img_size": side} if has_fixed_size else {},
        "pretrained_cfg": {
            "tag": f"{card.run}-{card.step}",
            "input_size": [3, side, side],
            "fixed_input_size": has_fixed_size,
            "num_classes": 0,
            **card.normalise.model_dump(mode="json"),
            "first_conv": layers.get("first_conv"),
            "classifier": layers.get("classifier"),
        },
    }
    _folder(path, backbone, card, model_card(card, _BY_TIMM, "timm"))
    (path / "config.json").write_text(json.dumps(settings, indent=1))
    loaded: nn.Module = timm.create_model(f"local-dir:{path}", pretrained=True)
    return loaded.eval()


def _check_free(path: Path) -> None:
    """See that nothing is there, or what `convert` once put there.

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
        read_card_file(path / _CARD)
    except (OSError, ExportError):
        foreign_files = foreign_files or [f"no {_CARD} of an export"]
    if foreign_files:
        raise ExportError(
            f"{path}: holds {printable(foreign_files[0])}, which would be lost: move it away"
        )


def _is_own_file(file: Path) -> bool:
    return file.name in _FILES and file.is_file() and not file.is_symlink()


def _replace(partial: Path, path: Path) -> None:
    for file in [*partial.iterdir(), partial] if partial.is_dir() else [partial]:
        sync(file)
    if path.is_dir():
        _check_free(path)
        for file in sorted(path.iterdir(), key=lambda file: file.name == _CARD):
            file.unlink()
        path.rmdir()
    partial.rename(path)
    sync(path.parent)


def _remove(partial: Path) -> None:
    """Delete what this process wrote, under a random name."""
    if partial.is_dir():
        shutil.rmtree(partial)
    else:
        partial.unlink(missing_ok=True)


Write = Callable[[nn.Module, PortableCard, Path], Callable[[Tensor], Tensor]]
"""Writes a backbone and its card to a path, and opens what it wrote."""
FORMATS: dict[str, tuple[Write, str]] = {
    "torch_export": (_torch_export, ".pt2"),
    "onnx": (_onnx, ".onnx"),
    "torchvision": (_torchvision, "-torchvision"),
    "timm": (_timm, "-timm"),
}
