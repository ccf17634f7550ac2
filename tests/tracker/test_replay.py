"""What MLflow will never take is set aside and named; all else arrives, wherever it is sent."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

from vssl_dist.tracker import (
    TRAINER_WRITERS,
    Spool,
    TrackingRecord,
    is_flushed,
    settle_identity,
    why_not_all_sent,
)
from vssl_dist.tracker.address import sqlite_uri
from vssl_dist.tracker.cursor import load_spool_cursor
from vssl_dist.tracker.record import Sender, sending_lock
from vssl_dist.tracker.refusals import RefusedByMlflow, is_transient
from vssl_dist.tracker.replay import Replayer


@pytest.fixture
def uri(database: Path, tmp_path: Path) -> str:
    """An empty database of MLflow's in a folder with an awkward name."""
    folder = tmp_path / "50%25 ä?#"
    folder.mkdir()
    return sqlite_uri(Path(shutil.copy(database, folder)))


def replay(run: Path, uri: str, *, afresh: bool = False) -> None:
    """What the flusher's process does."""
    identity = settle_identity(run)
    record = TrackingRecord.load(run, identity)
    record.tracking_uri = uri
    Replayer(run, identity, record, retry_refused=afresh).flush()


def mlflow_run(run: Path, uri: str) -> Run:
    return MlflowClient(tracking_uri=uri).get_run(
        TrackingRecord.load(run, settle_identity(run)).runs[uri]
    )


def curve(run: Path, uri: str, key: str = "loss") -> list[tuple[int, float]]:
    client = MlflowClient(tracking_uri=uri)
    history = client.get_metric_history(mlflow_run(run, uri).info.run_id, key)
    return [(metric.step, metric.value) for metric in history]


def a_run(folder: Path, steps: int = 20) -> Spool:
    spool = Spool(folder, "train")
    spool.status("RUNNING")
    spool.params({"name": folder.name, "out": str(folder.parent), "optim": {"lr": 0.1}})
    for step in range(1, steps + 1):
        spool.metrics({"loss": 1 / step}, step)
    return spool


def test_values_that_are_never_taken_are_named_and_hold_nothing_up(
    tmp_path: Path, uri: str
) -> None:
    run = tmp_path / os.fsdecode(b"caf\xe9")
    spool = a_run(run)
    spool.params({f"many.{i}": i for i in range(150)} | {"data.train": "/data/caf\udce9"})
    spool.tags({"fine": 1, "folder": "caf\udce9"})
    spool.metrics({"huge": 1.0, "loss": 0.0}, 2**70)
    spool.params({"long": "x" * 10_000})
    spool.artifact(run / "never-written.png")
    spool.artifact(run / ("n" * 300))
    (run / "config.yaml").write_text("seed: 0\n")
    spool.artifact(run / "config.yaml")
    spool.status("FINISHED")
    replay(run, uri)
    assert len(list(tmp_path.iterdir())) == 2, "no folder named as the address escapes it"
    there = mlflow_run(run, uri)
    assert curve(run, uri) == [(s, 1 / s) for s in range(1, 21)]
    assert len(there.data.params) == 153, "out, optim.lr, the many, long; no name, no data.train"
    assert there.data.params["long"] == "x" * 6000
    assert (there.data.tags["fine"], there.info.status) == ("1", "FINISHED")
    assert there.info.run_name == r"caf\xe9"
    client = MlflowClient(tracking_uri=uri)
    assert [a.path for a in client.list_artifacts(there.info.run_id)] == ["config.yaml"]
    assert is_flushed(run, uri)
    assert load_spool_cursor(run, uri).refusal_reasons.keys() == {
        "parameter name", "parameter data.train", "tag folder", "metric huge", "metric loss",
        "parameter long", "artifact never-written.png", f"artifact {'n' * 300}",
    }  # fmt: skip
    line = why_not_all_sent(run, uri)
    assert line is not None
    assert all(name in line for name in ("data.train", "tag folder", "never-written.png"))
    assert r"launch/track.py $'" in line
    line.encode()


