"""Names are text, whatever signs are in them: in pictures, tables and model cards."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from huggingface_hub import ModelCard
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from tests.support.cards import unchecked_card
from tests.support.exports import NORMALISE
from tests.support.heads import SMALL, exported_branch
from tests.support.photos import three_splits
from tests.support.shards import edit_manifest
from vssl_dist.config import UncertaintyConfig
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.evaluation.figures import plots
from vssl_dist.evaluation.figures.contact_sheet import draw_contact_sheet
from vssl_dist.evaluation.figures.plots import escape_mathtext, render_png
from vssl_dist.evaluation.one_class_table import (
    OTHER_CLASSES_SPLIT,
    ClassResult,
    draw_auroc_bars,
    markdown_table,
)
from vssl_dist.evaluation.run import evaluate
from vssl_dist.exports.model_card import format_model_card
from vssl_dist.preview.page import Tile, draw_page

NAMES = [
    r"a$\frac{$", "$x$", "x\x1b[31m", "<script>", "a\nb", "\udcff", "\u732b", "\U0001f600",
    r"\$5", "a_b^c", "%", "_hidden",
]  # fmt: skip


def drawn(figure: Figure) -> list[str]:
    """What matplotlib draws: none of it is a formula."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert render_png(figure).startswith(b"\x89PNG")
    texts = []
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        clean, formula = text._preprocess_math(text.get_text())  # type: ignore[attr-defined]
        assert not formula
        assert all(line.isprintable() for line in clean.split("\n"))
        texts.append(clean)
    return texts


@pytest.mark.parametrize("name", NAMES)
def test_names_are_drawn_as_they_stand(name: str) -> None:
    figure, (axes,) = plots.make_empty_figure(name)
    plots.draw_lines(axes, {name: ([1, 2], [3, 4]), "b": ([1], [2])}, x_label=name, y_label=name)
    shown = escape_mathtext(name).replace("\\$", "$")
    assert shown in drawn(figure)
    scores = {OTHER_CLASSES_SPLIT: {"knn": {"auroc": 0.5}, name: {"auroc": 0.25}}}
    assert shown in drawn(draw_auroc_bars(name, [ClassResult(name, {"results": scores})]))


def test_the_classes_of_a_sheet_may_be_called_anything_and_end_no_evaluation(
    tmp_path: Path,
) -> None:
    data = three_splits(tmp_path / "data", foreign=16)
    classes = NAMES[:6]
    for part in ("train", "val"):
        edit_manifest(data / part, classes=classes)
    path, _ = exported_branch(tmp_path / "export", data, SMALL["vje"])
    task = UncertaintyConfig(k=3, max_corrupted=2, shown=6, batch=50)
    found = evaluate(path, task)
    assert any("shown" in name or "sheet" in name for name in found["plots"]) or found["plots"]
    figure = draw_contact_sheet(
        Dataset.open(data / "val"), {r"a$\frac{$": range(6)}, lambda row: "$\\frac{"
    )
    texts = drawn(figure)
    assert any(text.startswith(r"a$\frac{$") for text in texts)
    assert any(text.startswith(r"x\x1b[31m") for text in texts)


def test_a_page_of_augmentations_draws_any_name_in_one_line() -> None:
    image = Image.new("RGB", (32, 32))
    for name in [*NAMES, "a" * 100_000]:
        tile = Tile(image, [name, name], None, [])
        assert draw_page((name, name), [(name, name)], [[tile]]).mode == "RGB"


def test_a_one_class_table_has_a_row_for_any_name() -> None:
    for name in NAMES:
        table = markdown_table(
            "vje",
            [ClassResult(name, {"results": {OTHER_CLASSES_SPLIT: {name: {"auroc": 0.5}}}})],
            "",
        )
        assert "<script" not in table
        assert all(line.isprintable() for line in table.splitlines())


HOSTILE = [
    "x\n# INJECTED", "x\n\n---\nlicense: evil\n---", "<script>alert(1)</script>", "&lt;b&gt;",
    "<b>", "[here](https://evil.example)", "![x](https://evil.example/p.png)", "https://evil.example",
    "www.evil.example", "*loud*", "_loud_", "~~gone~~", "`code`", "$x$", "a | b", "# head",
    "1. item", "- item", "\x1b[31m", "\u2028x", "```\n# INJECTED\n```",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_no_string_of_a_card_is_more_than_text_in_the_model_card(text: str) -> None:
    card = unchecked_card(
        run=text, method=text, backbone=text, branch=text, normalise=NORMALISE, sha256=text,
        licence=text, fingerprint=text, versions={text: text}, metrics={text: 1.0},
        evaluations={text: {text: 2.0}}, config={"licence": text, text: [text, {text: text}]},
    )  # fmt: skip
    whole = ModelCard(format_model_card(card, "import timm", "timm"))
    body, _, config = whole.text.partition("## Configuration")
    fence = re.findall("^(`{3,})yaml$", config, re.M)
    assert len(fence) == 1
    assert config.rstrip().endswith(f"\n{fence[0]}")
    assert config.count(fence[0]) == 2, "nothing in it ends the block"
    lines = body.splitlines()
    heads = [line for line in lines if line.startswith("#")]
    assert len(heads) == 2
    assert heads[1] == "## Figures"
    assert not re.search(r"<|https?://|www\.e|(?<!\\)\]\(|(?<!\\)[*$~]", body)
    assert len(lines) == len(re.split("\r|\n", body)) - body.endswith("\n")
    assert all(line.isprintable() for line in lines)
    data: dict[str, Any] = vars(whole.data)
    assert data["tags"] == ["vssl-dist", text]


def test_matplotlib_keeps_its_settings() -> None:
    before = matplotlib.rcParams.copy()
    render_png(plots.make_empty_figure("a$b")[0])
    assert matplotlib.rcParams == before
