"""The flusher brings everything to MLflow exactly once, whoever is killed on the way."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.support.launchers import HOSTILE, INNOCENT, of_process
from vssl_dist.tracker import Flusher, Spool, flush_once, is_flushed, lease_holder, why_not_all_sent
from vssl_dist.tracker.spool import mark_unfinished_failed

TRAIN_AND_DIE = """
import os, signal, sys
from pathlib import Path
from vssl_dist.tracker import Flusher, Spool
run = Path(sys.argv[1])
spool = Spool(run, "train")
spool.status("RUNNING")
Flusher(run, "tests", sys.argv[2]).start()
for step in range(100):
    spool.metrics({"loss": step / 7}, step)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def uri(database: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{shutil.copy(database, tmp_path_factory.mktemp('tracking'))}"


class Tracked:
    """A run folder and what MLflow knows of it."""

    def __init__(self, folder: Path, uri: str, *, connect: bool = True) -> None:
        self.folder, self.uri = folder, uri
        if connect:
            self.client = MlflowClient(tracking_uri=uri)

    def flusher(self, system_every_s: float | None = None) -> Flusher:
        return Flusher(self.folder, "tests", self.uri, system_every_s=system_every_s)

    @property
    def run_id(self) -> str:
        run_id: str = json.loads((self.folder / "mlflow_run.json").read_text())["run_id"]
        return run_id

    @property
    def run(self) -> Run:
        return self.client.get_run(self.run_id)

    def curve(self, key: str) -> list[tuple[int, float, int]]:
        history = self.client.get_metric_history(self.run_id, key)
        return [(metric.step, metric.value, metric.timestamp) for metric in history]


@pytest.fixture
def tracked(tmp_path: Path, uri: str) -> Tracked:
    return Tracked(tmp_path / f"run-{random.getrandbits(32):08x}", uri)


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def flusher_pids(run_dir: Path) -> list[int]:
    """The flusher processes of one run of this test."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"vssl_dist.tracker" in command and str(run_dir).encode() in command:
            found.append(int(entry.name))
    return found


def test_everything_arrives_once_even_when_it_is_sent_again(tracked: Tracked) -> None:
    spool = Spool(tracked.folder, "train")
    spool.status("RUNNING")
    spool.params({"optim": {"lr": 0.2}, "long": "ä" * 10_000, "name": "größe/../x"})
    spool.params({f"many.{i}": i for i in range(150)})
    spool.tags({"vssl_dist.hosts": "a,b"})
    (tracked.folder / "config.yaml").write_text("seed: 0\n")
    spool.artifact(tracked.folder / "config.yaml")
    spool.artifact(tracked.folder / "never-written.png")
    for step in range(1500):
        spool.metrics({"loss": 1 / (step + 1), "we?ird/../key": step}, step)
    spool.metrics({"nan": float("nan"), "up": float("inf"), "down": -float("inf")}, 0)
    spool.status("FINISHED")
    flusher = tracked.flusher(system_every_s=0.1)
    flusher.start()
    # The sampler's first values come some seconds after the process has started.
    wait_for(lambda: Spool(tracked.folder, "system").last_step() >= 2)
    assert flusher.close(60)

    def seen() -> tuple[object, ...]:
        keys = ("loss", "we_ird/key", "up", "down", "system/cpu_utilization_percentage")
        curves = [tracked.curve(key) for key in keys]
        data = tracked.run.data
        return curves, data.params, data.tags, tracked.run.info.status, tracked.run.info.end_time

    first = seen()
    curves = [tracked.curve("loss"), tracked.curve("we_ird/key")]
    assert [[step for step, _, _ in curve] for curve in curves] == [list(range(1500))] * 2
    assert [value for _, value, _ in curves[0]] == [1 / (step + 1) for step in range(1500)]
    assert len(tracked.curve("nan")) == 1
    assert tracked.curve("up")[0][1] > 1e308
    params = tracked.run.data.params
    assert (params["optim.lr"], params["many.149"], len(params["long"])) == ("0.2", "149", 6000)
    assert tracked.run.data.tags["vssl_dist.hosts"] == "a,b"
    assert tracked.run.info.status == "FINISHED"
    assert [a.path for a in tracked.client.list_artifacts(tracked.run_id)] == ["config.yaml"]
    assert len(tracked.curve("system/system_memory_usage_megabytes")) >= 3

    # Neither the cursor nor the run's id was written down before a crash: all is sent again.
    (tracked.folder / "spool" / "cursor.json").unlink()
    facts = json.loads((tracked.folder / "mlflow_run.json").read_text())
    run_id = facts.pop("run_id")
    (tracked.folder / "mlflow_run.json").write_text(json.dumps(facts))
    assert flush_once(tracked.folder, tracked.uri)
    assert tracked.run_id == run_id
    assert seen() == first


def test_steps_that_a_resumed_run_redoes_are_on_the_curve_once(tracked: Tracked) -> None:
    first = Spool(tracked.folder, "train")
    first.params({"seed": 0, "threads": 4})
    first.status("RUNNING")
    for step in range(1, 13):
        first.metrics({"loss": 1 / step}, step)
    first.status("KILLED")
    flusher = tracked.flusher()
    flusher.start()
    assert flusher.close(60)
    run_id, before = tracked.run_id, tracked.curve("loss")
    assert tracked.run.info.status == "KILLED"
    first.close()

    time.sleep(0.01)
    second = Spool(tracked.folder, "train")
    second.params({"seed": 0, "threads": 8})
    second.status("RUNNING")
    for step in range(10, 21):
        second.metrics({"loss": 1 / step}, step)
    flusher = tracked.flusher()
    flusher.start()
    wait_for(lambda: len(tracked.curve("loss")) == 20 and tracked.run.info.status == "RUNNING")
    assert tracked.run_id == run_id
    after = tracked.curve("loss")
    assert after[:12] == before
    assert [(step, value) for step, value, _ in after] == [(s, 1 / s) for s in range(1, 21)]
    assert tracked.run.data.params == {"seed": "0", "threads": "4"}, "the first value stays"

    # Evaluations end in any order, the last of them after the training.
    second.status("FINISHED")
    assert flusher.close(60)
    for step in (20, 10):
        Spool(tracked.folder, f"knn-{step}").metrics({"knn/top1": step / 100}, step)
        assert flush_once(tracked.folder, tracked.uri)
    assert {(step, value) for step, value, _ in tracked.curve("knn/top1")} == {(20, 0.2), (10, 0.1)}
    assert tracked.run.info.status == "FINISHED"


def test_killing_flushers_again_and_again_neither_loses_nor_doubles(tracked: Tracked) -> None:
    spool = Spool(tracked.folder, "train")
    flushers = [tracked.flusher() for _ in range(2)]
    for flusher in flushers:
        flusher.start()
    lucky = random.Random(0)
    step = 0

    def sent() -> int:
        try:
            cursor = json.loads((tracked.folder / "spool" / "cursor.json").read_text())
        except OSError:
            return -1
        return int(cursor["files"].get("train.jsonl", {"last": {}})["last"].get("loss", -1))

    for turn in range(3):
        goal = step + 1000
        while sent() < goal:
            spool.metrics({"loss": step / 7}, step)
            step += 1
            time.sleep(0.001)
        # Whoever holds the lease dies, at any moment; the other one goes on.
        lock = tracked.folder / "spool" / "flusher.lock"
        holders = [int(line.split()[4]) for line in Path("/proc/locks").read_text().splitlines()
                   if line.split()[5].endswith(f":{lock.stat().st_ino}")]  # fmt: skip
        assert len(holders) == 1
        if turn < 2:
            time.sleep(lucky.random() * 2)
            os.kill(holders[0], signal.SIGKILL)
            flushers.append(tracked.flusher())
            flushers[-1].start()
    closed = [flusher.close(60) for flusher in flushers[-2:]]
    assert all(closed)
    for flusher in flushers[:-2]:
        flusher.close(0)
    assert [(s, v) for s, v, _ in tracked.curve("loss")] == [(s, s / 7) for s in range(step)]
    runs = tracked.client.search_runs([tracked.run.info.experiment_id])
    assert sum(run.info.run_name == tracked.folder.name for run in runs) == 1


def test_a_killed_trainer_leaves_its_numbers_in_mlflow_and_no_process(tracked: Tracked) -> None:
    subprocess.run(
        [sys.executable, "-c", TRAIN_AND_DIE, str(tracked.folder), tracked.uri],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    wait_for(lambda: not flusher_pids(tracked.folder))
    assert [step for step, _, _ in tracked.curve("loss")] == list(range(100))
    assert tracked.run.info.status == "FAILED"


def test_a_trainer_that_has_taken_the_run_up_again_speaks_for_itself(tmp_path: Path) -> None:
    first = time.time()
    Spool(tmp_path, "train").status("RUNNING")
    before = (tmp_path / "spool" / "train.jsonl").read_text()
    mark_unfinished_failed(tmp_path, trainer_began_at=first - 1)
    assert (tmp_path / "spool" / "train.jsonl").read_text() == before
    mark_unfinished_failed(tmp_path, trainer_began_at=first + 1)
    mark_unfinished_failed(tmp_path, trainer_began_at=first + 1)
    words = [
        json.loads(line)["value"]
        for line in (tmp_path / "spool" / "train.jsonl").read_text().splitlines()
    ]
    assert words == ["RUNNING", "FAILED"]


def test_a_flusher_says_why_it_is_refused_and_leaves_at_once(
    tmp_path: Path, database: Path
) -> None:
    shutil.copy(database, tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(tracking_uri=uri)
    client.delete_experiment(client.create_experiment("tests"))
    run = Tracked(tmp_path / "run", uri)
    Spool(run.folder, "train").metrics({"loss": 1.0}, 0)
    flusher = run.flusher()
    flusher.start()
    start = time.monotonic()
    assert not flusher.close(60)
    assert time.monotonic() - start < 25, "an outage is given half a minute"
    line = why_not_all_sent(run.folder, uri)
    assert line is not None
    assert "in the bin" in line
    assert "experiments restore" in line
    assert f"python launch/track.py {run.folder} sends them" in line
    client.restore_experiment(client.get_experiment_by_name("tests").experiment_id)
    assert flush_once(run.folder, run.uri)
    assert why_not_all_sent(run.folder, uri) is None
    assert "nobody has sent them there" in str(
        why_not_all_sent(run.folder, "http://elsewhere:5000")
    )


def test_nowhere_takes_everything_and_sends_nothing(tmp_path: Path) -> None:
    Spool(tmp_path, "train").metrics({"loss": 1.0}, 0)
    flusher = Flusher(tmp_path, "tests", "none", system_every_s=0.1)
    flusher.start()
    wait_for(lambda: Spool(tmp_path, "system").last_step() >= 1)
    assert flusher.close(30)
    assert flush_once(tmp_path, "none")
    line = why_not_all_sent(tmp_path, "none")
    assert line is not None
    assert f"python launch/track.py {tmp_path} --to URI" in line


@pytest.mark.slow
def test_a_run_that_was_deleted_in_mlflow_waits_and_comes_back_whole(tracked: Tracked) -> None:
    spool = Spool(tracked.folder, "train")
    spool.metrics({"loss": 0.0}, 0)
    flusher = tracked.flusher()
    flusher.start()
    wait_for(lambda: (tracked.folder / "spool" / "cursor.json").exists())
    tracked.client.delete_run(tracked.run_id)
    spool.metrics({"loss": 1.0}, 1)
    assert not flusher.close(3)
    assert "restore" in (tracked.folder / "spool" / "flusher.log").read_text()
    tracked.client.restore_run(tracked.run_id)
    assert flush_once(tracked.folder, tracked.uri)
    assert [step for step, _, _ in tracked.curve("loss")] == [0, 1]


@pytest.mark.slow
def test_a_new_database_is_filled_from_the_spool(tracked: Tracked, tmp_path: Path) -> None:
    spool = Spool(tracked.folder, "train")
    for step in range(10):
        spool.metrics({"loss": float(step)}, step)
    flusher = tracked.flusher()
    flusher.start()
    assert flusher.close(60)
    old, curve = tracked.run_id, tracked.curve("loss")
    elsewhere = Tracked(tracked.folder, f"sqlite:///{tmp_path}/sub/other.db")
    flusher = elsewhere.flusher()
    flusher.start()
    assert flusher.close(60)
    assert elsewhere.run_id != old
    assert elsewhere.curve("loss") == curve


def test_a_flusher_killed_while_it_makes_the_database_does_no_harm(tmp_path: Path) -> None:
    run = Tracked(tmp_path / "run", f"sqlite:///{tmp_path}/mlflow.db", connect=False)
    Spool(run.folder, "train").metrics({"loss": 1.0}, 0)
    flusher = run.flusher()
    flusher.start()
    wait_for(lambda: any(tmp_path.glob("mlflow.db.*.new")))
    time.sleep(0.3)
    (pid,) = flusher_pids(run.folder)
    os.kill(pid, signal.SIGKILL)
    assert not (tmp_path / "mlflow.db").exists(), "it was killed in the middle"
    assert flusher.close(60), "the next one does not stumble over the half-made one"
    assert len(Tracked(run.folder, run.uri).curve("loss")) == 1


@pytest.mark.slow
def test_a_database_that_is_removed_while_curves_are_sent_is_made_and_filled_again(
    tmp_path: Path,
) -> None:
    file = tmp_path / "mlflow.db"
    run = Tracked(tmp_path / "run", f"sqlite:///{file}", connect=False)
    spool = Spool(run.folder, "train")
    spool.metrics({"loss": 1.0}, 0)
    flusher = run.flusher()
    flusher.start()
    wait_for(lambda: is_flushed(run.folder))
    file.unlink()
    spool.metrics({"loss": 2.0}, 1)
    assert flusher.close(60)
    curve = Tracked(run.folder, run.uri).curve("loss")
    assert [(step, value) for step, value, _ in curve] == [(0, 1.0), (1, 2.0)]


def test_closing_returns_within_its_bound_and_says_so(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "run", "train")
    spool.metrics({"loss": 0.0}, 0)
    # Nobody answers at this address.
    flusher = Flusher(tmp_path / "run", "tests", "http://192.0.2.1:5000")
    flusher.start()
    start = time.monotonic()
    assert not flusher.close(2)
    assert time.monotonic() - start < 4
    assert not flusher_pids(tmp_path / "run")


def test_a_folder_that_was_never_tracked_has_nothing_to_flush(tmp_path: Path) -> None:
    Spool(tmp_path, "eval").metrics({"knn/top1": 0.5}, 3)
    assert flush_once(tmp_path, "http://127.0.0.1:9")
    assert not (tmp_path / "spool" / "flusher.log").exists(), "no process was started"


@pytest.mark.parametrize("only_sends", [False, True])
def test_who_tracks_nowhere_leaves_sending_to_others_and_only_a_trainers_death_ends_a_run(
    tmp_path: Path, only_sends: bool
) -> None:
    Spool(tmp_path, "train").status("RUNNING")
    flusher = Flusher(tmp_path, "tests", "none", only_sends=only_sends)
    flusher.start()
    wait_for(lambda: (tmp_path / "spool" / "flusher.json").exists() and not lease_holder(tmp_path))
    process = flusher._process
    assert process is not None
    assert process.poll() is None, "it is there, and has not the lease"
    process.communicate(timeout=20)  # as the death of who started it: its input ends
    spool = (tmp_path / "spool" / "train.jsonl").read_text()
    assert ("FAILED" in spool) is not only_sends


def test_a_flusher_belongs_to_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in HOSTILE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", INNOCENT["MLFLOW_TRACKING_TOKEN"])
    Flusher(tmp_path, "tests", f"sqlite:///{tmp_path}/x.db").start()
    wait_for(lambda: len(flusher_pids(tmp_path)) == 1)
    (pid,) = flusher_pids(tmp_path)
    try:
        environment = of_process(pid)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert not environment.keys() & HOSTILE.keys()
    assert environment["MLFLOW_TRACKING_TOKEN"] == "t"
