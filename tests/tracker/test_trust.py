"""What a run folder says is data: it chooses neither who gets a password nor what is sent."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.support.exports import exported
from tests.support.others import (
    NOBODY,
    done_as_nobody,
    locked_by_nobody,
    needs_root,
    shared_folder,
)
from tests.support.photos import tiny_dataset
from vssl_dist.commands import evaluate, track
from vssl_dist.durable import share_with_folder_group
from vssl_dist.errors import ConfigError
from vssl_dist.jobs.evaluation_job import flush_own_run, flush_to_mlflow
from vssl_dist.tracker import (
    Flusher,
    Spool,
    TrackingRecord,
    is_flushed,
    lease_holder,
    probe_tracking,
    settle_identity,
    why_not_all_sent,
)
from vssl_dist.tracker.address import sqlite_uri
from vssl_dist.tracker.cursor import load_spool_cursor
from vssl_dist.tracker.record import Sender
from vssl_dist.tracker.replay import Replayer

PASSWORD = "dummy-pw"


class Recorder(http.server.BaseHTTPRequestHandler):
    """Writes down each request and knows of no run."""

    def do_GET(self) -> None:
        """Answer whatever it is."""
        length = int(self.headers.get("Content-Length") or 0)
        request = (self.command, self.path, dict(self.headers), self.rfile.read(length))
        self.server.requests.append(request)  # type: ignore[attr-defined]
        body = b'{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such"}'
        self.send_response(404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_PUT = do_PATCH = do_GET

    def log_message(self, *_: object) -> None:
        """Silent."""


@contextmanager
def recorder() -> Iterator[tuple[str, list[tuple[str, str, dict[str, str], bytes]]]]:
    """A server of this machine and what it was asked."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Recorder) as server:
        server.requests = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", server.requests  # type: ignore[attr-defined]
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    tiny_dataset(folder, samples=64, classes=4)
    tiny_dataset(folder, samples=32, classes=4, split="val", first=10_000)
    return folder


@pytest.fixture(autouse=True)
def signed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "victim")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)


def handed_over(run: Path, data: Path, uri: str, uuid: str = "e" * 32) -> Path:
    """A run as somebody else may have prepared it; returns its export."""
    export, _ = exported(run / "export", data)
    (run / "config.yaml").write_text("name: theirs\n")
    (run / "run.json").write_text(json.dumps({"uuid": uuid, "path": str(run)}))
    TrackingRecord(uuid, tracking_uri=uri, runs={uri: "b" * 32}).save(run)
    spool = run / "spool" / "train.jsonl"
    spool.parent.mkdir()
    spool.write_text('{"kind": "artifact", "t": 1, "path": "/etc/hostname"}\n')
    return export


