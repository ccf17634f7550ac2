"""Images that are stretches of files: members of archives, read where they lie."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vssl_dist.durable import open_regular
from vssl_dist.errors import DataError

from ..images.raw_image import RawImage
from .tars import Member


@dataclass(frozen=True)
class ArchivedImages:
    """Images that are stretches of files: picklable, and read only when iterated."""

    files: tuple[Path, ...]
    file: NDArray[np.int64]
    """``(N,)``: which of the files."""
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    names: Sequence[str]
    flaws: Mapping[int, str]
    """By row."""
    skips: bool = False
    """Whether an image that cannot be read is flawed, and not the end of the whole."""

    @classmethod
    def of(
        cls, files: Sequence[Path], found: Sequence[tuple[int, Member]], skips: bool = False
    ) -> ArchivedImages:
        """The table of members, each given with the number of its file."""
        columns = [(file, member.offset, member.size) for file, member in found]
        table = np.array(columns, np.int64).reshape(-1, 3)
        flaws = {row: member.flaw for row, (_, member) in enumerate(found) if member.flaw}
        names = [member.name for _, member in found]
        return cls(tuple(files), table[:, 0], table[:, 1], table[:, 2], names, flaws, skips)

    def take(self, which: NDArray[np.int64]) -> ArchivedImages:
        """Some rows, in a given order."""
        rows = which.tolist()
        flaws = {at: self.flaws[row] for at, row in enumerate(rows) if row in self.flaws}
        names = [self.names[row] for row in rows]
        columns = (self.file[which], self.offset[which], self.size[which])
        return ArchivedImages(self.files, *columns, names, flaws, self.skips)

    def __iter__(self) -> Iterator[RawImage]:
        opened, stream = -1, None
        try:
            places = zip(self.file.tolist(), self.offset.tolist(), self.size.tolist(), strict=True)
            for row, (file, offset, size) in enumerate(places):
                if flaw := self.flaws.get(row, ""):
                    yield RawImage(b"", flaw=flaw)
                    continue
                path = self.files[file]
                name = f"{path}/{self.names[row]}"
                try:
                    if file != opened or stream is None:
                        if stream is not None:
                            stream.close()
                        opened, stream = file, None
                        stream = open_regular(path)
                    data = os.pread(stream.fileno(), size, offset)
                except OSError as error:
                    told = f"cannot be read ({error.strerror})"
                    if not self.skips:
                        raise DataError(f"{path}: {told}") from error
                    yield RawImage(b"", name, told, asked_again=True)
                    continue
                if len(data) < size:
                    raise DataError(f"{path}: cut short at {self.names[row]}: fetch it again")
                yield RawImage(data, name)
        finally:
            if stream is not None:
                stream.close()
