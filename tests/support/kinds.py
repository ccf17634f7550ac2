"""Kinds of image files as cameras, phones and editors leave them, and what is due to each.

Each kind turns a picture into a file; its verdict was written down before the files were made.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from data_prep.images.examine import ImageVerdict
from tests.support.encoders import SIGNATURE, chunk, interlaced, jpeg, png, rows, segment

Make = Callable[[np.ndarray], bytes]

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GREY_PROFILE = PROFILE[:16] + b"GRAY" + PROFILE[20:]
PACKET = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'>" + b" " * 50_000 + b"</x:xmpmeta>"
CALIBRATED = struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)


def exif(orientation: int) -> bytes:
    """A directory of one entry."""
    entry = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"MM\0*\0\0\0\x08\0\1" + entry + bytes(4)


def pillow(kind: str, mode: str = "RGB", **options: Any) -> Make:
    """By Pillow, in a mode."""

    def make(pixels: np.ndarray) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(stream, kind, **options)
        return stream.getvalue()

    return make


def before(*parts: bytes) -> Make:
    """A PNG with parts ahead of its pixels."""
    return lambda pixels: png(pixels, before=parts)


def after(*parts: bytes) -> Make:
    """A PNG with parts behind its pixels."""
    return lambda pixels: png(pixels, after=parts)


def ahead(*parts: bytes, **options: Any) -> Make:
    """A JPEG of our own with segments in front."""
    return lambda pixels: jpeg(pixels, ahead=parts, **options)


def within(*parts: bytes, **options: Any) -> Make:
    """A JPEG of Pillow's with segments behind its first."""

    def make(pixels: np.ndarray) -> bytes:
        data = pillow("JPEG", **{"quality": 95, **options})(pixels)
        at = 4 + int.from_bytes(data[4:6], "big")
        return data[:at] + b"".join(parts) + data[at:]

    return make


def changed(make: Make, change: Callable[[bytes], bytes]) -> Make:
    """Another kind's file with something done to it."""
    return lambda pixels: change(make(pixels))


def coded(change: Callable[[bytes], bytes]) -> Make:
    """A PNG with something done to its compressed pixels."""
    return lambda pixels: png(pixels, coded=change(zlib.compress(rows(pixels))))


def cut(at: float) -> Callable[[bytes], bytes]:
    """The first part of a file."""
    return lambda data: data[: int(len(data) * at)]


def parted(*between: bytes) -> Callable[[bytes], list[bytes]]:
    """Coded pixels in two chunks, and others between them."""
    return lambda body: [chunk(b"IDAT", body[:40]), *between, chunk(b"IDAT", body[40:])]


def unended(body: bytes) -> bytes:
    """The same compressed pixels in a stream that is flushed and never ended."""
    packer = zlib.compressobj()
    return packer.compress(zlib.decompress(body)) + packer.flush(zlib.Z_SYNC_FLUSH)


def deep(pixels: np.ndarray) -> bytes:
    """A grey PNG of 16 bits."""
    return pillow_array(pixels[..., 0].astype(np.uint16) * 257, "PNG")


def pillow_array(pixels: np.ndarray, kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def shallow(depth: int) -> Make:
    """A grey PNG of less than eight bits."""

    def make(pixels: np.ndarray) -> bytes:
        levels = pixels[..., 0] >> (8 - depth)
        bits = np.unpackbits(levels[..., None], axis=2)[..., 8 - depth :].reshape(len(levels), -1)
        head = struct.pack(">IIBBBBB", *pixels.shape[1::-1], depth, 0, 0, 0, 0)
        return png(pixels, header=head, coded=zlib.compress(rows(np.packbits(bits, axis=1))))

    return make


def thumbnail(pixels: np.ndarray) -> bytes:
    """EXIF with a small JPEG behind its directory, as cameras write it."""
    small = pillow("JPEG")(pixels[::4, ::4].copy())
    return pillow("JPEG", exif=b"Exif\0\0" + exif(1) + small, quality=95)(pixels)


def animated(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    first, second = Image.fromarray(pixels), Image.fromarray(pixels[::-1].copy())
    first.save(stream, "PNG", save_all=True, append_images=[second], duration=50)
    return stream.getvalue()


def panorama(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    first, second = Image.fromarray(pixels), Image.fromarray(pixels[::-1].copy())
    first.save(stream, "MPO", save_all=True, append_images=[second])
    return stream.getvalue()


def gain_mapped(pixels: np.ndarray) -> bytes:
    """As phones write it since 2023: the second picture only brightens the first."""
    data = panorama(pixels)
    note = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><a hdrgm:Version="1.0"/></x:xmpmeta>'
    return data[:2] + segment(0xE1, note) + data[2:]


def flipped(name: bytes, offset: int) -> Callable[[bytes], bytes]:
    """A bit changed so many bytes behind a name."""

    def change(data: bytes) -> bytes:
        at = data.index(name) + offset
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    return change


def adobe(transform: int) -> bytes:
    return segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([transform]))


def xmp(text: bytes) -> bytes:
    return segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + text)


JFIF = segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0")
EXTENDED = [
    segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(40) + bytes(60_000))
    for _ in range(3)
]
PHOTOSHOP = b"Photoshop 3.0\x008BIM"
OWN, PNGS = jpeg, pillow("PNG")
JPEGS = pillow("JPEG", quality=95)

