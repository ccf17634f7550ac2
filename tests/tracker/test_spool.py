"""The spool loses nothing that was written, and never stands in its writer's way."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vssl_dist.tracker import Spool, check_tracking, default_tracking_uri, flatten, run_tags
from vssl_dist.tracker.spool import read_records

WRITE_FOR_EVER = """
import itertools, sys
from pathlib import Path
from vssl_dist.tracker import Spool
spool = Spool(Path(sys.argv[1]), "train")
for step in itertools.count():
    spool.metrics({"loss": step / 7, "x" * 200: 1.0}, step)
"""


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_records(path, 0, max_bytes=None)[0]]


def test_a_writer_killed_at_any_moment_leaves_whole_records_in_order(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITE_FOR_EVER, str(tmp_path)]
    path = tmp_path / "spool" / "train.jsonl"
    with subprocess.Popen(command) as writer:
        while not path.exists() or path.stat().st_size < 100_000:
            time.sleep(0.01)
        writer.send_signal(signal.SIGKILL)
    seen = steps(path)
    assert len(seen) > 300
    assert seen == list(range(len(seen)))


def test_a_torn_last_line_is_skipped_and_the_next_writer_goes_on(tmp_path: Path) -> None:
    Spool(tmp_path, "train").metrics({"loss": 1.0}, 1)
    path = tmp_path / "spool" / "train.jsonl"
    with path.open("ab") as file:
        file.write(b'{"kind": "metrics", "t": 1, "st')
    whole = path.read_bytes().index(b"\n") + 1
    assert read_records(path, 0)[1] == whole
    Spool(tmp_path, "train").metrics({"loss": 2.0}, 2)
    assert steps(path) == [1, 2]
    assert Spool(tmp_path, "train").last_step() == 2


def test_reading_in_pieces_is_reading_the_whole(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "train")
    for step in range(50):
        spool.metrics({"loss": step}, step)
    pieces, offset = [], 0
    while True:
        records, after = read_records(spool.path, offset, max_bytes=200)
        if after == offset:
            break
        pieces += records
        offset = after
    assert pieces == read_records(spool.path, 0, max_bytes=None)[0]


def test_every_line_is_strict_json_and_gives_the_number_back(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "train")
    given = {"nan": math.nan, "inf": math.inf, "low": -math.inf, "tiny": 1e-300, "third": 1 / 3}
    spool.metrics(given, 3)

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    record = json.loads(spool.path.read_text(), parse_constant=refuse)
    back = {key: float(value) for key, value in record["values"].items()}
    assert math.isnan(back.pop("nan"))
    del given["nan"]
    assert back == given
    assert abs(record["t"] / 1000 - time.time()) < 60


def test_a_full_disk_is_reported_once_and_never_raised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = Spool(tmp_path, "train")
    with Path("/dev/full").open("ab", buffering=0) as full:
        spool._file = full
        for step in range(3):
            spool.metrics({"loss": 0.0}, step)
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text


def test_writing_costs_far_less_than_a_millisecond(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "train")
    values = {f"metric/{i}": i / 3 for i in range(20)}
    took = []
    for step in range(500):
        start = time.perf_counter()
        spool.metrics(values, step)
        took.append(time.perf_counter() - start)
    assert statistics.median(took) < 1e-3


def test_the_place_of_a_file_inside_the_run_is_relative(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "run", "train")
    spool.artifact(tmp_path / "run" / "config.yaml")
    spool.artifact(tmp_path / "other.png")
    paths = [record["path"] for record in read_records(spool.path, 0)[0]]
    assert paths == ["config.yaml", str(tmp_path / "other.png")]


def test_a_writer_cannot_leave_the_spool(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="writer"):
        Spool(tmp_path, "../../elsewhere")


def test_nested_values_become_dotted_keys() -> None:
    nested = {"a": {"b": math.inf, "c": None}, "l": [{"x": True}, {"x": 1e-6}], "p": (1, 2)}
    flat = {"a.b": "inf", "a.c": "null", "l.0.x": "true", "l.1.x": "1e-06", "p": "[1, 2]"}
    assert flatten(nested) == flat


def test_the_default_database_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert default_tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///sub/x.db")
    assert default_tracking_uri() == f"sqlite:///{tmp_path}/sub/x.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somewhere:5000")
    assert default_tracking_uri() == "http://somewhere:5000"


@pytest.mark.parametrize(
    ("uri", "hosts", "remedy"),
    [
        ("sqlite:////tmp/mlflow.db", 2, "MLFLOW_TRACKING_URI=http"),
        ("./mlruns", 1, "sqlite:///"),
        ("file:///tmp/mlruns", 1, "sqlite:///"),
    ],
)
def test_tracking_that_cannot_work_is_named_with_the_remedy(
    uri: str, hosts: int, remedy: str
) -> None:
    line = check_tracking(uri, hosts)
    assert line is not None
    assert uri in line
    assert remedy in line
    assert "\n" not in line


def test_tags_name_the_machines_and_the_job_that_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4242")  # of a session, in which our launcher is
    monkeypatch.delenv("VSSL_SLURM_JOB", raising=False)
    tags = run_tags(world_size=4, hosts=["a", "b"])
    assert "vssl_dist.slurm_job" not in tags
    monkeypatch.setenv("VSSL_SLURM_JOB", "77")
    assert run_tags(world_size=4, hosts=["a", "b"])["vssl_dist.slurm_job"] == "77"
    assert (tags["vssl_dist.world_size"], tags["vssl_dist.hosts"]) == ("4", "a,b")


def test_the_package_is_imported_without_mlflow_and_without_torch() -> None:
    code = "import sys, vssl_dist.tracker; print({'mlflow', 'torch'} & sys.modules.keys())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.stdout.strip() == "set()"
