"""Which files are pictures, by their first bytes: those that are decoded here, and all others.

What a file is called decides nothing, with one exception: a file that is called a picture and
is none (empty, or a web page in a picture's place) is a picture that is missing.
"""

from __future__ import annotations

import re
import struct

FILE_HEAD_BYTES = 512
"""Number of first bytes that tell what a file is."""
PICTURE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".apng", ".ppm", ".pgm", ".pbm", ".pnm",
    ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp", ".avif", ".avifs", ".heic", ".heif", ".hif",
    ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".jxl", ".jxr", ".tga", ".psd", ".dng",
    ".nef", ".cr2", ".cr3", ".arw", ".raf", ".orf", ".rw2",
)  # fmt: skip
"""Endings of the names of pictures."""

_PNM_GAP_PATTERN = rb"(?:\s|\#[^\n]*\n)*"
_PNM_SIDES_PATTERN = rb"\s" + _PNM_GAP_PATTERN + rb"[0-9]+\s" + _PNM_GAP_PATTERN + rb"[0-9]+\s"
"""Width and height of a PNM: text between them may be a remark."""
_DECODABLE_PATTERN = re.compile(
    rb"\xff\xd8\xff"
    rb"|\x89PNG\r\n\x1a\n"
    rb"|GIF8[79]a"
    rb"|RIFF....WEBP"
    rb"|II\*\0|MM\0\*|II\+\0|MM\0\+|II\0\*|MM\*\0"
    # Two letters are no proof: what a header must state follows.
    rb"|BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0"
    rb"|P4%(sides)b|P1%(sides)b[01\s\#]"
    rb"|P[2356]%(sides)b%(gap)b[0-9]{1,5}\s|Pf%(sides)b%(gap)b-?[0-9.]"
    % {b"sides": _PNM_SIDES_PATTERN, b"gap": _PNM_GAP_PATTERN},
    re.DOTALL,
)
_UNDECODABLE_FORMAT_PATTERNS = {
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
    "portable float map": rb"PF%b%b-?[0-9.]" % (_PNM_SIDES_PATTERN, _PNM_GAP_PATTERN),
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
_UNDECODABLE_PATTERN = re.compile(
    b"|".join(b"(%b)" % pattern for pattern in _UNDECODABLE_FORMAT_PATTERNS.values()), re.DOTALL
)
_SUBFILE_TYPE_TAG = 254
_SUB_DIRECTORIES_TAG = 330
_DNG_VERSION_TAG = 50706
"""Tags of a TIFF: whether its first picture is a preview, where others are, that it is a DNG."""
_MAX_TIFF_TAGS = 512


def has_picture_signature(file_head: bytes) -> bool:
    """Tell by its first bytes whether a file is a picture, of whatever format.

    >>> (
    ...     has_picture_signature(b"\\xff\\xd8\\xff\\xe0"),
    ...     has_picture_signature(b"BMW is a maker of cars"),
    ... )
    (True, False)
    """
    return bool(_DECODABLE_PATTERN.match(file_head) or _UNDECODABLE_PATTERN.match(file_head))


def has_picture_suffix(name: str) -> bool:
    """Tell whether a file name ends like a picture's.

    >>> has_picture_suffix("a/B.JPG"), has_picture_suffix("jpg")
    (True, False)
    """
    return name.lower().endswith(PICTURE_SUFFIXES)


def name_undecodable_format(data: bytes) -> str:
    """Name the format of a picture that nothing here decodes; "" for all other files.

    Args:
        data: The whole file: the first picture in a camera's raw file is a small preview.

    >>> name_undecodable_format(b"\\xff\\x4f\\xff\\x51")
    'JPEG 2000'
    """
    if _DECODABLE_PATTERN.match(data[:FILE_HEAD_BYTES]):
        return "camera raw" if _is_camera_raw(data) else ""
    match = _UNDECODABLE_PATTERN.match(data[:FILE_HEAD_BYTES])
    return list(_UNDECODABLE_FORMAT_PATTERNS)[(match.lastindex or 1) - 1] if match else ""


def _is_camera_raw(data: bytes) -> bool:
    """Tell whether a TIFF shows a preview only, and has the picture itself in a part of its own."""
    byte_order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if byte_order is None or len(data) < 8:
        return False
    if data[8:10] == b"CR":
        return True
    (start,) = struct.unpack_from(f"{byte_order}I", data, 4)
    if start + 2 > len(data):
        return False
    (count,) = struct.unpack_from(f"{byte_order}H", data, start)
    table = data[start + 2 : start + 2 + 12 * min(count, _MAX_TIFF_TAGS)]
    rows = struct.iter_unpack(f"{byte_order}HHII", table[: len(table) // 12 * 12])
    tags = {tag: (type_code, value) for tag, type_code, _, value in rows}
    if _DNG_VERSION_TAG in tags:
        return True
    type_code, value = tags.get(_SUBFILE_TYPE_TAG, (4, 0))
    subfile_type = value >> 16 if byte_order == ">" and type_code == 3 else value
    return bool(subfile_type & 1) and _SUB_DIRECTORIES_TAG in tags
