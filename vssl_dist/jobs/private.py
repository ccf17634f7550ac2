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
from vssl_dist.jobs.permissions import close_to_others, is_writable_by_others
from vssl_dist.run_folder import RunFolder

_log = logging.getLogger(__name__)
_RELATIVE_RUN = RunFolder(Path())
_CODE_FREE_FOLDERS = tuple(
    path.name
    for path in (
        _RELATIVE_RUN.export_folder.path,
        _RELATIVE_RUN.logs_folder,
        _RELATIVE_RUN.spool_folder,
    )
)
"""Folders that hold no code: colleagues who could write there may have evaluated the run."""
_RUN_SUBFOLDERS = (
    _RELATIVE_RUN.checkpoints_folder.name,
    _RELATIVE_RUN.slurm_folder.name,
    *_CODE_FREE_FOLDERS,
)
"""Folders that a run makes; a user's link to a folder elsewhere counts as that folder."""


@dataclass
class PermissionSurvey:
    """Files and folders of a run that others can write, or own."""

    writable_by_others: list[Path] = field(default_factory=list)
    """Paths of this user that others can write; a folder comes before what is in it."""
    owned_by_others: list[tuple[Path, int]] = field(default_factory=list)
    """Paths of other users among results, curves and logs, each with its owner's uid."""

    def warning_lines(self, run_dir: Path) -> Iterator[str]:
        """Yield the warnings about the folder, one line each."""
        if self.writable_by_others:
            count, first = _count_text(self.writable_by_others), self.writable_by_others[0]
            yield (
                f"others could write in {run_dir} ({count}, first {first}), and a run folder is "
                "code that runs as you: a start takes that from them (chmod -R go-w), not reading; "
                "what they changed before stays"
            )
        if self.owned_by_others:
            path, owner = self.owned_by_others[0]
            yield (
                f"{path} belongs to {user_name(owner)}, who can still change it "
                f"({_count_text(self.owned_by_others)} of others): remove what you did not ask for"
            )


def survey_permissions(run_dir: Path, *, is_recursive: bool = True) -> PermissionSurvey:
    """Find what others can write or own in a run folder, which need not exist; change nothing.

    Args:
        run_dir: The run's folder.
        is_recursive: All that is in it, not its own entries alone.

    Raises:
        ConfigError: One line: it is no folder or not this user's, or something in it is not.
    """
    result = PermissionSurvey()
    try:
        if run_dir.is_symlink():
            resolve_trusted_links(RunFolder(run_dir).owner_path)  # who made the links on the way
        resolved_dir = run_dir.resolve() if run_dir.is_symlink() else run_dir
        run_dir_stat = resolved_dir.lstat()
    except (FileNotFoundError, NotADirectoryError):
        if run_dir.is_symlink():
            raise ConfigError(f"{run_dir} is a link to nothing: remove it") from None
        return result
    except OSError as error:
        raise _unreadable_error(run_dir, error) from error
    if not stat.S_ISDIR(run_dir_stat.st_mode):
        raise ConfigError(f"{run_dir} is no folder: remove it, or choose another name= or out=")
    if run_dir_stat.st_uid != os.geteuid():
        raise ConfigError(
            f"{run_dir} belongs to {user_name(run_dir_stat.st_uid)}, and a run folder is code "
            "that runs as you: choose another name= or out="
        )
    if is_writable_by_others(resolved_dir, run_dir_stat):
        result.writable_by_others.append(resolved_dir)
    _survey_contents(
        resolved_dir, result, is_run_folder=True, may_be_run=True, is_recursive=is_recursive
    )
    return result


def refuse_linked_run(run_dir: Path) -> None:
    """Refuse a run folder that is a link: it may lead to another folder tomorrow.

    Raises:
        ConfigError: One line that says how to name the folder itself.
    """
    if run_dir.is_symlink():
        link_target = run_dir.resolve()
        raise ConfigError(
            f"{run_dir} is a link, and a run folder is code that runs as you: name the folder "
            f"itself, with out={link_target.parent} name={link_target.name}"
        )


def secure_run_folder(run_dir: Path, *, is_recursive: bool = False) -> None:
    """Close a run folder, and all that this process will make in it, to the writing of others.

    Args:
        run_dir: The run's folder, which exists.
        is_recursive: Look at all that is in it, also where the folder itself is closed to others.

    Raises:
        ConfigError: One line: it is not this user's, or something in it is not.
    """
    forbid_writing_by_others()
    result = survey_permissions(run_dir, is_recursive=is_recursive)
    if result.writable_by_others:
        result = survey_permissions(run_dir)
        for path in result.writable_by_others:
            close_to_others(path)
        for line in result.warning_lines(run_dir):
            _log.warning("%s", line)
        # What came in between, and a file system that knows no permissions.
        if writable_by_others := survey_permissions(run_dir).writable_by_others:
            _log.warning(
                "%s: this file system keeps no permissions, so others may write there",
                writable_by_others[0],
            )
    elif is_recursive:
        for line in result.warning_lines(run_dir):
            _log.warning("%s", line)


