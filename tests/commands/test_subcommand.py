from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SLOW_TO_STOP = """
import pathlib, signal, sys, time

def stop(number, frame):
    time.sleep(1)  # longer than subprocess.run grants
    pathlib.Path(sys.argv[1], "saved").touch()
    sys.exit(130)

signal.signal(signal.SIGINT, stop)
pathlib.Path(sys.argv[1], "ready").touch()
time.sleep(60)
"""


def test_ctrl_c_waits_until_the_called_command_has_saved(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(SLOW_TO_STOP)
    code = (
        "import os, sys; from vssl_dist.commands.subcommand import run_in_foreground; "
        "sys.exit(run_in_foreground([sys.executable, *sys.argv[1:]], os.environ))"
    )
    caller = subprocess.Popen(
        [sys.executable, "-c", code, str(program), str(tmp_path)],
        cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    end = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < end, "the program does not start"
        time.sleep(0.02)
    os.killpg(caller.pid, signal.SIGINT)  # as a terminal does
    _, said = caller.communicate(timeout=30)
    assert (caller.returncode, said) == (130, "")
    assert (tmp_path / "saved").exists()
