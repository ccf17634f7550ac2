"""Packages that a Python needs for any command of this project, and the code that it runs.

Imports the standard library alone, so that a Python without the packages can say what it lacks.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path

NEEDED = (
    "torch", "torchvision", "deepspeed", "mlflow", "webdataset", "submitit", "yaml", "pydantic",
    "filelock", "matplotlib", "numpy", "PIL", "psutil", "rich", "safetensors", "skimage", "sklearn",
    "scipy", "threadpoolctl", "timm", "click",
)  # fmt: skip
"""Modules of the packages that pyproject.toml asks for, but for DALI: a config may do without."""


def require_packages() -> None:
    """End the program with one line and exit code 2 where packages are missing.

    Commands call this before they import anything else.  It also settles what imports and names
    of files would fail on (see `print_any_path`), and that whatever Python is started from here,
    also by a library, imports nothing of the current folder.
    """
    print_any_path()
    os.environ.update(own_code_only(os.environ))
    # A notebook's: matplotlib, which draws for files alone here, would not import without it.
    os.environ.pop("MPLBACKEND", None)
    missing = [name for name in NEEDED if find_spec(name) is None]
    if not missing:
        return
    more = f" and {len(missing) - 1} other packages" if len(missing) > 1 else ""
    print(
        f"error: {sys.executable} lacks {missing[0]}{more}: `make install` once, then "
        f"`. .venv/bin/activate` in each shell, or .venv/bin/python {sys.argv[0]}",
        file=sys.stderr,
    )
    raise SystemExit(2)


def command_line(script: str) -> str:
    """Command line by which a user runs one of the commands, for messages.

    In a checkout that is the script, where the package is installed without one it is `vssl`.

    Args:
        script: Script of the command, such as ``launch/one_class.py``.
    """
    path = Path(script)
    if (Path(__file__).parents[1] / path).exists():
        return f"python {path}"
    return f"vssl {path.stem.replace('_', '-')}"


def has_dali() -> bool:
    """Whether there is a DALI, without the time that importing it takes."""
    try:
        return find_spec("nvidia.dali") is not None
    except (ImportError, ValueError):
        return False


def commit() -> str | None:
    """The commit of the code that runs, with ``-dirty`` when files differ from it.

    Returns:
        40 hexadecimal digits and perhaps that; None where the code lies in no git checkout.
    """
    folder = str(Path(__file__).parent)
    command = ["git", "-C", folder, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def own_code_only(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables with which a Python, and any that it starts, imports this code, wherever it lies,
    and nothing of the folder that it happens to be started in.

    To ``python -m`` and ``python -c`` that folder comes before all others, and so it does where
    ``PYTHONPATH`` has an empty entry, as ``PYTHONPATH=$PYTHONPATH:/code`` easily makes one.

    >>> own_code_only({"PYTHONPATH": ":/more"})["PYTHONPATH"].split(":")[1:]
    ['/more']
    """
    before = [path for path in environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    code = str(Path(__file__).parents[1])
    # Where all packages lie they would come before Python's own modules.
    beside_others = code in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    paths = before if beside_others else [code, *(path for path in before if path != code)]
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(paths)}


def print_any_path() -> None:
    """Have what this process prints show names that are no UTF-8 as ``\\xXX``, not fail on them.

    Trees of older systems have such names, and a line about a path is no reason to lose a run.
    """
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
