from __future__ import annotations

import math
import pickle
import re
import sys
from contextlib import suppress
from pathlib import Path

import cloudpickle
import pytest

from vssl_dist.config import KnnConfig
from vssl_dist.jobs.resources import Resources, resolve_for_slurm, resolve_for_this_machine
from vssl_dist.jobs.training_job import (
    TrainJob,
    attempt_name,
    job_variables,
    last_curves_wait_s,
    note_failure,
)
from vssl_dist.logs import entry_as_terminal_text
from vssl_dist.run_folder import RunFolder


def test_a_job_travels_as_text_and_a_reference_to_its_class() -> None:
    job = TrainJob(
        "name: a\n", resolve_for_slurm(Resources(device="cpu"), 2, "http://tracker:5000")
    )
    pickled = cloudpickle.dumps(job)
    assert pickle.loads(pickled) == job
    assert len(pickled) < 10_000
    assert job.checkpoint().function == job


def test_a_local_stop_leaves_curves_the_time_that_a_scheduler_does_not() -> None:
    profile = Resources(device="cpu")
    assert last_curves_wait_s(resolve_for_this_machine(profile, 1, 0, "http://tracker:5000")) == 30
    assert last_curves_wait_s(resolve_for_slurm(profile, 1, "http://tracker:5000")) <= 5


def test_the_first_failure_is_the_headline_and_later_ones_do_not_replace_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4242")  # of whatever session the launcher is in
    monkeypatch.setenv("VSSL_ATTEMPT", "a")
    for text in ("ZeroDivisionError", "connection closed by peer"):
        note_failure(tmp_path, text)
    assert RunFolder(tmp_path).failure_path("a").read_text() == "ZeroDivisionError"


def test_on_slurm_the_headline_is_also_in_the_log_of_rank_0_and_each_restart_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = {"SUBMITIT_FOLDER": str(tmp_path / "slurm"), "SLURM_JOB_ID": "77"}
    monkeypatch.setenv("RANK", "3")
    (tmp_path / "slurm").mkdir()
    for restart in ({}, {"SLURM_RESTART_COUNT": "1"}):
        for name, value in job_variables(task | restart).items():
            monkeypatch.setenv(name, value)
        note_failure(tmp_path, f"error: boom {len(restart)}\n")
    lines = (tmp_path / "slurm" / "77_0_log.out").read_text().splitlines()
    assert [re.sub(r"^[-0-9]{10} [:0-9]{8} ", "", line) for line in lines] == [
        "rank 3 ERROR boom 0",
        "rank 3 ERROR boom 1",
    ]


IN_THE_WAY = {
    "a session of SLURM": {"SLURM_JOB_ID": "4242", "RANK": "1"},
    "one without a rank": {"SLURM_JOB_ID": "4242"},
    "somebody's submitit": {"SUBMITIT_EXECUTOR": "slurm", "SUBMITIT_FOLDER": "/x", "RANK": "1"},
    "mpirun": {"OMPI_COMM_WORLD_RANK": "1", "RANK": "no number"},
    "a log that is not there": {"VSSL_LEAD_LOG": "/dev/null/log.out", "RANK": "1"},
    "a log that is a folder": {"VSSL_LEAD_LOG": "/", "RANK": "1"},
    "a name that no file can have": {"VSSL_ATTEMPT": "a" * 300, "RANK": "1"},
}


@pytest.mark.parametrize("variables", IN_THE_WAY.values(), ids=IN_THE_WAY)
def test_writing_down_a_failure_never_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name in ("RANK", "VSSL_ATTEMPT", "VSSL_LEAD_LOG", *variables):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    note_failure(tmp_path / "run", "error: caf\u00e9 \udcff")
    if len(attempt_name()) < 200:
        said = RunFolder(tmp_path / "run").failure_path(attempt_name()).read_text(encoding="utf-8")
        assert said == "error: caf\u00e9 \\udcff"
    for folder in ("file", "blocked"):
        (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / "blocked" / "logs").touch()
    (tmp_path / "file" / "run").touch()
    note_failure(tmp_path / "blocked", "error: the reason")
    note_failure(tmp_path / "file" / "run", "error: the reason")
    full = Path("/dev/full").open("w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stderr", full)
    note_failure(tmp_path / "blocked", "error: the reason")
    monkeypatch.undo()
    with suppress(OSError):
        full.close()


def test_a_reason_that_its_own_file_cannot_hold_is_still_in_the_log_that_people_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "logs").touch()
    for name, value in {"RANK": "1", "VSSL_LEAD_LOG": str(tmp_path / "0.out")}.items():
        monkeypatch.setenv(name, value)
    note_failure(tmp_path, "error: the reason")
    (line,) = (tmp_path / "0.out").read_text().splitlines()
    assert entry_as_terminal_text(line) == "error: the reason"


def test_an_evaluation_travels_as_text_and_keeps_an_infinite_temperature() -> None:
    task = KnnConfig(k=(20,), temperature=(0.07, math.inf))
    assert KnnConfig.model_validate_json(task.model_dump_json()) == task
