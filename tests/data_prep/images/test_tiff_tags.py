"""Single entries of a directory, against Pillow's writer and against anything else."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from PIL import Image

from data_prep.images.tiff_tags import (
    is_tiff_directory,
    parse_orientation,
    read_tag_number,
    tag_byte_count,
)


@pytest.mark.parametrize("stated", range(10))
@pytest.mark.parametrize("order", ["<", ">"])
def test_an_orientation_is_read_as_pillow_writes_it(stated: int, order: str) -> None:
    exif = Image.Exif()
    exif.endian = order
    exif[0x010E], exif[0x0112], exif[0x013B] = "a picture", stated, "somebody"
    data = exif.tobytes()
    assert data.startswith(b"Exif\0\0")
    assert (
        parse_orientation(data)
        == parse_orientation(data[6:])
        == (stated if 1 <= stated <= 8 else 1)
    )
    assert read_tag_number(data[6:], 0x0112) == stated
    assert read_tag_number(data[6:], 0x0100) is None
    assert is_tiff_directory(data[6:])


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("kind", [(1, 1), (3, 2), (4, 4), (6, 1), (8, 2), (9, 4)])
def test_an_orientation_counts_in_any_whole_number_and_the_first_of_several_does(
    kind: tuple[int, int], order: Literal["little", "big"]
) -> None:
    code, width = kind
    for count in (1, 2, 3, 4):
        values = b"".join(value.to_bytes(width, order) for value in (6, 3, 1, 1)[:count])
        value_field = values.ljust(4, b"\0") if len(values) <= 4 else (26).to_bytes(4, order)
        head = {"little": b"II*\0", "big": b"MM\0*"}[order] + (8).to_bytes(4, order)
        fields = [(1, 2), (0x0112, 2), (code, 2), (count, 4)]
        entry = b"".join(value.to_bytes(width, order) for value, width in fields) + value_field
        directory = head + entry + bytes(4) + values
        assert parse_orientation(directory) == 6
        if len(values) > 4:
            assert parse_orientation(directory[:26]) == 1
    assert parse_orientation(head + entry[:6] + bytes(4) + values.ljust(4, b"\0")) == 1


def test_what_is_no_directory_says_nothing_and_never_raises() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data, random = exif.tobytes()[6:], np.random.default_rng(0)
    hostile = [data[:cut] for cut in range(len(data))]
    hostile += [data[:4] + random.bytes(80) for _ in range(300)]
    for directory in hostile:
        assert 1 <= parse_orientation(directory) <= 8
        assert 0 <= tag_byte_count(directory, 0xB002) <= len(directory)
    assert parse_orientation(data) == 6
    assert parse_orientation(b"") == parse_orientation(b"zzzz") == 1


def test_bytes_under_a_tag_count_only_where_they_are_there() -> None:
    entry = b"\xb0\x02\0\7\0\0\0\x20\0\0\0\x1a"
    directory_bytes = b"MM\0*\0\0\0\x08\0\1" + entry + bytes(4) + bytes(0x20)
    assert tag_byte_count(directory_bytes, 0xB002) == 0x20
    assert tag_byte_count(directory_bytes[:-1], 0xB002) == 0
    assert tag_byte_count(directory_bytes, 0xB001) == 0
