"""What to watch besides the loss: collapse shows here first."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_RANK_ROWS = 256


@torch.no_grad()
def embedding(h: Tensor) -> dict[str, float]:
    """Spread and effective rank of embeddings ``(B, D)``: too dear for every step."""
    return {"embedding_spread": spread(h).item(), "effective_rank": effective_rank(h).item()}


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
    """Exponential of the entropy of the singular values of unit embeddings ``(B, D)``.

    After RankMe (Garrido et al., 2023), on 256 evenly spaced rows; from 1 to ``min(B, D, 256)``.

    >>> round(effective_rank(torch.eye(5)).item(), 3)
    5.0
    """
    rows = h.detach()[:: max(len(h) // _RANK_ROWS, 1)][:_RANK_ROWS]
    unit = F.normalize(rows.float(), dim=-1)
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
def alignment(a: Tensor, b: Tensor) -> Tensor:
    """Mean cosine similarity of the rows of ``(B, D)`` and ``(B, D)``."""
    return F.cosine_similarity(a.detach().float(), b.detach().float(), dim=-1).mean()


@torch.no_grad()
def scale(logvar: Tensor) -> dict[str, Tensor]:
    """Mean and extremes of the standard deviations of ``(B, D)`` log-variances.

    Averaged over ranks and micro-steps, the extremes are those of a typical micro-batch.
    """
    sigma = (0.5 * logvar.detach()).exp()
    return {
        "sigma_mean": sigma.mean(),
        "sigma_min": sigma.amin(),
        "sigma_max": sigma.amax(),
    }
