"""Features of frozen networks: an exported backbone, a random one, or no network at all."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vssl_dist.config import Normalisation
from vssl_dist.console.bars import progress_bar
from vssl_dist.data.damage.evaluation_log import SubstitutionTally
from vssl_dist.data.loader import BackendSpec, Batch
from vssl_dist.data.passes import evaluation_batches
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.errors import DataError
from vssl_dist.evaluation.scores.table import Features
from vssl_dist.models.backbones import build_backbone

Forward = Callable[[Tensor], Tensor]
"""``(B, 3, H, W)`` to ``(B, D)``, in eval mode."""
Rows = Generator[tuple[Tensor, Tensor], None, None]
"""Features ``(B, D)`` float32 on the CPU and labels ``(B,)`` int64, batch by batch."""
_FULL_PRECISION_BYTES = 2 << 30


@dataclass(frozen=True)
class Reading:
    """How the images of an evaluation are read: no augmentation, every image once."""

    image_size: int
    normalise: Normalisation
    batch: int = 256
    backend: str = "dali"
    threads: int = 2
    device: str = "cpu"
    autocast: torch.dtype | None = None
    """Precision of the network's products on a GPU, such as ``torch.bfloat16``."""
    timeout_s: float = 120.0
    """Seconds without an answer to one read after which storage counts as dead."""
    substitutes: SubstitutionTally = field(
        default_factory=SubstitutionTally, compare=False, repr=False
    )
    """Log of the damaged images that had to be replaced so far."""

    def batches(self, dataset: Dataset, ids: NDArray[np.int64]) -> Iterator[Batch]:
        """Batches of the images ``ids``, in that order; what is replaced in them is logged."""
        batches = evaluation_batches(
            dataset,
            self.spec(),
            backend=self.backend,
            batch=self.batch,
            ids=ids,
            timeout_s=self.timeout_s,
        )
        return self.counted(dataset, batches)

    def counted(self, dataset: Dataset, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass batches on and log what was replaced in them.

        Raises:
            DataError: Too many images of the split are damaged.
        """
        for batch in batches:
            self.substitutes.record(dataset, batch.substitutions)
            yield batch

    def spec(self) -> BackendSpec:
        """Settings of the decoding backend, without augmentation."""
        return BackendSpec((), self.image_size, self.normalise, self.threads, self.device)


def random_network(backbone: str, image_size: int, seed: int = 0) -> nn.Module:
    """Build a backbone with the initial weights of a seed, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network, _ = build_backbone(backbone, image_size)
    return network.eval()


def raw_pixels(images: Tensor) -> Tensor:
    """Flatten normalised images ``(B, 3, H, W)`` to features ``(B, 3 * H * W)``."""
    return images.flatten(1)


def extract(
    network: Forward,
    dataset: Dataset,
    reading: Reading,
    *,
    ids: NDArray[np.int64] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Compute features of images, in the order of their ids.

    A bar is drawn when standard error is a terminal.

    Args:
        network: ``(B, 3, H, W)`` to ``(B, D)``, already in eval mode; a module is moved to
            ``reading.device``.
        dataset: Where the images are.
        reading: How they are read.
        ids: Which images, in this order; None means all.
        progress: Called with the images done and in all.

    Returns:
        float32, or float16 beyond 2 GiB, on the CPU.

    Raises:
        DataError: The features would not fit into memory, or too many images are damaged.
    """
    ids = np.arange(dataset.samples) if ids is None else ids
    rows = stream(network, dataset, reading, ids)
    rows = with_progress_bar(rows, f"features of {dataset.folder.name}", len(ids))
    return collect(rows, len(ids), progress)


def collect(rows: Rows, total: int, progress: Callable[[int, int], None] | None = None) -> Features:
    """Gather streamed rows in memory, as `extract` returns them.

    Args:
        rows: Features and labels.
        total: How many they are.
        progress: Called with the rows done and in all.

    Raises:
        DataError: They would not fit.
        RuntimeError: They are not so many.
    """
    features = torch.empty(0)
    labels = torch.empty(total, dtype=torch.int64)
    done = 0
    for batch, batch_labels in rows:
        # The width is known from the first batch on; one allocation spares a copy of everything.
        if not len(features):
            features = _allocate(total, batch.shape[1])
        features[done : done + len(batch)] = batch
        labels[done : done + len(batch)] = batch_labels
        done += len(batch)
        if progress is not None:
            progress(done, total)
    if done != total:
        raise RuntimeError(f"{done} of {total} features were computed")
    return Features(features, labels)


def stream(network: Forward, dataset: Dataset, reading: Reading, ids: NDArray[np.int64]) -> Rows:
    """Yield features and labels of images, in the order of ``ids``; see `extract`."""
    if isinstance(network, nn.Module):
        network.to(reading.device)
    for batch in reading.batches(dataset, ids):
        yield forward(network, batch.views[0], reading), batch.labels.cpu()


def with_progress_bar(rows: Rows, title: str, total: int) -> Rows:
    """Pass rows on, with a progress bar."""
    with progress_bar() as progress:
        bar = progress.add_task(title, total=total)
        for features, labels in rows:
            yield features, labels
            progress.update(bar, advance=len(labels))


def forward(network: Forward, images: Tensor, reading: Reading) -> Tensor:
    """Run normalised images ``(B, 3, H, W)`` to features ``(B, D)``, float32 on the CPU."""
    device_type = torch.device(reading.device).type
    is_mixed = reading.autocast is not None
    with (
        torch.inference_mode(),
        torch.autocast(device_type, dtype=reading.autocast, enabled=is_mixed),
    ):
        return network(images).float().cpu()


def feature_dtype(samples: int, width: int) -> torch.dtype:
    """Choose float32, or float16 for a table that would be larger than 2 GiB."""
    is_large = samples * width * 4 > _FULL_PRECISION_BYTES
    return torch.float16 if is_large else torch.float32


def _allocate(samples: int, width: int) -> Tensor:
    dtype = feature_dtype(samples, width)
    needed = samples * width * dtype.itemsize
    free = psutil.virtual_memory().available
    if needed > free:
        raise DataError(
            f"{samples} features of width {width} need {needed / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} are free: set max_bank"
        )
    return torch.empty(samples, width, dtype=dtype)
