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
from vssl_dist.sealed import FORMAT, MANIFEST, REMEDY, Problem
from vssl_dist.text import printable

_log = logging.getLogger(__name__)
_NOT_BY_OTHERS = 0o7755  # what is left of a mode

T = TypeVar("T")


@dataclass(frozen=True)
class Committed:
    """A checkpoint whose every file was verified."""

    path: Path
    step: int
    facts: dict[str, Any]


def commit(root: Path, *, step: int, write: Callable[[Path], None], facts: dict[str, Any]) -> Path:
    """Write a checkpoint of ``step`` below ``root``; every rank calls this.

    A step that is already there is left as it is: the same run at the same step has the same
    state, and replacing it would risk it.

    Args:
        root: Folder of the run's checkpoints, shared by all ranks.
        step: Optimizer steps done; rank 0's value counts.
        write: Called on every rank with the folder to write into.
        facts: JSON values to keep with it, for :func:`newest` to return; rank 0's count.

    Returns:
        The committed directory.

    Raises:
        CheckpointError: Some rank could not write; nothing was committed, nothing was lost.
    """
    step, token = dist.broadcast((step, uuid4().hex[:12]))
    final, partial = root / f"step-{step:08d}", root / f".tmp-{step:08d}-{token}"
    if dist.broadcast(final.is_dir() and not final.is_symlink()):
        return final
    try:
        all_or_none(lambda: _begin(partial), only_on=0)
        all_or_none(lambda: write(partial))
        body = {"format": FORMAT, "step": step, "facts": facts, "files": _seal(partial)}
        all_or_none(lambda: _publish(partial, final, body), only_on=0)
    except CheckpointError:
        all_or_none(lambda: shutil.rmtree(partial, ignore_errors=True), only_on=0)
        raise
    return final


def newest(root: Path) -> Committed | None:
    """The newest checkpoint that is whole, or None if the run has never saved one.

    Every rank calls this, once, before training.  Rank 0 decides; damaged directories are
    renamed to ``*.corrupt`` with a warning, remains of interrupted commits are removed.

    Raises:
        CheckpointError: There are checkpoints, but none is whole (a run never silently starts
            again from step 0); something in the newest is not this user's; or a rank does not see
            what rank 0 sees.
    """
    all_or_none(lambda: _sweep(root), only_on=0)
    names = dist.broadcast(sealed.committed(root)[::-1])
    quarantined = dist.broadcast(any(root.glob("step-*.corrupt*")))
    for path in (root / name for name in names):
        read = sealed.read(path, sealed.step_of(path.name)) if dist.rank() == 0 else ({}, None)
        manifest, problem = dist.broadcast(read)
        problem = problem or _problem(path, manifest)
        if problem is None:
            return Committed(path, manifest["step"], manifest["facts"])
        if problem.stops:
            raise CheckpointError(problem.reason)
        all_or_none(bind(_set_aside, path, problem.reason), only_on=0)
    if names or quarantined:
        raise CheckpointError(
            f"every checkpoint in {root} is damaged (see *.corrupt there): restore one, or give "
            "the run another name, with name=..., to start again from step 0"
        )
    return None


def manifests(root: Path) -> list[dict[str, Any]]:
    """Readable manifests below ``root``, oldest first: for one process to look from outside.

    No file is verified and nothing is changed.

    Raises:
        CheckpointError: Something in the newest is not this user's own: see `newest`.
    """
    if reason := sealed.foreign_root(root):
        raise CheckpointError(reason)
    read = [sealed.read(root / name, sealed.step_of(name)) for name in sealed.committed(root)]
    last = next((problem for _, problem in reversed(read) if not problem or problem.stops), None)
    if last:
        raise CheckpointError(last.reason)
    return [manifest for manifest, problem in read if problem is None]