KEEP: dict[str, Make] = {
    # PNG: what tells about the picture, right or wrong, large or small.
    "png plain": png,
    "png by pillow": PNGS,
    "png grey": lambda pixels: png(pixels[..., 0]),
    "png interlaced": interlaced,
    "png 2 MB of text": before(chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2_000_000)))),
    "png xmp of 1.5 MB": before(
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(1_500_000)))
    ),
    "png text that is no stream": before(chunk(b"zTXt", b"Comment\0\7garbage")),
    "png text of no alphabet": before(chunk(b"iTXt", b"a\0\0\0\0\0\xff\xfe\xfd")),
    "png exif of garbage": before(chunk(b"eXIf", b"zzzz")),
    "png exif that ends early": before(chunk(b"eXIf", exif(6)[:15])),
    "png exif orientation 0": before(chunk(b"eXIf", exif(0))),
    "png checksum of a text": before(chunk(b"tEXt", b"Software\0x", 5)),
    "png checksum of exif": before(chunk(b"eXIf", exif(6), 5)),
    "png checksum behind": after(chunk(b"tIME", b"\7\xea\1\1\0\0\0", 5)),
    "png checksum of its end": lambda p: png(p, ending=chunk(b"IEND", b"", 1)),
    "png profile": pillow("PNG", icc_profile=PROFILE),
    "png profile of garbage": before(chunk(b"iCCP", b"icc\0\0garbage")),
    "png profile empty": before(chunk(b"iCCP", b"")),
    "png profile of 3 MB": before(
        chunk(b"iCCP", b"icc\0\0" + zlib.compress(PROFILE + bytes(3_000_000)))
    ),
    "png grey profile": before(chunk(b"iCCP", b"icc\0\0" + zlib.compress(GREY_PROFILE))),
    "png grey with a colour profile": lambda p: png(
        p[..., 0], before=[chunk(b"iCCP", b"icc\0\0" + zlib.compress(PROFILE))]
    ),
    "png calibrated": before(
        chunk(b"gAMA", struct.pack(">I", 45455)), chunk(b"cHRM", CALIBRATED), chunk(b"sRGB", b"\0")
    ),
    "png linear": before(chunk(b"gAMA", struct.pack(">I", 100_000))),
    "png short remarks": before(
        chunk(b"gAMA", b"1"), chunk(b"cHRM", b"1"), chunk(b"pHYs", b"1"), chunk(b"sRGB", b"")
    ),
    "png transparency of too few bytes": before(chunk(b"tRNS", b"1")),
    "png suggested palette": before(chunk(b"PLTE", bytes(range(30)))),
    "png private part": before(chunk(b"prVt", b"hello"), chunk(b"caBX", bytes(9_000))),
    "png a frame of nothing": after(chunk(b"fdAT", b"junk")),
    "png empty idats": lambda p: png(p, idats=lambda z: [*parted(chunk(b"IDAT", b""))(z)]),
    "png idats of five bytes": lambda p: png(
        p, idats=lambda z: [chunk(b"IDAT", z[at : at + 5]) for at in range(0, len(z), 5)]
    ),
    "png more behind its pixels": coded(lambda body: body + b"junk"),
    "png too many pixels": coded(lambda b: zlib.compress(zlib.decompress(b) + bytes(3_000_000))),
    "png behind its end": changed(png, lambda data: data + 3 * data),
    # JPEG: the same.
    "jpeg by pillow": JPEGS,
    "jpeg grey": pillow("JPEG", "L", quality=95),
    "jpeg progressive": pillow("JPEG", quality=95, progressive=True),
    "jpeg own": OWN,
    "jpeg own grey": lambda pixels: jpeg(pixels[..., 0]),
    "jpeg own sampled": ahead(luma=(2, 2)),
    "jpeg own sampled down": ahead(JFIF, luma=(1, 2)),
    "jpeg own sampled by four": ahead(luma=(4, 1)),
    "jpeg own restarts": ahead(JFIF, luma=(2, 1), restart=2),
    "jpeg own channels from 0": ahead(ids=b"\0\1\2"),
    "jpeg own rgb": ahead(adobe(0), transformed=False),
    "jpeg own rgb by name": ahead(ids=b"RGB", transformed=False),
    "jpeg own adobe": ahead(adobe(1)),
    "jpeg adobe cut short": ahead(segment(0xEE, b"Adobe\0")),
    "jpeg jfif cut short": ahead(segment(0xE0, b"JFIF\0\1")),
    "jpeg jfif thumbnail": ahead(segment(0xE0, b"JFIF\0\1\2\0\0\1\0\1\4\4" + bytes(48))),
    "jpeg exif thumbnail": thumbnail,
    "jpeg exif of garbage": within(segment(0xE1, b"Exif\0\0zzzz")),
    "jpeg exif that ends early": within(segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff\1\2")),
    "jpeg exif orientation 9": within(segment(0xE1, b"Exif\0\0" + exif(9))),
    "jpeg turned, told behind": lambda pixels: jpeg(
        pixels, behind=segment(0xE1, b"Exif\0\0" + exif(6))
    ),
    "jpeg exif empty": ahead(segment(0xE1, b"Exif\0\0"), segment(0xE1, b"")),
    "jpeg xmp": within(xmp(PACKET)),
    "jpeg xmp in parts": within(xmp(b"<a/>"), *EXTENDED),
    "jpeg photoshop": within(segment(0xED, PHOTOSHOP + b"\4\4\0\0\0\0\0\4abcd")),
    "jpeg photoshop cut short": within(segment(0xED, PHOTOSHOP + b"\3\xed")),
    "jpeg profile": pillow("JPEG", icc_profile=PROFILE, quality=95),
    "jpeg profile without its number": within(segment(0xE2, b"ICC_PROFILE\0")),
    "jpeg profile lacks a part": within(segment(0xE2, b"ICC_PROFILE\0\2\3x")),
    "jpeg grey profile": pillow("JPEG", icc_profile=GREY_PROFILE, quality=95),
    "jpeg comments of 60 kB": within(*3 * [segment(0xFE, b"c" * 60_000)]),
    "jpeg all applications": ahead(*[segment(0xE0 + n, b"whatever") for n in range(16)]),
    "jpeg index of garbage": within(segment(0xE2, b"MPF\0junk")),
    "jpeg gain map": gain_mapped,
    "jpeg fill bytes": changed(OWN, lambda data: data[:2] + b"\xff" * 9 + data[2:]),
    "jpeg behind its end": changed(JPEGS, lambda data: data + bytes(4096)),
    "jpeg two in one": changed(OWN, lambda data: data + data),
    "jpeg lines stated again": lambda p: jpeg(p, behind=segment(0xDC, struct.pack(">H", len(p)))),
}  # fmt: skip

