"""Figures to watch besides the loss: collapse shows in them first.

The curves of these figures are called ``train/...`` (`vssl_dist.curves`) and are explained in
docs/monitors.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

CHECK_EVERY = 25
"""Steps between two looks of the `CollapseAlarm`."""
_ROWS = 256
"""Rows at most that costly figures are computed on."""
_EVIDENCE = 16
"""Rows from which figures are evidence of a collapse."""


@torch.no_grad()
def embedding(h: Tensor) -> dict[str, float]:
    """Measure how embeddings ``(B, D)`` fill their space: too dear for every step."""
    shapes = {
        "embedding_spread": spread,
        "effective_rank": effective_rank,
        "embedding_uniformity": uniformity,
    }
    if not h.isfinite().all():  # a step that is skipped: its singular values do not exist
        return dict.fromkeys(shapes, math.nan)
    return {name: shape(h).item() for name, shape in shapes.items()}


class CollapseAlarm:
    """Goes on when the embeddings have collapsed, and off when they have recovered.

    Collapsed are embeddings that are nearly one point (spread below 0.1), that draw together and
    lie along few directions (spread below 0.3 and an effective rank below a fifth of what it could
    be), or whose projections, which is where the loss acts, are nearly one point (spread below
    0.2); and that in two looks on end.  Neither is a collapse alone: photographs in an untrained
    ResNet have a spread from 0.3 on and a high rank, in a trained one a spread of 0.6 and, where
    they are few, a rank of a tenth.

    >>> alarm = CollapseAlarm()
    >>> point = {"embedding_spread": 0.01, "effective_rank": 1.1}
    >>> [alarm.update(point, rows=64, width=128) for _ in range(3)], alarm.on
    ([False, True, False], True)
    """

    def __init__(self) -> None:
        self.on = False
        self._collapsed_before = False

    def update(
        self, values: Mapping[str, float], rows: int, width: int, rows_per_rank: int = _EVIDENCE
    ) -> bool:
        """Look at the metrics of a step; whether the alarm has just gone on.

        Args:
            values: `embedding` of all ranks, and ``projection_spread``, the mean of what each rank
                sees for itself, where a method has it.
            rows, width: Shape of the embeddings.  Fewer than 16 rows are no evidence of anything.
            rows_per_rank: Number of projections that a rank has by itself.
        """
        if rows_per_rank < _EVIDENCE:
            values = {key: value for key, value in values.items() if key != "projection_spread"}
        collapsed = rows >= _EVIDENCE and _collapsed(values, min(rows, width, _ROWS))
        # Two looks on end put it on; one without a collapse puts it off.
        was_on = self.on
        self.on = collapsed and (was_on or self._collapsed_before)
        self._collapsed_before = collapsed
        return self.on and not was_on


def _collapsed(values: Mapping[str, float], highest_rank: int) -> bool:
    spread, rank = values["embedding_spread"], values["effective_rank"]
    point = spread < 0.1 or values.get("projection_spread", 1.0) < 0.2
    return point or (spread < 0.3 and rank < 0.2 * highest_rank)


@torch.no_grad()
def spread(h: Tensor) -> Tensor:
    """``sqrt(D)`` times the mean standard deviation of unit embeddings ``(B, D)``.

    Near 1 for directions that fill the sphere, 0 for embeddings that are all the same.

    >>> spread(torch.ones(4, 3)).item()
    0.0
    """
    unit = F.normalize(h.detach().float(), dim=-1)
    return unit.std(0, correction=0).mean() * math.sqrt(h.shape[-1])


@torch.no_grad()
def effective_rank(h: Tensor) -> Tensor:
    """Effective rank (Roy & Vetterli, 2007) of unit embeddings ``(B, D)``.

    Exponential of the entropy of their singular values, as shares of the sum, on 256 evenly spaced
    rows; from 1 to ``min(B, D, 256)``.  Its curve is ``train/effective_rank``; that of held-out
    features less their mean is ``collapse/effective_rank_centred``.

    >>> round(effective_rank(torch.eye(5)).item(), 3)
    5.0
    """
    unit = F.normalize(_some_rows(h).float(), dim=-1)
    with torch.autocast(h.device.type, enabled=False):
        gram = unit @ unit.T if unit.shape[0] <= unit.shape[1] else unit.T @ unit
        squares = torch.linalg.eigvalsh(gram)
    # Rounding makes eigenvalues of zero small ones, and there are many of them.
    floor = squares[-1] * torch.finfo(squares.dtype).eps * len(squares)
    values = torch.where(squares > floor, squares, 0).sqrt()
    share = values / values.sum()
    entropy: Tensor = torch.special.entr(share).sum()
    return entropy.exp()


@torch.no_grad()
def uniformity(h: Tensor) -> Tensor:
    """Log of the mean of ``exp(-2 |x - y|^2)`` over pairs of unit embeddings ``(B, D)``.

    Wang & Isola (2020), on 256 evenly spaced rows: 0 at a point, towards -4 on a wide sphere.

    >>> round(uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).item(), 4)
    -8.0
    """
    squared = torch.pdist(F.normalize(_some_rows(h).float(), dim=-1)).square()
    return (-2 * squared).logsumexp(0) - math.log(max(len(squared), 1))


@torch.no_grad()
def views(h: Tensor, other: Tensor, teacher: Tensor | None = None) -> dict[str, Tensor]:
    """Measure how near embeddings ``(B, D)`` are that the method draws together.

    Args:
        h, other: Embeddings of two views of the same images; their mean squared distance as unit
            vectors is the alignment of Wang & Isola (2020), at best 0.
        teacher: The teacher's embedding of the first view, compared with ``h`` by its cosine.
    """
    distance = {"embedding_alignment": 2 - 2 * alignment_cos(h, other)}
    if teacher is None:
        return distance
    return distance | {"teacher_agreement": alignment_cos(h, teacher)}


@torch.no_grad()
def alignment_cos(a: Tensor, b: Tensor) -> Tensor:
    """Mean cosine similarity of the rows of ``(B, D)`` and ``(B, D)``.

    Curve ``train/alignment_cos`` is that of the two vectors of an image which the method draws
    together, so each method hands in others: VJE the posterior's mean of one view and the
    embedding of the other, SimCLR the projections of both.  1 where every pair points the same
    way, 0 where pairs have nothing in common.  It is not the alignment of Wang & Isola (2020), a
    squared distance of embeddings: that is ``train/embedding_alignment``, and
    ``collapse/alignment`` on held-out images.
    """
    return F.cosine_similarity(a.detach().float(), b.detach().float(), dim=-1).mean()


@torch.no_grad()
def scale(logvar: Tensor, name: str = "sigma") -> dict[str, Tensor]:
    """Mean and extremes of the standard deviations of ``(B, D)`` log-variances.

    Averaged over ranks and micro-steps, the extremes are those of a typical micro-batch.
    """
    sigma = (0.5 * logvar.detach()).exp()
    return {
        f"{name}_mean": sigma.mean(),
        f"{name}_min": sigma.amin(),
        f"{name}_max": sigma.amax(),
    }


def _some_rows(h: Tensor) -> Tensor:
    """At most 256 rows of ``(B, D)``, evenly spaced."""
    return h.detach()[:: max(len(h) // _ROWS, 1)][:_ROWS]
