"""Small shards to damage, loaders of them, and the tools to do it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray

from vssl_dist.config import DataConfig, OptimConfig, RunConfig, ViewRecipe
from vssl_dist.data.loader import Batch, Loader, build_loader
from vssl_dist.data.store import shardfile
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.errors import DataError
from vssl_dist.methods import CONFIGS

SAMPLES, SHARD = 61, 13
BACKENDS = ["dali", "reference"]


def config(folder: Path, backend: str = "dali", *, timeout_s: float = 120.0) -> RunConfig:
    data = DataConfig(
        train=folder,
        backend=backend,
        image_size=32,
        views=(ViewRecipe(), ViewRecipe(blur=0.5)),
        streams=4,
        window=5,
        threads=1,
        timeout_s=timeout_s,
    )
    optim = OptimConfig(base_lr=0.1, global_batch=16)
    method = CONFIGS["byol"](name="byol")
    return RunConfig(name="run", out=folder.parent, method=method, data=data, optim=optim)


def loader(cfg: RunConfig, rank: int = 0, world_size: int = 1) -> Loader:
    return build_loader(cfg, rank=rank, world_size=world_size, device="cpu")


def take(source: Loader, count: int) -> list[Batch]:
    with contextlib.closing(source):
        return list(islice(source, count))


def joined(batches: Sequence[Batch]) -> tuple[list[int], list[int], torch.Tensor]:
    """Ids, labels and the pixels of all views."""
    pixels = torch.cat([torch.stack(b.views, 1) for b in batches])
    ids = [int(i) for b in batches for i in b.ids]
    return ids, [int(i) for b in batches for i in b.labels], pixels


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def place(folder: Path, sample: int) -> tuple[Path, int, int]:
    """Tar, offset and size of a sample's image."""
    dataset = Dataset.open(folder)
    number, _ = dataset.locate(np.array([sample]))
    row = dataset.rows(np.array([sample]))[0]
    name = dataset.manifest.shards[int(number[0])].name
    return folder / name, int(row["offset"]), int(row["size"])


@contextlib.contextmanager
def stalled(name: str, at: str = "stat") -> Iterator[None]:
    """Within, storage does not answer a stat, or a read, of files whose name ends so."""
    release, stat, preadv = threading.Event(), Path.stat, os.preadv

    def stuck(self: Path, **options: bool) -> os.stat_result:
        if at == "stat" and self.name.endswith(name):
            release.wait(60)
        return stat(self, **options)

    def stuck_reading(file: int, buffers: Sequence[memoryview], offset: int) -> int:
        if at == "read" and Path(f"/proc/self/fd/{file}").readlink().name.endswith(name):
            release.wait(60)
        return preadv(file, buffers, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "stat", stuck)
        patch.setattr(shardfile.os, "preadv", stuck_reading)
        try:
            yield
        finally:
            release.set()


def one_line(error: pytest.ExceptionInfo[DataError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def alone(program: str) -> subprocess.CompletedProcess[str]:
    """What became of a Python program in a process of its own, started in the repository root."""
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@contextlib.contextmanager
def memory_left(count: int) -> Iterator[None]:
    """Let this process have so many bytes more of memory."""
    gc.collect()  # what is freed later would be more
    ctypes.CDLL(None).malloc_trim(0)  # so would be what the allocator still holds
    holes = _fill_holes()
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = psutil.Process().memory_info().vms + count
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        del holes


def _fill_holes() -> list[NDArray[np.uint8]]:
    """Take what earlier tests have left free within the heap, which no limit counts again."""
    process, holes = psutil.Process(), []
    while True:
        before = process.memory_info().vms
        block = np.empty(8 << 20, np.uint8)
        if process.memory_info().vms > before:
            return holes
        holes.append(block)
