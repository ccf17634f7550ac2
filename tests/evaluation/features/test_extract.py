"""A pass over images holds a few batches, however many images there are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.exports import NORMALISE
from tests.support.photos import tiny_dataset
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.evaluation.features.cache import FeatureCache
from vssl_dist.evaluation.features.extract import (
    ImageReading,
    extract_features,
    flatten_pixels,
)
from vssl_dist.evaluation.features.workers import ImagePass

FEW, MANY, SIDE = 400, 1600, 160
MIB_OF_PIXELS = (MANY - FEW) * 3 * SIDE * SIDE * 4 / 2**20
READING = ImageReading(SIDE, NORMALISE, batch_size=16, backend="reference", threads=1)


def narrow(images: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(images, 2).flatten(1)


def test_some_images_are_extracted_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    dataset = Dataset.open(tiny_dataset(tmp_path, samples=40))
    reading = ImageReading(32, NORMALISE, batch_size=7, backend="reference")
    all_features = extract_features(flatten_pixels, dataset, reading)
    ids = np.array([5, 39, 5, 0, 17, 3, 2, 1, 38])
    some = extract_features(flatten_pixels, dataset, reading, ids=ids)
    assert torch.equal(some.features, all_features.features[ids])
    assert torch.equal(some.labels, all_features.labels[ids])


def peak_mib() -> float:
    """The most memory that this process has held so far, of its own."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def growth(folder: Path) -> list[float]:
    """MiB by which the peak grows from FEW images to MANY: extracted, stored, and in a list."""
    dataset, growth_mib = Dataset.open(folder / "train"), []
    cache = FeatureCache(folder / "cache")

    def kept(count: int) -> None:
        image_pass = ImagePass(lambda: narrow, dataset, READING, count)
        cache.get_or_compute({"network": 1}, {"samples": count}, image_pass.feature_source(1))

    def listed(count: int) -> None:
        held.extend(batch.views[0] for batch in READING.read_batches(dataset, np.arange(count)))

    held: list[Tensor] = []
    passes = (lambda n: extract_features(narrow, dataset, READING, ids=np.arange(n)), kept, listed)
    for run_pass in passes:
        run_pass(FEW)
        before = peak_mib()
        run_pass(MANY)
        growth_mib.append(peak_mib() - before)
    return growth_mib


@pytest.mark.slow
def test_the_memory_of_a_pass_does_not_grow_with_the_images(tmp_path: Path) -> None:
    tiny_dataset(tmp_path, samples=MANY, shard_size=300)
    # In a process of its own, whose peak is that of nothing else.  Threads that allocate let it
    # grow somewhat at first, by much less than all pixels.
    program = (
        "from pathlib import Path; from tests.evaluation.features.test_extract import growth; "
        f"print(*growth(Path({str(tmp_path)!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"MALLOC_ARENA_MAX": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    extracted, stored, in_a_list = map(float, done.stdout.split())
    assert max(extracted, stored) < 0.35 * MIB_OF_PIXELS
    assert in_a_list > 0.8 * MIB_OF_PIXELS, "the measure sees a list of all pixels"
