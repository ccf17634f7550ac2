"""Runs from the command line and what MLflow has of them: stopped, copied, refused."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from tests.support.photos import tiny_dataset

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LATIN = os.fsdecode(b"caf\xe9")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is not UTF-8, with data and a configuration; the database is beside it."""
    place = tmp_path_factory.mktemp("tracked") / LATIN
    place.mkdir()
    tiny_dataset(place, samples=64, shard_size=64)
    text = {
        "log_every": 1,
        "method": {"name": "simsiam", "backbone": "resnet10_c16"},
        "data": {"train": "train", "image_size": 32, "streams": 2, "window": 16, "threads": 1,
                 "views": ["cifar", "cifar"]},
        "optim": {"base_lr": 0.05, "global_batch": 16, "max_steps": 2},
        "checkpoint": {"every_steps": 1},
        "engine": {"autocast": "none"},
        "evaluations": [],
    }  # fmt: skip
    (place / "tiny.yaml").write_text(yaml.safe_dump(text))
    return place


def command(folder: Path, uri: str, *words: str) -> subprocess.Popen[bytes]:
    program = str(ROOT / "launch" / "submit.py")
    return subprocess.Popen(
        [sys.executable, program, "--local", "1", "tiny.yaml", *words],
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "MLFLOW_TRACKING_URI": uri},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_a_path_that_mlflow_does_not_take_a_copied_run_and_a_binned_experiment(
    folder: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    uri = f"sqlite:///{folder.parent}/m.db?timeout=120"
    started.append(first := command(folder, uri, "name=a"))
    out, err = first.communicate(timeout=240)
    assert first.returncode == 0, err
    last = os.fsdecode(out).splitlines()[-1]
    assert last.startswith("warning: MLflow does not take parameter")
    assert "data.train" in last
    assert "launch/track.py" in last

    run, branch = folder / "runs" / "a", folder / "runs" / "b"
    shutil.copytree(run, branch)
    shutil.rmtree(branch / "checkpoints" / "step-00000002")
    started.append(second := command(folder, uri, "name=b"))
    out, err = second.communicate(timeout=240)
    assert second.returncode == 0, err
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("vssl-dist").experiment_id
    runs = {found.info.run_name: found for found in client.search_runs([experiment])}
    assert runs.keys() == {"a", "b"}
    for name, found in runs.items():
        curve = client.get_metric_history(found.info.run_id, "train/loss")
        assert [metric.step for metric in curve] == [1, 2]
        assert (found.data.params["name"], found.info.status) == (name, "FINISHED")
        assert len(found.data.params) > 50
    assert runs["b"].data.tags["vssl_dist.parent_run"] == runs["a"].info.run_id

    client.delete_experiment(experiment)
    started.append(third := command(folder, uri, "name=c"))
    out, err = third.communicate(timeout=120)
    assert third.returncode == 2
    assert b"experiments restore" in err
    assert not (folder / "runs" / "c").exists()


def test_a_stopped_run_waits_for_its_curves_until_it_is_asked_twice(
    folder: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    nobody = "http://127.0.0.1:9"
    started.append(run := command(folder, nobody, "name=s", "optim.max_steps=400"))
    log = folder / "runs" / "s" / "logs" / "rank-0.log"

    def wait_for(text: str) -> None:
        end = time.monotonic() + 240
        while not log.exists() or text not in log.read_text(errors="replace"):
            assert time.monotonic() < end, f"waited in vain for {text!r}"
            time.sleep(0.05)

    wait_for("step   3/")
    run.send_signal(signal.SIGINT)
    wait_for("up to 30 s for the last curves")
    time.sleep(4)
    assert run.poll() is None, "it gives them more than a scheduler would"
    asked = time.monotonic()
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=30)
    assert time.monotonic() - asked < 10, "30 s are not over"
    assert run.returncode == 130
    lines = os.fsdecode(err).splitlines()
    assert f"MLflow at {nobody} does not answer" in lines[0]
    assert "launch/track.py" in lines[-1]
