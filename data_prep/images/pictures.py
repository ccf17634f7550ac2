"""Which files are pictures, by their first bytes: those that are decoded here, and all others.

What a file is called decides nothing, with one exception: a file that is called a picture and
is none (empty, or a web page in a picture's place) is a picture that is missing.
"""

from __future__ import annotations

import re
import struct

HEAD = 512
"""So many first bytes tell what a file is."""
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".apng", ".ppm", ".pgm", ".pbm", ".pnm",
    ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp", ".avif", ".avifs", ".heic", ".heif", ".hif",
    ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".jxl", ".jxr", ".tga", ".psd", ".dng",
    ".nef", ".cr2", ".cr3", ".arw", ".raf", ".orf", ".rw2",
)  # fmt: skip
"""What a file that is called a picture ends with."""

_GAP = rb"(?:\s|\#[^\n]*\n)*"
_SIDES = rb"\s" + _GAP + rb"[0-9]+\s" + _GAP + rb"[0-9]+\s"
"""Of a PNM: text between them may be a remark."""
_DECODED = re.compile(
    rb"\xff\xd8\xff"
    rb"|\x89PNG\r\n\x1a\n"
    rb"|GIF8[79]a"
    rb"|RIFF....WEBP"
    rb"|II\*\0|MM\0\*|II\+\0|MM\0\+|II\0\*|MM\*\0"
    # Two letters are no proof: what a header must state follows.
    rb"|BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0"
    rb"|P4%(sides)b|P1%(sides)b[01\s\#]"
    rb"|P[2356]%(sides)b%(gap)b[0-9]{1,5}\s|Pf%(sides)b%(gap)b-?[0-9.]"
    % {b"sides": _SIDES, b"gap": _GAP},
    re.DOTALL,
)
_OTHERS = {
    "AVIF": rb"....ftyp(?:avi[fso]|MA1[AB])|....ftypm[is][afs][f1]....(?:....){0,16}?avi[fs]",
    "HEIF": rb"....ftyp(?:hei[cxms]|hev[cxms]|mi[af][f1]|mif[23]|msf1|avc[is]|jpe?gs?|j2[ki][is]"
    rb"|vvi[cs]|evb[is]|unif)",
    "Canon raw": rb"....ftypcrx |II.\0\0\0HEAPCCDR",
    "JPEG 2000": rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
    "JPEG XL": rb"\0\0\0\x0cJXL \r\n\x87\n|\xff\x0a",
    "JPEG XR": rb"II\xbc[\x00\x01]",
    "Fujifilm raw": rb"FUJIFILMCCD-RAW",
    "Olympus raw": rb"IIR[OS]|MMOR",
    "Panasonic raw": rb"IIU\0",
    "Sigma raw": rb"FOVb",
    "Minolta raw": rb"\0MRM",
    "Photoshop": rb"8BPS\0[\x01\x02]",
    "GIMP": rb"gimp xcf ",
    "OpenEXR": rb"\x76\x2f\x31\x01",
    "Radiance": rb"\#\?(?:RADIANCE|RGBE)\s",
    "DirectDraw": rb"DDS \x7c\0\0\0",
    "QOI": rb"qoif........[\x03\x04][\x00\x01]",
    "FLIF": rb"FLIF[1-9A-Z]",
    "BPG": rb"BPG\xfb",
    "portable float map": rb"PF%b%b-?[0-9.]" % (_SIDES, _GAP),
    "MNG": rb"[\x8a\x8b][MJ]NG\r\n\x1a\n",
    "JBIG2": rb"\x97JB2\r\n\x1a\n",
    "FITS": rb"SIMPLE  =",
    "farbfeld": rb"farbfeld",
    "IFF": rb"FORM....(?:ILBM|PBM )",
    "texture": rb"\xabKTX [12][01]\xbb|\x13\xab\xa1\x5c",
    "Windows metafile": rb"\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF",
    "PAM": rb"P7\nWIDTH|P7\n\#|P7\nHEIGHT|P7\nDEPTH",
    "icon": rb"\0\0[\x01\x02]\0[^\0]\0...\0.{8}[\x06-\xff].\0\0|icns",
    "SGI": rb"\x01\xda[\x00\x01][\x01\x02]\0[\x01-\x03]",
    "PCX": rb"\x0a[\x00\x02-\x05]\x01[\x01\x02\x04\x08]",
    "Sun raster": rb"\x59\xa6\x6a\x95",
    "DjVu": rb"AT&TFORM....DJV",
    "DICOM": rb".{128}DICM",
    "XPM": rb"/\* XPM \*/",
    "Encapsulated PostScript": rb"%!PS-Adobe-[0-9.]+ EPSF|\xc5\xd0\xd3\xc6",
    # What has once been passed is not tried in another way: there are too many.
    "SVG": rb"(?:\xef\xbb\xbf)?"
    rb"(?:<\?xml[^>]*>|<!--.*?-->|<!DOCTYPE svg[^>\[]*(?:\[[^\]]*\]\s*)?>|\s)*+<svg[\s>]",
}
_OTHER = re.compile(b"|".join(b"(%b)" % pattern for pattern in _OTHERS.values()), re.DOTALL)
_SHRUNK, _PARTS, _DNG = 254, 330, 50706
"""Tags of a TIFF: of what kind its first picture is, where others are, that it is a raw file."""
_MOST_TAGS = 512


def is_picture(head: bytes) -> bool:
    """Whether a file that begins so is a picture, of whatever format.

    >>> is_picture(b"\\xff\\xd8\\xff\\xe0"), is_picture(b"BMW is a maker of cars")
    (True, False)
    """
    return bool(_DECODED.match(head) or _OTHER.match(head))


def called_picture(name: str) -> bool:
    """Whether a name says that the file is a picture.

    >>> called_picture("a/B.JPG"), called_picture("jpg")
    (True, False)
    """
    return name.lower().endswith(SUFFIXES)


def undecodable(data: bytes) -> str:
    """The format of a picture that nothing here decodes; "" for all other files.

    Args:
        data: The whole file: the first picture in a camera's raw file is a small preview.

    >>> undecodable(b"\\xff\\x4f\\xff\\x51")
    'JPEG 2000'
    """
    if _DECODED.match(data[:HEAD]):
        return "camera raw" if _is_raw(data) else ""
    other = _OTHER.match(data[:HEAD])
    return list(_OTHERS)[(other.lastindex or 1) - 1] if other else ""


def _is_raw(data: bytes) -> bool:
    """Whether a TIFF shows a preview only, and has the picture itself in a part of its own."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None or len(data) < 8:
        return False
    if data[8:10] == b"CR":
        return True
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    if start + 2 > len(data):
        return False
    (count,) = struct.unpack_from(f"{order}H", data, start)
    table = data[start + 2 : start + 2 + 12 * min(count, _MOST_TAGS)]
    rows = struct.iter_unpack(f"{order}HHII", table[: len(table) // 12 * 12])
    tags = {tag: (kind, value) for tag, kind, _, value in rows}
    if _DNG in tags:
        return True
    kind, value = tags.get(_SHRUNK, (4, 0))
    shrunk = value >> 16 if order == ">" and kind == 3 else value
    return bool(shrunk & 1) and _PARTS in tags
