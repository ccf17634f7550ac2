"""What a look before the run says of databases and servers that will not take its curves."""

from __future__ import annotations

import errno
import fcntl
import http.server
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.store.db.utils import _get_latest_schema_revision

from vssl_dist.tracker import TrackingRecord, TrackingReport, probe_tracking, settle_identity
from vssl_dist.tracker.address import sqlite_uri
from vssl_dist.tracker.files import schema_history


@pytest.fixture(scope="module")
def template(database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of MLflow's with our experiment and the run ``run_id`` in it."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copy(database, folder)
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    experiment = client.create_experiment("vssl-dist", artifact_location=str(folder))
    run = client.create_run(experiment, tags={"vssl_dist.run": "u" * 32})
    (folder / "run_id").write_text(run.info.run_id)
    return folder


@pytest.fixture
def file(template: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "50 % of größe?"
    folder.mkdir()
    return Path(shutil.copy(template / "mlflow.db", folder))


def execute(file: Path, *statements: str) -> None:
    with closing(sqlite3.connect(file)) as base:
        for statement in statements:
            base.execute(statement)
        base.commit()


def answer(file: Path) -> TrackingReport:
    """What a look at a database says; it changes nothing there."""

    def state() -> dict[str, tuple[bytes | None, int]]:
        paths = [file.parent, *file.parent.rglob("*")]
        return {
            str(p): (p.read_bytes() if p.is_file() else None, p.stat().st_mtime_ns) for p in paths
        }

    before = state()
    given = probe_tracking(sqlite_uri(file), file.parent / "run")
    assert state() == before
    return given


def said(given: TrackingReport) -> str:
    """The one line of a problem."""
    assert given.problem is not None
    assert given.passing_problem is None
    assert "\n" not in given.problem
    return given.problem


def test_the_newest_schema_is_known_without_mlflow() -> None:
    newest, earlier = schema_history()
    assert newest == _get_latest_schema_revision()
    assert "451aebb31d03" in earlier


def test_a_database_that_will_do_or_that_will_be_made_is_nothing_to_speak_of(
    file: Path, tmp_path: Path
) -> None:
    assert answer(file) == TrackingReport()
    (tmp_path / "empty.db").touch()
    for fresh in (tmp_path / "no" / "such" / "folder" / "m.db", tmp_path / "empty.db"):
        assert probe_tracking(sqlite_uri(fresh), tmp_path / "run") == TrackingReport()
    assert not (tmp_path / "no").exists()
    other = tmp_path / "other.db"
    execute(other, "CREATE TABLE mine (x)")
    assert answer(other) == TrackingReport()


def test_a_binned_experiment_and_a_binned_run_are_named_with_what_brings_them_back(
    file: Path, template: Path
) -> None:
    execute(file, "UPDATE experiments SET lifecycle_stage = 'deleted' WHERE name = 'vssl-dist'")
    assert "mlflow experiments restore --experiment-id 1" in said(answer(file))
    execute(file, "UPDATE experiments SET lifecycle_stage = 'active'",
            "UPDATE runs SET lifecycle_stage = 'deleted'")  # fmt: skip
    assert answer(file) == TrackingReport(), "that run is none of ours"
    run_id = (template / "run_id").read_text()
    remedy = f"mlflow runs restore --run-id {run_id}"
    run = file.parent / "run"
    TrackingRecord(settle_identity(run).uuid, tracking_uri=sqlite_uri(file),
           runs={sqlite_uri(file): run_id}).save(run)  # fmt: skip
    note = str(answer(file).note)
    assert f"MLflow run {run_id}" in note
    assert "is another run's" in note
    (run / "mlflow_run.json").unlink()
    execute(
        file, f"UPDATE tags SET value = '{settle_identity(run).uuid}' WHERE key = 'vssl_dist.run'"
    )
    assert remedy in said(answer(file)), "known by its uuid"


@pytest.mark.parametrize(
    ("version", "remedy"),
    [
        ("'cc1f77228345'", "mlflow db upgrade"),
        ("'451aebb31d03'", "mlflow db upgrade"),
        ("'ffffffffffff'", "newer MLflow"),
        (None, "mlflow db upgrade"),
    ],
)
def test_a_database_of_another_mlflow_is_refused(
    file: Path, version: str | None, remedy: str
) -> None:
    change = f"UPDATE alembic_version SET version_num = {version}"
    execute(file, change if version else "DROP TABLE alembic_version")
    assert remedy in said(answer(file))


def test_what_is_no_database_or_cannot_hold_one_is_refused(file: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.db"
    text.write_text("not a database, but longer than a header of one\n" * 9)
    assert "no sqlite database" in said(answer(text))
    assert "is no file" in said(answer(file.parent))
    assert "no folder" in said(probe_tracking(sqlite_uri(text / "mlflow.db"), tmp_path))
    for name in ("x" * 300, "%00"):
        assert "tracking to" in said(
            probe_tracking(f"sqlite:///{tmp_path}/{name}", tmp_path / "run")
        )
    file.write_bytes(file.read_bytes()[:100] + bytes(4096))
    assert "malformed" in said(answer(file))


@pytest.mark.parametrize(
    ("tables", "is_in_the_way"),
    [
        (["studies"], False),
        (["runs", "tags"], True),
        (["experiments"], True),
        (["alembic_version"], False),  # which a failed attempt of MLflow's leaves
        (["studies", "alembic_version"], True),
    ],
)
def test_a_database_of_another_program_is_used_where_mlflow_can_use_it(
    tables: list[str], is_in_the_way: bool, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs.db"
    execute(theirs, *(f"CREATE TABLE {name} (version_num TEXT)" for name in tables))
    if is_in_the_way:
        execute(theirs, *(f"INSERT INTO {name} VALUES ('v3.0.0.a')" for name in tables))
        assert "another program's" in said(answer(theirs))
    else:
        assert answer(theirs) == TrackingReport()


def test_databases_with_a_log_are_read_without_touching_it(file: Path) -> None:
    binned = "UPDATE experiments SET lifecycle_stage = 'deleted' WHERE name = 'vssl-dist'"
    execute(file, "PRAGMA journal_mode = WAL")
    assert answer(file) == TrackingReport()
    # The writer is a process of its own, as MLflow's is: connections of one share their log.
    code = (
        "import sqlite3, sys; base = sqlite3.connect(sys.argv[1]);"
        "base.execute(sys.argv[2]); base.commit(); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(file), binned],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as writer:  # fmt: skip
        assert writer.stdout is not None
        writer.stdout.readline()
        assert file.with_name(f"{file.name}-wal").stat().st_size
        assert "in the bin" in said(answer(file)), "it stands in the log only"


def test_rights_are_those_of_who_asks(template: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:  # where anybody may look
        lines = refused_by_rights(Path(shutil.copy(template / "mlflow.db", folder)))
    assert "no right to write into it" in lines[0]
    assert "no right to write in" in lines[1]


def refused_by_rights(file: Path) -> list[str]:
    """What a look says of a database, and of a folder, that others may only read."""
    results = []
    for mode, folder_mode in ((0o444, 0o777), (0o666, 0o555)):
        file.chmod(mode)
        file.parent.chmod(folder_mode)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            if os.geteuid() == 0:
                os.seteuid(65534)
            os.write(writer, str(probe_tracking(sqlite_uri(file), Path("/run")).problem).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            results.append(pipe.read())
        os.waitpid(child, 0)
    file.parent.chmod(0o700)
    return results


def test_a_file_system_without_locks_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert "has no locks" in said(answer(file))


def test_a_database_that_is_busy_is_a_doubt_within_the_time(file: Path) -> None:
    with closing(sqlite3.connect(file)) as base:
        base.execute("BEGIN EXCLUSIVE")
        start = time.monotonic()
        given = probe_tracking(sqlite_uri(file), file.parent / "my run", timeout_s=0.5)
        assert time.monotonic() - start < 1
    assert given.problem is None
    assert "locked" in str(given.passing_problem)
    assert f"launch/track.py '{file.parent}/my run'" in str(given.passing_problem)


class Reply(http.server.BaseHTTPRequestHandler):
    """Answers everything with what its server has been given."""

    def do_GET(self) -> None:
        status, body = self.server.reply(self.path, dict(self.headers))  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silent."""


@contextmanager
def answering(reply: object) -> Iterator[str]:
    """A server of this machine; ``reply`` gets path and headers and gives status and body."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Reply) as server:
        server.reply = reply  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/prefix"
        server.shutdown()
        thread.join()


def experiment(stage: str) -> bytes:
    return json.dumps({"experiment": {"experiment_id": "7", "lifecycle_stage": stage}}).encode()


MISSING = json.dumps({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such"}).encode()


@pytest.mark.parametrize(
    ("status", "body", "problem", "passing_problem"),
    [
        (200, experiment("active"), None, None),
        (404, MISSING, None, None),
        (200, experiment("deleted"), "experiments restore --experiment-id 7", None),
        (200, b"<html>Welcome to nginx</html>", "is no MLflow server", None),
        (404, b"<html>not found</html>", "is no MLflow server", None),
        (200, b'{"status": "ok"}', "is no MLflow server", None),
        (200, b"[1]", "is no MLflow server", None),
        (404, b'{"detail": "Not Found"}', "is no MLflow server", None),
        (200, b'{"experiment": "none"}', "is no MLflow server", None),
        (401, b"You are not authenticated", "MLFLOW_TRACKING_USERNAME", None),
        (403, b"Permission denied", "MLFLOW_TRACKING_USERNAME", None),
        (403, b"Invalid Host header - possible DNS rebinding attack detected", "--allowed-hosts",
         None),
        (429, b"slow down", None, "HTTP 429"),
        (408, b"", None, "HTTP 408"),
        (502, b"<html>Bad gateway</html>", None, "HTTP 502"),
        (500, b'{"error_code": "INTERNAL_ERROR"}', None, "HTTP 500"),
    ],
)  # fmt: skip
def test_what_a_server_answers_is_a_problem_or_a_doubt_or_neither(
    status: int, body: bytes, problem: str | None, passing_problem: str | None, tmp_path: Path
) -> None:
    with answering(lambda path, headers: (status, body)) as uri:
        given = probe_tracking(uri, tmp_path / "run")
    for line, expected in ((given.problem, problem), (given.passing_problem, passing_problem)):
        assert (line is None) == (expected is None)
        assert expected is None or expected in str(line)
        assert "\n" not in str(line)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("raw", "passing_problem", "problem"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", "IncompleteRead", None),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\nno", "decompress", None),
        (b"no HTTP\r\n\r\n", "no HTTP", None),
        (b"", "closed connection", None),
        (b"HTTP/1.1 302 Found\r\nLocation: http://[no\r\n\r\n", None, "cannot be asked"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000, None, "is no MLflow server"),
    ],
)
def test_half_an_answer_is_a_doubt_and_nonsense_a_problem(
    raw: bytes, passing_problem: str | None, problem: str | None, tmp_path: Path
) -> None:
    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(raw)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        given = probe_tracking(f"http://127.0.0.1:{listener.getsockname()[1]}", tmp_path)
        thread.join()
    assert (passing_problem or "None") in str(given.passing_problem)
    assert (problem or "None") in str(given.problem)
    assert "nothing within" not in str(given.passing_problem), "it has not hung"


def test_a_look_that_cannot_be_asked_for_says_why_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "cannot be asked" in said(probe_tracking(f"http://{'x' * 99}.org", tmp_path))
    for token in ("secr\net", "secr\u0436et"):
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", token)
        line = said(probe_tracking("http://127.0.0.1:1", tmp_path))
        assert "password or token" in line
        assert "secr" not in line


def test_a_binned_run_of_a_server_is_named(tmp_path: Path) -> None:
    tags = [{"key": "vssl_dist.run", "value": "of another"}]
    run = {"info": {"lifecycle_stage": "deleted"}, "data": {"tags": tags}}

    def reply(path: str, headers: dict[str, str]) -> tuple[int, bytes]:
        named = f"runs/get?run_id={'a' * 32}" in path
        return (200, json.dumps({"run": run}).encode()) if named else (404, MISSING)

    with answering(reply) as uri:
        assert probe_tracking(uri, tmp_path) == TrackingReport()
        TrackingRecord(settle_identity(tmp_path).uuid, tracking_uri=uri, runs={uri: "a" * 32}).save(
            tmp_path
        )
        assert "is another run's" in str(probe_tracking(uri, tmp_path).note)
        tags[0]["value"] = settle_identity(tmp_path).uuid
        assert f"mlflow runs restore --run-id {'a' * 32}" in said(probe_tracking(uri, tmp_path))


def test_a_look_signs_as_mlflow_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def reply(path: str, headers: dict[str, str]) -> tuple[int, bytes]:
        seen.append(headers.get("Authorization"))
        return 404, MISSING

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow" / "credentials").write_text(
        "[mlflow]\nmlflow_tracking_username = me\nmlflow_tracking_password = a%b\n"
    )
    with answering(reply) as uri:
        probe_tracking(uri, tmp_path)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "you")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "c")
        probe_tracking(uri, tmp_path)
        monkeypatch.setenv("HOME", "/")
        monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t")
        probe_tracking(uri, tmp_path)
    assert seen == ["Basic bWU6YSVi", "Basic eW91OmM=", "Bearer t"]


def test_who_does_not_answer_is_a_doubt_within_the_time(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        start = time.monotonic()
        given = probe_tracking(f"http://127.0.0.1:{port}", tmp_path, timeout_s=0.3)
        assert time.monotonic() - start < 0.6
        assert "does not answer" in str(given.passing_problem)
    given = probe_tracking(f"http://127.0.0.1:{port}", tmp_path)
    assert "refused" in str(given.passing_problem)
    assert f"python launch/track.py {tmp_path}" in str(given.passing_problem)
    assert "secure" in said(tls_to_plain(tmp_path))


def tls_to_plain(run: Path) -> TrackingReport:
    with answering(lambda path, headers: (200, b"")) as uri:
        return probe_tracking(uri.replace("http:", "https:"), run)


def test_a_look_imports_neither_mlflow_nor_torch(file: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from vssl_dist.tracker import probe_tracking;"
        "given = probe_tracking(sys.argv[1], Path('/run'));"
        "print(given.problem is None, {'mlflow', 'torch', 'alembic'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, sqlite_uri(file)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "True set()"
