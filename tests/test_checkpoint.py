"""A checkpoint is whole or it does not exist, whatever dies, breaks or fills up."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import run_ranks
from vssl_dist import checkpoint, dist, durable, sealed
from vssl_dist.checkpoint import (
    commit_checkpoint,
    delete_old_checkpoints,
    find_newest_checkpoint,
    read_manifests,
)
from vssl_dist.errors import CheckpointError


def content(step: int) -> dict[str, bytes]:
    """What a checkpoint of ``step`` holds: a large file, a small one, and one in a folder."""
    stream = random.Random(step)
    return {
        "weights.bin": stream.randbytes(300_000),
        "deepspeed/shard.bin": stream.randbytes(5_000),
        "state.json": b'{"step": %d}' % step,
    }


def writer(step: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name, data in content(step).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)

    return write


def save(root: Path, step: int, write: Callable[[Path], None] | None = None) -> Path:
    return commit_checkpoint(
        root, step=step, write_files=write or writer(step), facts={"position": step * 10}
    )


def assert_whole(path: Path, step: int) -> None:
    for name, data in content(step).items():
        assert (path / name).read_bytes() == data


def in_child(work: Callable[[], object]) -> int:
    """Run ``work`` in a forked process; its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_commit_is_found_again_with_its_facts(tmp_path: Path) -> None:
    assert find_newest_checkpoint(tmp_path / "new") is None
    path = save(tmp_path / "new", 7)
    assert path == tmp_path / "new" / "step-00000007"
    found = find_newest_checkpoint(tmp_path / "new")
    assert found is not None
    assert (found.path, found.step, found.run_facts) == (path, 7, {"position": 70})
    assert_whole(path, 7)
    assert [(m["step"], m["facts"]) for m in read_manifests(tmp_path / "new")] == [
        (7, {"position": 70})
    ]


def test_newest_is_the_highest_step_whatever_the_clock_said(tmp_path: Path) -> None:
    for step in (9, 100_000_000, 20):
        save(tmp_path, step)
    for path in tmp_path.iterdir():
        os.utime(path, (0, 2**32 if path.name == "step-00000009" else 0))
    found = find_newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 100_000_000


def test_a_step_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    save(tmp_path, 1)

    def fail(folder: Path) -> None:
        raise AssertionError("written twice")

    assert save(tmp_path, 1, fail) == tmp_path / "step-00000001"


class Killer:
    """Kills its own process at the ``moment``-th call of any function it has replaced."""

    def __init__(self, moment: int) -> None:
        self.left = moment

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call


STEPS_OF_A_COMMIT = [
    (Path, "mkdir"),
    (Path, "write_bytes"),
    (Path, "rename"),
    (Path, "replace"),
    (os, "fsync"),
    (os, "open"),
    (durable, "sync_to_disk"),
    (durable, "file_sha256"),
    (checkpoint, "_publish_checkpoint"),
]


def test_killed_before_any_of_its_steps_a_commit_leaves_the_last_one_and_no_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moment = 0
    while True:
        moment += 1
        root = tmp_path / str(moment)
        save(root, 1)

        def second(root: Path = root, moment: int = moment) -> None:
            killer = Killer(moment)
            with pytest.MonkeyPatch.context() as patch:
                for place, name in STEPS_OF_A_COMMIT:
                    patch.setattr(place, name, killer.before(getattr(place, name)))
                save(root, 2)

        survived = in_child(second) == 0
        found = find_newest_checkpoint(root)
        assert found is not None
        assert_whole(found.path, found.step)
        assert sorted(p.name for p in root.iterdir()) == [
            f"step-{step:08d}" for step in range(1, found.step + 1)
        ]
        if survived:
            break
    assert found.step == 2
    assert moment > 25  # it did die in between


def test_killed_at_any_time_a_run_of_commits_loses_nothing_committed(tmp_path: Path) -> None:
    clock = random.Random(0)
    seen = 0
    for _ in range(15):
        child = os.fork()
        if child == 0:
            for step in range(seen + 1, seen + 1000):
                save(tmp_path, step)
                delete_old_checkpoints(tmp_path, keep_last=2, keep_every=None)
            os._exit(0)
        time.sleep(clock.uniform(0.005, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        before = max((m["step"] for m in read_manifests(tmp_path)), default=0)
        found = find_newest_checkpoint(tmp_path)
        step = found.step if found else 0
        assert step == before >= seen
        seen = step
        if found:
            assert_whole(found.path, step)
        assert not list(tmp_path.glob(".*"))
    assert seen > 5


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "cut": cut,
    "emptied": lambda path: path.write_bytes(b""),
    "removed": Path.unlink,
    "other": lambda path: path.write_bytes(b"[1, 2]"),
}
FILES = [*content(2), sealed.MANIFEST_NAME]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_any_damage_to_any_file_is_found_and_the_one_before_is_taken(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    DAMAGE[damage](save(tmp_path, 2) / name)
    found = find_newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert_whole(found.path, 1)
    assert (tmp_path / "step-00000002.corrupt").is_dir()
    (warning,) = caplog.messages
    assert "\n" not in warning
    assert "step-00000002" in warning
    assert Path(name).name in warning
    save(tmp_path, 2)  # the name is free again
    again = find_newest_checkpoint(tmp_path)
    assert again is not None
    assert_whole(again.path, 2)


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    path = save(tmp_path, 1) / sealed.MANIFEST_NAME
    whole = path.read_bytes()
    for place in random.Random(0).sample(range(len(whole)), 60):
        bit = bytes([whole[place] ^ 1])
        if whole[place : place + 1].isspace() and bit.isspace():
            continue
        path.write_bytes(whole[:place] + bit + whole[place + 1 :])
        assert not read_manifests(tmp_path)
    path.write_bytes(whole)
    assert read_manifests(tmp_path)


def test_with_every_checkpoint_damaged_a_run_refuses_to_start_over_today_and_tomorrow(
    tmp_path: Path,
) -> None:
    for step in (1, 2):
        flip(save(tmp_path, step) / "weights.bin")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="start again from step 0"):
            find_newest_checkpoint(tmp_path)
    assert len(list(tmp_path.glob("step-*.corrupt"))) == 2


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path: Path) -> None:
    save(tmp_path, 1).rename(tmp_path / "step-00000005")
    with pytest.raises(CheckpointError):
        find_newest_checkpoint(tmp_path)


