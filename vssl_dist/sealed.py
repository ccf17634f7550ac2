"""Checkpoints as they lie on disk: what seals one, and what of it can be believed.

The manifest has the size and the sha256 of every file.  That tells whole from damaged, not ours
from foreign: whoever can write the files can write the manifest.  So nothing of a folder is read
before all in it is known to be this user's own, plain files and no links.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vssl_dist import durable
from vssl_dist.text import printable

FORMAT = "vssl-dist/checkpoint-1"
MANIFEST = "manifest.json"
REMEDY = "restore this checkpoint, or remove it to continue from the one before"
_STEP = re.compile(r"step-(\d{8}|[1-9]\d{8,})", re.ASCII)
_REMAINS = re.compile(
    rf"\.tmp-\d{{8,}}-[0-9a-f]{{12}}|\.trash-[0-9a-f]{{12}}-{_STEP.pattern}", re.A
)
_MAX_BYTES = 2**28
"""Most bytes of a manifest: that of a thousand ranks has half a million."""
_INNER_PATH = re.compile(r"(?!(?:.*/)?\.+(?:/|\Z))[\w.-]+(?:/[\w.-]+)*", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Problem:
    """Why a checkpoint cannot be taken."""

    reason: str
    stops: bool = False
    """Disks do damage: then the checkpoint before is taken.  What no disk does to a file, such as
    another owner, ends the run instead: to go on from elsewhere would hide it."""


def read(folder: Path, step: int) -> tuple[dict[str, Any], Problem | None]:
    """Read the manifest of a checkpoint, and say what is wrong with it or with its owner.

    Args:
        folder: The checkpoint.
        step: What its name says.
    """
    try:
        return _read(folder, step)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        return {}, Problem(f"{MANIFEST} cannot be read: {type(error).__name__}")


def committed_names(root: Path) -> list[str]:
    """List the names of committed checkpoints by step, also of links, which `read` refuses."""
    checkpoints = (path for path in root.glob("step-*") if _STEP.fullmatch(path.name))
    return sorted(
        (path.name for path in checkpoints if path.is_symlink() or path.is_dir()), key=step_of
    )


def step_of(name: str) -> int:
    """Return the step that a committed checkpoint's name says."""
    return int(name.removeprefix("step-"))


def leftovers(root: Path) -> list[Path]:
    """List what this user's interrupted commits and removals have left, and nothing else."""
    candidates = (path for path in root.glob(".t*") if _REMAINS.fullmatch(path.name))
    return [
        path for path in candidates if stat.S_ISDIR(path.lstat().st_mode) and not why_foreign(path)
    ]


def why_foreign_root(root: Path) -> str | None:
    """Say why the folder of checkpoints is not this user's; None if it is, or is not there yet."""
    try:
        return why_foreign(durable.followed(root))
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{root}: {error.strerror}"


def why_foreign(path: Path) -> str | None:
    """Say why a path is no file or folder of this user's own, or return None if it is one.

    Raises:
        OSError: It cannot be looked at.
    """
    status = path.lstat()
    name = printable(str(path))
    if stat.S_ISLNK(status.st_mode):
        return f"{name} is a link, which nothing in a checkpoint is: put there what it points to"
    if not (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)):
        return f"{name} is neither a file nor a folder: remove it"
    if status.st_uid not in (os.geteuid(), 0):
        owner = durable.name_of_user(status.st_uid)
        return (
            f"{name} belongs to {owner}, and a checkpoint can run code: if you trust {owner}, "
            "make it your own (chown, or cp -r of the run)"
        )
    return None


def why_damaged(path: Path, entry: dict[str, Any]) -> str | None:
    """Say how a file differs from its entry in the manifest, or return None."""
    try:
        if path.stat().st_size != entry["size"]:
            return f"{path.name} has {path.stat().st_size} bytes instead of {entry['size']}"
        if fingerprint(path) != entry:
            return f"the checksum of {path.name} is wrong"
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    return None


def fingerprint(path: Path) -> dict[str, Any]:
    """Compute a file's entry in the manifest: size and sha256."""
    return {"size": path.stat().st_size, "sha256": durable.sha256(path)}


def checksum(body: dict[str, Any]) -> str:
    """Compute the digest by which a manifest vouches for its own content."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _read(folder: Path, step: int) -> tuple[dict[str, Any], Problem | None]:
    if reason := _foreign_below(folder):
        return {}, Problem(reason, stops=True)
    if (folder / MANIFEST).stat().st_size > _MAX_BYTES:
        return {}, Problem(f"{MANIFEST} is longer than any manifest")
    manifest = json.loads((folder / MANIFEST).read_bytes())
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    if manifest["checksum"] != checksum(body):
        return {}, Problem(f"the checksum of {MANIFEST} is wrong")
    if manifest["step"] != step:
        return {}, Problem(f"{MANIFEST} is of step {_short(manifest['step'])}")
    if manifest["format"] != FORMAT:
        reason = f"{folder} has format {_short(manifest['format'])}, not {FORMAT}"
        return {}, Problem(reason, stops=True)
    if problem := _implausible(manifest):
        reason = f"{folder / MANIFEST}: {problem}, though its checksum is right: {REMEDY}"
        return {}, Problem(reason, stops=True)
    return manifest, None


def _foreign_below(folder: Path) -> str | None:
    """Say what in a folder or below it is foreign, whether the manifest names it or not."""
    waiting = [folder]
    while waiting:
        path = waiting.pop()
        if reason := why_foreign(path):
            return reason
        if path.is_dir():
            waiting += path.iterdir()
    return None


def _implausible(manifest: dict[str, Any]) -> str | None:
    """Say what in a manifest this program cannot have written, or return None."""
    if type(manifest["step"]) is not int:
        return "its step is no whole number"
    if not isinstance(manifest.get("facts"), dict) or not isinstance(manifest.get("files"), dict):
        return "it lacks facts or files"
    for name, entry in manifest["files"].items():
        if not _INNER_PATH.fullmatch(name):
            return f"it names {_short(name)}, which is no file inside the checkpoint"
        if not isinstance(entry, dict) or entry.keys() != {"size", "sha256"}:
            return f"{name} lacks size or sha256"
        size, sha256 = entry["size"], entry["sha256"]
        has_size = type(size) is int and size >= 0
        if not has_size or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            return f"{name} has a size or sha256 that is none"
    return None


def _short(value: Any) -> str:
    return printable(str(value)[:60])
