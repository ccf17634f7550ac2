"""The samples of a WebDataset's tars: neighbouring members of one key, with image and label."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from vssl_dist.errors import DataError

from ..archives.tars import (
    ArchiveError,
    Member,
    file_stamp,
    iter_members,
    read_head,
)
from ..archives.unpack import is_gzip
from ..images.signatures import PICTURE_SUFFIXES, is_picture
from .base import LeftOut, Request
from .labels import Label, join_names, read_label
from .tarlist import list_other_files

_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_MAX_LABEL_BYTES = 1 << 20
_LABELS = ("cls", "json")
"""Fields that labels are looked for in, in this order."""
_FIRST = frozenset({"jpg", "jpeg", "png", "ppm", "pgm", "bmp", "gif", "tif", "tiff", "webp"})
"""Fields that are the image whatever else there is."""
_NO_FIELD = "a picture without a field in its name, such as .jpg"

Parts = Mapping[str, Member]
"""The members of a sample by their fields."""


@dataclass(frozen=True)
class Sample:
    """A sample, or what is bad in the place of one."""

    tar: Path
    file: int
    """Number of the tar."""
    image: Member
    label: Label
    fields: frozenset[str] = frozenset()
    """Of one without an image: what it has."""

    @property
    def name(self) -> str:
        """What to call it: its image, or the whole tar."""
        return f"{self.tar.name}/{self.image.name}" if self.image.name else self.tar.name


class SampleReader:
    """Goes through the tars of a split."""

    def __init__(self, tars: Sequence[Path], request: Request) -> None:
        self.tars = tars
        self.read_at: list[Path] = []
        """Where each lies without compression."""
        self.samples: list[Sample] = []
        whole = request.root is not None and request.root.is_dir()
        self.left_out: list[LeftOut] = list_other_files(tars[0].parent) if whole else []
        self._request = request
        self._fields: dict[str, None] = {}
        """Those of samples with an image."""
        self._images: dict[str, None] = {}
        """Those of them that are the image."""
        self._unused: Counter[str] = Counter()
        """How many members of a field are neither image nor label."""
        self._damage = ""
        """Why a tar cannot be read to its end, and what there is of it is taken."""

    def read(self) -> None:
        """Find all samples.

        Raises:
            DataError: A tar is damaged, or its samples are not whole.
        """
        for number, path in enumerate(self.tars):
            self.read_at.append(path)
            self._damage = ""
            with self._damage_noted():
                self.read_at[number] = self._unpacked(path)
                self._read(number)
            if self._damage:
                self._cut(number, self._damage)
        self._sort_out()

    @contextmanager
    def _damage_noted(self) -> Iterator[None]:
        try:
            yield
        except ArchiveError as error:
            if not self._request.skips:
                raise
            self._damage = error.flaw

    def _cut(self, number: int, flaw: str) -> None:
        """List the rest of a damaged tar, and the sample before the damage: it may lack a part."""
        if self.samples and self.samples[-1].file == number:
            last = self.samples[-1]
            self.samples[-1] = replace(last, image=replace(last.image, flaw=flaw), label=None)
        self.samples.append(Sample(self.tars[number], number, Member("", 0, 0, flaw), None))

    def _unpacked(self, path: Path) -> Path:
        if not is_gzip(path):
            return path
        if self._request.unpack is None:
            raise DataError(f"{path}: is compressed, and there is no place to unpack it to")
        return self._request.unpack(path)

    def _read(self, number: int) -> None:
        path, seen = self.tars[number], set[str]()
        for key, group in groupby(self._keyed(number), key=lambda one: one[0]):
            if key in seen:
                raise DataError(
                    f"{path}: the members of {key!r} do not lie together, or it is there twice: "
                    "write the archive sorted by name"
                )
            seen.add(key)
            parts = [(field, member) for _, field, member in group]
            if len(dict(parts)) < len(parts):
                raise DataError(f"{path}: {key!r} has two members of one kind: write it anew")
            self.samples.append(self._sample(number, key, dict(parts)))

    def _keyed(self, number: int) -> Iterator[tuple[str, str, Member]]:
        """Members with their key and field; those that have none are no part of a sample."""
        path, read_at = self.tars[number], self.read_at[number]
        for member in self._members(path, read_at):
            match = _KEY.fullmatch(member.name)
            base = member.name.rpartition("/")[2]
            if match:
                yield match[1], match[2].lower(), member
            elif base.startswith(".") or member.flaw or not is_picture(read_head(read_at, member)):
                reason = member.flaw or "no picture"
                self.left_out.append(LeftOut.file(f"{path.name}/{member.name}", reason))
            else:
                yield member.name, "", replace(member, flaw=_NO_FIELD)

    def _members(self, path: Path, read_at: Path) -> Iterator[Member]:
        """Those of a tar, whose damage is told of the file that it was unpacked from."""
        with self._damage_noted():
            try:
                yield from iter_members(read_at)
            except ArchiveError as error:
                if path == read_at:
                    raise
                raise ArchiveError.of(path, error.flaw, "fetch it again") from error

    def _sample(self, number: int, key: str, parts: Parts) -> Sample:
        path, read_at = self.tars[number], self.read_at[number]
        field = self._image(number, key, parts)
        if field is None:
            asked = self._request.image_field
            lacks = f"a sample without the field {asked}" if asked else "a sample without an image"
            flaw = f"{lacks}: its fields are {join_names(parts)} (--image-field names another)"
            return Sample(path, number, Member(key, 0, 0, flaw), None, frozenset(parts))
        image = parts[field]
        self._unused.update(parts.keys() - {field, self._label_field(parts)})
        if not image.flaw:
            self._fields |= dict.fromkeys(parts)
            self._images[field] = None
        try:
            # What is left out for its image need not have a label that can be read.
            label = None if image.flaw else self._label(read_at, parts)
        except (ValueError, TypeError, RecursionError) as error:
            reason = " ".join(str(error).split())
            if not self._request.skips:
                raise DataError(
                    f"{path}: the label of {key!r} cannot be read ({reason})"
                ) from error
            image, label = replace(image, flaw=f"its label cannot be read ({reason})"), None
        return Sample(path, number, image, label)

    def _image(self, number: int, key: str, parts: Parts) -> str | None:
        """The field of the image; None if there is none."""
        if self._request.image_field:
            wanted = self._request.image_field.lower()
            return wanted if wanted in parts else None
        fields = [field for field in parts if field in _FIRST or not field]
        fields = fields or [field for field in parts if f".{field}" in PICTURE_SUFFIXES]
        fields = fields or [
            field
            for field, member in parts.items()
            if not member.flaw and is_picture(read_head(self.read_at[number], member))
        ]
        if len(fields) > 1:
            names = " and ".join(parts[field].name for field in fields)
            raise DataError(
                f"{self.tars[number]}: {key!r} has more than one image ({names}): --image-field "
                "says which"
            )
        return fields[0] if fields else None

    def _label_field(self, parts: Parts) -> str | None:
        """The field of the label; None if there is none."""
        asked = (self._request.label_field or "").partition(":")[0].lower()
        return next((field for field in ((asked,) if asked else _LABELS) if field in parts), None)

    def _label(self, path: Path, parts: Parts) -> Label:
        asked, _, key = (self._request.label_field or "").partition(":")
        field = self._label_field(parts)
        if field is not None:
            return read_label(field, key, _bytes(path, parts[field]))
        if asked:
            raise ValueError(f"it has no field {asked}, only {join_names(parts)} (--label-field)")
        return None

    def _sort_out(self) -> None:
        """Tell samples that lack their image from what never belonged to one."""
        self.left_out += [
            LeftOut(
                f"*.{field}", f"{count} in samples, neither image nor label", f".{field}", count
            )
            for field, count in sorted(self._unused.items())
        ]
        if not self._fields:
            return
        kept: list[Sample] = []
        for one in self.samples:
            if not one.fields or not one.fields.isdisjoint(self._fields):
                kept.append(one)
                continue
            names = (f"{one.name}.{field}" for field in sorted(one.fields))
            self.left_out += [LeftOut.file(name) for name in names]
        self.samples = kept

    def remark(self) -> str:
        """What to say of a dataset in which no label was looked for."""
        others = self._fields.keys() - self._images.keys()
        labelled = any(one.label is not None for one in self.samples)
        if labelled or not others:
            return ""
        return f"no labels: the fields are {join_names(self._fields)} (--label-field names theirs)"

    def stamp_of(self, path: Path) -> str:
        """What changes with a tar; nothing of one that cannot be read and is left out."""
        try:
            return file_stamp(path)
        except DataError:
            if not self._request.skips:
                raise
            return ""


def _bytes(path: Path, member: Member) -> bytes:
    if member.flaw or member.size > _MAX_LABEL_BYTES:
        raise ValueError(member.flaw or f"{member.size} bytes")
    try:
        with path.open("rb") as file:
            return os.pread(file.fileno(), member.size, member.offset)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
