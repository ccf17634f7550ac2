"""A linear classifier of features, and which images it is trained and chosen on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vssl_dist.evaluation.scores.table import LabelledFeatures, TopAccuracy
from vssl_dist.models.linear_probe import Probe, Scaling

ROWS_PER_BLOCK = 8192
_MAX_COPIED_BYTES = 1 << 30


@dataclass(frozen=True)
class ProbeData:
    """Features and labels that probes are trained on: some rows of a table."""

    features: LabelledFeatures
    row_numbers: Tensor
    """Numbers of the rows to train on, sorted."""
    num_classes: int
    device: str = "cpu"
    """Where products are computed; the features stay where they are."""

    def with_rows(self, rows: Tensor) -> ProbeData:
        """Choose other rows of the same table."""
        return ProbeData(self.features, rows, self.num_classes, self.device)

    def with_contiguous_rows(self) -> ProbeData:
        """Copy the rows to where they follow one another, if they are small enough.

        Many passes over scattered rows cost more in copies than in products.
        """
        float32_bytes = 4 * len(self.row_numbers) * self.features.features.shape[1]
        if is_contiguous_range(self.row_numbers) or float32_bytes > _MAX_COPIED_BYTES:
            return self
        blocks_by_table = zip(*iterate_blocks(self.features, self.row_numbers), strict=True)
        copied_features = LabelledFeatures(
            *(torch.cat(table_blocks) for table_blocks in blocks_by_table)
        )
        return ProbeData(
            copied_features, torch.arange(len(self.row_numbers)), self.num_classes, self.device
        )


def is_contiguous_range(rows: Tensor) -> bool:
    """Whether sorted rows follow one another, so that a slice has them all.

    >>> rows = torch.tensor([5, 6, 7, 9])
    >>> is_contiguous_range(rows[:3]), is_contiguous_range(rows)
    (True, False)
    """
    return int(rows[-1] - rows[0]) == len(rows) - 1


def iterate_blocks(
    features: LabelledFeatures, rows: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield features and labels of some sorted rows (all, if None) a few thousand at a time.

    Half precision comes as float32; what is wider stays, and is not copied if the rows follow one
    another.
    """
    dtype = torch.promote_types(features.features.dtype, torch.float32)
    if rows is None or is_contiguous_range(rows):
        # A slice is a view: features that are mapped from a file are not copied.
        row_slice = slice(None) if rows is None else slice(int(rows[0]), int(rows[-1]) + 1)
        pairs = zip(
            *(torch.split(table[row_slice], ROWS_PER_BLOCK) for table in features), strict=True
        )
        yield from ((x.to(dtype), y) for x, y in pairs)
        return
    for block_rows in torch.split(rows, ROWS_PER_BLOCK):
        yield features.features[block_rows].to(dtype), features.labels[block_rows]


def compute_scaling(features: LabelledFeatures, rows: Tensor) -> Scaling:
    """Compute mean and standard deviation of each feature over ``rows``, in float64."""
    row_count = len(rows)
    width = features.features.shape[1]
    feature_sums, squared_deviations = (torch.zeros(width, dtype=torch.float64) for _ in range(2))
    for x, _ in iterate_blocks(features, rows):
        feature_sums += x.double().sum(0)
    mean = feature_sums / row_count
    # A second pass: the mean of squares less the square of the mean loses digits.
    for x, _ in iterate_blocks(features, rows):
        squared_deviations += (x.double() - mean).square().sum(0)
    std = (squared_deviations / row_count).sqrt()
    # Rounding leaves a constant feature some spread; dividing by it would make noise of it.
    is_constant = std <= 1e-6 * mean.abs().clamp_min(torch.finfo(torch.float32).tiny)
    return Scaling(mean, torch.where(is_constant, 1.0, std))


def probe_accuracy(
    probe: Probe, features: LabelledFeatures, rows: Tensor | None = None
) -> TopAccuracy:
    """Compute top-1 and top-5 accuracy; of equal logits the lower class comes first.

    A probe that is not finite is never right.

    >>> two = LabelledFeatures(torch.eye(2), torch.arange(2))
    >>> probe_accuracy(Probe(torch.eye(2), torch.zeros(2)), two)
    TopAccuracy(top1=1.0, top5=1.0)
    """
    hit_counts = torch.zeros(2, dtype=torch.int64)
    image_count = 0
    for x, labels in iterate_blocks(features, rows):
        logits = probe.logits(x.to(probe.weight.device)).cpu()
        label_logit = logits.gather(1, labels[:, None])
        wins_ties = torch.arange(logits.shape[1]) < labels[:, None]
        label_rank = ((logits > label_logit) | ((logits == label_logit) & wins_ties)).sum(1)
        hit_counts += torch.stack([(label_rank < 1).sum(), (label_rank < 5).sum()])
        image_count += len(labels)
    # Nothing is greater than NaN, so that a diverged probe would come out as always right.
    top1, top5 = (hit_counts.double() / image_count * probe.is_finite).tolist()
    return TopAccuracy(top1, top5)


def draw_class_share(labels: Tensor, share: float, seed: int) -> Tensor:
    """Draw a share of each class's images, at least one of each: sorted row numbers.

    The same for the same labels, share and seed; a larger share contains a smaller one.

    >>> draw_class_share(torch.arange(4).repeat(50), 0.1, seed=0).shape
    torch.Size([20])
    """
    return _draw_rows(labels, torch.arange(len(labels)), share, seed, min_per_class=1)


def split_by_class(labels: Tensor, rows: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Divide ``rows`` into those to train on and those to choose on, class by class.

    A class with one image has it among the first; where all have, the second are none.
    """
    held_out = _draw_rows(labels, rows, share, seed, min_per_class=0)
    return rows[~torch.isin(rows, held_out)], held_out


def _draw_rows(labels: Tensor, rows: Tensor, share: float, seed: int, min_per_class: int) -> Tensor:
    generator = np.random.default_rng([seed, 0x6C696E])
    drawn_by_class = []
    row_labels = labels[rows].numpy()
    for label in np.unique(row_labels):
        class_rows = rows.numpy()[row_labels == label]
        drawn_count = max(round(share * len(class_rows)), min_per_class or int(len(class_rows) > 1))
        # The whole class is permuted whatever the share: a larger share contains a smaller one.
        drawn_by_class.append(generator.permutation(class_rows)[:drawn_count])
    return torch.from_numpy(np.sort(np.concatenate(drawn_by_class)))
