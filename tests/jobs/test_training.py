from __future__ import annotations

import math
import pickle
from pathlib import Path

import cloudpickle
import pytest

from vssl_dist.config import KnnConfig
from vssl_dist.jobs.resources import Resources, on_slurm, on_this_machine
from vssl_dist.jobs.training import TrainJob, failure_file, note_failure, stopping_s


def test_a_job_travels_as_text_and_a_reference_to_its_class() -> None:
    job = TrainJob("name: a\n", on_slurm(Resources(device="cpu"), 2, "http://tracker:5000"))
    pickled = cloudpickle.dumps(job)
    assert pickle.loads(pickled) == job
    assert len(pickled) < 10_000
    assert job.checkpoint().function == job


def test_a_local_stop_leaves_curves_the_time_that_a_scheduler_does_not() -> None:
    profile = Resources(device="cpu")
    assert stopping_s(on_this_machine(profile, 1, 0, "http://tracker:5000")) == 30
    assert stopping_s(on_slurm(profile, 1, "http://tracker:5000")) <= 5


def test_the_first_failure_is_the_headline_and_later_ones_do_not_replace_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("VSSL_ATTEMPT", "a")
    for text in ("ZeroDivisionError", "connection closed by peer"):
        note_failure(tmp_path, text)
    assert failure_file(tmp_path, "a").read_text() == "ZeroDivisionError"


def test_on_slurm_the_headline_is_also_in_the_log_of_rank_0_and_each_restart_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {
        "SUBMITIT_EXECUTOR": "slurm",
        "SUBMITIT_FOLDER": str(tmp_path / "slurm"),
        "SLURM_JOB_ID": "77",
        "RANK": "3",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "slurm").mkdir()
    for restart in ("0", "1"):
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
        note_failure(tmp_path, f"error {restart}\n")
    log = (tmp_path / "slurm" / "77_0_log.out").read_text()
    assert log == "error 0\nerror 1\n"


def test_an_evaluation_travels_as_text_and_keeps_an_infinite_temperature() -> None:
    task = KnnConfig(k=(20,), temperature=(0.07, math.inf))
    assert KnnConfig.model_validate_json(task.model_dump_json()) == task
