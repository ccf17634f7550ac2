"""Each task leaves pictures beside its results, and a run's are announced to its tracker."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.support.exports import exported
from tests.support.photos import tiny_dataset
from vssl_dist.config import CollapseConfig, KnnConfig, LinearConfig, OodConfig, TaskConfig
from vssl_dist.evaluation.figures import plots
from vssl_dist.evaluation.run import evaluate, evaluate_baselines
from vssl_dist.jobs.evaluation_job import PendingEvaluation, evaluate_export

LINEAR = LinearConfig(epochs=2, lr=(0.01, 0.1), l2=(0.1, 1.0), shares=(0.5,), seeds=1, batch=50)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    tiny_dataset(folder, samples=60, classes=4)
    for name, first in (("val", 9_000), ("foreign", 12_000)):
        tiny_dataset(folder / name[0], samples=30, classes=4, split="val", first=first).rename(
            folder / name
        )
    return folder


def white(path: Path) -> float:
    """Share of a picture that is blank."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        grey = image.convert("L").tobytes()
    return grey.count(255) / len(grey)


def test_every_task_draws_what_it_found(tmp_path: Path, data: Path) -> None:
    path, _ = exported(tmp_path / "export", data)
    tasks: dict[str, TaskConfig] = {
        "knn": KnnConfig(k=(5, 20), temperature=(0.07, 1.0)),
        "linear": LINEAR,
        "ood": OodConfig(ood={"others": data / "foreign"}, bootstrap=0),
        "collapse": CollapseConfig(),
    }
    names = {
        "knn": ["grid"],
        "linear": ["choice", "reliability"],
        "ood": ["roc-others"],
        "collapse": ["spectrum"],
    }
    for name, task in tasks.items():
        found = evaluate(path, task)
        assert found["plots"] == [f"{name}-00000040-{plot}.png" for plot in names[name]]
        assert all(0.3 < white(path.with_name(plot)) < 0.99 for plot in found["plots"])
    found = evaluate_baselines(path, tasks["collapse"])
    assert found["plots"] == [
        "collapse-baselines-raw_pixels-spectrum.png",
        "collapse-baselines-random_network-spectrum.png",
    ]
    assert all(path.with_name(plot).exists() for plot in found["plots"])


def test_the_pictures_of_a_run_are_its_artifacts(tmp_path: Path, data: Path) -> None:
    path, _ = exported(tmp_path / "export", data)
    evaluate_export(
        tmp_path, PendingEvaluation(path, 40, KnnConfig(k=(5,), temperature=(0.1,))), "cpu", 1
    )
    spool = (tmp_path / "spool" / "eval-knn-00000040.jsonl").read_text()
    records = [json.loads(line) for line in spool.splitlines()]
    artifacts = [record["path"] for record in records if record["kind"] == "artifact"]
    assert artifacts == ["export/knn-00000040-grid.png"]
    assert (tmp_path / artifacts[0]).is_file()


def test_the_calibration_of_the_probes_is_in_the_results(tmp_path: Path, data: Path) -> None:
    path, _ = exported(tmp_path / "export", data)
    found = evaluate(path, LINEAR)
    for kind, prefix in (("sgd", ""), ("logistic", "logistic_")):
        result = found["results"][kind]
        assert 0 < result["ece"] < 1
        assert found["metrics"][f"linear/{prefix}ece"] == result["ece"]
        assert sum(result["reliability"]["predictions"]) == 30
        gaps = zip(*result["reliability"].values(), strict=True)
        assert sum(abs(c - a) * n for c, a, n in gaps) / 30 == pytest.approx(result["ece"])
    diverged = evaluate(path, LINEAR.model_copy(update={"lr": (1e300,)}))
    assert diverged["results"]["sgd"]["ece"] is None
    assert "linear/ece" not in diverged["metrics"]
    assert diverged["metrics"]["linear/top1"] == 0
    json.dumps(diverged, allow_nan=False)


def test_the_same_figure_is_the_same_file() -> None:
    def drawn() -> bytes:
        figure, (axes,) = plots.make_empty_figure("two lines")
        plots.draw_lines(
            axes,
            {"a": ([1, 2], [3, 4]), "b": ([1, 2], [4, 3])},
            x_label="x",
            y_label="y",
            log_x=True,
        )
        return plots.render_png(figure)

    assert drawn() == drawn()
