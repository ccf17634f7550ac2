"""``preview.py`` writes the sheet of a config, or says in one line why it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from data_prep.preview import main
from tests.support.damage import stalled
from tests.support.photos import tiny_dataset

CONFIG = """\
method: {{name: byol, backbone: resnet10_c16}}
data: {{train: {folder}, image_size: 32, views: [cifar, cifar_byol_2], streams: 4, threads: 1}}
optim: {{base_lr: 0.1, global_batch: 16}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preview")
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.format(folder=tiny_dataset(folder, samples=32)))
    return path


def test_a_preview_is_a_picture_with_a_row_per_image(config: Path, tmp_path: Path) -> None:
    sizes = []
    for rows in ("2", "3"):
        out = tmp_path / "deep" / f"{rows}.png"
        assert main([str(config), "--out", str(out), "--rows", rows]) == 0
        with Image.open(out) as sheet:
            assert sheet.format == "PNG"
            sizes.append(sheet.size)
    assert sizes[0][0] == sizes[1][0]
    assert sizes[0][1] < sizes[1][1]


def test_overrides_change_what_is_shown(config: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one.png", tmp_path / "other.png"
    assert main([str(config), "--out", str(one), "--rows", "2"]) == 0
    override = "data.views=[{recipe: cifar, solarize: 1, count: 2}]"
    assert main([str(config), "data.backend=reference", override, "--out", str(other)]) == 0
    assert one.read_bytes() != other.read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.train={tmp}/absent"], "no such folder"),
        (["data.views=[cifr, cifar]"], "'cifr' is no recipe"),
        (["data.imagesize=3"], "did you mean 'image_size'"),
        (["data.views=[byol_1, byol_1]", "data.image_size=4"], "reaches 6 pixels"),
    ],
)
def test_what_cannot_be_shown_is_one_line_and_leaves_no_file(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    overrides = [word.replace("{tmp}", str(tmp_path)) for word in words]
    assert main([str(config), *overrides, "--out", str(tmp_path / "no.png")]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert message in output.err
    assert output.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_line(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file" / "sheet.png"):
        assert main([str(config), "--out", str(out)]) == 2
        output = capsys.readouterr().err
        assert output.startswith("error: ")
        assert output.count("\n") == 1
    assert main([str(config.parent / "other.yaml"), "--out", str(tmp_path / "a.png")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_storage_that_stalls_is_one_line_that_names_the_file(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with stalled(".tar", "read"):
        assert main([str(config), "data.timeout_s=0.4", "--out", str(tmp_path / "a.png")]) == 2
    output = capsys.readouterr().err
    assert output.startswith("error: preview.py waits for data: ")
    assert ".tar: storage has not answered" in output
    assert output.count("\n") == 1