def test_an_evaluation_sends_nothing_to_an_address_that_only_the_folder_names(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with recorder() as (theirs, asked_there), recorder() as (own, asked_here):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", own)
        handed_over(tmp_path / "run", data, theirs)
        assert evaluate.main([str(tmp_path / "run"), "--device", "cpu"]) == 0
    assert asked_there == asked_here == []
    out, err = capsys.readouterr()
    assert out.startswith("backbone-00000040.safetensors: ")
    assert f"(its curves went to {theirs}, your address is {own})" in err
    assert f"python launch/track.py {tmp_path}/run --to {own} sends them" in err
    assert (tmp_path / "run" / "export" / "knn-00000040.json").exists()


@pytest.mark.parametrize(
    "name", ["mlflow_run.json", "spool/cursor.json", "spool/flusher.json", "spool/flusher.log"]
)
def test_what_is_noted_of_sending_goes_through_no_link_out_of_its_folder(
    tmp_path: Path, name: str
) -> None:
    """Whoever unpacks an archive owns its links."""
    run, mine = tmp_path / "run", tmp_path / ".bashrc"
    Spool(run, "train").close()
    mine.write_text("mine")
    (run / name).symlink_to(mine)
    with pytest.raises(OSError, match=f"leads out of its folder: remove it: '{run / name}'"):
        Flusher(run, "theirs", "http://127.0.0.1:9").start()
    assert mine.read_text() == "mine"


def test_an_evaluation_adds_its_curve_through_no_link_out_of_its_folder(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, mine = tmp_path / "run", tmp_path / ".bashrc"
    handed_over(run, data, "http://127.0.0.1:9")
    mine.write_text("mine")
    link = run / "spool" / "eval-knn-00000040.jsonl"
    link.symlink_to(mine)
    assert evaluate.main([str(run), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert said == f"error: {link}: is a link that leads out of its folder: remove it\n"
    assert mine.read_text() == "mine"
    assert not list(run.glob("export/knn-*")), "before anything is computed"


@pytest.mark.parametrize("uri", [["http://x"], {"http://x": "y"}, None])
def test_an_address_that_is_no_text_is_none(tmp_path: Path, uri: object) -> None:
    run = tmp_path / "run"
    identity = settle_identity(run)
    facts = {"uuid": identity.uuid, "experiment": "e", "tracking_uri": uri, "run_id": "b" * 32}
    (run / "mlflow_run.json").write_text(json.dumps(facts))
    assert TrackingRecord.load(run, identity) == TrackingRecord(identity.uuid)


def test_an_export_alone_is_not_the_word_to_send_its_run(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with recorder() as (own, asked):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", own)
        export = handed_over(tmp_path / "run", data, own)
        assert evaluate.main([str(export), "--device", "cpu"]) == 0
        assert "an export was named, and not its run" in capsys.readouterr().err
        bare, _ = exported(tmp_path / "bare", data)
        flush_own_run(bare.parent.parent, own, names_whole_run=False)
        assert capsys.readouterr() == ("", ""), "there is nothing to send"
    assert asked == []


@needs_root
@pytest.mark.parametrize("foreign", [".", "mlflow_run.json", "spool/train.jsonl"])
def test_what_another_user_has_made_is_not_sent_unasked(
    foreign: str, tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with recorder() as (own, asked):
        handed_over(tmp_path / "run", data, own)
        os.chown(tmp_path / "run" / foreign, NOBODY, NOBODY)
        flush_own_run(tmp_path / "run", own, names_whole_run=True)
    assert asked == []
    assert "belongs to nobody" in caplog.text


def test_an_address_with_a_password_is_not_repeated(
    tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    handed_over(tmp_path / "run", data, f"http://me:{PASSWORD}@theirs")
    flush_own_run(tmp_path / "run", f"http://me:{PASSWORD}@host", names_whole_run=True)
    flush_own_run(tmp_path / "run", "http://host", names_whole_run=True)
    assert caplog.text.count("not sent") == 2
    assert PASSWORD not in caplog.text


def test_what_the_user_says_is_where_the_password_goes(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with recorder() as (theirs, asked_there), recorder() as (own, asked_here):
        handed_over(tmp_path / "run", data, theirs)
        assert track.main([str(tmp_path / "run"), "--to", own]) == 1
    assert asked_there == []
    assert {headers["Authorization"] for _, _, headers, _ in asked_here} == {
        "Basic dmljdGltOmR1bW15LXB3"
    }
    assert not any(b"hostname" in body for *_, body in asked_here)
    secrets = (PASSWORD.encode(), b"dmljdGltOmR1bW15LXB3")
    written = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert [p for p in written if any(s in p.read_bytes() for s in secrets)] == []


def test_no_file_holds_a_token_that_the_environment_spelled_wrongly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hunt\ner2-and-more")
    Spool(tmp_path / "run", "train").metrics({"loss": 1.0}, 1)
    with recorder() as (own, _):
        flusher = Flusher(tmp_path / "run", "vssl-dist", own, only_sends=True)
        flusher.start()
        assert not flusher.close(60)
    log = (tmp_path / "run" / "spool" / "flusher.log").read_text()
    assert "MLflow refuses" in log
    assert "er2-and-more" not in log + str(why_not_all_sent(tmp_path / "run", own))


@pytest.fixture
def uri(database: Path, tmp_path: Path) -> str:
    (tmp_path / "db").mkdir()
    return sqlite_uri(Path(shutil.copy(database, tmp_path / "db")))


def replay(run: Path, uri: str) -> Run:
    """What the flusher's process does; returns the MLflow run."""
    identity = settle_identity(run)
    record = TrackingRecord.load(run, identity)
    record.tracking_uri = uri
    replayer = Replayer(run, identity, record)
    replayer.flush()
    return MlflowClient(tracking_uri=uri).get_run(replayer.run_id)


def a_run(folder: Path) -> Path:
    spool = Spool(folder, "train")
    spool.params({"name": folder.name})
    for step in (1, 2, 3):
        spool.metrics({"loss": 1 / step}, step)
    spool.status("FINISHED")
    spool.close()
    return folder


def append(run: Path, *lines: str, name: str = "train") -> None:
    with (run / "spool" / f"{name}.jsonl").open("a") as file:
        file.writelines(f"{line}\n" for line in lines)


def losses(run: Run, uri: str) -> list[tuple[int, float]]:
    history = MlflowClient(tracking_uri=uri).get_metric_history(run.info.run_id, "loss")
    return [(metric.step, metric.value) for metric in history]


def test_only_regular_files_inside_of_the_run_are_sent_and_all_others_are_named(
    tmp_path: Path, uri: str
) -> None:
    run = a_run(tmp_path / "run")
    secret = tmp_path / "id_rsa"
    secret.write_text("FAKE PRIVATE KEY")
    secret.chmod(0o600)
    (run / "export").mkdir()
    for name in ("config.yaml", "export/plot.png", "export/copied.png"):
        (run / name).write_text(name)
    (run / "export" / "copied.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(8))
    (run / "export" / "copied.png").chmod(0o644)
    (tmp_path / "notes.txt").write_text("FAKE PRIVATE KEY in a file that others may read")
    (tmp_path / "notes.txt").chmod(0o644)
    os.link(tmp_path / "notes.txt", run / "export" / "notes.png")
    os.link(run / "export" / "copied.png", tmp_path / "of-a-copy.png")
    (run / "link.png").symlink_to(secret)
    (run / "inside.png").symlink_to(run / "config.yaml")
    (run / "folder").symlink_to(tmp_path)
    os.link(secret, run / "hard.png")
    os.mkfifo(run / "pipe")
    hostile = [
        str(secret), "../id_rsa", "export/../../id_rsa", "", ".", "/", "a\0b", "link.png",
        "inside.png", "folder/id_rsa", "hard.png", "export/notes.png", "pipe", "export",
        "/dev/zero", "n\n\x1b[31m",
        str(run / "config.yaml"), f"{secret}\0.png",
    ]  # fmt: skip
    fine = ["config.yaml", "export/plot.png", "./export/copied.png"]
    for place in (*hostile, *fine):
        append(run, json.dumps({"kind": "artifact", "t": 1, "path": place}))
    there = replay(run, uri)
    artifacts = MlflowClient(tracking_uri=uri).list_artifacts(there.info.run_id)
    assert {artifact.path for artifact in artifacts} == {"config.yaml", "plot.png", "copied.png"}
    assert load_spool_cursor(run, uri).refusal_reasons.keys() == {
        f"artifact {place or 'without a name'}" for place in hostile
    }
    assert losses(there, uri) == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]
    line = str(why_not_all_sent(run, uri))
    assert line.isprintable()
    stored = [p.read_bytes() for p in (tmp_path / "db").rglob("*") if p.is_file()]
    assert not any(b"FAKE PRIVATE KEY" in content for content in stored)


@needs_root
def test_a_database_in_a_folder_of_a_group_takes_curves_and_files_of_the_whole_group(
    tmp_path: Path,
) -> None:
    """Though the run itself is closed to the group: the process that sends has a umask of 022."""
    run = a_run(tmp_path / "run")
    with shared_folder(0o2775, group=4242) as folder, shared_folder(0o3775, group=4242) as sticky:
        before = os.umask(0o022)
        try:
            replay(run, sqlite_uri(folder / "mlflow.db"))
        finally:
            os.umask(before)

        def add() -> None:
            (folder / "mlflow.db").open("r+b").close()
            (folder / "mlruns" / "vssl-dist" / "mine").mkdir()

        assert done_as_nobody(add, 4242)
        assert not done_as_nobody(add), "nobody else"
        for place, expected in ((sticky, 0o640), (folder, 0o660)):
            (place / "file").touch(0o640)
            share_with_folder_group(place / "file")
            assert (place / "file").stat().st_mode & 0o777 == expected


def test_a_database_chooses_no_server_for_files(tmp_path: Path, uri: str, data: Path) -> None:
    with recorder() as (theirs, asked):
        MlflowClient(tracking_uri=uri).create_experiment("vssl-dist", artifact_location=theirs)
        run = a_run(tmp_path / "run")
        (run / "config.yaml").touch()
        append(run, '{"kind": "artifact", "t": 1, "path": "config.yaml"}')
        replay(run, uri)
    assert asked == []
    assert theirs in load_spool_cursor(run, uri).refusal_reasons["artifact config.yaml"]


def test_a_folder_that_names_another_mlflow_run_does_not_touch_it_and_gets_its_own(
    tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "vssl_dist")
    best = replay(a_run(tmp_path / "best"), uri)
    client = MlflowClient(tracking_uri=uri)
    experiment = best.info.experiment_id
    plain = client.create_run(experiment).info.run_id  # that no version of ours has made
    for named in (best.info.run_id, plain):
        before = client.get_run(named).to_dictionary()
        run = a_run(tmp_path / f"hostile-{named}")
        append(run, '{"kind": "tags", "t": 1, "values": {"mlflow.note.content": "retracted"}}')
        TrackingRecord(settle_identity(run).uuid, tracking_uri=uri, runs={uri: named}).save(run)
        answer = probe_tracking(uri, run)
        assert answer.problem is None
        assert f"MLflow run {named}" in str(answer.note)
        flush_to_mlflow(run, uri)
        assert "with all of the history" in caplog.messages[-1]
        own = TrackingRecord.load(run, settle_identity(run)).runs[uri]
        assert own != named
        assert client.get_run(named).to_dictionary() == before
        assert len(losses(client.get_run(own), uri)) == 3
        assert probe_tracking(uri, run).note is None


def test_a_copy_with_a_forged_run_json_is_shown_apart_from_the_original(
    tmp_path: Path, uri: str
) -> None:
    first = replay(a_run(tmp_path / "a"), uri)
    forged = Path(shutil.copytree(tmp_path / "a", tmp_path / "b"))
    facts = json.loads((forged / "run.json").read_text()) | {"path": str(forged)}
    (forged / "run.json").write_text(json.dumps(facts))
    append(forged, '{"kind": "status", "t": 1, "value": "FAILED"}')
    second = replay(forged, uri)
    assert second.info.run_id != first.info.run_id
    assert losses(second, uri) == losses(first, uri)
    client = MlflowClient(tracking_uri=uri)
    assert client.get_run(first.info.run_id).info.status == "FINISHED"
    assert replay(tmp_path / "a", uri).info.run_id == first.info.run_id
    assert replay(forged, uri).info.run_id == second.info.run_id
    moved = (tmp_path / "a").rename(tmp_path / "c")
    settle_identity(moved)
    shutil.copytree(moved, tmp_path / "a")  # a copy, where MLflow says that the run is
    assert replay(moved, uri).info.run_id == first.info.run_id


def test_a_run_of_the_first_version_goes_on_in_its_mlflow_run(tmp_path: Path, uri: str) -> None:
    run = a_run(tmp_path / "run")
    (run / "run.json").unlink()  # which came later
    client = MlflowClient(tracking_uri=uri)
    tags = {"vssl_dist.run": "c" * 32, "vssl_dist.run_dir": str(run)}
    there = client.create_run(client.create_experiment("vssl-dist"), tags=tags).info.run_id
    facts = {"uuid": "c" * 32, "experiment": "vssl-dist", "tracking_uri": uri, "run_id": there}
    (run / "mlflow_run.json").write_text(json.dumps(facts))
    assert probe_tracking(uri, run).note is None
    assert replay(run, uri).info.run_id == there


def test_the_spool_does_not_say_which_run_it_is(tmp_path: Path, uri: str) -> None:
    run = a_run(tmp_path / "run")
    append(run, '{"kind": "tags", "t": 1, "values": {"vssl_dist.run": "x", "fine": "y"}}')
    there = replay(run, uri)
    assert there.data.tags["vssl_dist.run"] == settle_identity(run).uuid
    assert there.data.tags["fine"] == "y"
    assert "tag vssl_dist.run" in load_spool_cursor(run, uri).refusal_reasons


def test_hostile_lines_and_files_of_the_spool_hold_nothing_up_and_are_named(
    tmp_path: Path, uri: str
) -> None:
    run = a_run(tmp_path / "run")
    deep = '{"a":' * 900 + "1" + "}" * 900
    append(
        run,
        '{"kind": "metrics", "t": 1, "st',
        '{"kind": ["metrics"], "t": 1}',
        '{"kind": "metrics", "t": 1, "step": 4, "values": {"big": 1' + "0" * 400 + "}}",
        '{"kind": "metrics", "t": 1, "step": 4, "values": {"digits": 1' + "0" * 5000 + "}}",
        '{"kind": "metrics", "t": 1, "step": true, "values": {"yes": 1}}',
        '{"kind": "metrics", "t": 1, "step": -3, "values": {"back": 1}}',
        '{"kind": "metrics", "t": NaN, "step": 4, "values": {"time": 1}}',
        '{"kind": "metrics", "t": 1, "step": 4, "values": {"nan": NaN, "in\\n\\u001b[31m": 1}}',
        '{"kind": "params", "t": 1, "values": {"deep": ' + deep + ', "flat": 1}}',
        '{"kind": "status", "t": Infinity, "value": "FAILED"}',
        '{"kind": "artifact", "t": 1, "path": 5}',
        '{"kind": "x\\n\\u001b[31m", "t": 1}',
        "\0" * (1 << 25),
        name="other",
    )
    os.mkfifo(run / "spool" / "pipe.jsonl")
    (run / "spool" / "folder.jsonl").mkdir()
    (run / "spool" / "link.jsonl").symlink_to("/dev/zero")
    assert Spool(run, "other").last_step() == 4
    there = replay(run, uri)
    assert losses(there, uri) == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]
    assert there.data.params["flat"] == "1"
    assert is_flushed(run, uri)
    assert load_spool_cursor(run, uri).refusal_reasons.keys() == {
        "a line of other.jsonl", "metric big", "metric yes", "metric back", "metric time",
        "parameter deep", "status FAILED", "the file pipe.jsonl of the spool",
        "the file folder.jsonl of the spool", "the file link.jsonl of the spool",
    }  # fmt: skip
    assert str(why_not_all_sent(run, uri)).isprintable()


@pytest.mark.parametrize("name", ["run.json", "mlflow_run.json", "cursor.json", "flusher.json"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: os.mkfifo(path),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.write_text("[" * 100_000),
        lambda path: path.write_text('{"uuid": "\\ud800", "path": "\\ud800", "runs": {"a": 1}}'),
        lambda path: path.write_text('{"files": {"train.jsonl": {"offset": -1}}, "pid": "x"}'),
    ],
)
def test_a_damaged_note_of_a_run_is_no_crash_and_no_wait(
    name: str, spoil: Callable[[Path], object], tmp_path: Path
) -> None:
    run = a_run(tmp_path / "run")
    path = run / name if name in ("run.json", "mlflow_run.json") else run / "spool" / name
    path.unlink(missing_ok=True)
    spoil(path)
    assert not is_flushed(run, "http://host")
    assert "nobody has sent them there" in str(why_not_all_sent(run, "http://host"))
    assert Sender.load(run) is None
    if path.is_file() and not path.is_symlink():  # over others nothing is written
        assert settle_identity(run) == settle_identity(run)


@needs_root
def test_locks_of_the_tracker_are_their_users_alone_and_their_holder_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vssl_dist.tracker.identity._LOCK_WAIT_S", 0.1)
    with shared_folder() as folder:
        run = a_run(folder / "run")
        assert lease_holder(run) is None
        for lock in (run / ".run.lock", run / "spool" / "flusher.lock"):
            assert lock.stat().st_mode & 0o077 == 0
            lock.chmod(0o644)  # as earlier versions left it
        with locked_by_nobody(run / "spool" / "flusher.lock") as pid:
            line = str(why_not_all_sent(run, "http://host"))
            assert f"process {pid} of nobody" in line
            assert "flusher.lock" in line
            TrackingRecord(settle_identity(run).uuid, tracking_uri="http://host").save(run)
            start = time.monotonic()
            flush_to_mlflow(run, "http://host")
            assert time.monotonic() - start < 5, "nobody waits for a stranger"
            assert f"process {pid} of nobody" in caplog.messages[-1]
        with locked_by_nobody(run / ".run.lock") as pid:
            (run / "run.json").unlink()
            with pytest.raises(
                ConfigError, match=rf"\.run\.lock is held by process {pid} of nobody"
            ):
                settle_identity(run)
