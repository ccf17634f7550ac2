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
    ArchiveMember,
    file_stamp,
    iter_members,
    read_member_head,
)
from ..archives.unpack import is_gzip
from ..images.signatures import PICTURE_SUFFIXES, has_picture_signature
from .base import LeftOutEntry, SourceRequest
from .labels import SampleLabel, join_names, read_label
from .tarlist import list_other_files

_KEY_AND_FIELD_PATTERN = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_MAX_LABEL_BYTES = 1 << 20
_LABEL_FIELDS = ("cls", "json")
"""Fields that labels are looked for in, in this order."""
_IMAGE_FIELDS = frozenset({"jpg", "jpeg", "png", "ppm", "pgm", "bmp", "gif", "tif", "tiff", "webp"})
"""Fields that are the image, whatever other fields a sample has."""
_NO_FIELD_FLAW = "a picture without a field in its name, such as .jpg"

MemberByField = Mapping[str, ArchiveMember]
"""The members of a sample by their fields."""


@dataclass(frozen=True)
class Sample:
    """A sample, or what is bad in the place of one."""

    tar: Path
    tar_index: int
    """Number of the tar among those of the split."""
    image: ArchiveMember
    label: SampleLabel
    fields: frozenset[str] = frozenset()
    """Fields of a sample without an image."""

    @property
    def name(self) -> str:
        """Name of the sample's image, or of the whole tar."""
        return f"{self.tar.name}/{self.image.name}" if self.image.name else self.tar.name


