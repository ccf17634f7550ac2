"""A study plans each run once, survives a kill, and believes no torn result."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from bench.study import main, read_outcome, write_page
from bench.study_log import describe_machine
from bench.study_picture import draw_picture
from bench.study_plan import BASE_POINT, Study, Trial, plan_trials, read_study
from bench.study_report import (
    RunOutcome,
    base_table,
    factor_table,
    markdown_page,
    read_baselines,
    read_figures,
    read_reference_rows,
)
from tests.support.cards import card_text
from tests.support.photos import tiny_dataset
from vssl_dist import config
from vssl_dist.config import read_task
from vssl_dist.errors import ConfigError
from vssl_dist.evaluation.figures.plots import render_png
from vssl_dist.exports.results import RESULT_FORMAT
from vssl_dist.linter import Facts, lint

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "bench" / "studies").glob("*.yaml"))
STEPS = 12
SAME_NAME = {"x y": ["seed=1"], "x-y": ["seed=2"]}


def tiny(place: Path) -> dict[str, Any]:
    """A study of two runs of 12 steps each, on data that lies in ``place``."""
    tiny_dataset(place, samples=64)
    tiny_dataset(place, samples=32, split="val", first=500)
    text = {
        "trace": True,
        "log_every": 1,
        "vote_every": 1,
        "checkpoint": {"every_steps": 2},
        "method": {"name": "simsiam", "backbone": "resnet10_c16", "hidden": 32, "dim": 32},
        "data": {
            "train": str(place / "train"),
            "val": str(place / "val"),
            "image_size": 32,
            "streams": 2,
            "threads": 1,
            "views": ["cifar", "cifar"],
        },
        "optim": {"base_lr": 0.05, "epochs": 1.5, "global_batch": 8},
        "engine": {"autocast": "none"},
        "evaluations": [{"task": "knn", "k": [5], "temperature": [0.1, "inf"], "every_epochs": 9}],
    }
    (place / "base.yaml").write_text(yaml.safe_dump(text))
    return {
        "title": "Tiny",
        "data": "made by the test",
        "ranks": 1,
        "columns": {"k-NN %": ["knn", "k5_t0.1", "top1"], "unweighted": ["knn", "k5_tinf", "top1"]},
        "points": {"simsiam": {"config": str(place / "base.yaml")}},
        "factors": [
            {
                "name": "rate",
                "point": "simsiam",
                "values": {"0.05": [], "0.1": ["optim.base_lr=0.1"]},
            }
        ],
    }


def write(place: Path, study: dict[str, Any]) -> Path:
    path = place / "tiny.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_value_without_overrides_is_the_base_points_own_run(here: Path) -> None:
    study = read_study(write(here, tiny(here) | {"seeds": [0, 3]}))
    planned = plan_trials(study, "tiny", here / "runs")
    assert [(t.factor, t.value, t.seed) for t in planned] == [
        (BASE_POINT, "base", 0),
        (BASE_POINT, "base", 3),
        ("rate", "0.1", 0),
        ("rate", "0.1", 3),
    ]
    assert [t.cfg.optim.base_lr for t in planned] == [0.05, 0.05, 0.1, 0.1]
    assert [t.cfg.seed for t in planned] == [0, 3, 0, 3]
    assert len({t.cfg.dir for t in planned}) == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pionts": {}}, "pionts: no such key (did you mean 'points'?)"),
        ({"seeds": []}, "seeds"),
        ({"common": ["optim.epoch=3"]}, "simsiam, base, seed 0: optim.epoch: no such key"),
        ({"common": ["evaluations=[]"]}, "columns need knn"),
        ({"factors": [{"name": "a", "point": "b", "values": {"c": []}}]}, "none of the points"),
        (
            {"factors": [{"name": "a", "point": "simsiam", "values": SAME_NAME}]},
            "would both be",
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_the_first_run(
    here: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], said: str
) -> None:
    path = write(here, tiny(here) | change)
    before = sorted(here.iterdir())
    assert main([str(path)]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sorted(here.iterdir()) == before


def test_the_table_says_mean_spread_trouble_and_what_is_not_yet() -> None:
    study = Study.model_validate(
        {
            "title": "T", "data": "", "seeds": (0, 1), "columns": {"a %": ("knn", "a")},
            "conclusion": "All is well.",
            "points": {"p": {"config": "x"}, "q": {"config": "x"}, "r": {"config": "x"}},
            "factors": ({"name": "f", "point": "p", "values": {"1": (), "2": ("x=1",)}},),
        }
    )  # fmt: skip
    outcomes = {
        ("p", BASE_POINT, "base"): [
            RunOutcome({"a %": 50.0}, seconds=10, place="1 core"),
            RunOutcome({"a %": 54.0}, seconds=30, place="2 cores", whole=False),
        ],
        ("q", BASE_POINT, "base"): [
            RunOutcome({"a %": 7.0}, seconds=1, place="1 core"), RunOutcome(None, "diverged"),
        ],
        ("r", BASE_POINT, "base"): [RunOutcome(None), RunOutcome(None)],
        ("p", "f", "2"): [RunOutcome(None, "diverged"), RunOutcome(None, "diverged")],
    }  # fmt: skip
    assert base_table(study, outcomes, {}).splitlines()[2:] == [
        "| p | 52.0 ± 2.8 | > 20 |",
        "| q | 7.0 (1 of 2 seeds, diverged) | 1 |",
        "| r | not yet |  |",
    ]
    assert factor_table(study, outcomes, "f", "p").splitlines()[2:] == [
        "| **1** (base) | 52.0 ± 2.8 | > 20 |",
        "| 2 | diverged |  |",
    ]
    facts = {"command": "run me", "place": "2 cores", "picture": "t.png"}
    text = markdown_page(study, outcomes, {"raw pixels": {"a %": 40.0}}, facts)
    for part in (
        "# T",
        "run me",
        "6 of 8 runs",
        "seeds 0, 1",
        "each run on 1 core (2 of them) or 2 cores (1 of them);",
        "| raw pixels | 40.0 |  |",
        "(t.png)",
        "## What it says\n\nAll is well.\n",
    ):
        assert part in text
    assert render_png(draw_picture(study, outcomes, {})).startswith(b"\x89PNG")


def test_columns_from_elsewhere_stand_beside_those_of_the_runs_after_what_was_not_trained(
    tmp_path: Path,
) -> None:
    (tmp_path / "one.json").write_text(json.dumps({"mean": {"p": 0.75, "pixels": 0.5}}))
    compared = {"raw_pixels": {"x": 0.1}, "random_network": {"x": 0.2, "y": 3}}
    beside = tmp_path / "a-baselines.json"
    beside.write_text(json.dumps({"results": compared, "format": RESULT_FORMAT}))
    file = str(tmp_path / "one.json")
    rows = {
        "p": (file, "mean", "p"), "raw pixels": (file, "mean", "pixels"),
        "q": (str(tmp_path / "not there"), "mean"),
    }  # fmt: skip
    study = Study.model_validate(
        {
            "title": "T", "data": "", "columns": {"x %": ("a", "x"), "y": ("a", "y")},
            "points": {"p": {"config": "c"}, "q": {"config": "c"}},
            "elsewhere": {"z %": {"command": "make z", "rows": rows}},
        }
    )  # fmt: skip
    outcomes = {
        ("p", BASE_POINT, "base"): [RunOutcome({"x %": 50.0, "y": 1.0}, seconds=10)],
        ("q", BASE_POINT, "base"): [RunOutcome(None)],
    }
    facts = {"command": "run me", "place": "2 cores", "picture": "t.png"}
    found = read_reference_rows(study, tmp_path)
    assert base_table(study, outcomes, found).splitlines() == [
        "|  | x % | y | z % | seconds |",
        "|---|---|---|---|---|",
        "| raw pixels | 10.0 |  | 50.0 |  |",
        "| random network | 20.0 | 3.000 |  |  |",
        "| p | 50.0 | 1.000 | 75.0 | 10 |",
        "| q | not yet |  |  |  |",
    ]
    assert "z %: `make z`" in markdown_page(study, outcomes, found, facts)
    beside.write_text(json.dumps({"results": compared, "format": RESULT_FORMAT - 1}))
    assert read_reference_rows(study, tmp_path) == {"p": {"z %": 75.0}, "raw pixels": {"z %": 50.0}}
    assert read_baselines(tmp_path, "a") is None, "it is compared again, with all scores of today"
    (axes,) = draw_picture(study, outcomes, found).axes
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert names == ["raw pixels", "random network", "p", "q"]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn == {"x %": [[0, 10], [1, 20], [2, 50]], "z %": [[0, 50], [2, 75]]}


def test_a_column_that_no_result_has_is_named_with_what_there_is() -> None:
    study = Study.model_validate(
        {"title": "T", "data": "", "columns": {"a": ("knn", "b")}, "points": {"p": {"config": "x"}}}
    )
    with pytest.raises(ConfigError, match=re.escape("columns: a: no 'b' in the result (has: c)")):
        read_figures(study, {"knn": {"c": 1}})


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_shipped_study_can_run_and_changes_one_thing_at_a_time(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    study = read_study(path)
    planned = plan_trials(study, path.stem, Path("runs"))
    base = {t.point: t for t in planned if t.factor == BASE_POINT and t.seed == study.seeds[0]}
    for trial in planned:
        kept = config.frozen_part(base[trial.point].cfg)
        now = config.frozen_part(trial.cfg)
        changed = {key for key in now if now[key] != kept[key]} - {"seed"}
        one = trial.factor in {BASE_POINT, "target"} or len(changed) == 1
        assert one, f"{trial.label} changes {changed}"
        if trial.factor == BASE_POINT:
            samples = 6_400 if "photo" in path.stem else 50_000
            assert lint(trial.cfg, Facts(study.ranks, samples)) == [], trial.label


@pytest.mark.slow
def test_processes_of_one_study_share_its_runs(here: Path) -> None:
    path = write(here, tiny(here))
    both = [start(here) for _ in range(2)]
    said = [process.communicate(timeout=500) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    begun = [line for out, _ in said for line in out.splitlines() if line.startswith("== run")]
    assert sorted(line.split(":")[0] for line in begun) == ["== run 1 of 2", "== run 2 of 2"]
    assert any("1 of them with another process" in out for out, _ in said)
    assert main([str(path)]) == 0
    assert "2 of 2 runs" in (here / "docs" / "study_tiny.md").read_text()


def start(place: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bench.study", "tiny.yaml"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=place, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_and_a_torn_result_is_found_again(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(here, tiny(here))
    study = read_study(path)
    first, second = plan_trials(study, "tiny", here / "runs" / "study_tiny")

    trace = first.cfg.dir / "trace.rank0.jsonl"
    killed = start(here)
    try:
        end = time.monotonic() + 400
        while not trace.exists() or trace.read_text().count("\n") < 4:
            assert killed.poll() is None, killed.communicate()
            assert time.monotonic() < end
            time.sleep(0.05)
        ranks = psutil.Process(killed.pid).children(recursive=True)
    finally:
        killed.kill()
        killed.communicate()
    psutil.wait_procs(ranks, timeout=60)
    assert read_outcome(study, first).figures is None

    assert main([str(path)]) == 0
    for trial in (first, second):
        lines = (trial.cfg.dir / "trace.rank0.jsonl").read_text().splitlines()
        steps = [json.loads(line).get("step") for line in lines]
        assert steps == [*range(1, STEPS + 1), None], "steps are lost or done twice"
    found = [read_outcome(study, trial) for trial in (first, second)]
    assert [one.whole for one in found] == [False, True]
    page = (here / "docs" / "study_tiny.md").read_text()
    assert "2 of 2 runs; more than " in page
    assert f"each run on {describe_machine(study)}; seeds" in page
    for one in found:
        assert one.figures is not None
        assert f"{one.figures['k-NN %']:.1f}" in page
    assert "| raw pixels | " in page
    assert (here / "docs" / "study_tiny.png").read_bytes().startswith(b"\x89PNG")

    result = first.export.with_name(f"knn-{STEPS:08d}.json")
    result.write_text(result.read_text()[:100])
    assert read_outcome(study, first).figures is None
    trained, cost = trace.read_bytes(), read_outcome(study, second).seconds
    baselines = first.export.with_name("knn-baselines.json")
    compared = json.loads(baselines.read_text())["results"]
    baselines.unlink()
    assert main([str(path)]) == 0
    assert read_outcome(study, first).figures == found[0].figures
    assert json.loads(baselines.read_text())["results"] == compared
    assert trace.read_bytes() == trained
    assert read_outcome(study, second).seconds == cost

    other = tiny(here) | {"common": ["optim.weight_decay=1e-3"]}
    capsys.readouterr()
    assert main([str(write(here, other))]) == 2
    assert "was begun with another configuration" in capsys.readouterr().err


def begun(study: Study, trial: Trial, evaluations: list[dict[str, Any]]) -> None:
    """Write the folder of a run as if it had been started with these evaluations."""
    cfg = trial.cfg.model_copy(update={"evaluations": tuple(map(read_task, evaluations))})
    cfg.dir.mkdir(parents=True, exist_ok=True)
    (cfg.dir / "config.yaml").write_text(config.dump(cfg.absolute()))


def test_a_run_of_another_density_goes_on_and_its_old_figures_are_not_shown(here: Path) -> None:
    text = tiny(here)
    base = yaml.safe_load((here / "base.yaml").read_text())
    ood = {"task": "ood", "ood": {"x": str(here / "train")}, "every_epochs": 9}
    base |= {"method": {"name": "vje", "backbone": "resnet10_c16"}, "evaluations": [ood]}
    (here / "base.yaml").write_text(yaml.safe_dump(base))
    column = ["ood", "x", "s1_self_likelihood", "auroc"]
    path = write(here, text | {"columns": {"S1 %": column}, "factors": []})
    study = read_study(path)
    (trial,) = plan_trials(study, "tiny", here / "runs")
    begun(study, trial, [ood | {"density": "cartesian"}])
    export = trial.export
    export.parent.mkdir()
    export.with_suffix(".json").write_text(card_text("a" * 64, method="vje"))
    result = {
        "export": export.name, "export_sha256": "a" * 64, "task": {"task": "ood"}, "metrics": {},
        "results": {"x": {"s1_self_likelihood": {"auroc": 0.5}}}, "substituted_images": 0,
    }  # fmt: skip
    place_of_result = export.with_name(f"ood-{STEPS:08d}.json")
    place_of_result.write_text(json.dumps(result | {"format": 4}))
    assert read_outcome(study, trial).figures is None, "it is of an unnamed density, cartesian"
    place_of_result.write_text(
        json.dumps(result | {"format": RESULT_FORMAT, "density": "cartesian"})
    )
    assert read_outcome(study, trial).figures is None
    place_of_result.write_text(json.dumps(result | {"format": RESULT_FORMAT, "density": "polar"}))
    assert read_outcome(study, trial).figures == {"S1 %": 50.0}
    write_page(study, [trial], "command", here / "page.md")
    assert "Likelihoods of VJE: `density: polar`." in (here / "page.md").read_text()

    begun(study, trial, [ood | {"k": 3}])
    with pytest.raises(ConfigError, match=r"evaluations\[0\]\.k \(3 then, 50 now\)") as refused:
        read_outcome(study, trial)
    assert "delete" not in str(refused.value)