def test_a_checkpoint_of_another_format_is_refused_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "MANIFEST_FORMAT", "vssl-dist/checkpoint-99")
        path = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="checkpoint-99"):
        find_newest_checkpoint(tmp_path)
    assert path.is_dir()


def test_foreign_files_are_ignored_and_remains_are_swept(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    (path / "notes.txt").write_text("mine")
    (tmp_path / "latest").write_text("../elsewhere")
    (tmp_path / "step-best").mkdir()
    (tmp_path / "step-00000009").write_text("a file")
    for left in (".tmp-00000004-0123456789ab", ".trash-ba9876543210-step-00000001"):
        shutil.copytree(path, tmp_path / left)
    found = find_newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "latest",
        "step-00000003",
        "step-00000009",
        "step-best",
    ]


def test_a_full_disk_costs_only_the_checkpoint_that_did_not_fit(tmp_path: Path) -> None:
    save(tmp_path, 1)

    def second() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        with pytest.raises(CheckpointError, match=r"rank 0: OSError: .*File too large"):
            save(tmp_path, 2)
        assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**40, resource.RLIM_INFINITY))
        save(tmp_path, 2)

    assert in_child(second) == 0
    found = find_newest_checkpoint(tmp_path)
    assert found is not None
    assert_whole(found.path, 2)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=800k tmpfs {disk} 2>/dev/null") != 0:
        pytest.skip("mounting a small disk needs root")
    yield disk
    os.system(f"umount {disk}")


def test_on_a_disk_too_small_for_two_the_old_checkpoint_is_not_sacrificed(small_disk: Path) -> None:
    for step in (1, 2):
        save(small_disk, step)
    with pytest.raises(CheckpointError, match="No space left"):
        save(small_disk, 3)
    found = find_newest_checkpoint(small_disk)
    assert found is not None
    assert_whole(found.path, 2)
    delete_old_checkpoints(small_disk, keep_last=1, keep_every=None)
    save(small_disk, 3)


@pytest.mark.parametrize(
    ("last", "every", "kept"),
    [
        (1, None, [6]),
        (2, None, [5, 6]),
        (2, 3, [3, 5, 6]),
        (1, 2, [2, 4, 6]),
        (9, None, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_retention_keeps_the_newest_and_the_milestones(
    tmp_path: Path, last: int, every: int | None, kept: list[int]
) -> None:
    for step in range(1, 7):
        save(tmp_path, step)
    delete_old_checkpoints(tmp_path, last, every)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{step:08d}" for step in kept]


def test_a_published_file_is_never_half_there(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "card.json"
    durable.write_durably(path, b"old")

    def replace() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match="large"):
            durable.write_durably(path, b"x" * 2000)

    assert in_child(replace) == 0
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["card.json"]


def _on_two_ranks(root: Path) -> dict[str, Any]:
    """Everything that needs two ranks, in one launch; what this rank saw."""
    mine = f"rank-{dist.rank()}.bin"

    def write(folder: Path) -> None:
        (folder / mine).write_bytes(os.urandom(1000))

    def fail(folder: Path) -> None:
        write(folder)
        if dist.rank() == 1:
            raise OSError("the disk of rank 1\nis full")

    seen: dict[str, Any] = {}
    commit_checkpoint(root, step=1, write_files=write, facts={"position": 10})
    seen["refused"] = _refusal(lambda: commit_checkpoint(root, step=2, write_files=fail, facts={}))
    seen["after failure"] = sorted(p.name for p in root.iterdir())
    commit_checkpoint(
        root, step=3 + dist.rank(), write_files=write, facts={"position": 30 + dist.rank()}
    )
    found = find_newest_checkpoint(root)
    assert found
    seen["newest"] = (found.step, found.run_facts, sorted(p.name for p in found.path.iterdir()))
    if dist.rank() == 0:
        flip(found.path / "rank-1.bin")
    dist.barrier()
    found = find_newest_checkpoint(root)
    assert found
    seen["fallback"] = found.step
    elsewhere = root if dist.rank() == 0 else root.with_name("elsewhere")
    seen["blind"] = _refusal(lambda: find_newest_checkpoint(elsewhere))
    seen["left alone"] = (root / "step-00000001").is_dir()
    return seen


def _refusal(work: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        work()
    return str(caught.value)


def test_ranks_commit_fail_verify_and_refuse_together(tmp_path: Path) -> None:
    root = tmp_path / "run"
    seen, same = run_ranks(_on_two_ranks, 2, root)
    assert seen.pop("blind").startswith(f"rank 1 cannot see {root / 'step-00000001'}:")
    assert same.pop("blind").startswith("rank 1 cannot see")
    assert seen == same
    assert seen["refused"] == "rank 1: OSError: the disk of rank 1"
    assert seen["after failure"] == ["step-00000001"]
    files = ["manifest.json", "rank-0.bin", "rank-1.bin"]
    assert seen["newest"] == (3, {"position": 30}, files)
    assert seen["fallback"] == 1
    assert seen["left alone"]