def test_a_line_that_is_no_record_keeps_nothing_back(tmp_path: Path, uri: str) -> None:
    run = tmp_path / "run"
    a_run(run, 2)
    lines = [
        '{"kind": "metrics", "t": 1}',
        '{"kind": "metrics", "t": 1, "step": 3, "values": {"loss": "low"}}',
        '{"kind": "metrics", "t": "now", "step": 3, "values": {"other": 1}}',
        '{"kind": "params", "t": 1, "values": [1]}',
        '{"kind": "params", "t": 1, "values": {"number": 3}}',
        '{"kind": "news", "t": 1}',
        '{"kind": "status", "t": 1, "value": "ENDED"}',
        '{"kind": "metrics", "t": 1, "step": 3, "values": {"p": 1, "q": null, "r": 2}}',
        '{"kind": "status", "t": 1' + 30 * "0" + ', "value": "FINISHED"}',
        "[" * 100_000,
    ]
    with (run / "spool" / "train.jsonl").open("a") as file:
        file.writelines(f"{line}\n" for line in lines)
    Spool(run, "train").metrics({"loss": 1 / 4}, 4)
    replay(run, uri)
    assert curve(run, uri) == [(1, 1.0), (2, 1 / 2), (4, 1 / 4)]
    assert mlflow_run(run, uri).data.params["number"] == "3"
    assert is_flushed(run, uri)
    assert [curve(run, uri, f"train/{key}") for key in "pqr"] == [[(3, 1.0)], [], [(3, 2.0)]]
    assert load_spool_cursor(run, uri).refusal_reasons.keys() == {
        "a line of train.jsonl", "metric train/loss", "metric train/other", "metric train/q",
        "status FINISHED",
    }  # fmt: skip
    assert "a line of train.jsonl" in str(why_not_all_sent(run, uri))


def test_a_record_of_a_later_version_is_named(tmp_path: Path, uri: str) -> None:
    run = tmp_path / "run"
    a_run(run, 2)
    with (run / "spool" / "train.jsonl").open("a") as file:
        file.write('{"kind": "histogram", "t": 1}\n')
    replay(run, uri)
    assert "a record of kind histogram" in str(why_not_all_sent(run, uri))


def test_a_run_lacks_nothing_while_only_an_evaluation_is_still_on_its_way(
    tmp_path: Path, uri: str
) -> None:
    run = tmp_path / "run"
    spool = a_run(run, 2)
    replay(run, uri)
    Spool(run, "eval-knn-00000002").metrics({"knn/top1": 0.5}, 2)
    assert why_not_all_sent(run, uri, TRAINER_WRITERS) is None
    assert "not all curves" in str(why_not_all_sent(run, uri))
    spool.metrics({"loss": 0.0}, 3)
    with sending_lock(run):
        Sender(uri).save(run)
        assert why_not_all_sent(run, uri, TRAINER_WRITERS) is None, "somebody is at it"
        assert f"process {os.getpid()}" in str(why_not_all_sent(run, uri))
        Sender(uri, problem="no room").save(run)
        assert "(no room)" in str(why_not_all_sent(run, uri, TRAINER_WRITERS))
    assert "not all curves" in str(why_not_all_sent(run, uri, TRAINER_WRITERS))


def test_what_was_set_aside_is_tried_again_when_somebody_asks(tmp_path: Path, uri: str) -> None:
    run = tmp_path / "run"
    spool = a_run(run, 3)
    spool.artifact(run / "late.txt")
    replay(run, uri)
    assert "late.txt" in str(why_not_all_sent(run, uri))
    (run / "late.txt").write_text("here now")
    replay(run, uri)
    assert "late.txt" in str(why_not_all_sent(run, uri)), "not at every start"
    replay(run, uri, afresh=True)
    assert why_not_all_sent(run, uri) is None
    assert curve(run, uri) == [(s, 1 / s) for s in (1, 2, 3)], "nothing twice"


def test_an_artifact_store_that_nobody_may_write_holds_up_nothing(tmp_path: Path, uri: str) -> None:
    (tmp_path / "file").touch()
    client = MlflowClient(tracking_uri=uri)
    client.create_experiment("vssl-dist", artifact_location=f"{tmp_path}/file/below")
    run = tmp_path / "run"
    spool = a_run(run, 3)
    for name in ("a.txt", "b.txt"):
        (run / name).touch()
        spool.artifact(run / name)
    replay(run, uri)
    assert load_spool_cursor(run, uri).refusal_reasons.keys() == {
        "artifact a.txt",
        "artifact b.txt",
    }
    assert len(curve(run, uri)) == 3


def test_between_two_servers_a_run_goes_back_and_forth_without_loss_or_double(
    tmp_path: Path, uri: str, database: Path
) -> None:
    run = tmp_path / "run"
    (tmp_path / "other").mkdir()
    other = sqlite_uri(Path(shutil.copy(database, tmp_path / "other")))
    spool = a_run(run, 5)
    replay(run, uri)
    first = mlflow_run(run, uri).info.run_id
    spool.metrics({"loss": 1 / 6}, 6)
    assert not is_flushed(run, other)
    replay(run, other)
    second = mlflow_run(run, other).info.run_id
    assert second != first
    assert len(curve(run, uri)) == 5
    assert not is_flushed(run, uri)
    sent = load_spool_cursor(run, uri).progress_by_file["train.jsonl"].offset
    assert sent > 0, "what it has is not forgotten"
    for address in (uri, other, uri):
        replay(run, address)
        assert is_flushed(run, address)
        assert curve(run, address) == [(s, 1 / s) for s in range(1, 7)]
    assert [mlflow_run(run, a).info.run_id for a in (uri, other)] == [first, second]
    for address in (uri, other):
        client = MlflowClient(tracking_uri=address)
        experiment = client.get_experiment_by_name("vssl-dist").experiment_id
        assert len(client.search_runs([experiment])) == 1


