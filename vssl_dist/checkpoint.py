"""Checkpoint directories: ``step-00012500/`` exists only if everything in it is whole.

All ranks write into ``.tmp-STEP-UUID/``; the files are dealt to the ranks, hashed and synced to
disk; rank 0 adds ``manifest.json``, renames the directory and syncs its parent.  Whatever dies
at whatever moment, the last committed directory stays as it is.  Nothing in a directory is
opened before all of it is known to be this user's own and agrees with its manifest.  What disks
do is damage: the directory is set aside, and the one before it is taken.  What only people do,
such as a link or another owner, stops the run: going on from an older one would hide it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial as bind
from pathlib import Path
from typing import Any, TypeVar, cast
from uuid import uuid4

from vssl_dist import dist, durable, sealed
from vssl_dist.errors import CheckpointError
from vssl_dist.sealed import CHECKPOINT_REMEDY, MANIFEST_FORMAT, MANIFEST_NAME, CheckpointProblem
from vssl_dist.text import printable

_log = logging.getLogger(__name__)
_MODE_WITHOUT_OTHERS_WRITING = 0o7755  # what is left of a mode

T = TypeVar("T")


@dataclass(frozen=True)
class CommittedCheckpoint:
    """A committed checkpoint whose every file was verified."""

    path: Path
    step: int
    run_facts: dict[str, Any]


def commit_checkpoint(
    root: Path, *, step: int, write_files: Callable[[Path], None], facts: dict[str, Any]
) -> Path:
    """Write a checkpoint of ``step`` below ``root``; every rank calls this.

    A step that is already there is left as it is: the same run at the same step has the same
    state, and replacing it would risk it.

    Args:
        root: Folder of the run's checkpoints, shared by all ranks.
        step: Optimizer steps done; rank 0's value counts.
        write_files: Called on every rank with the folder to write into.
        facts: JSON values to keep with it, for :func:`find_newest_checkpoint` to return; rank 0's
            count.

    Returns:
        The committed directory.

    Raises:
        CheckpointError: Some rank could not write; nothing was committed, nothing was lost.
    """
    step, random_token = dist.broadcast((step, uuid4().hex[:12]))
    final_path = root / f"step-{step:08d}"
    partial_path = root / f".tmp-{step:08d}-{random_token}"
    if dist.broadcast(final_path.is_dir() and not final_path.is_symlink()):
        return final_path
    try:
        run_on_all_ranks(lambda: _make_partial_folder(partial_path), only_on=0)
        run_on_all_ranks(lambda: write_files(partial_path))
        manifest_body = {
            "format": MANIFEST_FORMAT,
            "step": step,
            "facts": facts,
            "files": _compute_manifest_entries(partial_path),
        }
        run_on_all_ranks(
            lambda: _publish_checkpoint(partial_path, final_path, manifest_body), only_on=0
        )
    except CheckpointError:
        run_on_all_ranks(lambda: shutil.rmtree(partial_path, ignore_errors=True), only_on=0)
        raise
    return final_path


def find_newest_checkpoint(root: Path) -> CommittedCheckpoint | None:
    """Find the newest checkpoint that is whole, or None if the run has never saved one.

    Every rank calls this, once, before training.  Rank 0 decides; damaged directories are
    renamed to ``*.corrupt`` with a warning, remains of interrupted commits are removed.

    Raises:
        CheckpointError: There are checkpoints, but none is whole (a run never silently starts
            again from step 0); something in the newest is not this user's; or a rank does not see
            what rank 0 sees.
    """
    run_on_all_ranks(lambda: _remove_leftovers(root), only_on=0)
    checkpoint_names = dist.broadcast(sealed.list_committed_names(root)[::-1])
    has_quarantined = dist.broadcast(any(root.glob("step-*.corrupt*")))
    for path in (root / name for name in checkpoint_names):
        manifest_and_problem = (
            sealed.read_manifest(path, sealed.step_of_checkpoint_name(path.name))
            if dist.rank() == 0
            else ({}, None)
        )
        manifest, problem = dist.broadcast(manifest_and_problem)
        problem = problem or _find_problem(path, manifest)
        if problem is None:
            return CommittedCheckpoint(path, manifest["step"], manifest["facts"])
        if problem.stops_run:
            raise CheckpointError(problem.reason)
        run_on_all_ranks(bind(_set_damaged_aside, path, problem.reason), only_on=0)
    if checkpoint_names or has_quarantined:
        raise CheckpointError(
            f"every checkpoint in {root} is damaged (see *.corrupt there): restore one, or give "
            "the run another name, with name=..., to start again from step 0"
        )
    return None


def read_manifests(root: Path) -> list[dict[str, Any]]:
    """Read the manifests below ``root``, oldest first, in one process beside the run.

    No file is verified and nothing is changed.

    Raises:
        CheckpointError: Something in the newest is not this user's own: see
            `find_newest_checkpoint`.
    """
    if reason := sealed.why_foreign_root(root):
        raise CheckpointError(reason)
    manifests_and_problems = [
        sealed.read_manifest(root / name, sealed.step_of_checkpoint_name(name))
        for name in sealed.list_committed_names(root)
    ]
    problems = (problem for _, problem in reversed(manifests_and_problems))
    last_problem = next((p for p in problems if not p or p.stops_run), None)
    if last_problem:
        raise CheckpointError(last_problem.reason)
    return [manifest for manifest, problem in manifests_and_problems if problem is None]


def delete_old_checkpoints(root: Path, keep_last: int, keep_every: int | None) -> None:
    """Delete all but the newest ``keep_last`` checkpoints and each ``keep_every`` steps' one.

    Rank 0 works, the others return at once.  A checkpoint loses its name before its files, lest
    half of one be taken for a whole one; what cannot be removed is reported and stays.
    """
    if dist.rank() != 0:
        return
    for name in sealed.list_committed_names(root)[:-keep_last]:
        if (keep_every and sealed.step_of_checkpoint_name(name) % keep_every == 0) or (
            root / name
        ).is_symlink():
            continue
        trash_path = root / f".trash-{uuid4().hex[:12]}-{name}"
        try:
            (root / name).rename(trash_path)
            shutil.rmtree(trash_path)
        except OSError as error:
            _log.warning("old checkpoint %s is not removed: %s", root / name, error)


def run_on_all_ranks(work: Callable[[], T], only_on: int | None = None) -> T | None:
    """Run ``work`` on every rank (or on one), then let all ranks learn whether it succeeded.

    Returns:
        This rank's result, None on ranks that had nothing to do.

    Raises:
        CheckpointError: On every rank, if any rank failed, with the first such rank's reason.
    """
    result, problem = None, None
    try:
        if only_on is None or dist.rank() == only_on:
            result = work()
    except Exception as error:
        reason = printable((str(error).splitlines() or [""])[0])
        is_refusal = isinstance(error, CheckpointError)
        problem = reason if is_refusal else f"rank {dist.rank()}: {type(error).__name__}: {reason}"
    first_problem = next(filter(None, dist.gather(problem)), None)
    if first_problem:
        raise CheckpointError(first_problem)
    return result


def load_on_all_ranks(path: Path, work: Callable[[], T]) -> T:
    """Run ``work``, which reads ``path``, on every rank; refuse on all if it fails on one.

    Returns:
        This rank's result.

    Raises:
        CheckpointError: One line that names ``path``: it is whole, and not what was written here.
    """

    def work_or_refuse() -> T:
        try:
            return work()
        except Exception as error:  # what fits a file's checksum may hold anything
            reason = printable((str(error).splitlines() or [""])[0][:200])
            error_description = f"{type(error).__name__}: {reason}"
            raise CheckpointError(
                f"{path} does not fit this run ({error_description}): {CHECKPOINT_REMEDY}"
            ) from error

    return cast(T, run_on_all_ranks(work_or_refuse))


def _compute_manifest_entries(partial_folder: Path) -> dict[str, dict[str, Any]]:
    """Sync every file to disk and return its size and sha256; the ranks share the files."""
    file_names = dist.broadcast(
        sorted(
            path.relative_to(partial_folder).as_posix()
            for path in partial_folder.rglob("*")
            if path.is_file()
        )
    )

    def compute_own_entries() -> dict[str, dict[str, Any]]:
        for name in _names_of_this_rank(file_names):
            durable.sync_to_disk(partial_folder / name)
        return {
            name: sealed.compute_manifest_entry(partial_folder / name)
            for name in _names_of_this_rank(file_names)
        }

    entries_by_rank = dist.gather(run_on_all_ranks(compute_own_entries))
    return {
        name: entry
        for rank_entries in entries_by_rank
        if rank_entries
        for name, entry in rank_entries.items()
    }


def _make_partial_folder(partial_folder: Path) -> None:
    """Make the folder to write into, where no group may write either, whatever the umask."""
    partial_folder.parent.mkdir(0o755, parents=True, exist_ok=True)
    partial_folder.mkdir(0o700)


def _publish_checkpoint(
    partial_folder: Path, final_path: Path, manifest_body: dict[str, Any]
) -> None:
    manifest = {"checksum": sealed.compute_manifest_checksum(manifest_body), **manifest_body}
    durable.write_durably(partial_folder / MANIFEST_NAME, json.dumps(manifest, indent=1).encode())
    for path in partial_folder.rglob("*"):
        path.chmod(path.stat().st_mode & _MODE_WITHOUT_OTHERS_WRITING)
        if path.is_dir():
            durable.sync_to_disk(path)
    root = final_path.parent
    # Read by whom the others are.
    partial_folder.chmod(root.stat().st_mode & _MODE_WITHOUT_OTHERS_WRITING)
    partial_folder.rename(final_path)
    for folder in (root, root.parent):  # the first commit also makes the root
        durable.sync_to_disk(folder)


def _find_problem(path: Path, manifest: dict[str, Any]) -> CheckpointProblem | None:
    """Say what is wrong with a checkpoint; all ranks return the same, each verifies a share."""
    visible_on_rank = dist.gather(path.is_dir())
    if not all(visible_on_rank):
        reason = (
            f"rank {visible_on_rank.index(False)} cannot see {path}: "
            "all nodes must share that file system"
        )
        return CheckpointProblem(reason, stops_run=True)
    entry_by_file = manifest["files"]
    own_problems = [
        sealed.why_damaged(path / name, entry_by_file[name])
        for name in _names_of_this_rank(sorted(entry_by_file))
    ]
    first_damage = next(
        (
            problem
            for rank_problems in dist.gather(own_problems)
            for problem in rank_problems
            if problem
        ),
        None,
    )
    return CheckpointProblem(first_damage) if first_damage else None


def _remove_leftovers(root: Path) -> None:
    if reason := sealed.why_foreign_root(root):
        raise CheckpointError(reason)
    for path in sealed.list_leftover_folders(root):
        shutil.rmtree(path, ignore_errors=True)


def _set_damaged_aside(path: Path, problem: str) -> None:
    new_path = path.with_name(f"{path.name}.corrupt")
    while os.path.lexists(new_path):
        new_path = new_path.with_name(f"{path.name}.corrupt-{uuid4().hex[:4]}")
    path.rename(new_path)
    _log.warning("checkpoint %s is damaged (%s); now %s", path, problem, new_path.name)


def _names_of_this_rank(names: list[str]) -> list[str]:
    return names[dist.rank() :: dist.world_size()]
