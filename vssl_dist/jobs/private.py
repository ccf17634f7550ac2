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

from vssl_dist.durable import followed, keep_others_from_writing, read_regular, user_name
from vssl_dist.errors import ConfigError
from vssl_dist.jobs.permissions import close, is_loose
from vssl_dist.run_folder import RunFolder

_log = logging.getLogger(__name__)
_RUN = RunFolder(Path())
_TEXT = tuple(path.name for path in (_RUN.exports.path, _RUN.logs, _RUN.spool))
"""Whose contents are no code: colleagues may have evaluated a run whose folder they could write."""
_FOLDERS = (_RUN.checkpoints.name, _RUN.slurm.name, *_TEXT)
"""What a run makes; a user's link to a folder elsewhere counts as that folder."""


@dataclass
class Survey:
    """What of a run folder is not its user's alone."""

    loose: list[Path] = field(default_factory=list)
    """This user's, and others can write it: a folder before what is in it."""
    theirs: list[tuple[Path, int]] = field(default_factory=list)
    """Files and folders of others among results, curves and logs, and whose they are."""

    def lines(self, run_dir: Path) -> Iterator[str]:
        """What there is to say of it."""
        if self.loose:
            yield (
                f"others could write in {run_dir} ({_number(self.loose)}, first {self.loose[0]}), "
                "and a run folder is code that runs as you: a start takes that from them (chmod -R "
                "go-w), not reading; what they changed before stays"
            )
        if self.theirs:
            path, owner = self.theirs[0]
            yield (
                f"{path} belongs to {user_name(owner)}, who can still change it "
                f"({_number(self.theirs)} of others): remove what you did not ask for"
            )


def survey(run_dir: Path, *, whole: bool = True) -> Survey:
    """Look at a run folder, which need not exist, and change nothing.

    Args:
        run_dir: The run's folder.
        whole: All that is in it, not its own entries alone.

    Raises:
        ConfigError: One line: it is no folder or not this user's, or something in it is not.
    """
    seen = Survey()
    try:
        if run_dir.is_symlink():
            followed(RunFolder(run_dir).owner)  # who made the links on the way
        target = run_dir.resolve() if run_dir.is_symlink() else run_dir
        top = target.lstat()
    except (FileNotFoundError, NotADirectoryError):
        if run_dir.is_symlink():
            raise ConfigError(f"{run_dir} is a link to nothing: remove it") from None
        return seen
    except OSError as error:
        raise _unreadable(run_dir, error) from error
    if not stat.S_ISDIR(top.st_mode):
        raise ConfigError(f"{run_dir} is no folder: remove it, or choose another name= or out=")
    if top.st_uid != os.geteuid():
        raise ConfigError(
            f"{run_dir} belongs to {user_name(top.st_uid)}, and a run folder is code that runs as "
            "you: choose another name= or out="
        )
    if is_loose(target, top):
        seen.loose.append(target)
    _enter(target, seen, top=True, code=True, whole=whole)
    return seen


def refuse_link(run_dir: Path) -> None:
    """Refuse a run folder that is a link: what it leads to may be another one tomorrow.

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
    """See that only this user can write in a run folder, from now on in all that is made in it.

    Args:
        run_dir: The run's folder, which exists.
        whole: Look at all that is in it, also where the folder itself is closed to others.

    Raises:
        ConfigError: One line: it is not this user's, or something in it is not.
    """
    keep_others_from_writing()
    seen = survey(run_dir, whole=whole)
    if seen.loose:
        seen = survey(run_dir)
        for path in seen.loose:
            close(path)
        for line in seen.lines(run_dir):
            _log.warning("%s", line)
        # What came in between, and a file system that knows no permissions.
        if left := survey(run_dir).loose:
            _log.warning(
                "%s: this file system keeps no permissions, so others may write there", left[0]
            )
    elif whole:
        for line in seen.lines(run_dir):
            _log.warning("%s", line)


def make(run_dir: Path) -> None:
    """Make a run folder that only this user can write in, or see that it is one.

    The folders above are made as the user's umask says: others may have runs there, too.

    Raises:
        ConfigError: One line: it is not this user's, or something in it is not.
    """
    survey(run_dir, whole=False)
    refuse_link(run_dir)
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    keep_others_from_writing()
    with suppress(FileExistsError):
        run_dir.mkdir()
        close(run_dir)  # of what a default ACL of the folder above gives
    secure(run_dir, whole=True)


def make_hidden(folder: Path) -> None:
    """Make a folder that only this user can look into; a link stays what it leads to.

    Raises:
        ConfigError: One line: it is not this user's.
    """
    keep_others_from_writing()
    try:
        followed(folder / "pickle")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.is_symlink():
            state = folder.stat()
            closed = state.st_uid == os.geteuid() and not is_loose(folder.resolve(), state)
            if not closed:
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
    """The text of a file that any process may have left in a run folder.

    Args:
        path: Of a regular file; nothing else is waited for.
        limit: How many bytes it has at most.

    Raises:
        OSError: It is not there, no regular file or larger.
        ValueError: It is no text.
    """
    return read_regular(path, limit).decode()


def _enter(folder: Path, seen: Survey, *, top: bool, code: bool, whole: bool) -> None:
    """Look at what is in a folder of the run.

    Args:
        folder: The run's own (``top``) or one below.
        seen: What is found is added to it.
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
                    f"{path} belongs to {user_name(state.st_uid)}, and a run folder is code that "
                    "runs as you: remove it, or choose another name="
                )
            seen.theirs.append((path, state.st_uid))
            continue
        if state.st_uid == os.geteuid() and is_loose(path, state):
            seen.loose.append(path)
        if stat.S_ISDIR(state.st_mode) and whole:
            _enter(path, seen, top=False, code=inside, whole=True)


def _refuse_link(link: Path, state: os.stat_result) -> None:
    if state.st_uid not in (os.geteuid(), 0):
        raise ConfigError(f"{link} is a link that {user_name(state.st_uid)} made: remove it")


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{error.filename or path}: {error.strerror or error}")


def _number(found: Sequence[object]) -> str:
    several = "s" * (len(found) > 1)
    return f"{len(found)} file{several} or folder{several}"
