"""Weighted k-NN classification of frozen features (Wu et al., 2018, as DINO evaluates it).

A query's ``k`` most similar bank images vote for their class with weight
``exp(cosine similarity / temperature)``.  Published figures differ in ``k`` and temperature, so
the whole grid is computed; it costs one search.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Features(NamedTuple):
    """What a network makes of ``N`` images, in the order of their ids.

    ``features`` is ``(N, D)`` of any floating dtype, ``labels`` is ``(N,)`` int64 and counts
    from 0; both on the CPU.
    """

    features: Tensor
    labels: Tensor


class Accuracy(NamedTuple):
    """Shares of the queries whose class had the most votes, or was among the first five."""

    top1: float
    top5: float


def knn_grid(
    bank: Features,
    queries: Features,
    ks: Sequence[int],
    temperatures: Sequence[float],
    *,
    chunk: tuple[int, int] = (512, 8192),
    device: torch.device | str = "cpu",
) -> dict[tuple[int, float], Accuracy]:
    """Accuracy for every ``k`` and temperature, from one search of the neighbours.

    Memory is bounded by ``chunk``, not by the sizes.  Of equally similar bank images the one
    with the lower index is nearer, of classes with equal votes the lower one wins; a class
    without a vote is never right.  A ``k`` beyond the size of the bank means all of the bank.

    Args:
        bank: ``N`` labelled images, ``(N, D)``; need not be normalised.
        queries: ``M`` images to classify, ``(M, D)``; their labels may be unknown to the bank.
        ks: Numbers of neighbours.
        temperatures: Of the votes' weights.
        chunk: How many queries meet how many bank images at a time, some 10 bytes a pair; the
            result does not depend on it beyond rounding.
        device: Where the products are computed.

    Raises:
        ValueError: Nothing to compare, widths that differ, or features that are not finite.

    >>> four = Features(torch.eye(4), torch.arange(4))
    >>> knn_grid(four, four, ks=[1], temperatures=[0.07])
    {(1, 0.07): Accuracy(top1=1.0, top5=1.0)}
    """
    _check(bank, queries, ks, temperatures)
    grid = [(k, temperature) for temperature in temperatures for k in sorted(set(ks))]
    hits = {point: torch.zeros(2, dtype=torch.int64) for point in grid}
    classes = int(torch.cat([bank.labels, queries.labels]).max()) + 1
    for block, labels in zip(*(torch.split(t, chunk[0]) for t in queries), strict=True):
        similarity, index = neighbours(bank.features, block, max(ks), chunk[1], device)
        voters = bank.labels.to(device)[index]
        for temperature in temperatures:
            # Relative to the nearest one: the same winner, and no overflow when it is cold.
            weights = ((similarity - similarity[:, :1]).double() / temperature).exp()
            ranks = _ranks(weights, voters, labels.to(device), sorted(set(ks)), classes)
            for k, rank in ranks.items():
                right = torch.stack([(rank < 1).sum(), (rank < 5).sum()])
                hits[k, temperature] += right.cpu()
    total = len(queries.labels)
    return {
        (k, t): Accuracy(*(hits[k, t].double() / total).tolist()) for k in ks for t in temperatures
    }


def neighbours(
    bank: Tensor, queries: Tensor, k: int, chunk: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """The ``k`` most similar rows of the bank, nearest first, equals by index.

    Args:
        bank: ``(N, D)``, read ``chunk`` rows at a time.
        queries: ``(M, D)``.
        k: At most ``N`` are returned.
        chunk: Rows of the bank per product.
        device: Where to compute.

    Returns:
        Cosine similarities ``(M, min(k, N))`` float32 and indices int64, on ``device``.
    """
    unit = _unit(queries, device)
    best = torch.empty(len(queries), 0, device=device)
    index = torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    for start in range(0, len(bank), chunk):
        found = unit @ _unit(bank[start : start + chunk], device).T
        value, place = _top(found, k)
        # Candidates of earlier chunks come first, so places still rise among equals.
        value, place = torch.cat([best, value], 1), torch.cat([index, place + start], 1)
        order = value.argsort(dim=1, descending=True, stable=True)[:, :k]
        best, index = value.gather(1, order), place.gather(1, order)
    return best, index


def _unit(rows: Tensor, device: torch.device | str) -> Tensor:
    return F.normalize(rows.to(device, torch.float32), dim=1)


def _top(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of each row, larger first, equals by place.

    ``topk`` may take any of several values that equal the k-th one; rows where that happens are
    sorted as a whole.
    """
    k = min(k, values.shape[1])
    best, place = values.topk(k, dim=1)
    place, order = place.sort(dim=1)
    order = best.gather(1, order).argsort(dim=1, descending=True, stable=True)
    place = place.gather(1, order)
    tied = (values >= best[:, -1:]).sum(1) > k
    if tied.any():
        place[tied] = values[tied].argsort(dim=1, descending=True, stable=True)[:, :k]
    return values.gather(1, place), place


def _ranks(
    weights: Tensor, voters: Tensor, labels: Tensor, ks: Sequence[int], classes: int
) -> dict[int, Tensor]:
    """For each ``k``, how many classes stand before each query's own one."""
    votes = torch.zeros(len(labels), classes, dtype=torch.float64, device=weights.device)
    before = torch.arange(classes, device=weights.device) < labels[:, None]
    ranks, counted = {}, 0
    for k in ks:
        stretch = slice(counted, k)
        votes.scatter_add_(1, voters[:, stretch], weights[:, stretch])
        own = votes.gather(1, labels[:, None])
        rank = ((votes > own) | ((votes == own) & before)).sum(1)
        ranks[k] = rank.masked_fill(own[:, 0] == 0, classes + 5)
        counted = k
    return ranks


def _check(
    bank: Features, queries: Features, ks: Sequence[int], temperatures: Sequence[float]
) -> None:
    if not len(bank.labels) or not len(queries.labels):
        raise ValueError("k-NN needs at least one bank image and one query")
    if min(ks, default=0) < 1 or min(temperatures, default=0) <= 0:
        raise ValueError(f"k-NN needs k >= 1 and temperatures > 0, got {ks} and {temperatures}")
    widths = bank.features.shape[1], queries.features.shape[1]
    if widths[0] != widths[1]:
        raise ValueError(f"bank features are {widths[0]} wide, query features {widths[1]}")
    for name, part in (("bank", bank), ("query", queries)):
        bad = sum(int((~r.isfinite().all(1)).sum()) for r in torch.split(part.features, 8192))
        if bad:
            raise ValueError(f"{bad} of {len(part.features)} {name} features are not finite")
