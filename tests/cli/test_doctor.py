"""`vssl doctor`: what a machine lacks, the first remedy last, and no traceback."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from tests.support.refusals import refusal
from vssl_dist.cli import doctor
from vssl_dist.jobs import machine
from vssl_dist.jobs.machine import Driver, Wheel

LOOKS = ("python", "gpu", "dali", "compiler", "disk", "slurm", "tracking")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder on a machine with a compiler, without SLURM and without a driver."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "c++").symlink_to(shutil.which("c++") or "/bin/true")
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(machine, "read_driver", lambda: None)
    return place


def states(out: str) -> dict[str, str]:
    return {line.split()[1]: line.split()[0] for line in out.splitlines()}


def test_a_machine_that_can_run_is_well_and_nothing_is_left_on_it(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main(["--out", "runs/new"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert tuple(states(out)) == LOOKS
    assert "FAULT" not in states(out).values()
    assert (states(out)["slurm"], states(out)["gpu"]) == ("-", "-")
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("variables", "words", "what", "said"),
    [
        ({}, ["--need", "slurm"], "slurm", "--local"),
        ({}, ["--need", "gpu,slurm"], "gpu", "stay on the CPU"),
        ({"PATH": ""}, [], "compiler", "install g++"),
        ({}, ["--out", "file/runs"], "disk", "is no folder"),
        ({"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, [], "tracking", "start it"),
        ({"MLFLOW_TRACKING_URI": "htp://h:1"}, [], "tracking", "did you mean http"),
        ({"MLFLOW_TRACKING_URI": "http://me:hunter2@h:1"}, [], "tracking", "PASSWORD"),
        ({"MLFLOW_TRACKING_URI": "sqlite:///$NOT_SET/m.db"}, [], "tracking", "NOT_SET"),
    ],
)
def test_what_is_at_fault_is_the_last_line_with_its_remedy(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str],
    words: list[str],
    what: str,
    said: str,
) -> None:
    (here / "file").touch()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert doctor.main(words) == 2
    out, err = capsys.readouterr()
    line = refusal(err)
    assert line.startswith(f"error: {what}: ")
    assert said in line
    assert states(out)[what] == "FAULT"
    assert "hunter2" not in out + err


def test_a_driver_that_is_too_old_is_a_fault(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "read_driver", lambda: Driver((12, 2), "535.129.03", num_gpus=8))
    monkeypatch.setattr(machine, "read_wheel", lambda: Wheel("2.13.0", "13.0"))
    assert doctor.main([]) == 2
    assert "580 or newer" in capsys.readouterr().err


def test_a_look_that_fails_or_hangs_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> doctor.Finding:
        raise RuntimeError("broken\nin two lines, at http://me:hunter2@h")

    monkeypatch.setattr(doctor, "_WITHIN_S", 0.05)
    assert doctor.take_look("x", failing).fault

    def hanging() -> doctor.Finding:
        time.sleep(1)
        return doctor.Finding("late")

    assert "no answer within" in doctor.take_look("x", hanging).text
