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

MANIFEST_FORMAT = "vssl-dist/checkpoint-1"
MANIFEST_NAME = "manifest.json"
CHECKPOINT_REMEDY = "restore this checkpoint, or remove it to continue from the one before"
_CHECKPOINT_NAME_PATTERN = re.compile(r"step-(\d{8}|[1-9]\d{8,})", re.ASCII)
_LEFTOVER_NAME_PATTERN = re.compile(
    rf"\.tmp-\d{{8,}}-[0-9a-f]{{12}}|\.trash-[0-9a-f]{{12}}-{_CHECKPOINT_NAME_PATTERN.pattern}",
    re.A,
)
_MAX_MANIFEST_BYTES = 2**28
"""Most bytes of a manifest: that of a thousand ranks has half a million."""
_INNER_PATH_PATTERN = re.compile(r"(?!(?:.*/)?\.+(?:/|\Z))[\w.-]+(?:/[\w.-]+)*", re.ASCII)
_SHA256_PATTERN = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class CheckpointProblem:
    """Why a checkpoint cannot be taken."""

    reason: str
    stops_run: bool = False
    """Disks do damage: then the checkpoint before is taken.  What no disk does to a file, such as
    another owner, ends the run instead: to go on from elsewhere would hide it."""


def read_manifest(folder: Path, step: int) -> tuple[dict[str, Any], CheckpointProblem | None]:
    """Read the manifest of a checkpoint, and say what is wrong with it or with its owner.

    Args:
        folder: The checkpoint.
        step: What its name says.
    """
    try:
        return _read_valid_manifest(folder, step)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        return {}, CheckpointProblem(f"{MANIFEST_NAME} cannot be read: {type(error).__name__}")


def list_committed_names(root: Path) -> list[str]:
    """List names of committed checkpoints by step, also of links, which `read_manifest` refuses."""
    checkpoint_paths = (
        path for path in root.glob("step-*") if _CHECKPOINT_NAME_PATTERN.fullmatch(path.name)
    )
    return sorted(
        (path.name for path in checkpoint_paths if path.is_symlink() or path.is_dir()),
        key=step_of_checkpoint_name,
    )


def step_of_checkpoint_name(name: str) -> int:
    """Return the step that a committed checkpoint's name says."""
    return int(name.removeprefix("step-"))


def list_leftover_folders(root: Path) -> list[Path]:
    """List what this user's interrupted commits and removals have left, and nothing else."""
    leftover_paths = (
        path for path in root.glob(".t*") if _LEFTOVER_NAME_PATTERN.fullmatch(path.name)
    )
    return [
        path
        for path in leftover_paths
        if stat.S_ISDIR(path.lstat().st_mode) and not why_foreign(path)
    ]


def why_foreign_root(root: Path) -> str | None:
    """Say why the folder of checkpoints is not this user's; None if it is, or is not there yet."""
    try:
        return why_foreign(durable.resolve_trusted_links(root))
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{root}: {error.strerror}"


def why_foreign(path: Path) -> str | None:
    """Say why a path is no file or folder of this user's own, or return None if it is one.

    Raises:
        OSError: It cannot be looked at.
    """
    path_status = path.lstat()
    shown_path = printable(str(path))
    if stat.S_ISLNK(path_status.st_mode):
        return (
            f"{shown_path} is a link, which nothing in a checkpoint is: put there what it points to"
        )
    if not (stat.S_ISDIR(path_status.st_mode) or stat.S_ISREG(path_status.st_mode)):
        return f"{shown_path} is neither a file nor a folder: remove it"
    if path_status.st_uid not in (os.geteuid(), 0):
        owner_name = durable.user_name(path_status.st_uid)
        return (
            f"{shown_path} belongs to {owner_name}, and a checkpoint can run code: if you trust "
            f"{owner_name}, make it your own (chown, or cp -r of the run)"
        )
    return None


def why_damaged(path: Path, entry: dict[str, Any]) -> str | None:
    """Say how a file differs from its entry in the manifest, or return None."""
    try:
        if path.stat().st_size != entry["size"]:
            return f"{path.name} has {path.stat().st_size} bytes instead of {entry['size']}"
        if compute_manifest_entry(path) != entry:
            return f"the checksum of {path.name} is wrong"
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    return None


def compute_manifest_entry(path: Path) -> dict[str, Any]:
    """Compute a file's entry in the manifest: size and sha256."""
    return {"size": path.stat().st_size, "sha256": durable.file_sha256(path)}


def compute_manifest_checksum(manifest_body: dict[str, Any]) -> str:
    """Compute the digest by which a manifest vouches for its own content."""
    return hashlib.sha256(json.dumps(manifest_body, sort_keys=True).encode()).hexdigest()


def _read_valid_manifest(
    folder: Path, step: int
) -> tuple[dict[str, Any], CheckpointProblem | None]:
    if reason := _why_foreign_below(folder):
        return {}, CheckpointProblem(reason, stops_run=True)
    if (folder / MANIFEST_NAME).stat().st_size > _MAX_MANIFEST_BYTES:
        return {}, CheckpointProblem(f"{MANIFEST_NAME} is longer than any manifest")
    manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
    manifest_body = {key: value for key, value in manifest.items() if key != "checksum"}
    if manifest["checksum"] != compute_manifest_checksum(manifest_body):
        return {}, CheckpointProblem(f"the checksum of {MANIFEST_NAME} is wrong")
    if manifest["step"] != step:
        return {}, CheckpointProblem(
            f"{MANIFEST_NAME} is of step {_shorten_printable(manifest['step'])}"
        )
    if manifest["format"] != MANIFEST_FORMAT:
        reason = (
            f"{folder} has format {_shorten_printable(manifest['format'])}, not {MANIFEST_FORMAT}"
        )
        return {}, CheckpointProblem(reason, stops_run=True)
    if implausibility := _why_implausible(manifest):
        complaint = f"{implausibility}, though its checksum is right: {CHECKPOINT_REMEDY}"
        reason = f"{folder / MANIFEST_NAME}: {complaint}"
        return {}, CheckpointProblem(reason, stops_run=True)
    return manifest, None


def _why_foreign_below(folder: Path) -> str | None:
    """Say what in a folder or below it is foreign, whether the manifest names it or not."""
    unseen_paths = [folder]
    while unseen_paths:
        path = unseen_paths.pop()
        if reason := why_foreign(path):
            return reason
        if path.is_dir():
            unseen_paths += path.iterdir()
    return None


def _why_implausible(manifest: dict[str, Any]) -> str | None:
    """Say what in a manifest this program cannot have written, or return None."""
    if type(manifest["step"]) is not int:
        return "its step is no whole number"
    if not isinstance(manifest.get("facts"), dict) or not isinstance(manifest.get("files"), dict):
        return "it lacks facts or files"
    for name, entry in manifest["files"].items():
        if not _INNER_PATH_PATTERN.fullmatch(name):
            return f"it names {_shorten_printable(name)}, which is no file inside the checkpoint"
        if not isinstance(entry, dict) or entry.keys() != {"size", "sha256"}:
            return f"{name} lacks size or sha256"
        size_bytes, sha256_digest = entry["size"], entry["sha256"]
        has_valid_size = type(size_bytes) is int and size_bytes >= 0
        if (
            not has_valid_size
            or not isinstance(sha256_digest, str)
            or not _SHA256_PATTERN.fullmatch(sha256_digest)
        ):
            return f"{name} has a size or sha256 that is none"
    return None


def _shorten_printable(value: Any) -> str:
    return printable(str(value)[:60])