def test_a_copy_is_shown_as_a_run_of_its_own_with_the_history_and_its_parent(
    tmp_path: Path, uri: str
) -> None:
    run = tmp_path / "a"
    spool = a_run(run, 5)
    spool.status("FINISHED")
    replay(run, uri)
    shutil.copytree(run, branch := tmp_path / "b")
    more = Spool(branch, "train")
    more.params({"name": "b", "out": str(tmp_path)})
    more.metrics({"loss": 9.0}, 6)
    replay(branch, uri)
    own, parent = mlflow_run(branch, uri), mlflow_run(run, uri)
    assert own.info.run_id != parent.info.run_id
    assert own.info.run_name == own.data.params["name"] == "b"
    assert own.data.params["optim.lr"] == "0.1"
    tags = own.data.tags
    assert tags["vssl_dist.run_dir"] == str(branch)
    assert (tags["vssl_dist.parent"], tags["vssl_dist.parent_run"]) == ("a", parent.info.run_id)
    assert curve(branch, uri) == [*curve(run, uri), (6, 9.0)]
    assert parent.data.params["name"] == "a"
    assert parent.data.tags["vssl_dist.run_dir"] == str(run)
    assert "vssl_dist.parent" not in parent.data.tags
    assert len(curve(run, uri)) == 5
    moved = run.rename(tmp_path / "renamed")
    replay(moved, uri)
    again = mlflow_run(moved, uri)
    assert again.info.run_id == parent.info.run_id
    assert again.data.tags["vssl_dist.run_dir"] == str(moved)


def test_bins_are_said_with_what_empties_them_again(tmp_path: Path, uri: str) -> None:
    run = tmp_path / "run"
    a_run(run, 2)
    replay(run, uri)
    client = MlflowClient(tracking_uri=uri)
    run_id = mlflow_run(run, uri).info.run_id
    replayer = Replayer(run, settle_identity(run), TrackingRecord.load(run, settle_identity(run)))
    client.delete_run(run_id)
    Spool(run, "train").metrics({"loss": 0.0}, 3)
    with pytest.raises(RefusedByMlflow, match=f"restore --run-id {run_id}"):
        replayer.flush()  # which was connected before
    with pytest.raises(RefusedByMlflow, match=f"restore --run-id {run_id}"):
        replay(run, uri)
    client.restore_run(run_id)
    client.delete_experiment(mlflow_run(run, uri).info.experiment_id)
    with pytest.raises(RefusedByMlflow, match="experiments restore --experiment-id"):
        replay(run, uri)


def test_outages_are_raised_and_set_nothing_aside(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    a_run(run, 2)
    sent: list[int] = []

    def failing(error: Exception) -> Callable[..., None]:
        def raise_it(*_: Any, **__: Any) -> None:
            sent.append(1)
            raise error

        return raise_it

    replay(run, uri)
    a_run(run, 4)
    away = MlflowException("failed with exception refused")  # as MLflow words a dead server
    for call, error in (
        ("log_batch", MlflowException("locked", error_code=TEMPORARILY_UNAVAILABLE)),
        ("log_batch", ConnectionResetError("gone")),
        ("set_tag", away),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, call, failing(error))
            if call == "set_tag":
                patch.setattr(MlflowClient, "log_batch", failing(away))
            with pytest.raises(type(error)):
                replay(run, uri)
    assert len(sent) <= 4, "one request each, not one per value"
    assert load_spool_cursor(run, uri).refusal_reasons == {}
    replay(run, uri)
    assert is_flushed(run, uri)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (MlflowException("x", error_code=1), True),
        (MlflowException("x", error_code=1000), False),
        (PermissionError(13, "no"), False),
        (OSError(28, "no space"), True),
        (TimeoutError("slow"), True),
        (ImportError("no psycopg2"), False),
        (RefusedByMlflow("bin"), False),
    ],
)
def test_what_may_pass(error: Exception, passes: bool) -> None:
    assert is_transient(error) == passes


@pytest.mark.slow
def test_a_database_is_made_where_there_are_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hardlink_to(self: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(self))

    monkeypatch.setattr(Path, "hardlink_to", hardlink_to)
    a_run(tmp_path / "run", 2)
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    replay(tmp_path / "run", uri)
    assert len(curve(tmp_path / "run", uri)) == 2
    assert not list((tmp_path / "new").glob("*.new"))