def retain(root: Path, keep_last: int, keep_every: int | None) -> None:
    """Delete all but the newest ``keep_last`` checkpoints and each ``keep_every`` steps' one.

    Rank 0 works, the others return at once.  A checkpoint loses its name before its files, lest
    half of one be taken for a whole one; what cannot be removed is reported and stays.
    """
    if dist.rank() != 0:
        return
    for name in sealed.committed(root)[:-keep_last]:
        if (keep_every and sealed.step_of(name) % keep_every == 0) or (root / name).is_symlink():
            continue
        trash = root / f".trash-{uuid4().hex[:12]}-{name}"
        try:
            (root / name).rename(trash)
            shutil.rmtree(trash)
        except OSError as error:
            _log.warning("old checkpoint %s is not removed: %s", root / name, error)


def all_or_none(work: Callable[[], T], only_on: int | None = None) -> T | None:
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
        told = isinstance(error, CheckpointError)
        problem = reason if told else f"rank {dist.rank()}: {type(error).__name__}: {reason}"
    first = next(filter(None, dist.gather(problem)), None)
    if first:
        raise CheckpointError(first)
    return result


def agreed(place: Path, work: Callable[[], T]) -> T:
    """Every rank's own result of ``work``, which reads ``place``, or the same refusal on all.

    Raises:
        CheckpointError: One line that names ``place``: it is whole, and not what was written here.
    """

    def named() -> T:
        try:
            return work()
        except Exception as error:  # what fits a file's checksum may hold anything
            reason = printable((str(error).splitlines() or [""])[0][:200])
            why = f"{type(error).__name__}: {reason}"
            raise CheckpointError(f"{place} does not fit this run ({why}): {REMEDY}") from error

    return cast(T, all_or_none(named))


def _seal(partial: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file, each read back and synced to disk by one of the ranks."""
    names = dist.broadcast(
        sorted(p.relative_to(partial).as_posix() for p in partial.rglob("*") if p.is_file())
    )

    def fingerprints() -> dict[str, dict[str, Any]]:
        for name in _share(names):
            durable.sync(partial / name)
        return {name: sealed.fingerprint(partial / name) for name in _share(names)}

    parts = dist.gather(all_or_none(fingerprints))
    return {name: entry for part in parts if part for name, entry in part.items()}


def _begin(partial: Path) -> None:
    """Make the folder to write into, where no group may write either, whatever the umask."""
    partial.parent.mkdir(0o755, parents=True, exist_ok=True)
    partial.mkdir(0o700)


def _publish(partial: Path, final: Path, body: dict[str, Any]) -> None:
    manifest = {"checksum": sealed.checksum(body), **body}
    durable.publish(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
    for path in partial.rglob("*"):
        path.chmod(path.stat().st_mode & _NOT_BY_OTHERS)
        if path.is_dir():
            durable.sync(path)
    partial.chmod(final.parent.stat().st_mode & _NOT_BY_OTHERS)  # read by whom the others are
    partial.rename(final)
    for folder in (final.parent, final.parent.parent):  # the first commit also makes the root
        durable.sync(folder)


def _problem(path: Path, manifest: dict[str, Any]) -> Problem | None:
    """What is wrong with a directory, the same answer on all ranks, each looking at its share."""
    seen = dist.gather(path.is_dir())
    if not all(seen):
        reason = (
            f"rank {seen.index(False)} cannot see {path}: all nodes must share that file system"
        )
        return Problem(reason, stops=True)
    files = manifest["files"]
    mine = [sealed.damage(path / name, files[name]) for name in _share(sorted(files))]
    damage = next((why for whys in dist.gather(mine) for why in whys if why), None)
    return Problem(damage) if damage else None


def _sweep(root: Path) -> None:
    if reason := sealed.foreign_root(root):
        raise CheckpointError(reason)
    for path in sealed.remains(root):
        shutil.rmtree(path, ignore_errors=True)


def _set_aside(path: Path, problem: str) -> None:
    aside = path.with_name(f"{path.name}.corrupt")
    while os.path.lexists(aside):
        aside = aside.with_name(f"{path.name}.corrupt-{uuid4().hex[:4]}")
    path.rename(aside)
    _log.warning("checkpoint %s is damaged (%s); now %s", path, problem, aside.name)


def _share(names: list[str]) -> list[str]:
    return names[dist.rank() :: dist.world_size()]
