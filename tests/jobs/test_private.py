"""A run folder is its user's alone: what others planted is refused, their writing is ended."""

from __future__ import annotations

import os
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.others import NOBODY, done_as_nobody, link_of_nobody, needs_root, shared_folder
from vssl_dist.errors import ConfigError
from vssl_dist.jobs import (
    owner,
    private,
    slurm,
)
from vssl_dist.jobs.resources import Resources, resolve_for_slurm

GROUP = 4242


def dead(job: str) -> bool:
    return False


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(autouse=True)
def lab_umask() -> Iterator[None]:
    """The umask that lets a group work together, and lasts as long as the test."""
    before = os.umask(0o002)
    yield
    os.umask(before)


@pytest.fixture
def lab() -> Iterator[Path]:
    """A group's folder, as clusters have them: who is in the group may write."""
    with shared_folder(0o2775, group=GROUP) as folder:
        yield folder


@pytest.fixture
def older(lab: Path) -> Path:
    """A run that an earlier version wrote there under that umask."""
    run = lab / "runs" / "a"
    for name in ("checkpoints/step-1", "slurm", "spool", "export", "logs"):
        (run / name).mkdir(parents=True)
    for name in ("config.yaml", "launch.yaml", "checkpoints/step-1/x.pt", "logs/rank-0.log"):
        (run / name).touch()
    return run


def everything(run: Path) -> list[Path]:
    return [run, *run.rglob("*")]


def test_others_of_the_group_read_a_new_run_and_cannot_write_in_it_and_have_runs_beside_it(
    lab: Path,
) -> None:
    run = lab / "runs" / "a"
    owner.claim(run, dead)
    (run / "checkpoints").mkdir()
    (run / "config.yaml").touch()
    assert {mode(path) & 0o022 for path in everything(run)} == {0}
    assert mode(run) & 0o055 == 0o055
    assert mode(run.parent) & 0o020, "colleagues may have runs there, too"


def test_an_older_run_that_a_group_could_write_goes_on_closed_and_says_so(
    older: Path, caplog: pytest.LogCaptureFixture
) -> None:
    owner.claim(older, dead)
    assert {mode(path) & 0o022 for path in everything(older)} == {0}
    assert mode(older) & 0o055 == 0o055
    assert mode(older / "logs" / "rank-0.log") & 0o044 == 0o044
    (line,) = caplog.messages
    assert f"others could write in {older}" in line
    owner.claim(older, dead)
    assert caplog.messages == [line], "only once"


def test_looking_changes_nothing(older: Path) -> None:
    before = [(path, mode(path)) for path in everything(older)]
    seen = private.survey_permissions(older)
    assert seen.writable_by_others[0] == older
    assert [(path, mode(path)) for path in everything(older)] == before


@needs_root
def test_nobody_of_the_group_can_put_another_pickle_into_a_claimed_run(older: Path) -> None:
    def swap() -> None:
        (older / "slurm").rename(older / "slurm.old")
        (older / "slurm").mkdir()

    owner.claim(older, dead)
    assert not done_as_nobody(swap, GROUP)
    assert not done_as_nobody(lambda: (older / "launch.yaml").write_text("x"), GROUP)
    assert not done_as_nobody(lambda: (older / "checkpoints" / "x").touch(), GROUP)
    assert done_as_nobody(lambda: (older / "launch.yaml").read_text(), GROUP)


@needs_root
@pytest.mark.parametrize(
    "place", ["launch.yaml", "owner.json", "extra", "slurm/7_submitted.pkl", "checkpoints/step-9"]
)
def test_what_others_planted_where_a_run_is_code_is_refused_by_name(
    older: Path, place: str
) -> None:
    planted = older / place
    if "step" in place:
        planted.mkdir()
    else:
        planted.touch()
    os.chown(planted, NOBODY, NOBODY)
    before = sorted(older.rglob("*"))
    with pytest.raises(ConfigError, match=f"{planted} belongs to nobody"):
        owner.claim(older, dead)
    assert sorted(older.rglob("*")) == before, "nothing was written"


@needs_root
@pytest.mark.parametrize("place", ["config.yaml", "logs", "spool/train.jsonl", "export/x.json"])
def test_a_link_of_another_user_is_refused_wherever_it_is(older: Path, place: str) -> None:
    link = older / place
    if link.is_dir():
        (link / "rank-0.log").unlink()
        link.rmdir()
    link.unlink(missing_ok=True)
    link_of_nobody(link, older.parent / "elsewhere")
    with pytest.raises(ConfigError, match=f"{link} is a link that nobody made: remove it"):
        owner.claim(older, dead)


@needs_root
def test_a_run_folder_of_another_user_or_behind_his_link_is_refused_before_anything_is_written(
    lab: Path,
) -> None:
    theirs = lab / "theirs"
    theirs.mkdir()
    os.chown(theirs, NOBODY, NOBODY)
    link_of_nobody(lab / "link", lab / "mine")
    (lab / "mine").mkdir()
    for run, reason in ((theirs, "belongs to nobody"), (lab / "link", "link that nobody made")):
        with pytest.raises(ConfigError, match=reason):
            owner.claim(run, dead)
    assert list(theirs.iterdir()) == list((lab / "mine").iterdir()) == []


