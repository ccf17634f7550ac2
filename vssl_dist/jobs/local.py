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

from vssl_dist.durable import open_append
from vssl_dist.environment import allocator_variables, outside_jobs
from vssl_dist.installed import own_code_only
from vssl_dist.jobs.progress import LogView
from vssl_dist.jobs.resources import Launch, interface_variables
from vssl_dist.jobs.stop import REFUSAL_PREFIX, REFUSED_EXIT_CODE, STOPPED_EXIT_CODE, SignalHandler
from vssl_dist.logs import entry_as_terminal_text
from vssl_dist.run_folder import RunFolder
from vssl_dist.text import printable, printable_lines

INTERRUPTED_EXIT_CODE = 130
"""Exit code of a run that was stopped by Ctrl-C, as shells expect it."""
_POLL_EVERY_S = 0.05
_MAX_SHOWN_LINES = 15
_MAX_SHOWN_BYTES = 100_000


@dataclass
class StopRequests:
    """Counts Ctrl-C, SIGTERM and SIGHUP: the first asks the ranks to stop, the second kills."""

    num_signals: int = 0
    previous_handlers: dict[int, SignalHandler] = field(default_factory=dict)
    """Those that `restore` brings back, by signal."""

    def listen(self) -> None:
        """Count these signals from now on."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self.previous_handlers[number] = signal.signal(number, self._count_signal)

    def restore(self) -> None:
        """Bring back the handlers from before `listen`."""
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def _count_signal(self, number: int, frame: FrameType | None) -> None:
        self.num_signals += 1


@dataclass
class RankProcesses:
    """The processes of one launch, each with a log, each ended when this process dies."""

    command: list[str]
    run: RunFolder
    world_size: int
    environment: dict[str, str]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> None:
        """Start all ranks, with a port to meet at that no other program can take.

        A port that is only looked up could be another program's by the time rank 0 has loaded
        torch: rank 0 inherits the listening socket itself.
        """
        self.run.logs_folder.mkdir(parents=True, exist_ok=True)
        with socket.create_server(("127.0.0.1", 0), backlog=self.world_size) as listening_socket:
            address, port = listening_socket.getsockname()
            shared_environment = self.environment | {
                "MASTER_ADDR": address,
                "MASTER_PORT": str(port),
            }
            first_rank_environment = shared_environment | {
                "VSSL_LISTENER": str(listening_socket.fileno())
            }
            for rank in range(self.world_size):
                inherited_fds = () if rank else (listening_socket.fileno(),)
                self.processes.append(
                    self._start_rank(
                        rank, shared_environment if rank else first_rank_environment, inherited_fds
                    )
                )

    def _start_rank(
        self, rank: int, environment: dict[str, str], inherited_fds: tuple[int, ...]
    ) -> subprocess.Popen[bytes]:
        with open_append(self.log_path(rank)) as log:
            return subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                pass_fds=inherited_fds,
                # The terminal's Ctrl-C is for the launcher, which passes it on once.
                start_new_session=True,
            )

    def log_path(self, rank: int) -> Path:
        """Return the path of a rank's log file."""
        return self.run.rank_log_path(rank)

    def exit_codes(self) -> list[int | None]:
        """Return each rank's exit code: None while it lives, negative if a signal ended it."""
        return [process.poll() for process in self.processes]

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the ranks that still live."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def kill(self) -> None:
        """Kill all ranks and wait until they are gone."""
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()


def run_local(run_dir: Path, launch: Launch) -> int:
    """Run all ranks until they end, showing rank 0's log.

    Args:
        run_dir: With ``config.yaml`` and ``launch.yaml``.
        launch: How many ranks, on what.

    Returns:
        0 when the run is finished, `INTERRUPTED_EXIT_CODE` when it was stopped, `REFUSED_EXIT_CODE`
        when it met something that its user has to mend, 1 when a rank failed.
    """
    attempt_name = f"{os.getpid()}-{int(time.time())}"
    ranks = RankProcesses(
        # -P: nothing of the current folder is imported; -u: the log can be followed.
        [sys.executable, "-P", "-u", "-m", "vssl_dist.jobs.rank", str(run_dir)],
        RunFolder(run_dir),
        launch.world_size,
        rank_environment(launch) | {"VSSL_ATTEMPT": attempt_name},
    )
    return supervise(ranks, LogView(), ranks.run.failure_path(attempt_name))