INFLATING = 40 * [chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(8_000_000)))]
ENCODE_ANEW: dict[str, Make] = {
    "png 1 bit": shallow(1),
    "png 2 bits": shallow(2),
    "png 4 bits": shallow(4),
    "png 16 bits": deep,
    "png palette": pillow("PNG", "P"),
    "png alpha": pillow("PNG", "RGBA"),
    "png grey alpha": pillow("PNG", "LA"),
    "png transparent colour": before(chunk(b"tRNS", bytes(6))),
    "png animated": animated,
    "png turned": before(chunk(b"eXIf", exif(6))),
    "png turned, told behind": after(chunk(b"eXIf", exif(8))),
    "png turned, told twice": before(chunk(b"eXIf", b"zzzz"), chunk(b"eXIf", exif(6))),
    # DALI refuses these for what stands around a picture that is whole.
    "png private part of 9 MB": before(chunk(b"prVt", bytes(9_000_000))),
    "png texts that take a decoder seconds": before(*INFLATING),
    "png animation of garbage": before(chunk(b"acTL", b"")),
    "png part of a reserved name": before(chunk(b"prvt", b"hello")),
    "png remark between its pixels": lambda p: png(p, idats=parted(chunk(b"tEXt", b"a\0b"))),
    "jpeg turned": pillow("JPEG", exif=b"Exif\0\0" + exif(6), quality=95),
    "jpeg turned in 32 bits": within(
        segment(
            0xE1,
            b"Exif\0\0" + exif(6).replace(b"\x12\0\3\0\0\0\1\0\6", b"\x12\0\x09\0\0\0\1\0\0\0\6"),
        )
    ),
    "jpeg own turned": ahead(segment(0xE1, b"Exif\0\0" + exif(3))),
    "jpeg turned by xmp": within(xmp(b'<x:xmpmeta tiff:Orientation="6"/>')),
    "png turned by xmp": before(
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<tiff:Orientation>3</tiff:Orientation>")
    ),
    "jpeg cmyk": pillow("JPEG", "CMYK", quality=95),
    "jpeg ycck": changed(
        pillow("JPEG", "CMYK", quality=95), lambda d: d.replace(adobe(0), adobe(2), 1)
    ),
    "jpeg of several pictures": panorama,
    "jpeg stray bytes": changed(OWN, lambda data: data.replace(b"\xff\xc4", b"\0\0\0\xff\xc4", 1)),
    "gif": pillow("GIF"),
    "bmp": pillow("BMP"),
    "tiff": pillow("TIFF"),
    "tiff turned": pillow("TIFF", tiffinfo={274: 6}),
    "tiff turned by xmp": pillow("TIFF", tiffinfo={700: b'<x tiff:Orientation="3"/>'}),
    "webp with exif of garbage": pillow("WEBP", exif=b"Exif\0\0zzzz", quality=95),
    "webp turned": pillow("WEBP", exif=b"Exif\0\0" + exif(5), quality=95),
}

