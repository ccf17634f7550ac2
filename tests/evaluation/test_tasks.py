"""Every task runs from an export and shards to a JSON file, alike by hand and beside a training."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from torch import nn

from tests.support.exports import by_hand, change, exported
from tests.support.photos import three_splits, tiny_dataset
from vssl_dist.commands.evaluate import main
from vssl_dist.config import TASKS as SETTINGS
from vssl_dist.config import CollapseConfig, KnnConfig, LinearConfig, OodConfig, read_task
from vssl_dist.errors import DataError
from vssl_dist.evaluation.features.workers import ImagePass
from vssl_dist.evaluation.run import (
    EvalSettings,
    evaluate,
    evaluate_baselines,
)
from vssl_dist.evaluation.scores.spectrum import rankme
from vssl_dist.evaluation.tasks import TASKS

QUICK = LinearConfig(epochs=5, lr=(0.01, 0.1), l2=(1e-3, 1e-1), shares=(0.25,), seeds=2, batch=50)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return three_splits(tmp_path_factory.mktemp("shards"), foreign=80)


@pytest.fixture(scope="module")
def export(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    return exported(tmp_path_factory.mktemp("run") / "export", data)


def features(network: nn.Module, folder: Path) -> np.ndarray:
    with torch.no_grad():
        return network(by_hand(folder)[0]).double().numpy()


def test_every_task_of_the_schema_can_be_done() -> None:
    assert list(SETTINGS) == list(TASKS)
    for name, settings in SETTINGS.items():
        assert read_task({"task": name}) == settings()
        assert read_task(settings().model_dump_json()) == settings()


def test_linear_probes_beat_chance_on_every_line(export: tuple[Path, nn.Module]) -> None:
    path, _ = export
    result = evaluate(path, QUICK)
    for kind in ("sgd", "logistic", "logistic_0.25"):
        assert 1 / 6 + 0.1 < result["results"][kind]["top1"] <= result["results"][kind]["top5"] <= 1
    assert result["results"]["sgd"]["held_out_images"] == 18
    assert result["results"]["logistic_0.25"]["images"] == 48
    assert len(result["results"]["sgd"]["top1_of_seeds"]) == 2
    assert result["metrics"]["linear/top1"] == result["results"]["sgd"]["top1"]
    assert "linear/logistic_0.25_top1_std" in result["metrics"]
    assert json.loads(path.with_name("linear-00000040.json").read_text()) == result
    assert evaluate(path, QUICK) == result, "not done twice"
    fresh = evaluate(path, QUICK.model_copy(update={"seeds": 1}))
    assert fresh["results"]["logistic"] == result["results"]["logistic"]


def test_under_lars_the_figures_have_the_same_names(export: tuple[Path, nn.Module]) -> None:
    path, _ = export
    settings = QUICK.model_copy(update={"optimizer": "lars", "lr": (30.0, 100.0), "shares": ()})
    result = evaluate(path, settings)
    assert set(result["results"]) == {"lars", "logistic"}
    assert result["metrics"]["linear/top1"] == result["results"]["lars"]["top1"] > 1 / 6
    assert {"linear/ece", "linear/logistic_top1"} <= result["metrics"].keys()
    assert all(path.with_name(plot).exists() for plot in result["plots"])


def test_ood_is_what_scikit_learn_finds(export: tuple[Path, nn.Module], data: Path) -> None:
    path, network = export
    task = OodConfig(ood={"others": data / "foreign"}, k=3, bootstrap=20, batch=50)
    result = evaluate(path, task)
    oracle = NearestNeighbors(n_neighbors=3, metric="cosine")
    oracle.fit(features(network, data / "train"))
    inside, outside = (
        oracle.kneighbors(features(network, data / part))[0][:, -1] for part in ("val", "foreign")
    )
    expected = roc_auc_score(np.r_[np.zeros(60), np.ones(80)], np.r_[inside, outside])
    actual = result["results"]["others"]["knn"]
    assert actual["auroc"] == pytest.approx(expected, abs=1e-3)
    assert result["metrics"]["ood/auroc_others_knn"] == actual["auroc"]
    low, high = actual["auroc_interval"]
    assert 0 <= low <= actual["auroc"] <= high <= 1
    assert result["ood"]["others"]["samples"] == 80
    assert path.with_name("ood-00000040.json").exists()
    elsewhere = evaluate(path, task, EvalSettings(ood={"others": data / "foreign"}))
    assert elsewhere["results"] == result["results"]
    assert len(list(path.parent.glob("ood-00000040-on-*.json"))) == 1


def test_collapse_is_of_the_held_out_images(export: tuple[Path, nn.Module], data: Path) -> None:
    path, network = export
    result = evaluate(path, CollapseConfig(batch=50))
    expected = rankme(torch.from_numpy(features(network, data / "val")).float())
    assert result["results"]["rankme"] == pytest.approx(expected, rel=1e-3)
    assert result["metrics"]["collapse/uniformity"] < 0
    assert "bank" not in result, "the training images are not even opened"


def test_tasks_share_one_pass_over_the_images(
    export: tuple[Path, nn.Module], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = export
    knn = KnnConfig(k=(5,), temperature=(0.1,), batch=50)
    before = evaluate(path, knn)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the images are read again")

    path.with_name("knn-00000040.json").unlink()
    monkeypatch.setattr(ImagePass, "stream_ids", never)
    after = evaluate(path, knn)
    assert {**after, "seconds": 0} == {**before, "seconds": 0}
    evaluate(path, QUICK.model_copy(update={"l2": (1e-2,)}))
    evaluate(path, CollapseConfig(batch=50))
    with pytest.raises(AssertionError, match="read again"):
        evaluate(path, KnnConfig(k=(5,), temperature=(0.1,), max_bank=100))


def test_baselines_are_found_alike(export: tuple[Path, nn.Module]) -> None:
    path, _ = export
    result = evaluate_baselines(path, QUICK.model_copy(update={"shares": (), "l2": (0.1,)}))[
        "results"
    ]
    assert list(result) == ["raw_pixels", "random_network"]
    assert all(1 / 6 < one["sgd"]["top1"] < 1 for one in result.values())
    assert path.with_name("linear-baselines.json").exists()


def test_what_cannot_be_evaluated_is_one_clear_line(tmp_path: Path, data: Path) -> None:
    path, _ = exported(tmp_path / "export", data)
    empty = OodConfig()
    with pytest.raises(DataError, match="no dataset to tell apart"):
        evaluate(path, empty)
    with pytest.raises(DataError, match="is the queries itself"):
        evaluate(path, OodConfig(ood={"x": data / "val"}))
    with pytest.raises(DataError, match="cannot be called bank"):
        evaluate(path, OodConfig(ood={"bank": data / "foreign"}))
    with pytest.raises(DataError, match="absent"):
        evaluate(path, OodConfig(ood={"x": tmp_path / "absent"}))
    one = tiny_dataset(tmp_path / "one", samples=8, classes=1)
    other = tiny_dataset(tmp_path / "two", samples=4, classes=1, split="val", first=700)
    with pytest.raises(DataError, match="one class"):
        evaluate(path, QUICK, EvalSettings(train=one, val=other))
    assert not list(path.parent.glob("linear-*")) + list(path.parent.glob("ood-*"))


def test_the_command_runs_several_tasks(
    tmp_path: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    path, _ = exported(tmp_path / "export", data)
    own = [{"task": "linear", "epochs": 2, "lr": [0.1], "l2": [0.1], "shares": [], "seeds": 1}]
    change(path, config={"data": {"backend": "reference"}, "evaluations": own})
    arguments = [str(tmp_path), "--device", "cpu", "--task", "knn,linear,ood,collapse"]
    assert main([*arguments, "--data", f"others={data / 'foreign'}"]) == 0
    shown = capsys.readouterr().out
    for words in ("k-NN top-1 %", "linear top-1 %", "AUROC/FPR95 %", "rankme", "step 40"):
        assert words in shown
    assert json.loads(path.with_name("linear-00000040.json").read_text())["task"]["epochs"] == 2


def test_ctrl_c_is_one_line_and_keeps_what_was_finished(tmp_path: Path, data: Path) -> None:
    path, _ = exported(tmp_path / "export", data)
    endless = {"task": "linear", "epochs": 10**9, "lr": [0.1], "shares": [], "seeds": 1}
    change(path, config={"data": {"backend": "reference"}, "evaluations": [endless]})
    program = Path(__file__).parents[2] / "launch" / "evaluate.py"
    words = [str(tmp_path), "--device", "cpu", "--task", "knn,linear"]
    process = subprocess.Popen([sys.executable, program, *words], stderr=subprocess.PIPE, text=True)
    first, end = path.with_name("knn-00000040.json"), time.monotonic() + 60
    while not first.exists():
        assert process.poll() is None
        assert time.monotonic() < end, "the first task takes too long"
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "stopped: the same command does what is missing"
    assert "Traceback" not in said
    assert not path.with_name("linear-00000040.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--task", "knn,lin"],
            "'lin' is not one of knn, linear, ood, collapse, uncertainty, finetune",
        ),
        (["--task", "knn,knn"], "'knn' stands twice"),
        (["--data", "a"], "two folders, as TRAIN,VAL, or NAME=FOLDER"),
        (["--data", "x=a"], "is for task ood"),
        (["--task", "ood", "--data", "../x=a"], "two folders"),
        (["--task", "ood", "--data=-x=a"], "should match pattern"),
        (["--task", "ood"], "no dataset to tell apart"),
    ],
)
def test_the_command_refuses_in_one_line(
    tmp_path: Path,
    data: Path,
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, _ = exported(tmp_path / "export", data)
    before = sorted(path.parent.iterdir())
    assert main([str(tmp_path), "--device", "cpu", *arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert "\n" not in said
    assert words in said
    assert [p for p in sorted(path.parent.iterdir()) if ".lock" not in p.name] == [
        p for p in before if ".lock" not in p.name
    ]
