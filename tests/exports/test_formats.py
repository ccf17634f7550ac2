"""An export in other formats gives the same features, or is not written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.support.exports import change, exported
from vssl_dist.commands.export import main
from vssl_dist.errors import ExportError
from vssl_dist.exports import formats
from vssl_dist.exports.formats import convert_export
from vssl_dist.models.backbones import build_backbone
from vssl_dist.vision import torchvision


def lived_in(folder: Path, name: str, side: int) -> tuple[Path, nn.Module]:
    """An export of another backbone than those of tests on 32 pixels."""
    torch.manual_seed(0)
    backbone, _ = build_backbone(name, side)
    backbone.train()(torch.randn(8, 3, side, side))
    path, _ = exported(folder, folder)
    save_file(backbone.state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    change(path, backbone=name, image_size=side, sha256=digest)
    return path, backbone.eval()


def test_a_program_of_torch_export_gives_the_features_and_says_how_to_normalise(
    tmp_path: Path,
) -> None:
    path, backbone = exported(tmp_path / "export", tmp_path)
    made = convert_export(path, "torch_export", tmp_path / "out")
    assert made == tmp_path / "out" / "backbone-00000040.pt2"
    extra = {"card.json": ""}
    program = torch.export.load(made, extra_files=extra).module()
    assert json.loads(extra["card.json"])["normalise"]["mean"] == [0.5, 0.45, 0.4]
    for count in (1, 2, 7):
        images = torch.randn(count, 3, 32, 32)
        torch.testing.assert_close(program(images), backbone(images))


@pytest.mark.slow
def test_onnx_gives_the_features(tmp_path: Path) -> None:
    for module in ("onnx", "onnxscript"):
        pytest.importorskip(module, reason="pip install .[onnx]")
    runtime = pytest.importorskip("onnxruntime", reason="pip install .[onnx]")
    path, backbone = exported(tmp_path, tmp_path)
    session = runtime.InferenceSession(
        convert_export(path, "onnx"), providers=["CPUExecutionProvider"]
    )
    card = json.loads(session.get_modelmeta().custom_metadata_map["card.json"])
    assert (card["run"], card["step"]) == ("tiny", 40)
    for count in (1, 7):
        images = torch.randn(count, 3, 32, 32)
        (found,) = session.run(["features"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), backbone(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "side"), [("resnet18", 96), ("timm:resnet18", 64), ("vit_tiny_patch16_224", 64)]
)
def test_timm_opens_the_folder_with_the_same_features(tmp_path: Path, name: str, side: int) -> None:
    path, backbone = lived_in(tmp_path, name, side)
    folder = convert_export(path, "timm")
    torchvision()
    import timm

    opened = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, side, side)
    torch.testing.assert_close(opened(images), backbone(images))
    assert tuple(opened.pretrained_cfg["mean"]) == (0.5, 0.45, 0.4)
    assert tuple(opened.pretrained_cfg["input_size"]) == (3, side, side)
    assert convert_export(path, "timm") == folder, "written again over itself"
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize(("name", "side"), [("resnet18", 32), ("resnet18", 96)])
def test_the_lines_of_the_card_open_the_folder_in_torchvision_with_the_same_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, side: int
) -> None:
    path, backbone = lived_in(tmp_path, name, side)
    folder = convert_export(path, "torchvision")
    assert {file.name for file in folder.iterdir()} == {
        "README.md",
        "card.json",
        "model.safetensors",
    }
    text = (folder / "README.md").read_text()
    lines = text.partition("```python\n")[2].partition("\n```")[0]
    images = torch.randn(2, 3, side, side)
    torchvision()
    monkeypatch.chdir(folder)
    names = {"images": images}
    exec(lines, names)
    torch.testing.assert_close(names["features"], backbone(images))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("timm", "it has no resnet18_c16 for 32-pixel images"),
        ("torchvision", "it has no resnet18_c16"),
    ],
)
def test_what_a_library_does_not_know_is_refused_and_nothing_is_written(
    tmp_path: Path, kind: str, words: str
) -> None:
    path, _ = exported(tmp_path, tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ExportError, match=f"^{kind}: {words}$"):
        convert_export(path, kind)
    assert sorted(tmp_path.iterdir()) == before


def test_other_features_are_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = exported(tmp_path, tmp_path)
    before = sorted(tmp_path.iterdir())
    wrong = {
        "bent": lambda b, _card, file: file.write_text("x") and (lambda x: b(x) * 1.001),
        "wide": lambda b, _card, file: (
            file.write_text("x") and (lambda x: b(x).repeat(1, 2)[:, :1])
        ),
        "nan": lambda b, _card, file: file.write_text("x") and (lambda x: b(x) * torch.nan),
    }
    monkeypatch.setattr(formats, "EXPORT_FORMATS", {kind: (w, ".x") for kind, w in wrong.items()})
    for kind in wrong:
        with pytest.raises(ExportError, match="features differ"):
            convert_export(path, kind)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "caffe"], "--format caffe: not one of torch_export, onnx, torchvision, timm"),
        (["--format", "timm"], "no export/backbone-STEP.safetensors"),
    ],
)
def test_the_command_refuses_in_one_line(
    tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert words in said


def test_the_command_takes_the_newest_export_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported(tmp_path / "export", tmp_path)
    exported(tmp_path / "export", tmp_path, step=80)
    assert main([str(tmp_path), "--format", "torch_export"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "export" / "backbone-00000080.pt2")
