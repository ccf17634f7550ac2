"""Identity of a run folder, which may be moved, mounted elsewhere, or copied.

``run.json`` holds the run's uuid and the folder's path.  A folder whose recorded path is another
folder with the same uuid is a copy of that one, and becomes a run of its own; any other folder
is the run that it says, under whatever name it is found.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from filelock import Timeout

from vssl_dist.config.paths import literal
from vssl_dist.durable import write_inside_folder
from vssl_dist.errors import ConfigError
from vssl_dist.locks import describe_lock_holder, make_private_lock
from vssl_dist.run_folder import RunFolder, is_export_path
from vssl_dist.tracker.intake import is_text_mapping, open_safely, read_json_object

_LOCK_WAIT_S = 60.0
_MAX_NAME_LENGTH = 1000
_MAX_CONFIG_BYTES = 1_000_000


@dataclass(frozen=True)
class CopiedRun:
    """The run that a copy was made of."""

    name: str
    uuid: str
    runs: dict[str, str] = field(default_factory=dict)
    """Ids of the parent's MLflow runs by their server's address."""


@dataclass(frozen=True)
class Identity:
    """Identity of a run folder, as ``run.json`` states it."""

    uuid: str
    path: str
    parent: CopiedRun | None = None


def stored_identity(run_dir: Path) -> Identity | None:
    """Read which run a folder is; ``None`` for a new folder and for a new copy."""
    stored = _read_identity(run_dir)
    return None if stored is None or _find_original(stored, run_dir) is not None else stored


def settle_identity(run_dir: Path) -> Identity:
    """Decide which run a folder is from now on, and write that down.

    Whoever is to write into a run folder calls this first: a copy gets files of its own in place
    of links to the original's.

    Raises:
        ConfigError: Another process has been at the same for a minute.
    """
    run_dir = run_dir.absolute()
    stored = _read_identity(run_dir)
    if (
        RunFolder(run_dir).identity_path.exists()
        and stored is not None
        and _leads_to_folder(stored.path, run_dir)
    ):
        return stored
    run_dir.mkdir(parents=True, exist_ok=True)
    lock_path = RunFolder(run_dir).identity_lock_path
    if lock_path.is_symlink():  # of a copy that is made of links
        lock_path.unlink(missing_ok=True)
    try:
        held_lock = make_private_lock(lock_path).acquire(timeout=_LOCK_WAIT_S)
    except Timeout:
        raise ConfigError(
            f"{lock_path} is held by {describe_lock_holder(lock_path)}: wait for it, or stop it"
        ) from None
    with held_lock:
        stored = _read_identity(run_dir)
        if stored is None:
            settled_identity = Identity(uuid.uuid4().hex, str(run_dir))
        elif (original := _find_original(stored, run_dir)) is None or _is_same_folder(
            original, run_dir
        ):
            settled_identity = Identity(stored.uuid, str(run_dir), stored.parent)
        else:
            _replace_shared_files(run_dir, original)
            parent = CopiedRun(original.name, stored.uuid, _read_copied_runs(run_dir, stored.uuid))
            settled_identity = Identity(uuid.uuid4().hex, str(run_dir), parent)
        if settled_identity != stored or not RunFolder(run_dir).identity_path.exists():
            write_inside_folder(
                RunFolder(run_dir).identity_path, json.dumps(asdict(settled_identity)).encode()
            )
        return settled_identity


def is_copy_of(path: str, run_dir: Path, uuid: str) -> bool:
    """Whether a run folder is a copy of the folder at a path, which is the same run.

    Args:
        path: Where MLflow says that the run is.
        run_dir: The folder that says it is this run.
        uuid: Of the run.
    """
    if not _is_path(path):
        return False
    original = _find_original(Identity(uuid, path), run_dir)
    if original is None or _is_same_folder(original, run_dir):
        return False
    # A copy that was put where this run used to be does not say that it is the run.
    return stored_identity(original) is not None or not os.access(original, os.R_OK | os.X_OK)


def as_utf8(text: str) -> str:
    r"""Make text valid UTF-8, as MLflow wants it: other bytes of a path become ``\xXX``.

    >>> print(as_utf8("caf\udce9"))
    caf\xe9
    """
    return os.fsencode(text).decode(errors="backslashreplace")


def shell_word(path: Path) -> str:
    r"""Quote a path as one word of a shell command, in characters that every terminal shows.

    >>> print(shell_word(Path("/data/caf\udce9")), shell_word(Path("/my data/$x")))
    $'/data/caf\xe9' '/my data/$$x'
    """
    typed_path = literal(path)
    utf8_path = as_utf8(typed_path)
    return shlex.quote(utf8_path) if utf8_path == typed_path else f"${shlex.quote(utf8_path)}"


def _read_identity(run_dir: Path) -> Identity | None:
    """Read the identity of a folder, of a run from before ``run.json`` from its other files."""
    match _read_object_or_empty(RunFolder(run_dir).identity_path):
        case {"uuid": str(run_uuid), "path": str(path), **others} if _is_uuid(
            run_uuid
        ) and _is_path(path):
            return Identity(run_uuid, path, _parse_parent(others.get("parent")))
    match _read_object_or_empty(RunFolder(run_dir).mlflow_record_path):
        case {"uuid": str(run_uuid)} if _is_uuid(run_uuid) and _is_path(
            path := _configured_path(run_dir)
        ):
            return Identity(run_uuid, path)
    return None


def _is_uuid(text: str) -> bool:
    return re.fullmatch(r"[\w-]{1,64}", text) is not None


def _is_path(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _parse_parent(facts: object) -> CopiedRun | None:
    match facts:
        case {"name": str(name), "uuid": str(parent_uuid), "runs": dict(runs)} if is_text_mapping(
            runs
        ):
            return CopiedRun(name[:_MAX_NAME_LENGTH], parent_uuid[:_MAX_NAME_LENGTH], runs)
    return None


def _configured_path(run_dir: Path) -> str:
    """Return the path at which the last submission saw the folder, as its config states it."""
    try:
        with open_safely(RunFolder(run_dir).config_path) as file:
            config_values = yaml.safe_load(file.read(_MAX_CONFIG_BYTES))
        return str(Path(config_values["out"], config_values["name"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError):
        return str(run_dir.absolute())


def _read_object_or_empty(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except (OSError, ValueError):
        return {}


def _read_copied_runs(run_dir: Path, original_uuid: str) -> dict[str, str]:
    """Read the MLflow runs of the original from a copied ``mlflow_run.json``."""
    match _read_object_or_empty(RunFolder(run_dir).mlflow_record_path):
        case {"uuid": str(run_uuid), "tracking_uri": str(uri), **facts} if (
            run_uuid == original_uuid
        ):
            last_run = {uri: facts["run_id"]} if "run_id" in facts else {}
            runs = [
                run_mapping
                for run_mapping in (facts.get("runs"), last_run)
                if is_text_mapping(run_mapping)
            ]
            return {address: run_id for mapping in runs for address, run_id in mapping.items()}
    return {}


def _find_original(stored: Identity, run_dir: Path) -> Path | None:
    """Find the folder that ``run_dir`` is a copy of, ``None`` if it is the run itself."""
    recorded_path = Path(stored.path)
    try:
        if _leads_to_folder(stored.path, run_dir) or not recorded_path.is_dir():
            return None
        facts = _read_object_or_empty(
            RunFolder(recorded_path).identity_path
        ) or _read_object_or_empty(RunFolder(recorded_path).mlflow_record_path)
        # What its owner lets nobody read is not this folder, wherever that was.
        is_readable = os.access(recorded_path, os.R_OK | os.X_OK)
    except PermissionError:
        return recorded_path
    except OSError:  # no path at all
        return None
    return recorded_path if facts.get("uuid") == stored.uuid or not is_readable else None


def _leads_to_folder(path: str, run_dir: Path) -> bool:
    """Whether a path leads here.  Folders have no hard links, their files may."""
    try:
        return Path(path).samefile(run_dir)
    except OSError:
        return False


def _is_same_folder(original: Path, run_dir: Path) -> bool:
    """Whether two paths are one folder under two mounts, which may number files differently."""
    probe_name = f".probe-{uuid.uuid4().hex}"
    probe_path = run_dir / probe_name
    probe_path.touch()
    try:
        return (original / probe_name).exists()
    except OSError:
        return False
    finally:
        probe_path.unlink()


def _replace_shared_files(run_dir: Path, original: Path) -> None:
    """Give a copy (``cp -al``, ``cp -as``) files of its own, in place of links to the original's.

    Hard links to weights stay: those are never changed where they lie.
    """
    original_path = original.resolve()
    for folder, _, names in os.walk(run_dir):
        for path in (Path(folder, name) for name in names):
            if path.is_symlink():
                is_shared = path.is_file() and path.resolve().is_relative_to(original_path)
            else:
                is_weights = is_export_path(path) or path.is_relative_to(
                    RunFolder(run_dir).checkpoints_folder
                )
                is_shared = not is_weights and path.is_file() and path.stat().st_nlink > 1
            if is_shared:
                copied_path = path.with_name(f".tmp-{uuid.uuid4().hex[:12]}")
                shutil.copy2(path, copied_path)
                copied_path.replace(path)
