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

_QUERIES_PER_SEARCH = 8192
_QUERIES_PER_TILE = 512
_LANE_COUNT = 16
_MIN_NORM = 1e-12


class NeighbourCandidates(NamedTuple):
    """Similarities ``(M, K)`` float32 and rows of the bank of the nearest so far, in any order."""

    similarity: Tensor
    bank_rows: Tensor


def find_neighbours(
    bank: Tensor, queries: Tensor, k: int, chunk_rows: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Find the ``k`` most similar rows of the bank, nearest first, equals by index.

    The bank is read in order, ``chunk_rows`` rows at a time, and once for up to 8,192 queries.

    Args:
        bank: ``(N, D)`` of any floating dtype, may be mapped into memory.
        queries: ``(M, D)``, alike.
        k: How many neighbours; at most ``N`` are returned.
        chunk_rows: Rows of the bank per product.
        device: Where to compute.

    Returns:
        Cosine similarities ``(M, min(k, N))`` float32 and indices int64, on ``device``.

    >>> find_neighbours(torch.eye(3), torch.eye(3)[:1], k=2, chunk_rows=2)
    (tensor([[1., 0.]]), tensor([[0, 1]]))
    """
    nearest_by_block = [
        _search_bank(bank, query_block, k, chunk_rows, device)
        for query_block in torch.split(queries, _QUERIES_PER_SEARCH)
    ]
    return torch.cat([candidates.similarity for candidates in nearest_by_block]), torch.cat(
        [candidates.bank_rows for candidates in nearest_by_block]
    )


def _search_bank(
    bank: Tensor, queries: Tensor, k: int, chunk_rows: int, device: torch.device | str
) -> NeighbourCandidates:
    # One buffer for all of the bank: as much again and again would be zeroed each time.
    unit_row_buffer = torch.empty(min(chunk_rows, len(bank)), bank.shape[1], device=device)
    query_blocks = torch.split(
        _unit_vectors(queries, torch.empty(queries.shape, device=device)), _QUERIES_PER_TILE
    )
    nearest: list[NeighbourCandidates | None] = [None] * len(query_blocks)
    for first_row in range(0, len(bank), chunk_rows):
        unit_bank_rows = _unit_vectors(bank[first_row : first_row + chunk_rows], unit_row_buffer)
        for index, block in enumerate(query_blocks):
            nearest[index] = _merge_tile(nearest[index], block @ unit_bank_rows.T, first_row, k)
    sorted_candidates = [
        _sort_nearest_first(candidates) for candidates in nearest if candidates is not None
    ]
    return NeighbourCandidates(
        *(torch.cat(column) for column in zip(*sorted_candidates, strict=True))
    )


def _unit_vectors(rows: Tensor, output_buffer: Tensor) -> Tensor:
    """Normalise rows to float32 unit vectors, in the first rows of ``output_buffer``."""
    unit_rows = output_buffer[: len(rows)].copy_(rows)
    # A zero vector stays zero, similar to nothing, instead of becoming NaN.
    return unit_rows.div_(unit_rows.norm(dim=1, keepdim=True).clamp_min_(_MIN_NORM))


def _merge_tile(
    nearest: NeighbourCandidates | None, tile: Tensor, first_row: int, k: int
) -> NeighbourCandidates:
    """Merge the nearest so far with a tile of similarities that begins at row ``first_row``."""
    threshold = _similarity_threshold(nearest, tile, k)
    if threshold is None:
        columns = torch.arange(tile.shape[1], device=tile.device).expand_as(tile)
        candidates = NeighbourCandidates(tile, columns)
    else:
        candidates = _pick_above_threshold(tile, threshold)
    candidates = NeighbourCandidates(candidates.similarity, candidates.bank_rows + first_row)
    if nearest is not None:
        pairs = zip(nearest, candidates, strict=True)
        candidates = NeighbourCandidates(*(torch.cat(pair, dim=1) for pair in pairs))
    return _keep_nearest(candidates, k)


def _similarity_threshold(
    nearest: NeighbourCandidates | None, similarity_tile: Tensor, k: int
) -> Tensor | None:
    """Similarity ``(M,)`` that an image of the tile must exceed to be among the ``k`` nearest."""
    if nearest is not None:
        # Images come in order: an equal one has the higher index and loses.
        return nearest.similarity.amin(1) if nearest.similarity.shape[1] == k else None
    lane_maxima = _view_as_lanes(similarity_tile).amax(1)
    if lane_maxima.shape[1] < k:
        return None
    # Each peak is an image: k of them are no worse than the k-th largest peak.
    kth_largest_maximum = lane_maxima.topk(k, dim=1, sorted=False)[0].amin(1)
    return kth_largest_maximum.nextafter(torch.full_like(kth_largest_maximum, -torch.inf))


def _view_as_lanes(similarity_tile: Tensor) -> Tensor:
    """View ``(M, C)`` as ``(M, 16, C / 16)``: its maxima over dimension 1 are cheap to take."""
    missing_columns = -similarity_tile.shape[1] % _LANE_COUNT
    if missing_columns:
        similarity_tile = F.pad(similarity_tile, (0, missing_columns), value=-torch.inf)
    return similarity_tile.view(len(similarity_tile), _LANE_COUNT, -1)


def _pick_above_threshold(similarity_tile: Tensor, threshold: Tensor) -> NeighbourCandidates:
    """Pick what exceeds its row's threshold; rows with fewer than others are padded with -inf."""
    lanes = _view_as_lanes(similarity_tile)
    # Groups of 16 whose maximum is too small, nearly all of them, are never looked into.
    rows, group_index = (lanes.amax(1) > threshold[:, None]).nonzero(as_tuple=True)
    group_similarities = lanes[rows, :, group_index]
    hit_index, lane_index = (group_similarities > threshold[rows, None]).nonzero(as_tuple=True)
    rows = rows[hit_index]
    columns = lane_index * lanes.shape[2] + group_index[hit_index]
    group_similarities = group_similarities[hit_index, lane_index]
    # Rows come in order: an entry's slot is its number less those of the rows before.
    counts = torch.bincount(rows, minlength=len(similarity_tile))
    row_slot = (
        torch.arange(len(rows), device=similarity_tile.device) - (counts.cumsum(0) - counts)[rows]
    )
    padded_shape = (len(similarity_tile), int(counts.max()))
    similarity = similarity_tile.new_full(padded_shape, -torch.inf)
    candidate_columns = torch.zeros(padded_shape, dtype=torch.int64, device=similarity_tile.device)
    similarity[rows, row_slot] = group_similarities
    candidate_columns[rows, row_slot] = columns
    return NeighbourCandidates(similarity, candidate_columns)


def _keep_nearest(candidates: NeighbourCandidates, k: int) -> NeighbourCandidates:
    """Keep the ``k`` largest of each row, of equals those of lower index."""
    if candidates.similarity.shape[1] <= k:
        return candidates
    similarity, top_slots = candidates.similarity.topk(k, dim=1, sorted=False)
    candidate_rows = candidates.bank_rows.gather(1, top_slots)
    # topk may take any of several values that equal the k-th one.
    has_ties = (candidates.similarity >= similarity.amin(1, keepdim=True)).sum(1) > k
    if has_ties.any():
        exactly_sorted = _sort_nearest_first(
            NeighbourCandidates(candidates.similarity[has_ties], candidates.bank_rows[has_ties])
        )
        similarity[has_ties] = exactly_sorted.similarity[:, :k]
        candidate_rows[has_ties] = exactly_sorted.bank_rows[:, :k]
    return NeighbourCandidates(similarity, candidate_rows)


def _sort_nearest_first(candidates: NeighbourCandidates) -> NeighbourCandidates:
    """Sort each row, the larger first, equals by index."""
    sorted_rows, order_by_row = candidates.bank_rows.sort(dim=1)
    similarity = candidates.similarity.gather(1, order_by_row)
    # Stable, so that the order of the indices decides among equals.
    order_by_similarity = similarity.argsort(dim=1, descending=True, stable=True)
    return NeighbourCandidates(
        similarity.gather(1, order_by_similarity), sorted_rows.gather(1, order_by_similarity)
    )
