"""Where the commands' code and the shipped YAML files lie: in a checkout, or in the package."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_ROOT = _PACKAGE.parent
_SUFFIX = ".yaml"


def module_name(name: str) -> str:
    """Name of a module such as ``data_prep.shard`` in this installation.

    A wheel holds the folders beside the package inside of it, so that it brings no top-level name
    but its own.
    """
    if name.startswith("vssl_dist.") or not module_file(name).is_relative_to(_PACKAGE):
        return name
    return f"vssl_dist.{name}"


def module_file(name: str) -> Path:
    """Source file of a module, which need not be imported to be read."""
    path = name.removeprefix("vssl_dist.").split(".")
    packed = _PACKAGE.joinpath(*path).with_suffix(".py")
    return packed if packed.exists() else _ROOT.joinpath(*path).with_suffix(".py")


def code_folder() -> Path:
    """The folder from which this code is imported."""
    return _ROOT


def _folders(folder_name: str) -> Iterator[Path]:
    """Folders that YAML files (``configs`` or ``slurm``) are looked for in, the nearest first."""
    yield Path(folder_name)
    packed = _PACKAGE / folder_name
    yield packed if packed.is_dir() else _ROOT / folder_name


def names(folder_name: str) -> list[str]:
    """The names of the YAML files in such a folder, without their suffix."""
    return sorted(
        {path.stem for folder in _folders(folder_name) for path in folder.glob(f"*{_SUFFIX}")}
    )


def by_name(folder_name: str, path: Path) -> Path:
    """The file that a user means by a path or by the bare name of a shipped one.

    A file of that path comes first, then ``configs/`` or ``slurm/`` of the current folder, then
    those that came with this code.  A path that none of them has is given back.
    """
    if not _is_name(path) or _is_there(path):
        return path
    files = (folder / f"{path.name}{_SUFFIX}" for folder in _folders(folder_name))
    return next((file for file in files if _is_there(file)), path)


def refuse_unknown(folder_name: str, path: Path) -> None:
    """Refuse the bare name of a file that `by_name` did not find.

    Raises:
        ValueError: One line with the nearest name.
    """
    if not _is_name(path) or _is_there(path):
        return
    close = difflib.get_close_matches(path.name, names(folder_name), n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names(folder_name))}"
    raise ValueError(f"{path}: neither a file nor the name of one in {folder_name}/ ({hint})")


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long a name, or a folder that may not be looked into
        return False


def _is_name(path: Path) -> bool:
    return len(path.parts) == 1 and not path.suffix


def shipped(folder_name: str, name: str) -> Path:
    """The file of that name which came with this code."""
    *_, folder = _folders(folder_name)
    return folder / f"{name}{_SUFFIX}"
