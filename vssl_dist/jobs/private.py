"""A run folder is code and carries its user's name: nobody else may write in it.

Nodes unpickle what lies in ``slurm``, a run that goes on what lies in ``checkpoints``, and
``launch.yaml`` reaches batch scripts.  So whoever is to write into a run folder sees first that it
is this user's, and takes from others (never from their reading) what an umask of 002 or a folder's
ACL gave them.  A run is claimed by its own name, not by that of a link; folders in it may be links
that this user or root made.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from vssl_dist.durable import (
    forbid_writing_by_others,
    read_regular_file,
    resolve_trusted_links,
    user_name,
)
from vssl_dist.errors import ConfigError
from vssl_dist.jobs.permissions import close_to_others, is_loose
from vssl_dist.run_folder import RunFolder

_log = logging.getLogger(__name__)
_RUN = RunFolder(Path())
_TEXT = tuple(path.name for path in (_RUN.export_folder.path, _RUN.logs_folder, _RUN.spool_folder))
"""Folders that hold no code: colleagues who could write there may have evaluated the run."""
_FOLDERS = (_RUN.checkpoints_folder.name, _RUN.slurm_folder.name, *_TEXT)
"""Folders that a run makes; a user's link to a folder elsewhere counts as that folder."""


@dataclass
class Survey:
    """Files and folders of a run that others can write, or own."""

    writable_by_others: list[Path] = field(default_factory=list)
    """Paths of this user that others can write; a folder comes before what is in it."""
    foreign: list[tuple[Path, int]] = field(default_factory=list)
    """Paths of other users among results, curves and logs, each with its owner's uid."""

    def lines(self, run_dir: Path) -> Iterator[str]:
        """Yield the warnings about the folder, one line each."""
        if self.writable_by_others:
            count, first = _number(self.writable_by_others), self.writable_by_others[0]
            yield (
                f"others could write in {run_dir} ({count}, first {first}), and a run folder is "
                "code that runs as you: a start takes that from them (chmod -R go-w), not reading; "
                "what they changed before stays"
            )
        if self.foreign:
            path, owner = self.foreign[0]
            yield (
                f"{path} belongs to {user_name(owner)}, who can still change it "
                f"({_number(self.foreign)} of others): remove what you did not ask for"
            )


def survey(run_dir: Path, *, whole: bool = True) -> Survey:
    """Find what others can write or own in a run folder, which need not exist; change nothing.

    Args:
        run_dir: The run's folder.
        whole: All that is in it, not its own entries alone.

    Raises:
        ConfigError: One line: it is no folder or not this user's, or something in it is not.
    """
    result = Survey()
    try:
        if run_dir.is_symlink():
            resolve_trusted_links(RunFolder(run_dir).owner_path)  # who made the links on the way
        target = run_dir.resolve() if run_dir.is_symlink() else run_dir
        top = target.lstat()
    except (FileNotFoundError, NotADirectoryError):
        if run_dir.is_symlink():
            raise ConfigError(f"{run_dir} is a link to nothing: remove it") from None
        return result
    except OSError as error:
        raise _unreadable(run_dir, error) from error
    if not stat.S_ISDIR(top.st_mode):
        raise ConfigError(f"{run_dir} is no folder: remove it, or choose another name= or out=")
    if top.st_uid != os.geteuid():
        raise ConfigError(
            f"{run_dir} belongs to {user_name(top.st_uid)}, and a run folder is code that runs "
            "as you: choose another name= or out="
        )
    if is_loose(target, top):
        result.writable_by_others.append(target)
    _enter(target, result, top=True, code=True, whole=whole)
    return result


def refuse_link(run_dir: Path) -> None:
    """Refuse a run folder that is a link: it may lead to another folder tomorrow.

    Raises:
        ConfigError: One line that says how to name the folder itself.
    """
    if run_dir.is_symlink():
        target = run_dir.resolve()
        raise ConfigError(
            f"{run_dir} is a link, and a run folder is code that runs as you: name the folder "
            f"itself, with out={target.parent} name={target.name}"
        )


