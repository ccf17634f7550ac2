"""A shard's bytes: the same for ever, and what any tar program reads."""

from __future__ import annotations

import hashlib
import struct
import tarfile
import zlib
from pathlib import Path

import webdataset

from tests.support.sharding import sharded

WRITTEN = {
    "shard-000000.idx.npy": "765e32ff333f7c82dd6b0a04a71047e3ec22ac27d5a9326c43a9f2ec50dc2ad8",
    "shard-000000.tar": "6d9046cc5d7980a283e21460f8f846e1242828d4cbedd969ffb833ed15b66c25",
    "shard-000001.idx.npy": "dd2e9cb2a66314e9b524fb2347aea322b8f435176531757ce77b8fe5fa18ee96",
    "shard-000001.tar": "d4a3c55ad3c324974206d233224c4b9ab025eb3e3e10c3417889134537f194b5",
}
"""SHA-256 of what commit e7b1e18 wrote, which made its tar headers itself."""


def grey_png(number: int) -> bytes:
    """A file whose bytes no library's version changes: its pixels are stored, not compressed."""
    width, height = 5 + number, 4
    rows = b"".join(b"\0" + bytes([number * 9 + row] * width) for row in range(height))
    stored = b"\x78\x01\x01" + struct.pack("<HH", len(rows), len(rows) ^ 0xFFFF) + rows
    stored += struct.pack(">I", zlib.adler32(rows))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", stored), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def written(tmp_path: Path) -> Path:
    for number in range(5):
        path = tmp_path / "raw" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(grey_png(number))
    assert sharded("imagefolder", tmp_path / "raw", tmp_path / "o", "--shard-size", 3) == 0
    return tmp_path / "o" / "train"


def test_shards_have_the_bytes_that_earlier_versions_wrote(tmp_path: Path) -> None:
    folder = written(tmp_path)
    sums = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("shard-*")
    }
    assert sums == WRITTEN


def test_members_come_image_first_and_say_nothing_of_who_wrote_them(tmp_path: Path) -> None:
    folder = written(tmp_path)
    keys = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        assert {(m.uid, m.gid, m.uname, m.gname, m.mode, m.mtime) for m in members} == {
            (0, 0, "", "", 0o644, 0)
        }
        assert [m.name.rpartition(".")[2] for m in members] == ["png", "cls"] * (len(members) // 2)
        assert path.stat().st_size % tarfile.RECORDSIZE == 0
        samples = webdataset.WebDataset(str(path), shardshuffle=False)
        keys += [sample["__key__"] for sample in samples]
    assert keys == [f"{number:012d}" for number in range(5)]
