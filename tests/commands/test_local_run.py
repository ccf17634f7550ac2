"""A run on this machine from the command line: stopped, continued, evaluated beside."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from launch import evaluate
from tests.support.photos import tiny_dataset

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STEPS = 36


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a configuration: 3 epochs of 12 steps, k-NN after each."""
    place = tmp_path_factory.mktemp("local")
    train = tiny_dataset(place, samples=192, shard_size=64)
    val = tiny_dataset(place, samples=64, shard_size=64, split="val", first=1000)
    text = {
        "trace": True,
        "log_every": 1,
        "vote_every": 1,
        "method": {"name": "simsiam", "backbone": "resnet18_c16"},
        "data": {
            "train": str(train),
            "val": str(val),
            "image_size": 32,
            "streams": 2,
            "window": 16,
            "threads": 1,
            "views": ["cifar", "cifar"],
        },
        "optim": {"base_lr": 0.05, "epochs": 3, "global_batch": 16},
        "engine": {"autocast": "none"},
        "evaluations": [{"task": "knn", "k": [5], "temperature": [0.1]}],
    }
    (place / "tiny.yaml").write_text(yaml.safe_dump(text))
    return place


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    submit = str(ROOT / "launch" / "submit.py")
    command = [sys.executable, submit, "--local", "2", "tiny.yaml", *overrides]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "MLFLOW_TRACKING_URI": "none"}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def step_of(run: Path) -> int:
    """The last step that rank 0 reported."""
    log = run / "logs" / "rank-0.log"
    found = re.findall(rf" INFO step +(\d+)/{STEPS} ", log.read_text() if log.exists() else "")
    return int(found[-1]) if found else 0


def wait_until(true: Callable[[], object], what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"timed out waiting for {what}"
        time.sleep(0.05)


def evaluations(run: Path) -> list[psutil.Process]:
    """The processes that evaluate this run."""
    wanted = ["-P", "-m", "vssl_dist.jobs.evaluation_queue", str(run)]
    return [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[1:] == wanted]


def test_a_run_survives_ctrl_c_a_hanging_evaluation_and_its_death(folder: Path) -> None:
    run = folder / "runs" / "tiny"
    first = start(folder)
    wait_until(lambda: step_of(run) >= 3, "three steps")
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 130
    assert "the same command continues the run" in err
    stopped_at = step_of(run)
    assert 3 <= stopped_at < 12

    second = start(folder)
    wait_until(lambda: evaluations(run), "the first evaluation")
    hanging = evaluations(run)[0]
    hanging.send_signal(signal.SIGSTOP)
    during = step_of(run)
    wait_until(lambda: step_of(run) >= during + 4, "steps while an evaluation hangs")
    hanging.kill()
    after = step_of(run)
    wait_until(lambda: step_of(run) >= after + 4, "steps after an evaluation was killed")
    out, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    assert "finished" in out

    for rank in range(2):
        lines = (run / f"trace.rank{rank}.jsonl").read_text().splitlines()
        steps = [json.loads(line).get("step") for line in lines]
        assert steps == [*range(1, STEPS + 1), None], "steps are lost or done twice"
        log = (run / "logs" / f"rank-{rank}.log").read_text()
        said = rf" rank {rank} INFO rank {rank} on \S+: CPU, torch \S+, \d+ cores?, \d+ threads?\n"
        assert len(re.findall(said, log)) == 2, "once at each start"
        entry = rf"[-0-9]{{10}} [:0-9]{{8}} rank {rank} (INFO|WARNING) "
        odd = [line for line in log.splitlines() if not re.match(entry, line)]
        assert not odd, "each line says when, who and how bad"
    results = [run / "export" / f"knn-{step:08d}.json" for step in (12, 24, 36)]
    wait_until(lambda: all(path.exists() for path in results), "an evaluation of every export")

    third = start(folder, "evaluations=[{task: knn}, {task: collapse}]")
    out, _ = third.communicate(timeout=60)
    assert (third.returncode, "is finished" in out) == (0, True)
    late = run / "export" / f"collapse-{STEPS:08d}.json"
    wait_until(late.exists, "an evaluation that was asked for when the run was finished")


def test_by_hand_an_evaluation_reads_what_is_there_and_says_what_is_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "runs" / "tiny"
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    assert evaluate.main([str(run), "--baselines", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for row in ("raw pixels", "random network", "step 12", "step 24", "step 36"):
        assert row in out
    assert evaluate.main([str(folder)]) == 2
    nothing = capsys.readouterr().err
    assert nothing.count("\n") == 1
    assert "export" in nothing
