"""CIFAR-10 and CIFAR-100 from the official python pickles, unpacked or still in their archive."""

from __future__ import annotations

import hashlib
import io
import pickle
import pickletools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vssl_dist.durable import read_regular_file
from vssl_dist.errors import DataError

from ..archives.tars import read_gzipped_members
from ..images.pixels import ArrayImages
from .base import SourceRequest, Split
from .download import fetch_archive

_MAX_FILE_BYTES = 1 << 30
_IMAGE_BYTES = 3 * 32 * 32
_MEMO_OPCODES = ("PUT", "BINPUT", "LONG_BINPUT")


@dataclass(frozen=True)
class CifarLayout:
    """How one of the two data sets is laid out."""

    dataset: str
    folder: str
    archive: str
    split_files: dict[str, tuple[str, ...]]
    """The files of each split."""
    meta_file: str
    names_key: str
    labels_key: str


CIFAR10 = CifarLayout(
    dataset="cifar10",
    folder="cifar-10-batches-py",
    archive="cifar-10-python.tar.gz",
    split_files={"train": tuple(f"data_batch_{n}" for n in range(1, 6)), "val": ("test_batch",)},
    meta_file="batches.meta",
    names_key="label_names",
    labels_key="labels",
)
CIFAR100 = CifarLayout(
    dataset="cifar100",
    folder="cifar-100-python",
    archive="cifar-100-python.tar.gz",
    split_files={"train": ("train",), "val": ("test",)},
    meta_file="meta",
    names_key="fine_label_names",
    labels_key="fine_labels",
)


def cifar10(request: SourceRequest) -> list[Split]:
    """Read the requested splits of CIFAR-10."""
    return _read_splits(CIFAR10, request)


def cifar100(request: SourceRequest) -> list[Split]:
    """Read the requested splits of CIFAR-100 with its 100 fine labels."""
    return _read_splits(CIFAR100, request)


def _read_splits(layout: CifarLayout, request: SourceRequest) -> list[Split]:
    """Read the requested splits into memory.

    Raises:
        DataError: A file is missing, damaged, or holds anything but arrays and labels.
    """
    if request.download and request.root is not None:
        fetch_archive(layout.dataset, request.root)
    root = request.require_root()
    needed_file_names = [
        layout.meta_file,
        *(file for name in request.splits for file in layout.split_files[name]),
    ]
    content_by_name = _read_files(layout, root, needed_file_names)
    meta_values = _unpickle(content_by_name[layout.meta_file], layout.meta_file)
    classes = tuple(_class_names(meta_values.get(layout.names_key), layout.meta_file))
    return [_make_split(layout, name, classes, content_by_name) for name in request.splits]


def _make_split(
    layout: CifarLayout, name: str, classes: tuple[str, ...], content_by_name: dict[str, bytes]
) -> Split:
    pixel_batches: list[NDArray[np.uint8]] = []
    labels: list[NDArray[np.int64]] = []
    digest = hashlib.sha256()
    for file in layout.split_files[name]:
        batch_values = _unpickle(content_by_name[file], file)
        data, batch_labels = batch_values.get("data"), batch_values.get(layout.labels_key)
        if not isinstance(data, np.ndarray) or data.ndim != 2:
            raise DataError(f"{file}: holds no pixels: unpack the official archive again")
        if (
            not isinstance(batch_labels, list)
            or len(batch_labels) != len(data)
            or data.shape[1] != _IMAGE_BYTES
        ):
            raise DataError(f"{file}: pixels and {layout.labels_key} do not match")
        if not all(type(label) is int and 0 <= label < len(classes) for label in batch_labels):
            raise DataError(f"{file}: labels are not numbers below {len(classes)}")
        pixel_batches.append(data)
        labels.append(np.array(batch_labels, np.int64))
        digest.update(hashlib.sha256(content_by_name[file]).digest())
    pixels = np.concatenate(pixel_batches)
    return Split(
        dataset=layout.dataset,
        name=name,
        classes=classes,
        labels=np.concatenate(labels),
        make_images=lambda numbers: ArrayImages((pixels,), numbers, (3, 32, 32), (1, 2, 0)),
        facts={"input": digest.hexdigest()},
        is_grouped_by_class=False,  # the official order is mixed already
        name_of=lambda number: f"{name} image {number}",
    )


