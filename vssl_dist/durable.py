"""Files that are either absent, or whole and on disk."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from uuid import uuid4


def publish(path: Path, data: bytes) -> None:
    """Write ``data`` so that whoever sees ``path`` sees all of it, also after a power cut.

    The folder is made if needed.  Raises ``OSError`` and leaves nothing behind when the disk is
    full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".tmp-{uuid4().hex[:12]}-{path.name}")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have the content of a file, or the names in a folder, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex digest of a file's content, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
