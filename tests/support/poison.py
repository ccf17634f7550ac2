"""Checkpoints that somebody has changed and sealed again: their manifests agree with them."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vssl_dist import sealed


class Payload:
    """A command that runs when this is unpickled."""

    def __init__(self, touched: Path) -> None:
        self.command = f"touch {touched}"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def reseal(folder: Path, **changes: Any) -> None:
    """Make the manifest of a checkpoint agree with its files, and say what else is wanted."""
    place = folder / sealed.MANIFEST_NAME
    body = {k: v for k, v in json.loads(place.read_bytes()).items() if k != "checksum"} | changes
    if "files" not in changes:
        names = [name for name in body["files"] if (folder / name).is_file()]
        body["files"] = {name: sealed.compute_manifest_entry(folder / name) for name in names}
    place.write_text(json.dumps({"checksum": sealed.compute_manifest_checksum(body), **body}))


def in_state(path: Path, touched: Path) -> None:
    """A payload beside what the file holds."""
    state = torch.load(path, weights_only=False)
    torch.save(state | {"more": Payload(touched)}, path)


def in_newer_protocol(path: Path, touched: Path) -> None:
    torch.save({"more": Payload(touched)}, path, pickle_protocol=4)


def in_old_format(path: Path, touched: Path) -> None:
    torch.save({"more": Payload(touched)}, path, _use_new_zipfile_serialization=False)


def bare(path: Path, touched: Path) -> None:
    path.write_bytes(pickle.dumps({"more": Payload(touched)}, protocol=2))


def before_a_zip(path: Path, touched: Path) -> None:
    path.write_bytes(pickle.dumps(Payload(touched), protocol=2) + path.read_bytes())


def as_second_entry(path: Path, touched: Path) -> None:
    """Two entries of one name: readers differ in which of them they take."""
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, pickle.dumps(Payload(touched), protocol=2))


def as_program(path: Path, touched: Path) -> None:
    """An archive of TorchScript, which torch.load would hand to another reader."""
    del touched
    torch.jit.script(nn.Linear(1, 1)).save(str(path))  # type: ignore[no-untyped-call]


POISONS: dict[str, Callable[[Path, Path], None]] = {
    "in its state": in_state,
    "in a newer protocol": in_newer_protocol,
    "in the old format": in_old_format,
    "a bare pickle": bare,
    "before a zip": before_a_zip,
    "a second entry": as_second_entry,
    "TorchScript": as_program,
}