def secure(run_dir: Path, *, whole: bool = False) -> None:
    """Close a run folder, and all that this process will make in it, to the writing of others.

    Args:
        run_dir: The run's folder, which exists.
        whole: Look at all that is in it, also where the folder itself is closed to others.

    Raises:
        ConfigError: One line: it is not this user's, or something in it is not.
    """
    forbid_writing_by_others()
    result = survey(run_dir, whole=whole)
    if result.writable_by_others:
        result = survey(run_dir)
        for path in result.writable_by_others:
            close_to_others(path)
        for line in result.lines(run_dir):
            _log.warning("%s", line)
        # What came in between, and a file system that knows no permissions.
        if writable_by_others := survey(run_dir).writable_by_others:
            _log.warning(
                "%s: this file system keeps no permissions, so others may write there",
                writable_by_others[0],
            )
    elif whole:
        for line in result.lines(run_dir):
            _log.warning("%s", line)


def make(run_dir: Path) -> None:
    """Make a run folder that only this user can write in, or close one that is there.

    The folders above are made as the user's umask says: others may have runs there, too.

    Raises:
        ConfigError: One line: it is not this user's, or something in it is not.
    """
    survey(run_dir, whole=False)
    refuse_link(run_dir)
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    forbid_writing_by_others()
    with suppress(FileExistsError):
        run_dir.mkdir()
        close_to_others(run_dir)  # a default ACL of the folder above may let them write
    secure(run_dir, whole=True)


def make_hidden(folder: Path) -> None:
    """Make a folder that only this user can look into; a folder behind a link keeps its mode.

    Raises:
        ConfigError: One line: it is not this user's.
    """
    forbid_writing_by_others()
    try:
        resolve_trusted_links(folder / "pickle")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.is_symlink():
            state = folder.stat()
            is_mine = state.st_uid == os.geteuid()
            if not is_mine or is_loose(folder.resolve(), state):
                raise ConfigError(
                    f"{folder} leads to a folder in which others can write, and nodes run what "
                    "they find there: remove the link"
                )
            return
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            owner = os.fstat(descriptor).st_uid
            if owner != os.geteuid():
                raise ConfigError(f"{folder} belongs to {user_name(owner)}: remove it")
            os.fchmod(descriptor, 0o700)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _unreadable(folder, error) from error


def read(path: Path, limit: int) -> str:
    """Read a text file of a run folder, in which any process may have left anything.

    Args:
        path: A regular file; a pipe is refused and not waited for.
        limit: Largest size in bytes.

    Raises:
        OSError: It is not there, no regular file or larger.
        ValueError: It is no text.
    """
    return read_regular_file(path, limit).decode()


def _enter(folder: Path, result: Survey, *, top: bool, code: bool, whole: bool) -> None:
    """Add what is in a folder of the run to a survey.

    Args:
        folder: The run's own (``top``) or one below.
        result: Is added to.
        top: See ``folder``.
        code: Whether what is in it may be run, and so must not be of others.
        whole: Look into its folders, too.
    """
    try:
        entries = sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return  # others are at work in a run; and what cannot be read cannot be run
    except OSError as error:
        raise _unreadable(folder, error) from error
    for path in entries:
        try:
            state = path.lstat()
        except FileNotFoundError:
            continue
        inside = code and not (top and path.name in _TEXT)
        if stat.S_ISLNK(state.st_mode):
            _refuse_link(path, state)
            if not (top and path.name in _FOLDERS and path.is_dir()):
                continue
            path = path.resolve()
            state = path.stat()
        if state.st_uid not in (os.geteuid(), 0):
            if code:
                raise ConfigError(
                    f"{path} belongs to {user_name(state.st_uid)}, and a run folder is code "
                    "that runs as you: remove it, or choose another name="
                )
            result.foreign.append((path, state.st_uid))
            continue
        if state.st_uid == os.geteuid() and is_loose(path, state):
            result.writable_by_others.append(path)
        if stat.S_ISDIR(state.st_mode) and whole:
            _enter(path, result, top=False, code=inside, whole=True)


def _refuse_link(link: Path, state: os.stat_result) -> None:
    if state.st_uid not in (os.geteuid(), 0):
        raise ConfigError(f"{link} is a link that {user_name(state.st_uid)} made: remove it")


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{error.filename or path}: {error.strerror or error}")


def _number(paths: Sequence[object]) -> str:
    plural = "s" * (len(paths) > 1)
    return f"{len(paths)} file{plural} or folder{plural}"
