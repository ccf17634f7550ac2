"""The launcher with ranks that do as they are told, and no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.launchers import HOSTILE, of_process

RANK = """
import os, sys, time
from vssl_dist.jobs.rank import die_with_the_launcher
from vssl_dist.jobs.stop import STOPPED_EXIT_CODE, StopFlag
die_with_the_launcher()
stop = StopFlag()
rank = os.environ["RANK"]
print(f"step  1/9  I am {rank} of {os.environ['WORLD_SIZE']}", flush=True)
"""
LAUNCHER = """
import os, sys
from pathlib import Path
from vssl_dist.jobs import local
from vssl_dist.jobs.progress import LogView
from vssl_dist.jobs.resources import Resources, resolve_for_this_machine
from vssl_dist.run_folder import RunFolder
launch = resolve_for_this_machine(Resources(device="cpu"), 2, 0, "")
command = [sys.executable, "-u", "-c", sys.argv[2]]
folder = Path(sys.argv[1])
ranks = local.RankProcesses(command, RunFolder(folder), 2, local.rank_environment(launch))
sys.exit(local.supervise(ranks, LogView(), folder / "failure.txt"))
"""
Launch = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    started = []
    (tmp_path / "logs").mkdir()

    def begin(body: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(tmp_path), RANK + body],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def ranks_of(launcher: subprocess.Popen[str], folder: Path) -> list[psutil.Process]:
    """The processes of both ranks, once each has spoken."""
    wait_until(
        lambda: all(
            path.exists() and "I am" in path.read_text()
            for path in (folder / "logs" / "rank-0.log", folder / "logs" / "rank-1.log")
        )
    )
    return psutil.Process(launcher.pid).children()


def wait_until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def test_all_ranks_run_and_rank_0_is_shown(launch: Launch, tmp_path: Path) -> None:
    out, err = (launcher := launch("")).communicate(timeout=30)
    assert (launcher.returncode, out, err) == (0, "step  1/9  I am 0 of 2\n", "")
    assert (tmp_path / "logs" / "rank-1.log").read_text() == "step  1/9  I am 1 of 2\n"


def test_the_port_where_ranks_meet_is_theirs_before_any_has_loaded_torch(
    launch: Launch, tmp_path: Path
) -> None:
    ended = f"'None' in open({str(tmp_path / 'logs' / 'rank-1.log')!r}).read()"
    body = f"""
import socket
address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
try:
    socket.socket().bind(address)
except OSError as error:
    print("step", error.strerror)
inherited = os.environ.get("VSSL_LISTENER")
door = inherited and socket.socket(fileno=int(inherited))
print("step", door and door.getsockname() == address)
while rank == "0" and not {ended}: time.sleep(0.02)
"""
    out, _ = launch(body).communicate(timeout=30)
    assert out.splitlines()[1:] == ["step Address already in use", "step True"]
    other = (tmp_path / "logs" / "rank-1.log").read_text()
    assert other.splitlines()[1:] == ["step Address already in use", "step None"]


def test_a_dead_rank_takes_the_others_with_it_and_its_traceback_is_the_headline(
    launch: Launch, tmp_path: Path
) -> None:
    spoken = f"open({str(tmp_path / 'logs' / 'rank-0.log')!r}).read()"
    wait = f"while 'I am' not in {spoken}: time.sleep(0.02)"
    launcher = launch(f"{wait}\ntime.sleep(0.5)\n1 / int(rank != '1')\ntime.sleep(60)")
    ranks = ranks_of(launcher, tmp_path)
    _, err = launcher.communicate(timeout=10)
    assert launcher.returncode == 1
    assert "ZeroDivisionError" in err
    assert "rank 1 ended with exit code 1" in err
    assert not any(rank.is_running() for rank in ranks)


@pytest.mark.parametrize(
    ("then", "peer"),
    [
        pytest.param("sys.exit(2)", "time.sleep(60)", id="the refusing rank ends"),
        pytest.param("os.abort()", "time.sleep(60)", id="the refusing rank crashes as it ends"),
        pytest.param("time.sleep(60)", "sys.exit(1)", id="its peer ends before it"),
    ],
)
def test_what_a_rank_refuses_is_one_line_and_exit_code_2(
    launch: Launch, tmp_path: Path, then: str, peer: str
) -> None:
    line = "error: shard-000001.tar is damaged: restore it (rank 1 on here)"
    failure = tmp_path / "failure.txt"
    launcher = launch(
        f"if rank == '1':\n"
        f"    open({str(failure)!r}, 'w').write({line!r})\n"
        f"    {then}\n"
        f"while not os.path.exists({str(failure)!r}): time.sleep(0.02)\n"
        f"time.sleep(0.1)\n"
        f"{peer}"
    )
    _, err = launcher.communicate(timeout=30)
    assert (launcher.returncode, err) == (2, f"{line}\n")


def test_a_refusal_that_its_rank_could_not_write_down_is_taken_from_its_log(
    launch: Launch, tmp_path: Path
) -> None:
    (tmp_path / "logs" / "rank-1.log").write_text("error: of yesterday\n")
    launcher = launch(
        "if rank == '1':\n"
        "    print('error: the disk is full', file=sys.stderr, flush=True)\n"
        "    sys.exit(2)\n"
        "time.sleep(60)"
    )
    _, err = launcher.communicate(timeout=30)
    assert (launcher.returncode, err) == (2, "error: the disk is full\n")


def test_ranks_are_told_by_their_launcher_alone_who_they_are(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variables of a rank are the same inside every other launcher and outside of all."""
    for name in HOSTILE:
        monkeypatch.delenv(name, raising=False)

    def ranks() -> list[dict[str, str]]:
        launcher = launch("while not stop(): time.sleep(0.02)\nsys.exit(STOPPED_EXIT_CODE)")
        started = ranks_of(launcher, tmp_path)
        seen = [of_process(rank.pid) for rank in started]
        for rank in started:
            rank.send_signal(signal.SIGUSR2)
        launcher.communicate(timeout=10)
        (tmp_path / "logs" / "rank-0.log").unlink()
        (tmp_path / "logs" / "rank-1.log").unlink()
        own = {"MASTER_PORT", "VSSL_LAUNCHER", "VSSL_LISTENER"}
        assert own - {"VSSL_LISTENER"} <= seen[1].keys()
        return [{k: v for k, v in one.items() if k not in own} for one in seen]

    outside = ranks()
    for name, value in HOSTILE.items():
        monkeypatch.setenv(name, value)
    assert ranks() == outside
    assert [(one["RANK"], one["WORLD_SIZE"], one["MASTER_ADDR"]) for one in outside] == [
        ("0", "2", "127.0.0.1"),
        ("1", "2", "127.0.0.1"),
    ]
    assert {name for name in HOSTILE if name in outside[0]} == {
        "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
    }  # fmt: skip


