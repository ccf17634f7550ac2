"""First bytes tell pictures from other files: each kind as its encoder or standard writes it."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from data_prep.images.examine import (
    DEFAULT_RULES,
    ImageVerdict,
    examine_image,
)
from data_prep.images.signatures import (
    FILE_HEAD_BYTES,
    has_picture_signature,
    has_picture_suffix,
    name_undecodable_format,
)
from tests.support.archives import jpeg, packed

PHOTO = Image.open(io.BytesIO(jpeg(3, (40, 60))))


def encoded(kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    PHOTO.save(stream, kind, **options)
    return stream.getvalue()


def tiff(tags: list[tuple[int, int, int]], order: str = "<") -> bytes:
    """The head of a TIFF with some tags of one value each: tag, type (3 short, 4 long), value."""
    rows = b"".join(
        struct.pack(f"{order}HHI", tag, kind, 1)
        + struct.pack(f"{order}H2x" if kind == 3 else f"{order}I", value)
        for tag, kind, value in tags
    )
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}IH", 8, len(tags)) + rows + bytes(4)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "MPO"])
def test_what_is_decoded_is_a_picture_of_no_foreign_format(kind: str) -> None:
    data = encoded(kind)
    assert examine_image(data, DEFAULT_RULES).verdict != ImageVerdict.REJECT
    assert has_picture_signature(data[:FILE_HEAD_BYTES])
    assert name_undecodable_format(data) == ""


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P"])
@pytest.mark.parametrize("kind", ["BMP", "PPM", "PNG", "GIF", "TIFF"])
def test_modes_of_pixels_make_no_difference(kind: str, mode: str) -> None:
    if (kind, mode) == ("PPM", "P"):
        mode = "RGB"
    stream = io.BytesIO()
    PHOTO.convert(mode).save(stream, kind)
    assert has_picture_signature(stream.getvalue()[:FILE_HEAD_BYTES])


FOREIGN: dict[str, tuple[Callable[[], bytes], str]] = {
    "avif": (lambda: encoded("AVIF"), "AVIF"),
    "avif of heif's brand": (lambda: b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
    "heic": (lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIF"),
    "heix": (lambda: b"\0\0\0\x18ftypheix\0\0\0\0mif1heix", "HEIF"),
    "heim": (lambda: b"\0\0\0\x18ftypheim\0\0\0\0mif1heim", "HEIF"),
    "heif of jpeg": (lambda: b"\0\0\0\x18ftypjpeg\0\0\0\0mif1jpeg", "HEIF"),
    "heif of avc": (lambda: b"\0\0\0\x18ftypavci\0\0\0\0mif1avci", "HEIF"),
    "heif, uncompressed": (lambda: b"\0\0\0\x18ftypunif\0\0\0\0mif1unif", "HEIF"),
    "avif sequence": (lambda: b"\0\0\0\x1cftypavis\0\0\0\0msf1avismiaf", "AVIF"),
    "avif sequence of heif's brand": (lambda: b"\0\0\0\x1cftypmsf1\0\0\0\0msf1avis", "AVIF"),
    "avif of a profile": (lambda: b"\0\0\0\x1cftypMA1B\0\0\0\0avifmif1", "AVIF"),
    "heif": (lambda: b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIF"),
    "heic burst": (lambda: b"\0\0\0\x18ftyphevc\0\0\0\0msf1hevc", "HEIF"),
    "jp2": (lambda: encoded("JPEG2000"), "JPEG 2000"),
    "j2k": (lambda: encoded("JPEG2000", no_jp2=True), "JPEG 2000"),
    "jxl": (lambda: b"\xff\x0a\xfa\x1f\x01", "JPEG XL"),
    "jxl in boxes": (lambda: b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl ", "JPEG XL"),
    "jxr": (lambda: b"II\xbc\x01\x20\0\0\0", "JPEG XR"),
    "psd": (lambda: b"8BPS\0\1" + bytes(6) + b"\0\3", "Photoshop"),
    "exr": (lambda: b"\x76\x2f\x31\x01\2\0\0\0", "OpenEXR"),
    "qoi": (lambda: encoded("QOI"), "QOI"),
    "dds": (lambda: encoded("DDS"), "DirectDraw"),
    "ico": (lambda: encoded("ICO"), "icon"),
    "icns": (lambda: b"icns\0\x1fT\x97TOC ", "icon"),
    "sgi": (lambda: encoded("SGI"), "SGI"),
    "pcx": (lambda: encoded("PCX"), "PCX"),
    "eps": (lambda: encoded("EPS"), "Encapsulated PostScript"),
    "svg": (lambda: b'<?xml version="1.0"?>\n<svg xmlns="x"/>', "SVG"),
    "svg after much else": (
        lambda: (
            b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- <svg> --><!---->\n"
            b'<!DOCTYPE svg PUBLIC "-//W3C" "x" [ <!ENTITY a "b"> ] >\n<svg width="1">'
        ),
        "SVG",
    ),
    "fits": (lambda: b"SIMPLE  =                    T", "FITS"),
    "emf": (lambda: b"\1\0\0\0" + bytes(36) + b" EMF", "Windows metafile"),
    "mng": (lambda: b"\x8aMNG\r\n\x1a\n", "MNG"),
    "pfm": (lambda: b"PF\n3 2\n-1.0\n" + bytes(72), "portable float map"),
    "cr2": (lambda: b"II*\0\x10\0\0\0CR\2\0", "camera raw"),
    "cr3": (lambda: b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "Canon raw"),
    "raf": (lambda: b"FUJIFILMCCD-RAW 0201", "Fujifilm raw"),
    "orf": (lambda: b"IIRO\x08\0\0\0", "Olympus raw"),
    "rw2": (lambda: b"IIU\0\x18\0\0\0", "Panasonic raw"),
    "nef": (lambda: tiff([(254, 4, 1), (330, 4, 900)], ">"), "camera raw"),
    "arw": (lambda: tiff([(254, 4, 1), (330, 4, 900)]), "camera raw"),
    "dng": (lambda: tiff([(254, 4, 0), (50706, 4, 0x0401)]), "camera raw"),
    "dng of shorts": (lambda: tiff([(254, 3, 1), (330, 4, 9)], ">"), "camera raw"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_picture_that_is_not_decoded_is_called_by_its_format(name: str) -> None:
    write, kind = FOREIGN[name]
    assert has_picture_signature(write()[:FILE_HEAD_BYTES])
    assert name_undecodable_format(write()) == kind


def test_what_is_decoded_stays_so_whatever_else_it_is_like() -> None:
    data = bytearray(encoded("TIFF"))
    data[128:132] = b"DICM"
    assert name_undecodable_format(bytes(data)) == ""


def test_a_tiff_of_many_sizes_is_no_raw_file() -> None:
    assert name_undecodable_format(tiff([(254, 4, 1), (256, 4, 10)])) == ""
    assert name_undecodable_format(tiff([(254, 4, 0), (330, 4, 900)])) == ""
    for cut in range(40):
        name_undecodable_format(tiff([(254, 4, 1), (330, 4, 900)])[:cut])


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.jpg", jpeg(1))
    return stream.getvalue()


def array() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.zeros(9))
    return stream.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n\n\n",
        b"BMW, Bosch and BASF are companies, and this is a text about them",
        b"P1 comes before P2, which is a text as well",
        b"P1 12 34\nP2 56 78\nP3 90 12\n",
        b"P5 10 20\nP6 30 40\n",
        b"<!---->" * 70 + b"<html>",
        b"GIF images are great",
        b"II. The second chapter",
        b"\xff\xfe" + "text of sixteen bits".encode("utf-16-le"),
        b"<html><body><svg/></body></html>",
        b'<?xml version="1.0"?><annotation><folder/></annotation>',
        b"%PDF-1.7\n",
        b"\0\0\0\x18ftypisom\0\0\2\0isommp42",
        b"\0\0\x08\x03\0\0\xea\x60\0\0\0\x1c\0\0\0\x1c" + bytes(64),
        b"RIFF\0\0\0\0WAVEfmt ",
        b"\0\x05\x16\x07\0\2\0\0Mac OS X" + bytes(100),
        bytes(600),
        json.dumps({"label": 3}).encode(),
        array(),
        zipped(),
        packed([("a.jpg", jpeg(1))]),
    ],
)
def test_what_is_no_picture_is_not_taken_for_one(data: bytes) -> None:
    assert not has_picture_signature(data[:FILE_HEAD_BYTES])
    assert name_undecodable_format(data) == ""


def test_names_say_little_and_in_any_case() -> None:
    assert all(map(has_picture_suffix, ("x.JPG", "x.jfif", "x.HEIC", "a/x.tar.png")))
    assert not any(map(has_picture_suffix, ("jpg", "x.txt", "x.jpg.txt", "")))
