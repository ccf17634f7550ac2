from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.support.damage import config, stalled
from tests.support.shards import tiny_shards
from vssl_dist.data.store.manifest import read_manifest
from vssl_dist.errors import DataError
from vssl_dist.jobs.evaluation_queue import EvaluationSpawner
from vssl_dist.jobs.progress import ProgressReport, ProgressReporter
from vssl_dist.jobs.resources import Resources, resolve_for_this_machine
from vssl_dist.jobs.run_reporter import RunReporter
from vssl_dist.tracker import Spool
from vssl_dist.tracker.spool import read_records


def test_a_collapse_is_a_line_in_the_log_and_a_tag_of_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vssl_dist")
    # Without what its constructor starts: flusher and evaluations are not asked anything here.
    run_reporter = RunReporter.__new__(RunReporter)
    run_reporter.progress_reporter = ProgressReporter(total=90)
    run_reporter.spool = Spool(tmp_path, "train")
    fine = {"loss": 1.0, "collapse_alarm": 0.0, "embedding_spread": 0.6, "effective_rank": 20.0}
    gone = fine | {"collapse_alarm": 1.0, "embedding_spread": 0.04}
    for step, metrics in ((25, fine), (50, gone), (75, gone)):
        run_reporter.log(metrics, step)
    run_reporter.spool.close()
    levels = ["INFO", "INFO", "WARNING", "INFO"]
    assert [record.levelname for record in caplog.records] == levels
    reports = [line for line in caplog.messages if ProgressReport.parse(line)]
    assert len(reports) == 3
    assert "collapsed by step 50 (embedding_spread 0.040" in caplog.messages[2]
    records, _ = read_records(run_reporter.spool.path, 0)
    kinds = [record["kind"] for record in records]
    assert kinds == ["metrics", "metrics", "tags", "metrics"]
    assert records[2]["values"] == {"vssl_dist.collapsed": "step 50"}
    assert records[3]["values"]["train/collapse_alarm"] == 1


def test_an_export_of_a_run_without_evaluations_starts_no_process(tmp_path: Path) -> None:
    run_reporter = RunReporter.__new__(RunReporter)
    run_reporter.has_evaluations = False
    run_reporter.evaluation_spawner = EvaluationSpawner(tmp_path, "local")
    run_reporter.on_export(tmp_path / "backbone-00000001.safetensors", 1)
    assert run_reporter.evaluation_spawner.processes == []
    assert not any(tmp_path.iterdir())


def test_storage_that_stalls_costs_the_sheet_and_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = config(tiny_shards(tmp_path / "train"), timeout_s=0.4)
    run_reporter = RunReporter.__new__(RunReporter)
    run_reporter.spool = Spool(tmp_path, "train")
    with stalled(".tar", "read"):
        run_reporter._note_augmentation_sheet(cfg, read_manifest(cfg.data.train))
    run_reporter.spool.close()
    (line,) = caplog.messages
    assert line.startswith("no augmentation sheet: rank 0 waits for data: ")
    assert ".tar: storage has not answered" in line


def test_a_dataset_that_does_not_answer_ends_rank_0_before_it_starts_anything(
    tmp_path: Path,
) -> None:
    cfg = config(tiny_shards(tmp_path / "train"), timeout_s=0.4)
    launch = resolve_for_this_machine(
        Resources(device="cpu"), 1, 0, f"sqlite:///{tmp_path}/mlflow.db"
    )
    stalls = pytest.raises(DataError, match=r"^rank 0 waits for data: .*manifest\.json")
    with stalls, stalled("manifest.json"):
        RunReporter(cfg, launch, ["here"])
    assert not cfg.dir.exists()