def rank_environment(launch: Launch) -> dict[str, str]:
    """Return the environment that all ranks of a launch on this machine have in common."""
    return {
        **outside_jobs(os.environ),
        **allocator_variables(launch.device, os.environ),
        "OMP_NUM_THREADS": str(launch.cpus_per_rank),
        **interface_variables(launch.resources.interface),
        **(settings := launch.resources.env),
        **own_code_only(os.environ | settings),
        "WORLD_SIZE": str(launch.world_size),
        "LOCAL_WORLD_SIZE": str(launch.world_size),
        "VSSL_LAUNCHER": str(os.getpid()),
    }


def supervise(ranks: RankProcesses, log_view: LogView, failure_path: Path) -> int:
    """Start the ranks, pass Ctrl-C on, end all when one fails; see `run_local`.

    Args:
        ranks: Not yet started.
        log_view: Shows the log of rank 0.
        failure_path: The file in which the first rank that fails says why.
    """
    stop_requests = StopRequests()
    num_passed_on = 0
    stop_requests.listen()
    log_start = ranks.log_path(0).stat().st_size if ranks.log_path(0).exists() else 0
    try:
        ranks.start()
        with ranks.log_path(0).open(errors="replace") as log:
            log.seek(log_start)
            while None in (exit_codes := ranks.exit_codes()):
                log_view.show(log.read())
                if (
                    any(code not in (None, 0, STOPPED_EXIT_CODE) for code in exit_codes)
                    or stop_requests.num_signals > 1
                ):
                    break
                if stop_requests.num_signals > num_passed_on:
                    num_passed_on = stop_requests.num_signals
                    log_view.say(
                        "stopping after a checkpoint and the last curves; Ctrl-C again ends at once"
                    )
                    ranks.signal(signal.SIGUSR2)
                time.sleep(_POLL_EVERY_S)
            ranks.kill()
            log_view.show(log.read())
    finally:
        ranks.kill()
        log_view.close()
        stop_requests.restore()
    return _report_end(ranks, exit_codes, stop_requests, failure_path)


def _read_log_end(path: Path) -> str:
    """Return the end of a rank's file as a terminal shows it; empty where there is no file."""
    try:
        with path.open("rb") as file:
            tail_start = max(file.seek(0, os.SEEK_END) - _MAX_SHOWN_BYTES, 0)
            file.seek(tail_start)
            text = file.read(_MAX_SHOWN_BYTES).decode(errors="replace")
    except OSError:
        return ""
    if tail_start:  # in the middle of a line
        text = text.partition("\n")[2]
    return "\n".join(map(entry_as_terminal_text, printable_lines(text).rstrip().split("\n")))


def _find_refusal_line(ranks: RankProcesses, exit_codes: list[int | None]) -> str:
    """Find in the logs the line with which a rank refused to go on; empty where none did."""
    for rank in (rank for rank, code in enumerate(exit_codes) if code == REFUSED_EXIT_CODE):
        lines = _read_log_end(ranks.log_path(rank)).split("\n")
        if refusals := [line for line in lines if line.startswith(REFUSAL_PREFIX)]:
            return refusals[-1]
    return ""


def _report_end(
    ranks: RankProcesses,
    exit_codes: list[int | None],
    stop_requests: StopRequests,
    failure_path: Path,
) -> int:
    """Say on stderr how the ranks ended; returns the exit code of `run_local`."""
    if all(code == 0 for code in exit_codes):
        return 0
    all_saved = all(code in (0, STOPPED_EXIT_CODE) for code in exit_codes)
    # A rank that has not even found its signal handlers yet dies of the first Ctrl-C.
    if (
        all_saved
        or stop_requests.num_signals > 1
        or (stop_requests.num_signals and -signal.SIGUSR2 in exit_codes)
    ):
        end_text = "stopped at a checkpoint" if all_saved else "killed"
        print(f"{end_text}: the same command continues the run", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    reason = _read_log_end(failure_path) or _find_refusal_line(ranks, exit_codes)
    # Not the exit codes: a rank that lost its peer, or torch's threads, can be faster with another.
    if reason.startswith(REFUSAL_PREFIX):
        print(reason, file=sys.stderr)
        return REFUSED_EXIT_CODE
    rank, code = next(((rank, code) for rank, code in enumerate(exit_codes) if code), (0, None))
    if reason:
        print(reason, file=sys.stderr)
    else:
        lines = _read_log_end(ranks.log_path(rank)).split("\n")[-_MAX_SHOWN_LINES:]
        print("\n".join(lines), file=sys.stderr)
    cause = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    print(
        f"error: rank {rank} ended with {cause} and the others were ended (logs: "
        f"{printable(str(ranks.run.logs_folder))}); "
        "the same command continues from the last checkpoint",
        file=sys.stderr,
    )
    return 1