@needs_root
def test_a_colleague_s_results_are_named_and_are_no_reason_to_lose_a_run(
    older: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = older / "export" / "knn-00000004.json"
    theirs.touch()
    os.chown(theirs, NOBODY, NOBODY)
    owner.claim(older, dead)
    assert f"{theirs} belongs to nobody" in caplog.text


def test_a_run_is_claimed_by_its_own_name_and_not_by_that_of_a_link(older: Path) -> None:
    link = older.parent / "link"
    link.symlink_to(older)
    before = mode(older)
    with pytest.raises(ConfigError, match=f"is a link, .+ out={older.parent} name={older.name}"):
        owner.claim(link, dead)
    assert mode(older) == before
    owner.claim(older, dead)


def test_checkpoints_behind_the_user_s_own_link_are_closed_too(older: Path) -> None:
    elsewhere = older.parent.parent / "scratch"
    (older / "checkpoints").rename(elsewhere)
    (older / "checkpoints").symlink_to(elsewhere)
    (older / "data").symlink_to(older.parent.parent)
    owner.claim(older, dead)
    assert {mode(path) & 0o022 for path in everything(elsewhere)} == {0}
    assert mode(older.parent.parent) & 0o020, "no folder of the run"


@needs_root
def test_checkpoints_that_lie_in_a_folder_of_another_user_are_refused(older: Path) -> None:
    elsewhere = older.parent.parent / "scratch"
    (older / "checkpoints").rename(elsewhere)
    os.chown(elsewhere, NOBODY, NOBODY)
    (older / "checkpoints").symlink_to(elsewhere)
    with pytest.raises(ConfigError, match=f"{elsewhere} belongs to nobody"):
        owner.claim(older, dead)


def test_what_a_folder_s_acl_gives_to_new_files_is_taken_too(lab: Path) -> None:
    entries = [(0x01, 7, -1), (0x04, 7, -1), (0x08, 7, GROUP), (0x10, 7, -1), (0x20, 5, -1)]
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, bits, who & 0xFFFFFFFF) for tag, bits, who in entries
    )
    try:
        os.setxattr(lab, "system.posix_acl_default", acl)
    except OSError:
        pytest.skip("this file system has no ACLs")
    run = lab / "a"
    owner.claim(run, dead)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "x.pt").touch()
    assert {mode(path) & 0o022 for path in everything(run)} == {0}
    assert mode(run / "checkpoints") & 0o050 == 0o050, "readable stays readable"


def test_the_folder_of_pickles_is_closed_and_a_link_s_target_keeps_its_mode(tmp_path: Path) -> None:
    private.make_private_folder(tmp_path / "slurm")
    assert mode(tmp_path / "slurm") == 0o700
    other = tmp_path / "other"
    other.mkdir(mode=0o755)
    (tmp_path / "link").symlink_to(other)
    private.make_private_folder(tmp_path / "link")
    assert mode(other) == 0o755
    other.chmod(0o775)
    with pytest.raises(ConfigError, match="link leads to a folder in which others can write"):
        private.make_private_folder(tmp_path / "link")


@needs_root
def test_a_node_unpickles_nothing_from_a_folder_that_another_user_put_in_the_run_s_place(
    lab: Path,
) -> None:
    """He may write in the folder above, where the run waits for its turn."""
    run, tools = lab / "a", lab / "tools"
    tools.mkdir()
    (tools / "srun").write_text(f"#!/bin/sh\ntouch {lab}/started\n")
    (tools / "srun").chmod(0o755)
    owner.claim(run, dead)
    private.make_private_folder(run / "slurm")
    parameters = slurm.train_parameters("a", resolve_for_slurm(Resources(device="cpu"), 1, ""))
    text = slurm.batch_script_text(run / "slurm", parameters)

    def swap() -> None:
        run.rename(lab / "b")
        (run / "slurm").mkdir(parents=True)

    def started() -> subprocess.CompletedProcess[str]:
        path = {"PATH": f"{tools}:/usr/bin:/bin"}
        return subprocess.run(["bash"], input=text, env=path, capture_output=True, text=True)

    assert started().returncode == 0
    (lab / "started").unlink()
    assert done_as_nobody(swap, GROUP)
    refused = started()
    assert (refused.returncode, (lab / "started").exists()) == (2, False)
    assert refused.stderr == f"error: {run} is not yours, and nodes run what they find there\n"
    (run / "slurm").rmdir()
    run.rmdir()
    assert done_as_nobody(lambda: run.symlink_to(lab / "b"), GROUP)
    refused = started()
    assert (refused.returncode, (lab / "started").exists()) == (2, False)


@needs_root
def test_an_evaluation_is_not_unpickled_below_a_run_that_another_user_has_put_there(
    lab: Path,
) -> None:
    """Though the folder of pickles is the user's own: it may be one of many."""
    run, own = lab / "a", lab / "own"
    (own / "evaluations").mkdir(parents=True)

    def plant() -> None:
        run.mkdir()
        (run / "slurm").symlink_to(own)

    assert done_as_nobody(plant, GROUP)
    parameters = slurm.evaluation_parameters("a", resolve_for_slurm(Resources(device="cpu"), 1, ""))
    text = slurm.batch_script_text(run / "slurm" / "evaluations", parameters).partition("\nsrun ")[
        0
    ]
    done = subprocess.run(["bash"], input=text, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {run} is not yours")