class TarSampleReader:
    """Reads the samples in the tars of a split."""

    def __init__(self, tars: Sequence[Path], request: SourceRequest) -> None:
        self.tars = tars
        self.unpacked_paths: list[Path] = []
        """Path of each tar without compression."""
        self.samples: list[Sample] = []
        is_whole_folder = request.root is not None and request.root.is_dir()
        self.left_out: list[LeftOutEntry] = (
            list_other_files(tars[0].parent) if is_whole_folder else []
        )
        self._request = request
        self._fields_of_image_samples: dict[str, None] = {}
        """Fields of samples with an image."""
        self._fields_used_as_image: dict[str, None] = {}
        """Fields that are an image."""
        self._unused_count_by_field: Counter[str] = Counter()
        """How many members of a field are neither image nor label."""
        self._tar_damage = ""
        """Why a tar cannot be read to its end, and what there is of it is taken."""

    def read(self) -> None:
        """Find all samples.

        Raises:
            DataError: A tar is damaged, or its samples are not whole.
        """
        for number, path in enumerate(self.tars):
            self.unpacked_paths.append(path)
            self._tar_damage = ""
            with self._note_tar_damage():
                self.unpacked_paths[number] = self._unpack_if_gzip(path)
                self._read_tar(number)
            if self._tar_damage:
                self._add_tar_damage(number, self._tar_damage)
        self._separate_left_out()

    @contextmanager
    def _note_tar_damage(self) -> Iterator[None]:
        try:
            yield
        except ArchiveError as error:
            if not self._request.skip_unreadable:
                raise
            self._tar_damage = error.flaw

    def _add_tar_damage(self, number: int, flaw: str) -> None:
        """List the damage of a tar, also as the last sample's, which may lack a member."""
        if self.samples and self.samples[-1].tar_index == number:
            last_sample = self.samples[-1]
            self.samples[-1] = replace(
                last_sample, image=replace(last_sample.image, flaw=flaw), label=None
            )
        self.samples.append(Sample(self.tars[number], number, ArchiveMember("", 0, 0, flaw), None))

    def _unpack_if_gzip(self, path: Path) -> Path:
        if not is_gzip(path):
            return path
        if self._request.unpack is None:
            raise DataError(f"{path}: is compressed, and there is no place to unpack it to")
        return self._request.unpack(path)

    def _read_tar(self, number: int) -> None:
        path = self.tars[number]
        seen_keys: set[str] = set()
        for key, members_of_key in groupby(
            self._iter_keyed_members(number), key=lambda keyed_member: keyed_member[0]
        ):
            if key in seen_keys:
                raise DataError(
                    f"{path}: the members of {key!r} do not lie together, or it is there twice: "
                    "write the archive sorted by name"
                )
            seen_keys.add(key)
            sample_members = [(field, member) for _, field, member in members_of_key]
            if len(dict(sample_members)) < len(sample_members):
                raise DataError(f"{path}: {key!r} has two members of one kind: write it anew")
            self.samples.append(self._make_sample(number, key, dict(sample_members)))

    def _iter_keyed_members(self, number: int) -> Iterator[tuple[str, str, ArchiveMember]]:
        """Yield members with their key and field; those that have none belong to no sample."""
        path = self.tars[number]
        unpacked_path = self.unpacked_paths[number]
        for member in self._iter_tar_members(path, unpacked_path):
            match = _KEY_AND_FIELD_PATTERN.fullmatch(member.name)
            base_name = member.name.rpartition("/")[2]
            if match:
                yield match[1], match[2].lower(), member
            elif (
                base_name.startswith(".")
                or member.flaw
                or not has_picture_signature(read_member_head(unpacked_path, member))
            ):
                reason = member.flaw or "no picture"
                self.left_out.append(LeftOutEntry.file(f"{path.name}/{member.name}", reason))
            else:
                yield member.name, "", replace(member, flaw=_NO_FIELD_FLAW)

    def _iter_tar_members(self, path: Path, unpacked_path: Path) -> Iterator[ArchiveMember]:
        """Yield the members of a tar; errors name the file that it was unpacked from."""
        with self._note_tar_damage():
            try:
                yield from iter_members(unpacked_path)
            except ArchiveError as error:
                if path == unpacked_path:
                    raise
                raise ArchiveError.of(path, error.flaw, "fetch it again") from error

    def _make_sample(self, number: int, key: str, sample_members: MemberByField) -> Sample:
        path = self.tars[number]
        unpacked_path = self.unpacked_paths[number]
        field = self._find_image_field(number, key, sample_members)
        if field is None:
            requested_field = self._request.image_field
            missing_field_text = (
                f"a sample without the field {requested_field}"
                if requested_field
                else "a sample without an image"
            )
            flaw = (
                f"{missing_field_text}: its fields are {join_names(sample_members)} "
                "(--image-field names another)"
            )
            return Sample(
                path, number, ArchiveMember(key, 0, 0, flaw), None, frozenset(sample_members)
            )
        image = sample_members[field]
        self._unused_count_by_field.update(
            sample_members.keys() - {field, self._find_label_field(sample_members)}
        )
        if not image.flaw:
            self._fields_of_image_samples |= dict.fromkeys(sample_members)
            self._fields_used_as_image[field] = None
        try:
            # What is left out for its image need not have a label that can be read.
            label = None if image.flaw else self._read_label(unpacked_path, sample_members)
        except (ValueError, TypeError, RecursionError) as error:
            reason = " ".join(str(error).split())
            if not self._request.skip_unreadable:
                raise DataError(
                    f"{path}: the label of {key!r} cannot be read ({reason})"
                ) from error
            image, label = replace(image, flaw=f"its label cannot be read ({reason})"), None
        return Sample(path, number, image, label)

    def _find_image_field(self, number: int, key: str, sample_members: MemberByField) -> str | None:
        """Find the field of the image; None if there is none."""
        if self._request.image_field:
            requested_field = self._request.image_field.lower()
            return requested_field if requested_field in sample_members else None
        fields = [field for field in sample_members if field in _IMAGE_FIELDS or not field]
        fields = fields or [field for field in sample_members if f".{field}" in PICTURE_SUFFIXES]
        fields = fields or [
            field
            for field, member in sample_members.items()
            if not member.flaw
            and has_picture_signature(read_member_head(self.unpacked_paths[number], member))
        ]
        if len(fields) > 1:
            names = " and ".join(sample_members[field].name for field in fields)
            raise DataError(
                f"{self.tars[number]}: {key!r} has more than one image ({names}): --image-field "
                "says which"
            )
        return fields[0] if fields else None

    def _find_label_field(self, sample_members: MemberByField) -> str | None:
        """Find the field of the label; None if there is none."""
        requested_field = (self._request.label_field or "").partition(":")[0].lower()
        return next(
            (
                field
                for field in ((requested_field,) if requested_field else _LABEL_FIELDS)
                if field in sample_members
            ),
            None,
        )

    def _read_label(self, path: Path, sample_members: MemberByField) -> SampleLabel:
        requested_field, _, key = (self._request.label_field or "").partition(":")
        field = self._find_label_field(sample_members)
        if field is not None:
            return read_label(field, key, _read_label_bytes(path, sample_members[field]))
        if requested_field:
            raise ValueError(
                f"it has no field {requested_field}, only {join_names(sample_members)} "
                "(--label-field)"
            )
        return None

    def _separate_left_out(self) -> None:
        """Separate samples that lack their image from files that never belonged to one."""
        self.left_out += [
            LeftOutEntry(
                f"*.{field}", f"{count} in samples, neither image nor label", f".{field}", count
            )
            for field, count in sorted(self._unused_count_by_field.items())
        ]
        if not self._fields_of_image_samples:
            return
        samples: list[Sample] = []
        for sample in self.samples:
            if not sample.fields or not sample.fields.isdisjoint(self._fields_of_image_samples):
                samples.append(sample)
                continue
            names = (f"{sample.name}.{field}" for field in sorted(sample.fields))
            self.left_out += [LeftOutEntry.file(name) for name in names]
        self.samples = samples

    def remark(self) -> str:
        """Make the remark on a dataset whose fields may hold labels that nobody asked for."""
        other_fields = self._fields_of_image_samples.keys() - self._fields_used_as_image.keys()
        is_labelled = any(sample.label is not None for sample in self.samples)
        if is_labelled or not other_fields:
            return ""
        fields = join_names(self._fields_of_image_samples)
        return f"no labels: the fields are {fields} (--label-field names theirs)"

    def make_stamp(self, path: Path) -> str:
        """Return the stamp of a tar; "" for one that cannot be read and is left out."""
        try:
            return file_stamp(path)
        except DataError:
            if not self._request.skip_unreadable:
                raise
            return ""


def _read_label_bytes(path: Path, member: ArchiveMember) -> bytes:
    if member.flaw or member.size > _MAX_LABEL_BYTES:
        raise ValueError(member.flaw or f"{member.size} bytes")
    try:
        with path.open("rb") as file:
            return os.pread(file.fileno(), member.size, member.offset)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
