"""A linear classifier of features, and which images it is trained and chosen on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vssl_dist.evaluation.scores.table import Accuracy, Features
from vssl_dist.models.linear_probe import Probe, Scaling

CHUNK = 8192
_COPIED_BYTES = 1 << 30


@dataclass(frozen=True)
class ProbeData:
    """Features and labels that probes are trained on: some rows of a table."""

    features: Features
    rows: Tensor
    """Numbers of the rows to train on, sorted."""
    classes: int
    device: str = "cpu"
    """Where products are computed; the features stay where they are."""

    def with_rows(self, rows: Tensor) -> ProbeData:
        """Choose other rows of the same table."""
        return ProbeData(self.features, rows, self.classes, self.device)

    def contiguous(self) -> ProbeData:
        """Copy the rows to where they follow one another, if they are small enough.

        Many passes over scattered rows cost more in copies than in products.
        """
        size = 4 * len(self.rows) * self.features.features.shape[1]
        if is_contiguous(self.rows) or size > _COPIED_BYTES:
            return self
        columns = zip(*blocks(self.features, self.rows), strict=True)
        copied = Features(*(torch.cat(column) for column in columns))
        return ProbeData(copied, torch.arange(len(self.rows)), self.classes, self.device)


def is_contiguous(rows: Tensor) -> bool:
    """Whether sorted rows follow one another, so that a slice has them all.

    >>> is_contiguous(torch.arange(5, 9)), is_contiguous(torch.tensor([1, 3]))
    (True, False)
    """
    return int(rows[-1] - rows[0]) == len(rows) - 1


def blocks(features: Features, rows: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield features and labels of some sorted rows (all, if None) a few thousand at a time.

    Half precision comes as float32; what is wider stays, and is not copied if the rows follow one
    another.
    """
    dtype = torch.promote_types(features.features.dtype, torch.float32)
    if rows is None or is_contiguous(rows):
        # A slice is a view: features that are mapped from a file are not copied.
        row_slice = slice(None) if rows is None else slice(int(rows[0]), int(rows[-1]) + 1)
        pairs = zip(*(torch.split(t[row_slice], CHUNK) for t in features), strict=True)
        yield from ((x.to(dtype), y) for x, y in pairs)
        return
    for index in torch.split(rows, CHUNK):
        yield features.features[index].to(dtype), features.labels[index]


def fit_scaling(features: Features, rows: Tensor) -> Scaling:
    """Compute mean and standard deviation of each feature over ``rows``, in float64."""
    count = len(rows)
    width = features.features.shape[1]
    total, squares = (torch.zeros(width, dtype=torch.float64) for _ in range(2))
    for x, _ in blocks(features, rows):
        total += x.double().sum(0)
    mean = total / count
    # A second pass: the mean of squares less the square of the mean loses digits.
    for x, _ in blocks(features, rows):
        squares += (x.double() - mean).square().sum(0)
    std = (squares / count).sqrt()
    # Rounding leaves a constant feature some spread; dividing by it would make noise of it.
    constant = std <= 1e-6 * mean.abs().clamp_min(torch.finfo(torch.float32).tiny)
    return Scaling(mean, torch.where(constant, 1.0, std))


def accuracy(probe: Probe, features: Features, rows: Tensor | None = None) -> Accuracy:
    """Compute top-1 and top-5 accuracy; of equal logits the lower class comes first.

    A probe that is not finite is never right.

    >>> two = Features(torch.eye(2), torch.arange(2))
    >>> accuracy(Probe(torch.eye(2), torch.zeros(2)), two)
    Accuracy(top1=1.0, top5=1.0)
    """
    hits = torch.zeros(2, dtype=torch.int64)
    total = 0
    for x, labels in blocks(features, rows):
        logits = probe.logits(x.to(probe.weight.device)).cpu()
        label_logit = logits.gather(1, labels[:, None])
        wins_ties = torch.arange(logits.shape[1]) < labels[:, None]
        rank = ((logits > label_logit) | ((logits == label_logit) & wins_ties)).sum(1)
        hits += torch.stack([(rank < 1).sum(), (rank < 5).sum()])
        total += len(labels)
    # Nothing is greater than NaN, so that a diverged probe would come out as always right.
    top1, top5 = (hits.double() / total * probe.is_finite).tolist()
    return Accuracy(top1, top5)


def subset(labels: Tensor, share: float, seed: int) -> Tensor:
    """Draw a share of each class's images, at least one of each: sorted row numbers.

    The same for the same labels, share and seed; a larger share contains a smaller one.

    >>> subset(torch.arange(4).repeat(50), 0.1, seed=0).shape
    torch.Size([20])
    """
    return _draw_rows(labels, torch.arange(len(labels)), share, seed, at_least=1)


def split(labels: Tensor, rows: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Divide ``rows`` into those to train on and those to choose on, class by class.

    A class with one image has it among the first; where all have, the second are none.
    """
    held_out = _draw_rows(labels, rows, share, seed, at_least=0)
    return rows[~torch.isin(rows, held_out)], held_out


def _draw_rows(labels: Tensor, rows: Tensor, share: float, seed: int, at_least: int) -> Tensor:
    generator = np.random.default_rng([seed, 0x6C696E])
    drawn = []
    row_labels = labels[rows].numpy()
    for label in np.unique(row_labels):
        members = rows.numpy()[row_labels == label]
        count = max(round(share * len(members)), at_least or int(len(members) > 1))
        # The whole class is permuted whatever the share: a larger share contains a smaller one.
        drawn.append(generator.permutation(members)[:count])
    return torch.from_numpy(np.sort(np.concatenate(drawn)))
