from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vssl_dist.config import ConfigError
from vssl_dist.jobs import owner

CLAIM = """
import sys, time
from pathlib import Path
from vssl_dist.config import ConfigError
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
    owner.hand_over(tmp_path, "4711")
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
    owner.hand_over(run, "4711")
    branch = tmp_path / "b"
    shutil.copytree(run, branch)
    before = sorted(path.name for path in branch.iterdir())
    owner.check_free(branch, alive)
    assert sorted(path.name for path in branch.iterdir()) == before
    owner.claim(branch, alive)
    owner.hand_over(branch, "4712")
    moved = run.rename(tmp_path / "c")
    for folder, job in ((moved, "4711"), (branch, "4712")):
        with pytest.raises(ConfigError, match=f"SLURM job {job}"):
            owner.check_free(folder, alive)