def _read_files(layout: CifarLayout, root: Path, files: Sequence[str]) -> dict[str, bytes]:
    """Read files by name, from the official folder at or below ``root`` or from the archive."""
    for folder in (root / layout.folder, root):
        if (folder / layout.meta_file).is_file():
            return {name: _read_file(folder / name) for name in files}
    archive = root if root.is_file() else root / layout.archive
    if not archive.is_file():
        raise DataError(
            f"{root}: neither {layout.folder}/ nor {layout.archive} in it (--download fetches it)"
        )
    return _read_from_archive(archive, layout.folder, files)


def _read_file(path: Path) -> bytes:
    try:
        return read_regular_file(path, _MAX_FILE_BYTES)
    except FileNotFoundError:
        raise DataError(
            f"{path}: missing (--split makes one split only, --download fetches the data)"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _read_from_archive(archive: Path, folder: str, files: Sequence[str]) -> dict[str, bytes]:
    """Read regular members by their exact names: nothing is extracted to disk."""
    members = read_gzipped_members(archive, [f"{folder}/{name}" for name in files], _MAX_FILE_BYTES)
    content_by_name = {name.removeprefix(f"{folder}/"): blob for name, blob in members.items()}
    for name in files:
        if name not in content_by_name:
            raise DataError(f"{archive}: has no {folder}/{name} (--split makes one split only)")
    return content_by_name


class _ArrayStandIn:
    """What a pickle builds in numpy's place: a stated shape takes no memory but for its bytes."""

    def __init__(self, *stated_arguments: object) -> None:
        self.pixels: NDArray[np.uint8] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, element_type, columns_first, buffer = state
        if element_type is not _BYTE_TYPE:
            raise pickle.UnpicklingError("it holds an array of other things than bytes")
        flat_pixels = np.frombuffer(buffer, np.uint8)
        self.pixels = flat_pixels.reshape(shape, order="F" if columns_first else "C")


class _ByteType:
    """The type of an array's elements, ``dtype("u1")``."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        pass


_BYTE_TYPE = _ByteType()


def _stand_in_dtype(type_code: str | bytes, *ignored_arguments: object) -> _ByteType | None:
    return _BYTE_TYPE if type_code in ("u1", b"u1") else None


class _Unpickler(pickle.Unpickler):
    """Builds arrays, lists and dicts of numbers and text; refuses to call anything else."""

    def __init__(self, blob: bytes) -> None:
        super().__init__(io.BytesIO(blob), encoding="bytes")
        self._encodable_bytes_left = len(blob)

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _ArrayStandIn
        if module == "numpy" and name in ("ndarray", "dtype"):
            return _ArrayStandIn if name == "ndarray" else _stand_in_dtype
        if (module, name) == ("_codecs", "encode"):
            return self._encode_latin1
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")

    def _encode_latin1(self, text: str, encoding: str) -> bytes:
        # How Python 3 writes bytes into a protocol-2 pickle; no other codec occurs.
        if encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError(f"it refers to the codec {encoding}")
        # Each text is written there, so more of them than the whole is one text many times.
        self._encodable_bytes_left -= len(text)
        if self._encodable_bytes_left < 0:
            raise pickle.UnpicklingError("it holds more bytes than it is long")
        return text.encode("latin-1")


def _check_memo_numbers(blob: bytes) -> None:
    """See that objects are numbered as they come: the unpickler makes a table of so many."""
    for count, (opcode, pickle_memo_index, _) in enumerate(pickletools.genops(blob)):
        if opcode.name in _MEMO_OPCODES and (pickle_memo_index or 0) > count:
            raise pickle.UnpicklingError(
                f"object {pickle_memo_index} is numbered before there are as many"
            )


def _unpickle(blob: bytes, name: str) -> dict[str, Any]:
    try:
        _check_memo_numbers(blob)
        items = _Unpickler(blob).load().items()
        values = {key.decode() if isinstance(key, bytes) else key: value for key, value in items}
    # The unpickler raises nearly anything on damaged input, and all of it means the same.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{name}: damaged or not the official pickle ({reason}): unpack the archive again"
        ) from error
    return {
        key: value.pixels if isinstance(value, _ArrayStandIn) else value
        for key, value in values.items()
    }


def _class_names(values: object, name: str) -> list[str]:
    if not isinstance(values, list) or not all(
        isinstance(value, (bytes, str)) for value in values or [0]
    ):
        raise DataError(f"{name}: holds no class names: unpack the official archive again")
    return [
        value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in values
    ]
