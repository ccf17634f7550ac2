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

_HELD = 8192
_ROWS = 512
_LANES = 16
_TINY = 1e-12


class Near(NamedTuple):
    """Similarities ``(M, K)`` float32 and rows of the bank of the nearest so far, in any order."""

    similarity: Tensor
    rows: Tensor


def neighbours(
    bank: Tensor, queries: Tensor, k: int, chunk: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """The ``k`` most similar rows of the bank, nearest first, equals by index.

    The bank is read in order, ``chunk`` rows at a time, and once for up to 8,192 queries.

    Args:
        bank: ``(N, D)`` of any floating dtype, may be mapped into memory.
        queries: ``(M, D)``, alike.
        k: At most ``N`` are returned.
        chunk: Rows of the bank per product.
        device: Where to compute.

    Returns:
        Cosine similarities ``(M, min(k, N))`` float32 and indices int64, on ``device``.

    >>> neighbours(torch.eye(3), torch.eye(3)[:1], k=2, chunk=2)
    (tensor([[1., 0.]]), tensor([[0, 1]]))
    """
    found = [_search(bank, some, k, chunk, device) for some in torch.split(queries, _HELD)]
    return torch.cat([near.similarity for near in found]), torch.cat([near.rows for near in found])


def _search(bank: Tensor, queries: Tensor, k: int, chunk: int, device: torch.device | str) -> Near:
    # One buffer for all of the bank: as much again and again would be zeroed each time.
    held = torch.empty(min(chunk, len(bank)), bank.shape[1], device=device)
    blocks = torch.split(_unit(queries, torch.empty(queries.shape, device=device)), _ROWS)
    found: list[Near | None] = [None] * len(blocks)
    for start in range(0, len(bank), chunk):
        rows = _unit(bank[start : start + chunk], held)
        for number, block in enumerate(blocks):
            found[number] = _nearer(found[number], block @ rows.T, start, k)
    ordered = [_ordered(near) for near in found if near is not None]
    return Near(*(torch.cat(column) for column in zip(*ordered, strict=True)))


def _unit(rows: Tensor, held: Tensor) -> Tensor:
    """The rows as float32 unit vectors, in the first rows of ``held``."""
    unit = held[: len(rows)].copy_(rows)
    return unit.div_(unit.norm(dim=1, keepdim=True).clamp_min_(_TINY))


def _nearer(held: Near | None, tile: Tensor, start: int, k: int) -> Near:
    """The ``k`` nearest of those held and of a tile whose first column is image ``start``."""
    bar = _bar(held, tile, k)
    if bar is None:
        columns = torch.arange(tile.shape[1], device=tile.device).expand_as(tile)
        new = Near(tile, columns)
    else:
        new = _above(tile, bar)
    new = Near(new.similarity, new.rows + start)
    if held is not None:
        new = Near(*(torch.cat(pair, dim=1) for pair in zip(held, new, strict=True)))
    return _best(new, k)


def _bar(held: Near | None, tile: Tensor, k: int) -> Tensor | None:
    """What an image of the tile must exceed to be among the ``k`` nearest, ``(M,)``."""
    if held is not None:
        # Images come in order: an equal one has the higher index and loses.
        return held.similarity.amin(1) if held.similarity.shape[1] == k else None
    peaks = _lanes(tile).amax(1)
    if peaks.shape[1] < k:
        return None
    # Each peak is an image: k of them are no worse than the k-th largest peak.
    least = peaks.topk(k, dim=1, sorted=False)[0].amin(1)
    return least.nextafter(torch.full_like(least, -torch.inf))


def _lanes(tile: Tensor) -> Tensor:
    """``(M, C)`` as ``(M, 16, C / 16)``: its maxima over dimension 1 are cheap to take."""
    missing = -tile.shape[1] % _LANES
    if missing:
        tile = F.pad(tile, (0, missing), value=-torch.inf)
    return tile.view(len(tile), _LANES, -1)


def _above(tile: Tensor, bar: Tensor) -> Near:
    """What exceeds its row's bar; rows with fewer than others are filled up with -inf."""
    lanes = _lanes(tile)
    rows, group = (lanes.amax(1) > bar[:, None]).nonzero(as_tuple=True)
    values = lanes[rows, :, group]
    hit, lane = (values > bar[rows, None]).nonzero(as_tuple=True)
    rows, columns, values = rows[hit], lane * lanes.shape[2] + group[hit], values[hit, lane]
    counts = torch.bincount(rows, minlength=len(tile))
    place = torch.arange(len(rows), device=tile.device) - (counts.cumsum(0) - counts)[rows]
    shape = len(tile), int(counts.max())
    similarity = tile.new_full(shape, -torch.inf)
    index = torch.zeros(shape, dtype=torch.int64, device=tile.device)
    similarity[rows, place], index[rows, place] = values, columns
    return Near(similarity, index)


def _best(near: Near, k: int) -> Near:
    """The ``k`` largest of each row, of equals those of lower index."""
    if near.similarity.shape[1] <= k:
        return near
    similarity, place = near.similarity.topk(k, dim=1, sorted=False)
    index = near.rows.gather(1, place)
    # topk may take any of several values that equal the k-th one.
    tied = (near.similarity >= similarity.amin(1, keepdim=True)).sum(1) > k
    if tied.any():
        exact = _ordered(Near(near.similarity[tied], near.rows[tied]))
        similarity[tied], index[tied] = exact.similarity[:, :k], exact.rows[:, :k]
    return Near(similarity, index)


def _ordered(near: Near) -> Near:
    """Larger first, equals by index."""
    index, by_index = near.rows.sort(dim=1)
    similarity = near.similarity.gather(1, by_index)
    order = similarity.argsort(dim=1, descending=True, stable=True)
    return Near(similarity.gather(1, order), index.gather(1, order))
