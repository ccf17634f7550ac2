"""A run folder is the run that it says, under any name; a copy of one is a run of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vssl_dist.tracker import Spool, settle_identity, stored_identity
from vssl_dist.tracker.cursor import is_flushed
from vssl_dist.tracker.record import TrackingRecord

COPIES = ["cp -r", "cp -a", "cp -al", "cp -as", "tar", "copytree"]
URI = "sqlite:////somewhere/mlflow.db"


def a_run(folder: Path) -> Path:
    """A run with a history, which has been sent."""
    spool = Spool(folder, "train")
    spool.metrics({"loss": 1.0}, 1)
    spool.close()
    (folder / "trace.rank0.jsonl").write_text("{}\n")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "weights").write_bytes(b"w")
    TrackingRecord(settle_identity(folder).uuid, tracking_uri=URI, runs={URI: "a" * 32}).save(
        folder
    )
    return folder


def copy(source: Path, target: Path, how: str) -> Path:
    if how == "copytree":
        shutil.copytree(source, target)
    elif how == "tar":
        target.mkdir()
        subprocess.run(f"tar c -C {source} . | tar x -C {target}", shell=True, check=True)
    else:
        subprocess.run([*how.split(), str(source), str(target)], check=True)
    return target


def content(folder: Path) -> dict[str, bytes]:
    files = [p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".lock")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_a_run_of_its_own_and_leaves_the_original_alone(how: str, tmp_path: Path) -> None:
    original = a_run(tmp_path / "a")
    before = content(original)
    branch = copy(original, tmp_path / "b", how)
    assert stored_identity(branch) is None, "not settled yet, and nothing written"
    assert content(branch) == before
    spool = Spool(branch, "train")
    spool.metrics({"loss": 2.0}, 2)
    spool.close()
    with (branch / "trace.rank0.jsonl").open("a") as file:
        file.write("{}\n")
    assert content(original) == before
    own, theirs = settle_identity(branch), settle_identity(original)
    assert own.uuid != theirs.uuid
    assert own.parent is not None
    assert (own.parent.name, own.parent.uuid, own.parent.runs) == (
        "a", theirs.uuid, {URI: "a" * 32},
    )  # fmt: skip
    assert settle_identity(branch) == own == stored_identity(branch)
    assert TrackingRecord.load(branch, own).runs == {}
    assert not is_flushed(branch, URI), "all of the history is still to be sent"
    assert (branch / "spool" / "train.jsonl").read_text().count("\n") == 2
    assert not any(path.is_symlink() for path in branch.rglob("*"))
    weights = Path("checkpoints", "weights")
    assert (branch / weights).samefile(original / weights) == (how == "cp -al")
    for lock in original.rglob("*.lock"):
        twin = branch / lock.relative_to(original)
        assert not twin.exists() or not twin.samefile(lock), "else one keeps the other waiting"


def test_what_moved_or_is_seen_through_a_link_stays_itself(tmp_path: Path) -> None:
    run = a_run(tmp_path / "a")
    uuid = settle_identity(run).uuid
    (tmp_path / "link").symlink_to(run)
    assert settle_identity(tmp_path / "link").uuid == uuid
    moved = run.rename(tmp_path / "elsewhere")
    assert settle_identity(moved).uuid == uuid
    assert settle_identity(moved).parent is None
    assert TrackingRecord.load(moved, settle_identity(moved)).runs == {URI: "a" * 32}
    # Something else has taken the old place: another run, or none.
    again = moved.rename(tmp_path / "third")
    a_run(tmp_path / "elsewhere")
    assert settle_identity(again).uuid == uuid
    assert settle_identity(tmp_path / "elsewhere").uuid != uuid


def test_a_copy_whose_original_is_gone_has_taken_its_place(tmp_path: Path) -> None:
    run = a_run(tmp_path / "a")
    uuid = settle_identity(run).uuid
    saved = copy(run, tmp_path / "saved", "cp -a")
    shutil.rmtree(run)
    assert settle_identity(saved).uuid == uuid


def test_copies_of_copies_and_what_is_copied_back_are_all_runs_of_their_own(tmp_path: Path) -> None:
    first = a_run(tmp_path / "a")
    second = copy(first, tmp_path / "b", "cp -a")
    unsettled = copy(second, tmp_path / "c", "cp -a")
    settle_identity(second)
    third = copy(second, tmp_path / "d", "cp -al")
    parents = {run.name: settle_identity(run).parent for run in (first, second, unsettled, third)}
    names = {name: parent.name if parent else None for name, parent in parents.items()}
    assert names == {"a": None, "b": "a", "c": "a", "d": "b"}
    moved = first.rename(tmp_path / "moved")
    settle_identity(moved)
    back = copy(moved, tmp_path / "a", "cp -a")
    uuids = [settle_identity(run).uuid for run in (moved, second, unsettled, third, back)]
    assert len(set(uuids)) == 5


def test_two_mounts_that_number_files_differently_are_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path / "mount" / "a")
    uuid = settle_identity(run).uuid
    (tmp_path / "other").symlink_to(tmp_path / "mount")
    # A link in place of a second mount, and files that do not look the same through it.
    same = Path.samefile

    def differs(self: Path, other: str | Path) -> bool:
        return same(self, other) and str(self) == str(other)

    monkeypatch.setattr(Path, "samefile", differs)
    seen = tmp_path / "other" / "a"
    assert settle_identity(seen).uuid == uuid
    assert settle_identity(seen).parent is None
    assert not [p for p in run.iterdir() if "probe" in p.name]


def test_a_folder_that_may_not_be_read_any_more_is_somebody_elses(tmp_path: Path) -> None:
    run = a_run(tmp_path / "theirs" / "a")
    branch = copy(run, tmp_path / "b", "cp -a")
    tmp_path.chmod(0o777)
    branch.chmod(0o777)
    (tmp_path / "theirs").chmod(0o700)
    child = os.fork()
    if child == 0:
        if os.geteuid() == 0:
            os.seteuid(65534)
        else:
            (tmp_path / "theirs").chmod(0)
        os._exit(0 if stored_identity(branch) is None else 1)
    status = os.waitpid(child, 0)[1]
    (tmp_path / "theirs").chmod(0o700)
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_run_from_before_run_json_keeps_its_uuid_and_its_copy_gets_one(tmp_path: Path) -> None:
    run = a_run(tmp_path / "a")
    uuid = settle_identity(run).uuid
    (run / "run.json").unlink()
    (run / "config.yaml").write_text(f"out: {tmp_path}\nname: a\n")
    facts = json.loads((run / "mlflow_run.json").read_text())
    del facts["runs"]  # which came with run.json
    (run / "mlflow_run.json").write_text(json.dumps(facts | {"run_id": "a" * 32}))
    branch = copy(run, tmp_path / "b", "cp -a")
    assert settle_identity(branch).uuid != uuid
    assert settle_identity(run).uuid == uuid
    assert TrackingRecord.load(run, settle_identity(run)).runs == {URI: "a" * 32}
    assert settle_identity(branch).parent is not None


@pytest.mark.parametrize(
    "text",
    [
        "", "{}", "[1]", "[" * 100_000, '{"uuid": 5, "path": "/x"}', '{"uuid": "a", "path": null}',
        '{"uuid": "a", "path": "/a\\u0000b"}', '{"uuid": "it\'s", "path": "/x"}',
    ],
)  # fmt: skip
def test_a_damaged_run_json_is_made_anew_from_what_else_is_known(text: str, tmp_path: Path) -> None:
    run = a_run(tmp_path / "a")
    uuid = settle_identity(run).uuid
    (run / "run.json").write_text(text)
    assert settle_identity(run).uuid == uuid, "mlflow_run.json has it, too"
    (run / "mlflow_run.json").write_text("{")
    (run / "run.json").write_text(text)
    assert settle_identity(run).uuid not in (uuid, "a", "")
    assert settle_identity(run) == stored_identity(run)
    assert TrackingRecord.load(run, settle_identity(run)).runs == {}


@pytest.mark.parametrize("runs", [[1], None, "x"])
def test_a_copy_with_a_damaged_record_is_a_copy(runs: object, tmp_path: Path) -> None:
    run = a_run(tmp_path / "a")
    facts = json.loads((run / "mlflow_run.json").read_text()) | {"runs": runs}
    branch = copy(run, tmp_path / "b", "cp -a")
    (branch / "mlflow_run.json").write_text(json.dumps(facts))
    parent = settle_identity(branch).parent
    assert parent is not None
    assert (parent.name, parent.uuid) == ("a", settle_identity(run).uuid)


def test_a_path_that_is_none_and_a_parent_that_is_none_leave_the_run_itself(tmp_path: Path) -> None:
    for path in ("/" + "x" * 5000, "elsewhere/b"):
        facts = {"uuid": "a" * 32, "path": path, "parent": {"name": 1}}
        (tmp_path / "run.json").write_text(json.dumps(facts))
        assert settle_identity(tmp_path).uuid == "a" * 32
        assert settle_identity(tmp_path).parent is None


@pytest.mark.parametrize("there", [True, False])
def test_which_run_a_folder_is_is_not_written_through_a_link_out_of_it(
    tmp_path: Path, there: bool
) -> None:
    """Whoever unpacks an archive owns its links."""
    run, mine = tmp_path / "run", tmp_path / ".bashrc"
    run.mkdir()
    if there:
        mine.write_text("mine")
    (run / "run.json").symlink_to(mine)
    with pytest.raises(OSError, match="leads out of its folder: remove it"):
        settle_identity(run)
    assert mine.exists() == there
    assert not there or mine.read_text() == "mine"
