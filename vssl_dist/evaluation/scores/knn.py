"""Weighted k-NN classification of frozen features (Wu et al., 2018, as DINO evaluates it).

A query's ``k`` most similar bank images vote for their class with weight
``exp(cosine similarity / temperature)``.  Published figures differ in ``k`` and temperature, so
the whole grid is computed; it costs one search.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from vssl_dist.evaluation.scores.neighbours import neighbours
from vssl_dist.evaluation.scores.table import Accuracy, Features

_VOTES = 512


def knn_grid(
    bank: Features,
    queries: Features,
    ks: Sequence[int],
    temperatures: Sequence[float],
    *,
    chunk: tuple[int, int] = (8192, 8192),
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
        chunk: How many queries meet how many bank images at a time: the bank is read once for
            so many queries.  The result does not depend on it beyond rounding.
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
        found = neighbours(bank.features, block, max(ks), chunk[1], device)
        voters = bank.labels.to(device)[found[1]]
        parts = zip(*(torch.split(t, _VOTES) for t in (found[0], voters, labels)), strict=True)
        for (similarity, voted, own), temperature in product(parts, temperatures):
            # Relative to the nearest one: the same winner, and no overflow when it is cold.
            weights = ((similarity - similarity[:, :1]).double() / temperature).exp()
            ranks = _ranks(weights, voted, own.to(device), sorted(set(ks)), classes)
            for k, rank in ranks.items():
                right = torch.stack([(rank < 1).sum(), (rank < 5).sum()])
                hits[k, temperature] += right.cpu()
    total = len(queries.labels)
    return {
        (k, t): Accuracy(*(hits[k, t].double() / total).tolist()) for k in ks for t in temperatures
    }


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