REJECT: dict[str, Make] = {
    "png cut in half": changed(PNGS, cut(0.5)),
    "png without its end": changed(PNGS, lambda data: data[:-12]),
    "png idat cut short": coded(lambda body: body[: len(body) * 2 // 3]),
    "png stream without its checksum": coded(lambda body: body[:-4]),
    "png stream without a byte": coded(lambda body: body[:-1]),
    "png stream never ended": coded(unended),
    "png wrong stream checksum": coded(lambda body: body[:-4] + b"abcd"),
    "png stream without a head": coded(lambda body: body[2:]),
    "png a byte of pixels missing": coded(lambda b: zlib.compress(zlib.decompress(b)[:-1])),
    "png idat damaged": changed(png, flipped(b"IDAT", 30)),
    "png header damaged": changed(png, flipped(b"IHDR", 15)),
    "png unknown filter": coded(lambda body: zlib.compress(b"\7" + zlib.decompress(body)[1:])),
    "png of apple": lambda p: SIGNATURE + chunk(b"CgBI", b"\x50\0\x20\6") + png(p)[8:],
    "png without pixels": lambda p: png(p, header=struct.pack(">IIBBBBB", 0, 9, 8, 2, 0, 0, 0)),
    "jpeg cut in half": changed(JPEGS, cut(0.5)),
    "jpeg own cut": changed(OWN, cut(0.7)),
    "jpeg progressive cut": changed(KEEP["jpeg progressive"], cut(0.6)),
    "jpeg without its end": changed(JPEGS, lambda data: data[:-2]),
    "jpeg height told behind": lambda p: jpeg(
        p, stated=0, behind=segment(0xDC, struct.pack(">H", len(p)))
    ),
    "jpeg 12 bits": changed(OWN, lambda d: d.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c")),
    "jpeg two channels sampled in thirds": changed(
        OWN, lambda d: d.replace(b"\1\x11\0\2\x11\0\3", b"\1\x31\0\2\x21\0\3")
    ),
    "a page": lambda _: b"<html><body>404 Not Found</body></html>",
}

DUE: dict[str, ImageVerdict] = {
    **dict.fromkeys(KEEP, ImageVerdict.KEEP),
    **dict.fromkeys(ENCODE_ANEW, ImageVerdict.ENCODE_ANEW),
    **dict.fromkeys(REJECT, ImageVerdict.REJECT),
}
KINDS = KEEP | ENCODE_ANEW | REJECT
