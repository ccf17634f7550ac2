"""The one-class table against sums done by hand, and the picture that goes with it."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vssl_dist.evaluation.figures.plots import render_png
from vssl_dist.evaluation.one_class_table import (
    OTHER_CLASSES_SPLIT,
    ClassResult,
    draw_auroc_bars,
    markdown_table,
    mean_auroc,
    mean_auroc_by_network,
)


def found(**auroc: float) -> dict[str, Any]:
    """Results of task ``ood`` as far as they matter here."""
    return {
        OTHER_CLASSES_SPLIT: {
            score: {"auroc": value, "aupr": 0.0} for score, value in auroc.items()
        }
    }


def trained(name: str, baselines: dict[str, Any] | None = None, **auroc: float) -> ClassResult:
    return ClassResult(name, {"results": found(**auroc)}, baselines or {})


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_mean_is_over_classes_and_only_of_scores_that_all_have() -> None:
    rows = [{"knn": 0.2, "s1": 1.0}, {"s1": 0.5, "knn": 0.4, "s2": 0.3}, {"knn": 0.9, "s1": 0.0}]
    assert mean_auroc(rows) == pytest.approx({"knn": np.mean([0.2, 0.4, 0.9]), "s1": 0.5})


def test_the_table_has_a_row_per_class_and_the_mean() -> None:
    classes = [trained("cat", knn=0.5, s1=0.75), trained("sea_lion", knn=0.9, s2=0.1)]
    lines = markdown_table("vje", classes, "where from").splitlines()
    rows = {row[0]: row[1:] for line in lines if line.startswith("|") for row in [cells(line)]}
    assert rows["class"] == ["knn", "s1", "s2"]
    assert rows["cat"] == ["50.0", "75.0", ""]
    assert rows["sea lion"] == ["90.0", "", "10.0"]
    assert rows["mean"] == ["70.0", "", ""]
    assert rows["features"] == ["knn"]
    assert rows["vje"] == ["70.0"]
    assert lines[-1] == "where from"


def test_a_class_of_any_name_is_one_row() -> None:
    table = markdown_table("vje", [trained("a|b\nc", knn=0.5)], "")
    assert "| a\\|b c | 50.0 |" in table.splitlines()


def test_baselines_come_first_and_only_where_every_class_has_them() -> None:
    both = {"raw_pixels": found(knn=0.6), "random_network": found(knn=0.7)}
    classes = [trained("cat", both, knn=0.8), trained("dog", both, knn=1.0)]
    assert list(mean_auroc_by_network("vje", classes)) == ["raw_pixels", "random_network", "vje"]
    assert mean_auroc_by_network("vje", classes)["random_network"] == pytest.approx({"knn": 0.7})
    assert list(mean_auroc_by_network("vje", [*classes, trained("cow", knn=0.5)])) == ["vje"]


def test_the_picture_has_a_bar_per_class_and_score() -> None:
    classes = [trained("cat", knn=0.5, s1=0.75), trained("dog", knn=0.9, s1=0.1)]
    figure = draw_auroc_bars("vje", classes)
    heights = sorted(round(bar.get_height(), 6) for bar in figure.axes[0].patches)
    assert heights == pytest.approx(sorted([50, 75, 90, 10, 70, 42.5]))
    assert Image.open(io.BytesIO(render_png(figure))).format == "PNG"
    assert render_png(draw_auroc_bars("vje", classes)) == render_png(
        draw_auroc_bars("vje", classes)
    )
