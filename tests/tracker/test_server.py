"""What a person sees in ``mlflow ui``, and what a server that fails does to a training."""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vssl_dist.jobs.evaluation_job import flush_to_mlflow
from vssl_dist.tracker import Answer, Flusher, Spool, default_tracking_uri, flush_once, look

NO_JOBS = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
"""Without the ten processes beside the server that wait for work nobody here gives it."""


class Server:
    """A real ``mlflow ui`` on a free port of this machine, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        # One worker instead of four: a test has one reader.
        command = ["-m", "mlflow", "ui", "--port", str(self.port), "--workers", "1"]
        with (self.folder / "server.txt").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"} | NO_JOBS,
            )
        deadline = time.monotonic() + 90
        while not self.healthy():
            assert time.monotonic() < deadline, (self.folder / "server.txt").read_text()
            time.sleep(0.1)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.process.wait()

    def healthy(self) -> bool:
        try:
            return self.get("/health") == b"OK"
        except OSError:
            return False

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            body: bytes = answer.read()
            return body

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self.url}/api/2.0/mlflow/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def curve(self, run_id: str, key: str) -> list[tuple[int, float]]:
        query = f"run_id={run_id}&metric_key={key}&max_results=25000"
        answer = json.loads(self.get(f"/api/2.0/mlflow/metrics/get-history?{query}"))
        return [(m.get("step", 0), m["value"]) for m in answer.get("metrics", [])]


@contextmanager
def server(folder: Path) -> Iterator[Server]:
    one = Server(folder)
    try:
        yield one
    finally:
        one.kill()


def run_id_of(run: Path) -> str:
    run_id: str = json.loads((run / "mlflow_run.json").read_text())["run_id"]
    return run_id


def test_mlflow_ui_shows_the_run_its_curve_and_its_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tmp_path / "runs" / "quick"
    spool = Spool(run, "train")
    spool.params({"optim": {"base_lr": 0.2}})
    sheet = run / "augmentations.png"
    Image.effect_mandelbrot((64, 48), (-2, -1.5, 1, 1.5), 20).save(sheet)
    spool.artifact(sheet)
    for step in range(20):
        spool.metrics({"loss": 1 / (1 + step)}, step)
    # The job itself may start in any folder: the address was made absolute before.
    flusher = Flusher(run, "vssl-dist", here := default_tracking_uri())
    monkeypatch.chdir(run)
    with flusher:
        pass
    assert flush_once(run, here, 120)
    with server(tmp_path) as ui:
        ui.start()
        experiments = ui.post("experiments/search", {"max_results": 10})["experiments"]
        ids = [e["experiment_id"] for e in experiments if e["name"] == "vssl-dist"]
        (found,) = ui.post("runs/search", {"experiment_ids": ids})["runs"]
        assert found["info"]["run_name"] == "quick"
        assert found["data"]["params"] == [{"key": "optim.base_lr", "value": "0.2"}]
        run_id = found["info"]["run_id"]
        assert ui.curve(run_id, "loss") == [(s, 1 / (1 + s)) for s in range(20)]
        image = ui.get(f"/get-artifact?path=augmentations.png&run_uuid={run_id}")
        assert image == sheet.read_bytes()
        assert look(ui.url, run) == Answer()
        ui.post("experiments/delete", {"experiment_id": ids[0]})
        assert "mlflow experiments restore" in str(look(ui.url, run).problem)


@pytest.mark.slow
def test_a_server_that_is_away_or_hangs_costs_a_training_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    spool = Spool(run, "train")
    took: list[float] = []

    def train(steps: int) -> None:
        for _ in range(steps):
            start = time.perf_counter()
            spool.metrics({"loss": len(took) / 7}, len(took))
            took.append(time.perf_counter() - start)
            time.sleep(0.01)

    (tmp_path / "server").mkdir()
    with server(tmp_path / "server") as remote:
        flusher = Flusher(run, "vssl-dist", remote.url)
        start = time.perf_counter()
        flusher.start()
        assert time.perf_counter() - start < 1
        train(200)  # there is no server yet
        remote.start()
        while not (run / "spool" / "cursor.json").exists():
            train(10)
        train(200)
        remote.kill()
        train(300)
        remote.start()
        train(200)
        remote.signal(signal.SIGSTOP)
        train(300)
        start = time.perf_counter()
        assert not flusher.close(2)
        assert time.perf_counter() - start < 4
        remote.signal(signal.SIGCONT)
        (run / "config.yaml").write_text("seed: 0\n")
        spool.artifact(run / "config.yaml")
        assert flush_once(run, remote.url, 60)
        run_id = run_id_of(run)
        assert remote.curve(run_id, "loss") == [(s, s / 7) for s in range(len(took))]
        uploaded = remote.get(f"/get-artifact?path=config.yaml&run_uuid={run_id}")
        assert uploaded == b"seed: 0\n"
    assert statistics.quantiles(took, n=100)[-1] < 5e-3
    log = (run / "spool" / "flusher.log").read_text()
    assert "cannot send" in log
    assert len(log.splitlines()) < 30, "an outage is reported, not repeated"


@pytest.mark.slow
def test_what_a_server_that_is_away_did_not_get_waits_and_the_user_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with server(tmp_path) as remote:
        flusher = Flusher(run, "vssl-dist", remote.url)
        flusher.start()
        flusher.close(0)
        Spool(run, "eval-knn-00000003").metrics({"knn/top1": 0.5}, 3)
        start = time.monotonic()
        flush_to_mlflow(run, remote.url)
        assert time.monotonic() - start < 200, "a server that is away is given up in the end"
        assert f"python launch/track.py {run} sends them" in capsys.readouterr().out
        remote.start()
        flush_to_mlflow(run, remote.url)
        assert capsys.readouterr().out == ""
        assert remote.curve(run_id_of(run), "knn/top1") == [(3, 0.5)]