def make_run_folder(run_dir: Path) -> None:
    """Make a run folder that only this user can write in, or close one that is there.

    The folders above are made as the user's umask says: others may have runs there, too.

    Raises:
        ConfigError: One line: it is not this user's, or something in it is not.
    """
    survey_permissions(run_dir, is_recursive=False)
    refuse_linked_run(run_dir)
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    forbid_writing_by_others()
    with suppress(FileExistsError):
        run_dir.mkdir()
        close_to_others(run_dir)  # a default ACL of the folder above may let them write
    secure_run_folder(run_dir, is_recursive=True)


def make_private_folder(folder: Path) -> None:
    """Make a folder that only this user can look into; a folder behind a link keeps its mode.

    Raises:
        ConfigError: One line: it is not this user's.
    """
    forbid_writing_by_others()
    try:
        resolve_trusted_links(folder / "pickle")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.is_symlink():
            folder_stat = folder.stat()
            is_mine = folder_stat.st_uid == os.geteuid()
            if not is_mine or is_writable_by_others(folder.resolve(), folder_stat):
                raise ConfigError(
                    f"{folder} leads to a folder in which others can write, and nodes run what "
                    "they find there: remove the link"
                )
            return
        folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            owner_uid = os.fstat(folder_fd).st_uid
            if owner_uid != os.geteuid():
                raise ConfigError(f"{folder} belongs to {user_name(owner_uid)}: remove it")
            os.fchmod(folder_fd, 0o700)
        finally:
            os.close(folder_fd)
    except OSError as error:
        raise _unreadable_error(folder, error) from error


def read_text_file(path: Path, max_bytes: int) -> str:
    """Read a text file of a run folder, in which any process may have left anything.

    Args:
        path: A regular file; a pipe is refused and not waited for.
        max_bytes: Largest size in bytes.

    Raises:
        OSError: It is not there, no regular file or larger.
        ValueError: It is no text.
    """
    return read_regular_file(path, max_bytes).decode()


def _survey_contents(
    folder: Path,
    result: PermissionSurvey,
    *,
    is_run_folder: bool,
    may_be_run: bool,
    is_recursive: bool,
) -> None:
    """Add what is in a folder of the run to a survey.

    Args:
        folder: The run's own (``is_run_folder``) or one below.
        result: Is added to.
        is_run_folder: See ``folder``.
        may_be_run: Whether what is in it may be run, and so must not be of others.
        is_recursive: Look into its folders, too.
    """
    try:
        entries = sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return  # others are at work in a run; and what cannot be read cannot be run
    except OSError as error:
        raise _unreadable_error(folder, error) from error
    for path in entries:
        try:
            path_stat = path.lstat()
        except FileNotFoundError:
            continue
        contents_may_be_run = may_be_run and not (is_run_folder and path.name in _CODE_FREE_FOLDERS)
        if stat.S_ISLNK(path_stat.st_mode):
            _refuse_foreign_link(path, path_stat)
            if not (is_run_folder and path.name in _RUN_SUBFOLDERS and path.is_dir()):
                continue
            path = path.resolve()
            path_stat = path.stat()
        if path_stat.st_uid not in (os.geteuid(), 0):
            if may_be_run:
                raise ConfigError(
                    f"{path} belongs to {user_name(path_stat.st_uid)}, and a run folder is code "
                    "that runs as you: remove it, or choose another name="
                )
            result.owned_by_others.append((path, path_stat.st_uid))
            continue
        if path_stat.st_uid == os.geteuid() and is_writable_by_others(path, path_stat):
            result.writable_by_others.append(path)
        if stat.S_ISDIR(path_stat.st_mode) and is_recursive:
            _survey_contents(
                path, result, is_run_folder=False, may_be_run=contents_may_be_run, is_recursive=True
            )


def _refuse_foreign_link(link: Path, link_stat: os.stat_result) -> None:
    if link_stat.st_uid not in (os.geteuid(), 0):
        raise ConfigError(f"{link} is a link that {user_name(link_stat.st_uid)} made: remove it")


def _unreadable_error(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{error.filename or path}: {error.strerror or error}")


def _count_text(paths: Sequence[object]) -> str:
    plural = "s" * (len(paths) > 1)
    return f"{len(paths)} file{plural} or folder{plural}"
