"""Which run a folder is: it may be moved, mounted elsewhere, or copied.

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

_WAIT_S = 60.0
_LONGEST_NAME = 1000
_LARGEST_CONFIG = 1_000_000


@dataclass(frozen=True)
class Parent:
    """The run that a copy was made of."""

    name: str
    uuid: str
    runs: dict[str, str] = field(default_factory=dict)
    """Its MLflow runs by their server's address."""


@dataclass(frozen=True)
class Identity:
    """Identity of a run folder, as ``run.json`` states it."""

    uuid: str
    path: str
    parent: Parent | None = None


def stored_identity(run_dir: Path) -> Identity | None:
    """Read which run a folder is; ``None`` for a new folder and for a new copy."""
    stored = _stored(run_dir)
    return None if stored is None or _original(stored, run_dir) is not None else stored


def settle_identity(run_dir: Path) -> Identity:
    """Decide which run a folder is from now on, and write that down.

    Whoever is to write into a run folder calls this first: a copy gets files of its own in place
    of links to the original's.

    Raises:
        ConfigError: Another process has been at the same for a minute.
    """
    run_dir = run_dir.absolute()
    stored = _stored(run_dir)
    if (
        RunFolder(run_dir).identity_path.exists()
        and stored is not None
        and _is_at(stored.path, run_dir)
    ):
        return stored
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = RunFolder(run_dir).identity_lock_path
    if lock.is_symlink():  # of a copy that is made of links
        lock.unlink(missing_ok=True)
    try:
        held = make_private_lock(lock).acquire(timeout=_WAIT_S)
    except Timeout:
        raise ConfigError(
            f"{lock} is held by {describe_lock_holder(lock)}: wait for it, or stop it"
        ) from None
    with held:
        stored = _stored(run_dir)
        if stored is None:
            settled = Identity(uuid.uuid4().hex, str(run_dir))
        elif (original := _original(stored, run_dir)) is None or _is_same_folder(original, run_dir):
            settled = Identity(stored.uuid, str(run_dir), stored.parent)
        else:
            _detach(run_dir, original)
            parent = Parent(original.name, stored.uuid, _runs(run_dir, stored.uuid))
            settled = Identity(uuid.uuid4().hex, str(run_dir), parent)
        if settled != stored or not RunFolder(run_dir).identity_path.exists():
            write_inside_folder(
                RunFolder(run_dir).identity_path, json.dumps(asdict(settled)).encode()
            )
        return settled


def is_copy_of(path: str, run_dir: Path, uuid: str) -> bool:
    """Whether a run folder is a copy of the folder at a path, which is the same run.

    Args:
        path: Where MLflow says that the run is.
        run_dir: The folder that says it is this run.
        uuid: Of the run.
    """
    if not _is_path(path):
        return False
    original = _original(Identity(uuid, path), run_dir)
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
    typed = literal(path)
    text = as_utf8(typed)
    return shlex.quote(text) if text == typed else f"${shlex.quote(text)}"


def _stored(run_dir: Path) -> Identity | None:
    """Read the identity of a folder, of a run from before ``run.json`` from its other files."""
    match _read(RunFolder(run_dir).identity_path):
        case {"uuid": str(run_uuid), "path": str(path), **others} if _is_uuid(
            run_uuid
        ) and _is_path(path):
            return Identity(run_uuid, path, _parent(others.get("parent")))
    match _read(RunFolder(run_dir).mlflow_record_path):
        case {"uuid": str(run_uuid)} if _is_uuid(run_uuid) and _is_path(
            path := _configured(run_dir)
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


def _parent(facts: object) -> Parent | None:
    match facts:
        case {"name": str(name), "uuid": str(parent_uuid), "runs": dict(runs)} if is_text_mapping(
            runs
        ):
            return Parent(name[:_LONGEST_NAME], parent_uuid[:_LONGEST_NAME], runs)
    return None


def _configured(run_dir: Path) -> str:
    """Return the path at which the last submission saw the folder, as its config states it."""
    try:
        with open_safely(RunFolder(run_dir).config_path) as file:
            config = yaml.safe_load(file.read(_LARGEST_CONFIG))
        return str(Path(config["out"], config["name"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError):
        return str(run_dir.absolute())


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except (OSError, ValueError):
        return {}


def _runs(run_dir: Path, owner: str) -> dict[str, str]:
    """Read the MLflow runs of the original from a copied ``mlflow_run.json``."""
    match _read(RunFolder(run_dir).mlflow_record_path):
        case {"uuid": str(run_uuid), "tracking_uri": str(uri), **facts} if run_uuid == owner:
            last = {uri: facts["run_id"]} if "run_id" in facts else {}
            runs = [
                candidate for candidate in (facts.get("runs"), last) if is_text_mapping(candidate)
            ]
            return {address: run_id for mapping in runs for address, run_id in mapping.items()}
    return {}


def _original(stored: Identity, run_dir: Path) -> Path | None:
    """Find the folder that ``run_dir`` is a copy of, ``None`` if it is the run itself."""
    recorded_path = Path(stored.path)
    try:
        if _is_at(stored.path, run_dir) or not recorded_path.is_dir():
            return None
        facts = _read(RunFolder(recorded_path).identity_path) or _read(
            RunFolder(recorded_path).mlflow_record_path
        )
        # What its owner lets nobody read is not this folder, wherever that was.
        is_readable = os.access(recorded_path, os.R_OK | os.X_OK)
    except PermissionError:
        return recorded_path
    except OSError:  # no path at all
        return None
    return recorded_path if facts.get("uuid") == stored.uuid or not is_readable else None


def _is_at(path: str, run_dir: Path) -> bool:
    """Whether a path leads here.  Folders have no hard links, their files may."""
    try:
        return Path(path).samefile(run_dir)
    except OSError:
        return False


def _is_same_folder(original: Path, run_dir: Path) -> bool:
    """Whether two paths are one folder under two mounts, which may number files differently."""
    probe = f".probe-{uuid.uuid4().hex}"
    mark = run_dir / probe
    mark.touch()
    try:
        return (original / probe).exists()
    except OSError:
        return False
    finally:
        mark.unlink()


def _detach(run_dir: Path, original: Path) -> None:
    """Give a copy (``cp -al``, ``cp -as``) files of its own, in place of links to the original's.

    Hard links to weights stay: those are never changed where they lie.
    """
    original_path = original.resolve()
    for folder, _, names in os.walk(run_dir):
        for path in (Path(folder, name) for name in names):
            if path.is_symlink():
                shared = path.is_file() and path.resolve().is_relative_to(original_path)
            else:
                weights = is_export_path(path) or path.is_relative_to(
                    RunFolder(run_dir).checkpoints_folder
                )
                shared = not weights and path.is_file() and path.stat().st_nlink > 1
            if shared:
                copied_path = path.with_name(f".tmp-{uuid.uuid4().hex[:12]}")
                shutil.copy2(path, copied_path)
                copied_path.replace(path)
