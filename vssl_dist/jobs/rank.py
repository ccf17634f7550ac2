"""One rank on this machine: ``python -m vssl_dist.jobs.rank RUN``, started by ``jobs.local``."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from pathlib import Path

from vssl_dist import logs
from vssl_dist.installed import print_any_path

_log = logging.getLogger("vssl_dist.jobs.rank")  # not __name__, which is __main__
_PR_SET_PDEATHSIG = 1


def die_with_the_launcher() -> None:
    """Have the kernel kill this process when its launcher dies, even of SIGKILL."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ["VSSL_LAUNCHER"]):
        sys.exit("the launcher is gone")  # it died before the kernel was told


def main() -> int:
    """Train as one rank of the run in ``sys.argv[1]``; see `run_rank` for the exit code."""
    die_with_the_launcher()
    print_any_path()
    logs.configure_log_output(f"rank {os.environ['RANK']}")
    from vssl_dist.jobs.stop import REFUSED_EXIT_CODE, StopFlag, exit_now

    stop_flag = StopFlag()  # before the slow imports: a signal may come at any time
    from vssl_dist.errors import ConfigError
    from vssl_dist.jobs import private
    from vssl_dist.jobs.resources import load_launch
    from vssl_dist.jobs.training_job import TrainJob, run_rank
    from vssl_dist.run_folder import RunFolder

    run_dir = Path(sys.argv[1])
    try:
        private.secure_run_folder(run_dir)
        job = TrainJob(RunFolder(run_dir).config_path.read_text(), load_launch(run_dir))
    except ConfigError as error:
        _log.error("%s", error)
        return REFUSED_EXIT_CODE
    exit_code = run_rank(job, stop_flag)
    if exit_code == REFUSED_EXIT_CODE:  # its process group still stands
        exit_now(exit_code)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
