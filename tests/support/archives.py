"""Small archives of exactly the official structures, made of real crops."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

from tests.support.photos import crop

SYNSETS = ("n01440764", "n02102040", "n03028079", "n07753592")
DEVKIT = "ILSVRC2012_devkit_t12"
STL10_NAMES = (
    "airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck",
)  # fmt: skip
STL10_COUNTS = {"train": 20, "test": 12, "unlabeled": 50}


def jpeg(number: int, sides: tuple[int, int] = (40, 90)) -> bytes:
    """A real crop as a JPEG file."""
    stream = io.BytesIO()
    Image.fromarray(crop(number, 16, sides)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def packed(
    files: Iterable[tuple[str | tarfile.TarInfo, bytes]], format: int = tarfile.GNU_FORMAT
) -> bytes:
    """An uncompressed tar of files, in the given order."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for name, data in files:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def train_files(each: int) -> dict[str, dict[str, bytes]]:
    """By synset, the files that its archive holds, in no particular order."""
    made: dict[str, dict[str, bytes]] = {}
    for label, synset in enumerate(SYNSETS):
        numbers = [label + len(SYNSETS) * n for n in reversed(range(each))]
        made[synset] = {f"{synset}_{number * 37}.JPEG": jpeg(number) for number in numbers}
    return made


def val_files(samples: int) -> dict[str, tuple[str, bytes]]:
    """By name, the synset and the bytes of each validation image."""
    return {
        f"ILSVRC2012_val_{number + 1:08d}.JPEG": (
            SYNSETS[number * 3 % len(SYNSETS)],
            jpeg(1000 + number),
        )
        for number in range(samples)
    }


def devkit_files(val: dict[str, tuple[str, bytes]]) -> dict[str, bytes]:
    """The two files of the kit that matter: numbers of synsets are not in order of their ids."""
    fields = (
        "ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height",
        "num_train_images",
    )  # fmt: skip
    numbers = {synset: 1 + (label * 3 + 2) % len(SYNSETS) for label, synset in enumerate(SYNSETS)}
    rows = [(n, synset, "a word, another", "gloss", 0, [], 0, 9) for synset, n in numbers.items()]
    rows.append((len(SYNSETS) + 1, "n00000001", "all", "gloss", 2, [1, 2], 1, 0))
    table = np.array(rows, dtype=[(name, object) for name in fields])
    stream = io.BytesIO()
    scipy.io.savemat(stream, {"synsets": table.reshape(-1, 1)})
    truth = "".join(f"{numbers[synset]}\n" for synset, _ in val.values())
    return {
        "data/meta.mat": stream.getvalue(),
        "data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    }


def write_imagenet(root: Path, each: int = 5, samples: int = 8, devkit: bool = True) -> Path:
    """The three official archives (or the two with images); returns ``root``."""
    root.mkdir(parents=True, exist_ok=True)
    classes = train_files(each)
    inner = [(f"{synset}.tar", packed(files.items())) for synset, files in classes.items()]
    (root / "ILSVRC2012_img_train.tar").write_bytes(packed(reversed(inner)))
    val = val_files(samples)
    blob = packed((name, data) for name, (_, data) in val.items())
    (root / "ILSVRC2012_img_val.tar").write_bytes(blob)
    if devkit:
        write_devkit(root, devkit_files(val))
    return root


def write_devkit(root: Path, files: dict[str, bytes]) -> None:
    """The kit as its archive."""
    with tarfile.open(root / f"{DEVKIT}.tar.gz", "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{DEVKIT}/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_unpacked(root: Path, each: int = 5, samples: int = 8) -> Path:
    """The same images as `write_imagenet`, as image folders; returns ``root``."""
    for synset, files in train_files(each).items():
        for name, data in files.items():
            path = root / "train" / synset / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    for name, (synset, data) in val_files(samples).items():
        path = root / "val" / synset / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def stl10_pixels(part: str) -> np.ndarray:
    """``(N, 96, 96, 3)`` real crops: the images of one of the official files."""
    first = 1000 * list(STL10_COUNTS).index(part)
    return np.stack([crop(first + n, 16, (96, 96)) for n in range(STL10_COUNTS[part])])


def write_stl10(root: Path) -> Path:
    """A small STL-10 as it unpacks: columns first, labels from 1; returns ``root``."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for part in STL10_COUNTS:
        (folder / f"{part}_X.bin").write_bytes(stl10_pixels(part).transpose(0, 3, 2, 1).tobytes())
    for part in ("train", "test"):
        labels = 1 + np.arange(STL10_COUNTS[part]) * 7 % 10
        (folder / f"{part}_y.bin").write_bytes(labels.astype(np.uint8).tobytes())
    (folder / "class_names.txt").write_text("\n".join(STL10_NAMES) + "\n")
    (folder / "fold_indices.txt").write_text("0 1\n")
    return root
