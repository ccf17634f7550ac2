from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from vssl_dist.jobs.stop import StopFlag


@pytest.fixture
def seen() -> Iterator[list[int]]:
    """What reaches the handler that was there before, as submitit's is."""
    calls: list[int] = []
    before = {n: signal.getsignal(n) for n in (signal.SIGUSR2, signal.SIGTERM)}
    signal.signal(signal.SIGUSR2, lambda number, frame: calls.append(number))
    yield calls
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_raises_the_flag_and_does_nothing_else(seen: list[int]) -> None:
    stop = StopFlag()
    assert not stop()
    os.kill(os.getpid(), signal.SIGUSR2)
    assert stop()
    assert seen == []


def test_the_earlier_handler_is_called_when_all_is_saved(seen: list[int]) -> None:
    stop = StopFlag()
    os.kill(os.getpid(), signal.SIGUSR2)
    stop.requeue()
    assert seen == [signal.SIGUSR2]


@pytest.mark.parametrize(("code", "fails"), [(-signal.SIGTERM, False), (1, True)])
def test_a_requeue_that_slurm_cuts_short_is_one_and_a_refused_one_is_an_error(
    seen: list[int], code: int, fails: bool
) -> None:
    def handler(number: int, frame: object) -> None:
        raise subprocess.CalledProcessError(code, ["scontrol", "requeue", "7"])

    signal.signal(signal.SIGUSR2, handler)
    stop = StopFlag()
    with pytest.raises(subprocess.CalledProcessError) if fails else nullcontext():
        stop.requeue()


@pytest.mark.parametrize(
    ("signals", "final"),
    [
        ([], False),  # another rank was told
        ([signal.SIGUSR2], False),
        ([signal.SIGTERM], True),  # scancel, or SLURM requeues by itself
        ([signal.SIGUSR2, signal.SIGTERM], False),  # preempted, and slow
    ],
)
def test_a_job_that_was_only_terminated_does_not_put_itself_back(
    seen: list[int], signals: list[int], final: bool
) -> None:
    stop = StopFlag()
    for number in signals:
        os.kill(os.getpid(), number)
    assert stop.only_sigterm is final


def test_the_exit_code_of_a_rank_is_its_own_whatever_its_interpreter_ends_in() -> None:
    program = (
        "import atexit, os; atexit.register(os.abort); from vssl_dist.jobs.stop import exit_now; "
        "print('error: the reason'); exit_now(2)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "error: the reason\n")
