"""A PNG and a JPEG writer from the standards alone, to build files that no library writes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import scipy.fft

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ZIGZAG = sorted(
    ((row, column) for row in range(8) for column in range(8)),
    key=lambda place: (sum(place), place[1 - sum(place) % 2]),
)
_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])


def chunk(kind: bytes, body: bytes, crc32: int | None = None) -> bytes:
    """A part of a PNG; ``crc32`` replaces its right checksum."""
    right = zlib.crc32(kind + body) if crc32 is None else crc32
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", right)


def one_idat(coded: bytes) -> list[bytes]:
    return [chunk(b"IDAT", coded)]


def rows(pixels: np.ndarray) -> bytes:
    """What a PNG codes of 8-bit pixels: each row without a filter."""
    return b"".join(b"\0" + row.tobytes() for row in pixels)


def png(
    pixels: np.ndarray,
    *,
    before: Sequence[bytes] = (),
    after: Sequence[bytes] = (),
    coded: bytes | None = None,
    idats: Callable[[bytes], Sequence[bytes]] = one_idat,
    header: bytes = b"",
    ending: bytes = chunk(b"IEND", b""),
) -> bytes:
    """A PNG of ``(H, W, 3)`` or ``(H, W)`` uint8 with anything in the place of any part."""
    height, width = pixels.shape[:2]
    plain = struct.pack(">IIBBBBB", width, height, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    body = zlib.compress(rows(pixels)) if coded is None else coded
    parts = [chunk(b"IHDR", header or plain), *before, *idats(body), *after, ending]
    return SIGNATURE + b"".join(parts)


def vast_png(height: int, width: int) -> bytes:
    """A black PNG of any size, made without the memory that its pixels take."""
    packer = zlib.compressobj(1)
    coded = b"".join(packer.compress(bytes(1 + 3 * width)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return png(np.zeros((1, 1, 3), np.uint8), header=header, coded=coded)


def interlaced(pixels: np.ndarray) -> bytes:
    """Adam7, pass by pass."""
    height, width = pixels.shape[:2]
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2),
              (1, 0, 2, 1)]  # fmt: skip
    parts = [pixels[top::down, left::across] for top, left, down, across in passes]
    coded = zlib.compress(b"".join(rows(part) for part in parts if part.size))
    head = struct.pack(">IIBBBBB", width, height, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 1)
    return png(pixels, coded=coded, header=head)


def segment(marker: int, body: bytes) -> bytes:
    """A part of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def jpeg(
    pixels: np.ndarray,
    *,
    ahead: Sequence[bytes] = (),
    luma: tuple[int, int] = (1, 1),
    ids: bytes = b"\1\2\3",
    transformed: bool = True,
    restart: int = 0,
    stated: int | None = None,
    behind: bytes = b"",
) -> bytes:
    """A baseline JPEG of ``(H, W, 3)`` or ``(H, W)`` uint8.

    Args:
        pixels: What it shows.
        ahead: Segments in front of the tables.
        luma: Samples of the first channel across and down for one of the others.
        ids: Names of the channels.
        transformed: Whether the channels are made luma and chroma.
        restart: Markers of restart each so many blocks; 0 for none.
        stated: A height to state instead of the right one.
        behind: Bytes between the coded pixels and the end marker.
    """
    planes = pixels[..., None].astype(float) if pixels.ndim == 2 else pixels.astype(float)
    if planes.shape[2] == 3 and transformed:
        planes = planes @ _YCC.T + [0, 128, 128]
    across, down = luma if planes.shape[2] == 3 else (1, 1)
    height, width = pixels.shape[:2]
    wide, tall = -(-width // (8 * across)) * 8 * across, -(-height // (8 * down)) * 8 * down
    padded = np.pad(planes, ((0, tall - height), (0, wide - width), (0, 0)), mode="edge")
    channels = [padded[..., 0]]
    for number in range(1, planes.shape[2]):
        shape = (tall // down, down, wide // across, across)
        channels.append(padded[..., number].reshape(shape).mean((1, 3)))
    factors = [(across, down)] + [(1, 1)] * (len(channels) - 1)
    names = ids[: len(channels)]
    frame = struct.pack(">BHHB", 8, height if stated is None else stated, width, len(channels))
    scan = bytes([len(channels)])
    for name, (h, v) in zip(names, factors, strict=True):
        frame += bytes([name, h * 16 + v, 0])
        scan += bytes([name, 0])
    dc, ac = bytes(range(12)), bytes(run * 16 + size for run in range(16) for size in range(11))
    tables = segment(0xDB, b"\0" + b"\2" * 64)
    # Codes of one length each: eight bits have room for all symbols but the one of all ones.
    tables += segment(0xC4, b"\0" + bytes([0, 0, 0, 12]) + bytes(12) + dc)
    tables += segment(0xC4, b"\x10" + bytes(7) + bytes([len(ac)]) + bytes(8) + ac)
    tables += segment(0xDD, struct.pack(">H", restart)) if restart else b""
    coded = _coded(channels, factors, restart, (dc, ac))
    head = b"\xff\xd8" + b"".join(ahead) + tables + segment(0xC0, frame)
    return head + segment(0xDA, scan + b"\0\x3f\0") + coded + behind + b"\xff\xd9"


def _coded(
    channels: Sequence[np.ndarray],
    factors: Sequence[tuple[int, int]],
    restart: int,
    symbols: tuple[bytes, bytes],
) -> bytes:
    blocks = []
    for plane in channels:
        tiles = plane.reshape(plane.shape[0] // 8, 8, -1, 8).swapaxes(1, 2) - 128
        blocks.append(np.rint(scipy.fft.dctn(tiles, axes=(2, 3), norm="ortho") / 2).astype(int))
    down, across = (blocks[-1].shape[axis] for axis in (0, 1))
    if len(channels) == 1:
        down, across = blocks[0].shape[:2]
    out, bits, last = b"", "", [0] * len(channels)
    for unit in range(down * across):
        if restart and unit and unit % restart == 0:
            out += _packed(bits) + bytes([0xFF, 0xD0 + (unit // restart - 1) % 8])
            bits, last = "", [0] * len(channels)
        row, column = divmod(unit, across)
        for number, (h, v) in enumerate(factors):
            for y in range(v):
                for x in range(h):
                    block = blocks[number][row * v + y, column * h + x]
                    bits += _block(block, last[number], symbols)
                    last[number] = int(block[0, 0])
    return out + _packed(bits)


def _block(block: np.ndarray, before: int, symbols: tuple[bytes, bytes]) -> str:
    dc, ac = symbols
    values = [int(block[place]) for place in _ZIGZAG]
    text = f"{dc.index(_size(values[0] - before)):04b}{_bits(values[0] - before)}"
    run = 0
    end = max((at for at in range(1, 64) if values[at]), default=0)
    for value in values[1 : end + 1]:
        if not value:
            run += 1
            continue
        text += f"{ac.index(0xF0):08b}" * (run // 16)
        text += f"{ac.index(run % 16 * 16 + _size(value)):08b}{_bits(value)}"
        run = 0
    return text if end == 63 else text + f"{ac.index(0):08b}"


def _size(value: int) -> int:
    return abs(value).bit_length()


def _bits(value: int) -> str:
    size = _size(value)
    return f"{value if value > 0 else value + (1 << size) - 1:0{size}b}" if size else ""


def _packed(bits: str) -> bytes:
    bits += "1" * (-len(bits) % 8)
    whole = int(bits, 2).to_bytes(len(bits) // 8, "big") if bits else b""
    return whole.replace(b"\xff", b"\xff\0")
