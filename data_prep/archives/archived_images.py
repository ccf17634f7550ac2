"""Images that are stretches of files: members of archives, read where they lie."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vssl_dist.durable import open_regular_file
from vssl_dist.errors import DataError

from ..images.raw_image import RawImage
from .tars import ArchiveMember


@dataclass(frozen=True)
class ArchivedImages:
    """Images that are stretches of files: picklable, and read only when iterated."""

    files: tuple[Path, ...]
    file_numbers: NDArray[np.int64]
    """``(N,)``: the number of each image's file in ``files``."""
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    names: Sequence[str]
    flaws: Mapping[int, str]
    """Why an image must not be read, by row."""
    skip_unreadable: bool = False
    """Whether an image that cannot be read is a flawed one instead of an error."""

    @classmethod
    def from_members(
        cls,
        files: Sequence[Path],
        members: Sequence[tuple[int, ArchiveMember]],
        skip_unreadable: bool = False,
    ) -> ArchivedImages:
        """Make the table of members, each with the number of its file."""
        member_rows = [(number, member.offset, member.size) for number, member in members]
        member_table = np.array(member_rows, np.int64).reshape(-1, 3)
        flaws = {row: member.flaw for row, (_, member) in enumerate(members) if member.flaw}
        names = [member.name for _, member in members]
        return cls(
            tuple(files),
            member_table[:, 0],
            member_table[:, 1],
            member_table[:, 2],
            names,
            flaws,
            skip_unreadable,
        )

    def select_rows(self, row_numbers: NDArray[np.int64]) -> ArchivedImages:
        """Select rows, in the order of their numbers in ``row_numbers``."""
        rows = row_numbers.tolist()
        flaws = {new_row: self.flaws[row] for new_row, row in enumerate(rows) if row in self.flaws}
        names = [self.names[row] for row in rows]
        member_columns = (
            self.file_numbers[row_numbers],
            self.offsets[row_numbers],
            self.sizes[row_numbers],
        )
        return ArchivedImages(self.files, *member_columns, names, flaws, self.skip_unreadable)

    def __iter__(self) -> Iterator[RawImage]:
        open_file_number = -1
        stream = None
        try:
            file_spans = zip(
                self.file_numbers.tolist(), self.offsets.tolist(), self.sizes.tolist(), strict=True
            )
            for row, (file_number, offset, size) in enumerate(file_spans):
                if flaw := self.flaws.get(row, ""):
                    yield RawImage(b"", flaw=flaw)
                    continue
                path = self.files[file_number]
                name = f"{path}/{self.names[row]}"
                try:
                    if file_number != open_file_number or stream is None:
                        if stream is not None:
                            stream.close()
                        open_file_number = file_number
                        # Opening may fail: the closed file must not be read then.
                        stream = None
                        stream = open_regular_file(path)
                    data = os.pread(stream.fileno(), size, offset)
                except OSError as error:
                    flaw_text = f"cannot be read ({error.strerror})"
                    if not self.skip_unreadable:
                        raise DataError(f"{path}: {flaw_text}") from error
                    yield RawImage(b"", name, flaw_text, may_be_read_later=True)
                    continue
                if len(data) < size:
                    raise DataError(f"{path}: cut short at {self.names[row]}: fetch it again")
                yield RawImage(data, name)
        finally:
            if stream is not None:
                stream.close()