def test_a_stop_from_elsewhere_is_no_failure(launch: Launch, tmp_path: Path) -> None:
    launcher = launch("while not stop(): time.sleep(0.02)\nsys.exit(STOPPED_EXIT_CODE)")
    for rank in ranks_of(launcher, tmp_path):
        rank.send_signal(signal.SIGUSR2)
    _, err = launcher.communicate(timeout=10)
    assert launcher.returncode == 130
    assert err == "stopped at a checkpoint: the same command continues the run\n"


def test_a_killed_rank_is_named_with_its_signal(launch: Launch, tmp_path: Path) -> None:
    launcher = launch("time.sleep(60)")
    ranks_of(launcher, tmp_path)[1].kill()
    _, err = launcher.communicate(timeout=10)
    assert launcher.returncode == 1
    assert "rank 1 ended with signal 9" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_ctrl_c_lets_every_rank_save_and_leave(
    launch: Launch, tmp_path: Path, number: signal.Signals
) -> None:
    launcher = launch(
        "while not stop(): time.sleep(0.02)\nprint('saved')\nsys.exit(STOPPED_EXIT_CODE)"
    )
    ranks_of(launcher, tmp_path)
    launcher.send_signal(number)
    out, err = launcher.communicate(timeout=10)
    assert launcher.returncode == 130
    assert "the same command continues" in err
    assert "saved" in out
    assert "saved" in (tmp_path / "logs" / "rank-1.log").read_text()


def test_the_second_ctrl_c_kills(launch: Launch, tmp_path: Path) -> None:
    launcher = launch("time.sleep(60); time.sleep(60)")
    ranks = ranks_of(launcher, tmp_path)
    launcher.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=10)
    assert launcher.returncode == 130
    assert not any(rank.is_running() for rank in ranks)


def test_no_rank_outlives_a_launcher_that_is_killed(launch: Launch, tmp_path: Path) -> None:
    launcher = launch("time.sleep(60)")
    ranks = ranks_of(launcher, tmp_path)
    assert len(ranks) == 2
    launcher.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(rank.is_running() for rank in ranks))


def test_a_rank_whose_launcher_is_gone_does_not_start(tmp_path: Path) -> None:
    environment = {**os.environ, "VSSL_LAUNCHER": "1", "RANK": "0", "WORLD_SIZE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RANK], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "launcher is gone" in done.stderr


def test_nothing_that_a_rank_says_is_a_command_to_the_terminal(
    launch: Launch, tmp_path: Path
) -> None:
    (tmp_path / "failure.txt").write_text("error: class \x1b[2J\n")
    out, err = launch("print('\\ta \\x1b]0;x\\x07 name', flush=True)\nsys.exit(2)").communicate(
        timeout=30
    )
    assert out.splitlines()[1] == "\ta \\x1b]0;x\\x07 name"
    assert err == "error: class \\x1b[2J\n"


def test_of_a_log_of_any_size_the_end_is_shown(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "logs" / "rank-1.log").write_bytes(b"x" * 10_000_000)
    launcher = launch("if rank == '1':\n    print('\\nthe reason', flush=True); sys.exit(1)\n"
                      "time.sleep(60)")  # fmt: skip
    _, err = launcher.communicate(timeout=30)
    assert "the reason\nerror: rank 1 ended with exit code 1" in err
    assert len(err) < 2000
