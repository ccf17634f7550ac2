"""Shards written by Python's own tar writer: sound ones, and ones that no sharder would write."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.photos import crop
from vssl_dist.data.store.manifest import (
    FORMAT,
    INDEX_DTYPE,
    seal,
)


@dataclass(frozen=True)
class Stored:
    """One sample as it lies in a shard."""

    data: bytes
    suffix: str
    height: int
    width: int
    label: int


def encoded(image: Image.Image, kind: str) -> bytes:
    """An image file of format ``kind``."""
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def crops(count: int, *, classes: int = 4, side: int = 32) -> list[Stored]:
    """Real photographs as PNG; sample ``n`` has the label ``n % classes``."""
    made = []
    for number in range(count):
        pixels = crop(number, classes, (side, side))
        made.append(
            Stored(encoded(Image.fromarray(pixels), "PNG"), "png", side, side, number % classes)
        )
    return made


def write_shards(folder: Path, shards: Sequence[Sequence[Stored]]) -> Path:
    """A whole dataset; returns the folder that holds its ``manifest.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    entries, first = [], 0
    for number, samples in enumerate(shards):
        entries.append(_write(folder, f"shard-{number:06d}.tar", samples, first))
        first += len(samples)
    labels = [sample.label for samples in shards for sample in samples]
    contents = {
        "format": FORMAT,
        "name": "made",
        "split": folder.name,
        "samples": first,
        "classes": [f"class {label}" for label in range(max(labels) + 1)],
        "shards": entries,
        "source": {},
    }
    (folder / "manifest.json").write_bytes(seal(contents))
    return folder


def tiny_shards(folder: Path, samples: int = 61, shard_size: int = 13) -> Path:
    """Real crops in shards of equal size; the last one may be smaller."""
    made = crops(samples)
    return write_shards(folder, [made[i : i + shard_size] for i in range(0, samples, shard_size)])


def rewritten(source: Path, target: Path, changes: Mapping[int, Stored | bytes]) -> Path:
    """A copy in which some samples are others, and every checksum agrees with what is there.

    Bytes take the place of the image alone: the index keeps its height and width.
    """
    first, shards = 0, []
    for samples in stored(source):
        shards.append([_changed(s, changes.get(first + i)) for i, s in enumerate(samples)])
        first += len(samples)
    return write_shards(target, shards)


def stored(folder: Path) -> list[list[Stored]]:
    """What lies in each shard, read with Python's own tar reader."""
    shards = []
    for path in sorted(folder.glob("*.tar")):
        rows = np.load(path.with_name(path.stem + ".idx.npy"), allow_pickle=False)
        with tarfile.open(path) as tar:
            members = [m for m in tar.getmembers() if not m.name.endswith(".cls")]
            shards.append(
                [_stored(tar, m, row) for m, row in zip(members, rows.tolist(), strict=True)]
            )
    return shards


def edit_manifest(folder: Path, **fields: object) -> None:
    """Change fields of a manifest (of its first shard: those that a shard has) and seal it."""
    path = folder / "manifest.json"
    contents = json.loads(path.read_bytes())
    for name, value in fields.items():
        place = contents["shards"][0] if name in contents["shards"][0] else contents
        place[name] = value
    path.write_bytes(seal(contents))


def edit_index(folder: Path, blob: bytes) -> None:
    """Give the first shard another index, whose digest the manifest states."""
    (folder / "shard-000000.idx.npy").write_bytes(blob)
    edit_manifest(folder, index_sha256=hashlib.sha256(blob).hexdigest())


def _changed(sample: Stored, change: Stored | bytes | None) -> Stored:
    if change is None:
        return sample
    return replace(sample, data=change) if isinstance(change, bytes) else change


def _stored(tar: tarfile.TarFile, member: tarfile.TarInfo, row: tuple[int, ...]) -> Stored:
    stream = tar.extractfile(member)
    assert stream is not None
    return Stored(stream.read(), member.name.rsplit(".")[-1], *row[2:5])


def _write(folder: Path, name: str, samples: Sequence[Stored], first: int) -> dict[str, object]:
    rows = np.zeros(len(samples), INDEX_DTYPE)
    with tarfile.open(folder / name, "w", format=tarfile.USTAR_FORMAT) as tar:
        for at, s in enumerate(samples):
            files = ((s.suffix, s.data), ("cls", str(s.label).encode()))
            for suffix, data in files:
                member = tarfile.TarInfo(f"{first + at:09d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
                if suffix != "cls":
                    end = tar.offset
            padded = -(-len(s.data) // 512) * 512
            rows[at] = (end - padded, len(s.data), s.height, s.width, s.label, zlib.crc32(s.data))
    index = io.BytesIO()
    np.save(index, rows)
    (folder / name.replace(".tar", ".idx.npy")).write_bytes(index.getvalue())
    blob = (folder / name).read_bytes()
    return {
        "name": name,
        "bytes": len(blob),
        "samples": len(samples),
        "sha256": hashlib.sha256(blob).hexdigest(),
        "index_sha256": hashlib.sha256(index.getvalue()).hexdigest(),
    }
