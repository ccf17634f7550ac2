"""All ranks of a run on this machine, in the foreground: one process each, and none left over."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from vssl_dist.durable import open_append
from vssl_dist.environment import outside_jobs
from vssl_dist.installed import own_code_only
from vssl_dist.jobs.progress import LogView
from vssl_dist.jobs.resources import Launch, meeting_place
from vssl_dist.jobs.stop import REFUSAL, REFUSED, STOPPED
from vssl_dist.logs import terminal_text
from vssl_dist.run_folder import RunFolder
from vssl_dist.text import printable, printable_lines

INTERRUPTED = 130
"""Exit code of a run that was stopped by Ctrl-C, as shells expect it."""
_POLL_S = 0.05
_TAIL_LINES = 15
_TAIL_BYTES = 100_000


@dataclass
class StopRequests:
    """What the user wants: the first Ctrl-C (or SIGTERM, SIGHUP) stops, the second kills."""

    count: int = 0
    kept: dict[int, Any] = field(default_factory=dict)

    def listen(self) -> None:
        """Take the signals over."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self.kept[number] = signal.signal(number, self._note)

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self.kept.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


@dataclass
class RankProcesses:
    """The processes of one launch, each with a log, each ended when this process dies."""

    command: list[str]
    run: RunFolder
    world_size: int
    environment: dict[str, str]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> None:
        """Start all, to meet at a port that is theirs alone.

        A port that is only looked up could be another program's by the time rank 0 has loaded
        torch: rank 0 inherits the listening socket itself.
        """
        self.run.logs.mkdir(parents=True, exist_ok=True)
        with socket.create_server(("127.0.0.1", 0), backlog=self.world_size) as door:
            address, port = door.getsockname()
            shared = self.environment | {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
            first = shared | {"VSSL_LISTENER": str(door.fileno())}
            for rank in range(self.world_size):
                fds = () if rank else (door.fileno(),)
                self.processes.append(self._start(rank, shared if rank else first, fds))

    def _start(
        self, rank: int, environment: dict[str, str], fds: tuple[int, ...]
    ) -> subprocess.Popen[bytes]:
        with open_append(self.log(rank)) as log:
            return subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                pass_fds=fds,
                # The terminal's Ctrl-C is for the launcher, which passes it on once.
                start_new_session=True,
            )

    def log(self, rank: int) -> Path:
        """Where a rank writes."""
        return self.run.rank_log(rank)

    def codes(self) -> list[int | None]:
        """Each rank's exit code, None while it lives, negative if a signal ended it."""
        return [process.poll() for process in self.processes]

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the ranks that still live."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def kill(self) -> None:
        """End them all, now."""
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()


def run_local(run_dir: Path, launch: Launch) -> int:
    """Run all ranks until they end, showing rank 0's log.

    Args:
        run_dir: With ``config.yaml`` and ``launch.yaml``.
        launch: How many ranks, on what.

    Returns:
        0 when the run is finished, `INTERRUPTED` when it was stopped, `REFUSED` when it met
        something that its user has to mend, 1 when a rank failed.
    """
    attempt = f"{os.getpid()}-{int(time.time())}"
    ranks = RankProcesses(
        [sys.executable, "-P", "-u", "-m", "vssl_dist.jobs.rank", str(run_dir)],
        RunFolder(run_dir),
        launch.world_size,
        rank_environment(launch) | {"VSSL_ATTEMPT": attempt},
    )
    return supervise(ranks, LogView(), ranks.run.failure(attempt))


def rank_environment(launch: Launch) -> dict[str, str]:
    """What all ranks of a launch on this machine find in their environment."""
    return {
        **outside_jobs(os.environ),
        "OMP_NUM_THREADS": str(launch.cpus_per_rank),
        **meeting_place(launch.resources.interface),
        **(settings := launch.resources.env),
        **own_code_only(os.environ | settings),
        "WORLD_SIZE": str(launch.world_size),
        "LOCAL_WORLD_SIZE": str(launch.world_size),
        "VSSL_LAUNCHER": str(os.getpid()),
    }


def supervise(ranks: RankProcesses, screen: LogView, failure: Path) -> int:
    """Start the ranks, pass Ctrl-C on, end all when one fails; see `run_local`."""
    orders, passed_on = StopRequests(), 0
    orders.listen()
    begin = ranks.log(0).stat().st_size if ranks.log(0).exists() else 0
    try:
        ranks.start()
        with ranks.log(0).open(errors="replace") as log:
            log.seek(begin)
            while None in (codes := ranks.codes()):
                screen.show(log.read())
                if any(code not in (None, 0, STOPPED) for code in codes) or orders.count > 1:
                    break
                if orders.count > passed_on:
                    passed_on = orders.count
                    screen.say(
                        "stopping after a checkpoint and the last curves; Ctrl-C again ends at once"
                    )
                    ranks.signal(signal.SIGUSR2)
                time.sleep(_POLL_S)
            ranks.kill()
            screen.show(log.read())
    finally:
        ranks.kill()
        screen.close()
        orders.restore()
    return _verdict(ranks, codes, orders, failure)


def _end_of(path: Path) -> str:
    """How a file of a rank ends, in lines that any terminal shows; empty where there is none."""
    try:
        with path.open("rb") as file:
            start = max(file.seek(0, os.SEEK_END) - _TAIL_BYTES, 0)
            file.seek(start)
            text = file.read(_TAIL_BYTES).decode(errors="replace")
    except OSError:
        return ""
    whole = printable_lines(text.partition("\n")[2] if start else text).rstrip()
    return "\n".join(map(terminal_text, whole.split("\n")))


def _refusal(ranks: RankProcesses, codes: list[int | None]) -> str:
    """The line with which a rank ended that refused something, from its log."""
    for rank in (rank for rank, code in enumerate(codes) if code == REFUSED):
        lines = _end_of(ranks.log(rank)).split("\n")
        if refusals := [line for line in lines if line.startswith(REFUSAL)]:
            return refusals[-1]
    return ""


def _verdict(
    ranks: RankProcesses, codes: list[int | None], orders: StopRequests, failure: Path
) -> int:
    if all(code == 0 for code in codes):
        return 0
    saved = all(code in (0, STOPPED) for code in codes)
    # A rank that has not even found its signal handlers yet dies of the first Ctrl-C.
    if saved or orders.count > 1 or (orders.count and -signal.SIGUSR2 in codes):
        how = "stopped at a checkpoint" if saved else "killed"
        print(f"{how}: the same command continues the run", file=sys.stderr)
        return INTERRUPTED
    said = _end_of(failure) or _refusal(ranks, codes)
    # Not the exit codes: a rank that lost its peer, or torch's threads, can be faster with another.
    if said.startswith(REFUSAL):
        print(said, file=sys.stderr)
        return REFUSED
    rank, code = next(((r, c) for r, c in enumerate(codes) if c), (0, None))
    if said:
        print(said, file=sys.stderr)
    else:
        lines = _end_of(ranks.log(rank)).split("\n")[-_TAIL_LINES:]
        print("\n".join(lines), file=sys.stderr)
    cause = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    print(
        f"error: rank {rank} ended with {cause} and the others were ended (logs: "
        f"{printable(str(ranks.run.logs))}); "
        "the same command continues from the last checkpoint",
        file=sys.stderr,
    )
    return 1
