"""`launch/track.py`: the whole spool of a run, to wherever tracking points now."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
from mlflow import MlflowClient

from vssl_dist.commands import track
from vssl_dist.tracker import Flusher, Spool
from vssl_dist.tracker.record import Sender, sending_lock


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def a_run(folder: Path) -> Path:
    spool = Spool(folder, "train")
    spool.params({"name": folder.name})
    for step in range(3):
        spool.metrics({"loss": float(step)}, step)
    spool.status("FINISHED")
    spool.close()
    return folder


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line with which nothing is sent."""
    assert track.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_what_cannot_be_sent_is_refused_before_anything_is_written(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a_run(here / "run")
    before = files(here)
    assert "nosuch: no such folder" in refusal(capsys, "run", "nosuch")
    (here / "data").mkdir()
    assert "no spool" in refusal(capsys, "data")
    assert "MLFLOW_TRACKING_PASSWORD" in refusal(capsys, "run", "--to", "http://me:secret@host")
    for blank in ("", " "):
        assert "--to: " in refusal(capsys, "run", "--to", blank)
    assert "did you mean http" in refusal(capsys, "run", "--to", "htp://host:5000")
    assert "is no file" in refusal(capsys, "run", "--to", f"sqlite:///{here}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    assert "--to URI" in refusal(capsys, "run")
    assert files(here) == before


def test_a_server_that_is_away_is_said_with_what_to_do(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a_run(here / "run")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert track.main(["run", "--to", f"http://127.0.0.1:{port}"]) == 1
    assert f"python launch/track.py {here}/run" in capsys.readouterr().err


def test_a_run_that_somebody_sends_is_left_to_them_by_name(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a_run(here / "run")
    monkeypatch.setattr(track, "_LEASE_WAIT_S", 0.1)
    with sending_lock(here / "run"):
        Sender("http://login1:5000", host="gpu07", pid=12, job="345").save(here / "run")
        assert track.main(["run"]) == 1
        other = capsys.readouterr().out
        Sender(f"sqlite:///{here}/mlflow.db", host="gpu07", pid=12, job="345").save(here / "run")
        assert track.main(["run"]) == 1
        same = capsys.readouterr().out
    for out in (other, same):
        assert "process 12 on gpu07, SLURM job 345 is sending" in out
    assert "http://login1:5000" in other


@pytest.mark.slow
def test_runs_that_never_had_a_server_or_had_another_are_sent_with_all_their_history(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    never, moved = a_run(here / "runs" / "never"), a_run(here / "runs" / "moved")
    flusher = Flusher(moved, "vssl-dist", "http://127.0.0.1:9")  # nobody has ever been there
    flusher.start()
    flusher.close(5)
    copy = Path(shutil.copytree(moved, here / "runs" / "copy"))
    words = [str(path.relative_to(here)) for path in (never, moved, copy)]
    assert track.main(words) == 0
    assert capsys.readouterr().out.count("all of it is at sqlite:///") == 3
    client = MlflowClient(tracking_uri=f"sqlite:///{here}/mlflow.db")
    experiment = client.get_experiment_by_name("vssl-dist").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert runs.keys() == {"never", "moved", "copy"}
    for name, run in runs.items():
        curve = client.get_metric_history(run.info.run_id, "loss")
        assert [(m.step, m.value) for m in curve] == [(0, 0.0), (1, 1.0), (2, 2.0)]
        assert (run.info.status, run.data.params["name"]) == ("FINISHED", name)
    assert runs["copy"].data.tags["vssl_dist.parent"] == "moved"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    assert track.main([*words, "--to", "sqlite:///mlflow.db"]) == 0
    assert len(client.search_runs([experiment])) == 3
    facts = json.loads((never / "mlflow_run.json").read_text())
    assert facts["run_id"] == runs["never"].info.run_id
    client.delete_run(facts["run_id"])  # in the bin: the others are sent all the same
    later = Spool(moved, "later")
    later.metrics({"loss": 3.0}, 3)
    later.close()
    table = here / "runs" / "table.md"  # what lies there, too, where `runs/*` is typed
    table.touch()
    capsys.readouterr()
    assert track.main([*words, str(table), "--to", "sqlite:///mlflow.db"]) == 1
    out, err = capsys.readouterr()
    other, binned = sorted(err.splitlines(), key=lambda line: "bin" in line)
    assert binned.startswith(f"error: {never}: ")
    assert "is in the bin" in binned
    assert other.startswith(f"error: {table}: has no spool")
    assert [line.partition(":")[0] for line in out.splitlines()] == [str(moved), str(copy)]
    assert len(client.get_metric_history(runs["moved"].info.run_id, "loss")) == 4
