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
from vssl_dist.console.bars import make_progress_bar
from vssl_dist.data.damage.evaluation_log import SubstitutionTally
from vssl_dist.data.loader import BackendSpec, Batch
from vssl_dist.data.passes import evaluation_batches
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.errors import DataError
from vssl_dist.evaluation.scores.table import LabelledFeatures
from vssl_dist.models.backbones import build_backbone

FeatureFunction = Callable[[Tensor], Tensor]
"""A network in eval mode: images ``(B, 3, H, W)`` to features ``(B, D)``."""
FeatureBatches = Generator[tuple[Tensor, Tensor], None, None]
"""Features ``(B, D)`` float32 on the CPU and labels ``(B,)`` int64, batch by batch."""
_MAX_FLOAT32_TABLE_BYTES = 2 << 30


@dataclass(frozen=True)
class ImageReading:
    """How the images of an evaluation are read: no augmentation, every image once."""

    image_size: int
    normalise: Normalisation
    batch_size: int = 256
    backend: str = "dali"
    threads: int = 2
    device: str = "cpu"
    autocast: torch.dtype | None = None
    """Precision of the network's products on a GPU, such as ``torch.bfloat16``."""
    timeout_s: float = 120.0
    """Seconds without an answer to one read after which storage counts as dead."""
    substitution_tally: SubstitutionTally = field(
        default_factory=SubstitutionTally, compare=False, repr=False
    )
    """Log of the damaged images that had to be replaced so far."""

    def read_batches(self, dataset: Dataset, ids: NDArray[np.int64]) -> Iterator[Batch]:
        """Batches of the images ``ids``, in that order; what is replaced in them is logged."""
        batches = evaluation_batches(
            dataset,
            self.backend_spec(),
            backend=self.backend,
            batch=self.batch_size,
            ids=ids,
            timeout_s=self.timeout_s,
        )
        return self.log_substitutions(dataset, batches)

    def log_substitutions(self, dataset: Dataset, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass batches on and log what was replaced in them.

        Raises:
            DataError: Too many images of the split are damaged.
        """
        for batch in batches:
            self.substitution_tally.record(dataset, batch.substitutions)
            yield batch

    def backend_spec(self) -> BackendSpec:
        """Settings of the decoding backend, without augmentation."""
        return BackendSpec((), self.image_size, self.normalise, self.threads, self.device)


def build_random_network(backbone: str, image_size: int, seed: int = 0) -> nn.Module:
    """Build a backbone with the initial weights of a seed, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network, _ = build_backbone(backbone, image_size)
    return network.eval()


def flatten_pixels(images: Tensor) -> Tensor:
    """Flatten normalised images ``(B, 3, H, W)`` to features ``(B, 3 * H * W)``."""
    return images.flatten(1)


def extract_features(
    network: FeatureFunction,
    dataset: Dataset,
    reading: ImageReading,
    *,
    ids: NDArray[np.int64] | None = None,
    report_progress: Callable[[int, int], None] | None = None,
) -> LabelledFeatures:
    """Compute features of images, in the order of their ids.

    A bar is drawn when standard error is a terminal.

    Args:
        network: ``(B, 3, H, W)`` to ``(B, D)``, already in eval mode; a module is moved to
            ``reading.device``.
        dataset: Where the images are.
        reading: How they are read.
        ids: Which images, in this order; None means all.
        report_progress: Called with the images done and in all.

    Returns:
        float32, or float16 beyond 2 GiB, on the CPU.

    Raises:
        DataError: The features would not fit into memory, or too many images are damaged.
    """
    ids = np.arange(dataset.samples) if ids is None else ids
    feature_batches = stream_features(network, dataset, reading, ids)
    feature_batches = with_progress_bar(
        feature_batches, f"features of {dataset.folder.name}", len(ids)
    )
    return collect_features(feature_batches, len(ids), report_progress)


def collect_features(
    feature_batches: FeatureBatches,
    row_count: int,
    report_progress: Callable[[int, int], None] | None = None,
) -> LabelledFeatures:
    """Gather streamed rows in memory, as `extract_features` returns them.

    Args:
        feature_batches: Features and labels.
        row_count: How many they are.
        report_progress: Called with the rows done and in all.

    Raises:
        DataError: They would not fit.
        RuntimeError: They are not so many.
    """
    features = torch.empty(0)
    labels = torch.empty(row_count, dtype=torch.int64)
    rows_done = 0
    for feature_batch, batch_labels in feature_batches:
        # The width is known from the first batch on; one allocation spares a copy of everything.
        if not len(features):
            features = _allocate_features(row_count, feature_batch.shape[1])
        features[rows_done : rows_done + len(feature_batch)] = feature_batch
        labels[rows_done : rows_done + len(feature_batch)] = batch_labels
        rows_done += len(feature_batch)
        if report_progress is not None:
            report_progress(rows_done, row_count)
    if rows_done != row_count:
        raise RuntimeError(f"{rows_done} of {row_count} features were computed")
    return LabelledFeatures(features, labels)


def stream_features(
    network: FeatureFunction, dataset: Dataset, reading: ImageReading, ids: NDArray[np.int64]
) -> FeatureBatches:
    """Yield features and labels of images, in the order of ``ids``; see `extract_features`."""
    if isinstance(network, nn.Module):
        network.to(reading.device)
    for batch in reading.read_batches(dataset, ids):
        yield compute_features(network, batch.views[0], reading), batch.labels.cpu()


def with_progress_bar(
    feature_batches: FeatureBatches, title: str, row_count: int
) -> FeatureBatches:
    """Pass rows on, with a progress bar."""
    with make_progress_bar() as progress:
        bar_id = progress.add_task(title, total=row_count)
        for features, labels in feature_batches:
            yield features, labels
            progress.update(bar_id, advance=len(labels))


def compute_features(network: FeatureFunction, images: Tensor, reading: ImageReading) -> Tensor:
    """Run normalised images ``(B, 3, H, W)`` to features ``(B, D)``, float32 on the CPU."""
    device_type = torch.device(reading.device).type
    uses_autocast = reading.autocast is not None
    with (
        torch.inference_mode(),
        torch.autocast(device_type, dtype=reading.autocast, enabled=uses_autocast),
    ):
        return network(images).float().cpu()


def choose_feature_dtype(samples: int, width: int) -> torch.dtype:
    """Choose float32, or float16 for a table that would be larger than 2 GiB."""
    exceeds_float32_limit = samples * width * 4 > _MAX_FLOAT32_TABLE_BYTES
    return torch.float16 if exceeds_float32_limit else torch.float32


def _allocate_features(samples: int, width: int) -> Tensor:
    dtype = choose_feature_dtype(samples, width)
    needed_bytes = samples * width * dtype.itemsize
    free_bytes = psutil.virtual_memory().available
    if needed_bytes > free_bytes:
        raise DataError(
            f"{samples} features of width {width} need {needed_bytes / 2**30:.1f} GiB, "
            f"{free_bytes / 2**30:.1f} are free: set max_bank"
        )
    return torch.empty(samples, width, dtype=dtype)
