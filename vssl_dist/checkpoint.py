"""Checkpoint directories: ``step-00012500/`` exists only if everything in it is whole.

All ranks write into ``.tmp-STEP-UUID/``; the files are dealt to the ranks, hashed and synced to
disk; rank 0 adds ``manifest.json``, renames the directory and syncs its parent.  Whatever dies
at whatever moment, the last committed directory stays as it is.  Nothing in a directory is
opened before its sizes and checksums agree with its manifest.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial as bind
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from vssl_dist import dist, durable

FORMAT = "vssl-dist/checkpoint-1"
MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d{8,})")

T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint could not be written, or none can be trusted; one line, on every rank."""


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
    if dist.broadcast(final.is_dir()):
        return final
    try:
        all_or_none(lambda: partial.mkdir(parents=True), only_on=0)
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
            again from step 0), or a rank does not see what rank 0 sees.
    """
    all_or_none(lambda: _sweep(root), only_on=0)
    names, set_aside = dist.broadcast((_committed(root)[::-1], list(root.glob("step-*.corrupt*"))))
    for path in (root / name for name in names):
        manifest, problem = dist.broadcast(_read_manifest(path) if dist.rank() == 0 else ({}, None))
        if problem is None:
            problem = _problem(path, manifest)
        if problem is None:
            return Committed(path, manifest["step"], manifest["facts"])
        all_or_none(bind(_set_aside, path, problem), only_on=0)
    if names or set_aside:
        raise CheckpointError(
            f"every checkpoint in {root} is damaged (see *.corrupt there): restore one, or give "
            "the run another name, with name=..., to start again from step 0"
        )
    return None


def manifests(root: Path) -> list[dict[str, Any]]:
    """Readable manifests below ``root``, oldest first: for one process to look from outside.

    No file is verified and nothing is changed.
    """
    read = (_read_manifest(root / name) for name in _committed(root))
    return [manifest for manifest, problem in read if problem is None]


def retain(root: Path, keep_last: int, keep_every: int | None) -> None:
    """Delete all but the newest ``keep_last`` checkpoints and each ``keep_every`` steps' one.

    Rank 0 works, the others return at once.  A checkpoint loses its name before its files, lest
    half of one be taken for a whole one; what cannot be removed is reported and stays.
    """
    if dist.rank() != 0:
        return
    for name in _committed(root)[:-keep_last]:
        if keep_every and _step_of(name) % keep_every == 0:
            continue
        trash = root / f".trash-{uuid4().hex[:12]}-{name}"
        try:
            (root / name).rename(trash)
            shutil.rmtree(trash)
        except OSError as error:
            print(f"warning: old checkpoint {root / name} is not removed: {error}", flush=True)


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
        reason = (str(error).splitlines() or [""])[0]
        problem = f"rank {dist.rank()}: {type(error).__name__}: {reason}"
    for told in dist.gather(problem):
        if told:
            raise CheckpointError(told)
    return result


def _seal(partial: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file, each read back and synced to disk by one of the ranks."""
    names = dist.broadcast(
        sorted(p.relative_to(partial).as_posix() for p in partial.rglob("*") if p.is_file())
    )

    def fingerprints() -> dict[str, dict[str, Any]]:
        for name in _share(names):
            durable.sync(partial / name)
        return {name: _fingerprint(partial / name) for name in _share(names)}

    parts = dist.gather(all_or_none(fingerprints))
    return {name: entry for part in parts if part for name, entry in part.items()}


def _publish(partial: Path, final: Path, body: dict[str, Any]) -> None:
    manifest = {"checksum": _checksum(body), **body}
    durable.publish(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
    for folder in [path for path in partial.rglob("*") if path.is_dir()]:
        durable.sync(folder)
    partial.rename(final)
    for folder in (final.parent, final.parent.parent):  # the first commit also makes the root
        durable.sync(folder)


def _read_manifest(path: Path) -> tuple[dict[str, Any], str | None]:
    """The manifest of a directory, or what is wrong with it."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        body = {key: value for key, value in manifest.items() if key != "checksum"}
        if manifest["checksum"] != _checksum(body):
            return {}, f"the checksum of {MANIFEST} is wrong"
        if manifest["step"] != _step_of(path.name):
            return {}, f"{MANIFEST} is of step {manifest['step']}"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return {}, f"{MANIFEST} cannot be read: {type(error).__name__}"
    return manifest, None


def _problem(path: Path, manifest: dict[str, Any]) -> str | None:
    """What is wrong with a directory, the same answer on all ranks, each looking at its share."""
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {manifest['format']}, not {FORMAT}")
    seen = dist.gather(path.is_dir())
    if not all(seen):
        raise CheckpointError(
            f"rank {seen.index(False)} cannot see {path}: all nodes must share that file system"
        )
    files = manifest["files"]
    mine = [_damage(path / name, files[name]) for name in _share(sorted(files))]
    return next((why for whys in dist.gather(mine) for why in whys if why), None)


def _damage(path: Path, entry: dict[str, Any]) -> str | None:
    try:
        if path.stat().st_size != entry["size"]:
            return f"{path.name} has {path.stat().st_size} bytes instead of {entry['size']}"
        if _fingerprint(path) != entry:
            return f"the checksum of {path.name} is wrong"
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    return None


def _set_aside(path: Path, problem: str) -> None:
    aside = path.with_name(f"{path.name}.corrupt")
    while aside.exists():
        aside = aside.with_name(f"{path.name}.corrupt-{uuid4().hex[:4]}")
    path.rename(aside)
    print(f"warning: checkpoint {path} is damaged ({problem}); now {aside.name}", flush=True)


def _sweep(root: Path) -> None:
    for path in [*root.glob(".tmp-*"), *root.glob(".trash-*")]:
        shutil.rmtree(path, ignore_errors=True)


def _committed(root: Path) -> list[str]:
    """Names of committed directories, by ascending step."""
    names = (p.name for p in root.glob("step-*") if _STEP.fullmatch(p.name) and p.is_dir())
    return sorted(names, key=_step_of)


def _step_of(name: str) -> int:
    return int(name.removeprefix("step-"))


def _share(names: list[str]) -> list[str]:
    return names[dist.rank() :: dist.world_size()]


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": durable.sha256(path)}


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
