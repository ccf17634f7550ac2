"""The most similar images, exactly, from a bank that need not fit into memory.

Products are made a tile at a time.  Of each tile only what beats a query's k-th best neighbour so
far is looked at: after the first few thousand images that is next to nothing, so the search costs
little more than the products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_QUERIES = 8192
_ROWS = 512
_LANES = 16
_TINY = 1e-12


class Candidates(NamedTuple):
    """Similarities ``(M, K)`` float32 and rows of the bank of the nearest so far, in any order."""

    similarity: Tensor
    rows: Tensor


def neighbours(
    bank: Tensor, queries: Tensor, k: int, chunk: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Find the ``k`` most similar rows of the bank, nearest first, equals by index.

    The bank is read in order, ``chunk`` rows at a time, and once for up to 8,192 queries.

    Args:
        bank: ``(N, D)`` of any floating dtype, may be mapped into memory.
        queries: ``(M, D)``, alike.
        k: How many neighbours; at most ``N`` are returned.
        chunk: Rows of the bank per product.
        device: Where to compute.

    Returns:
        Cosine similarities ``(M, min(k, N))`` float32 and indices int64, on ``device``.

    >>> neighbours(torch.eye(3), torch.eye(3)[:1], k=2, chunk=2)
    (tensor([[1., 0.]]), tensor([[0, 1]]))
    """
    nearest = [_search(bank, block, k, chunk, device) for block in torch.split(queries, _QUERIES)]
    return torch.cat([c.similarity for c in nearest]), torch.cat([c.rows for c in nearest])


def _search(
    bank: Tensor, queries: Tensor, k: int, chunk: int, device: torch.device | str
) -> Candidates:
    # One buffer for all of the bank: as much again and again would be zeroed each time.
    buffer = torch.empty(min(chunk, len(bank)), bank.shape[1], device=device)
    blocks = torch.split(_unit(queries, torch.empty(queries.shape, device=device)), _ROWS)
    nearest: list[Candidates | None] = [None] * len(blocks)
    for start in range(0, len(bank), chunk):
        rows = _unit(bank[start : start + chunk], buffer)
        for index, block in enumerate(blocks):
            nearest[index] = _merge_tile(nearest[index], block @ rows.T, start, k)
    ordered = [_ordered(candidates) for candidates in nearest if candidates is not None]
    return Candidates(*(torch.cat(column) for column in zip(*ordered, strict=True)))


def _unit(rows: Tensor, buffer: Tensor) -> Tensor:
    """Normalise rows to float32 unit vectors, in the first rows of ``buffer``."""
    unit = buffer[: len(rows)].copy_(rows)
    # A zero vector stays zero, similar to nothing, instead of becoming NaN.
    return unit.div_(unit.norm(dim=1, keepdim=True).clamp_min_(_TINY))


def _merge_tile(nearest: Candidates | None, tile: Tensor, start: int, k: int) -> Candidates:
    """Merge the nearest so far with a tile of similarities whose first column is row ``start``."""
    threshold = _threshold(nearest, tile, k)
    if threshold is None:
        columns = torch.arange(tile.shape[1], device=tile.device).expand_as(tile)
        candidates = Candidates(tile, columns)
    else:
        candidates = _above(tile, threshold)
    candidates = Candidates(candidates.similarity, candidates.rows + start)
    if nearest is not None:
        pairs = zip(nearest, candidates, strict=True)
        candidates = Candidates(*(torch.cat(pair, dim=1) for pair in pairs))
    return _best(candidates, k)


def _threshold(nearest: Candidates | None, tile: Tensor, k: int) -> Tensor | None:
    """Similarity ``(M,)`` that an image of the tile must exceed to be among the ``k`` nearest."""
    if nearest is not None:
        # Images come in order: an equal one has the higher index and loses.
        return nearest.similarity.amin(1) if nearest.similarity.shape[1] == k else None
    peaks = _lanes(tile).amax(1)
    if peaks.shape[1] < k:
        return None
    # Each peak is an image: k of them are no worse than the k-th largest peak.
    least = peaks.topk(k, dim=1, sorted=False)[0].amin(1)
    return least.nextafter(torch.full_like(least, -torch.inf))


def _lanes(tile: Tensor) -> Tensor:
    """View ``(M, C)`` as ``(M, 16, C / 16)``: its maxima over dimension 1 are cheap to take."""
    missing = -tile.shape[1] % _LANES
    if missing:
        tile = F.pad(tile, (0, missing), value=-torch.inf)
    return tile.view(len(tile), _LANES, -1)


def _above(tile: Tensor, threshold: Tensor) -> Candidates:
    """Pick what exceeds its row's threshold; rows with fewer than others are padded with -inf."""
    lanes = _lanes(tile)
    # Groups of 16 whose maximum is too small, nearly all of them, are never looked into.
    rows, group = (lanes.amax(1) > threshold[:, None]).nonzero(as_tuple=True)
    values = lanes[rows, :, group]
    hit, lane = (values > threshold[rows, None]).nonzero(as_tuple=True)
    rows = rows[hit]
    columns = lane * lanes.shape[2] + group[hit]
    values = values[hit, lane]
    # Rows come in order: an entry's slot is its number less those of the rows before.
    counts = torch.bincount(rows, minlength=len(tile))
    slot = torch.arange(len(rows), device=tile.device) - (counts.cumsum(0) - counts)[rows]
    shape = (len(tile), int(counts.max()))
    similarity = tile.new_full(shape, -torch.inf)
    index = torch.zeros(shape, dtype=torch.int64, device=tile.device)
    similarity[rows, slot] = values
    index[rows, slot] = columns
    return Candidates(similarity, index)


def _best(candidates: Candidates, k: int) -> Candidates:
    """Keep the ``k`` largest of each row, of equals those of lower index."""
    if candidates.similarity.shape[1] <= k:
        return candidates
    similarity, slot = candidates.similarity.topk(k, dim=1, sorted=False)
    index = candidates.rows.gather(1, slot)
    # topk may take any of several values that equal the k-th one.
    tied = (candidates.similarity >= similarity.amin(1, keepdim=True)).sum(1) > k
    if tied.any():
        exact = _ordered(Candidates(candidates.similarity[tied], candidates.rows[tied]))
        similarity[tied] = exact.similarity[:, :k]
        index[tied] = exact.rows[:, :k]
    return Candidates(similarity, index)


def _ordered(candidates: Candidates) -> Candidates:
    """Sort each row, the larger first, equals by index."""
    index, by_index = candidates.rows.sort(dim=1)
    similarity = candidates.similarity.gather(1, by_index)
    # Stable, so that the order of the indices decides among equals.
    order = similarity.argsort(dim=1, descending=True, stable=True)
    return Candidates(similarity.gather(1, order), index.gather(1, order))
