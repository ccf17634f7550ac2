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
    """Compute the accuracy for every ``k`` and temperature, from one search of the neighbours.

    Memory is bounded by ``chunk``, not by the sizes.  Of equally similar bank images the one
    with the lower index is nearer, of classes with equal votes the lower one wins; a class
    without a vote is never right.  A ``k`` beyond the size of the bank means all of the bank.

    Args:
        bank: ``N`` labelled images, ``(N, D)``; need not be normalised.
        queries: ``M`` images to classify, ``(M, D)``; their labels may be unknown to the bank.
        ks: Numbers of neighbours.
        temperatures: What similarities are divided by in the votes' weights.
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
        similarities, indices = neighbours(bank.features, block, max(ks), chunk[1], device)
        votes = bank.labels.to(device)[indices]
        # Few queries at a time: a table of votes per query and class would fill the memory.
        columns = (torch.split(t, _VOTES) for t in (similarities, votes, labels))
        for (similarity, voted, label), temperature in product(
            zip(*columns, strict=True), temperatures
        ):
            # Relative to the nearest one: the same winner, and no overflow when it is cold.
            weights = ((similarity - similarity[:, :1]).double() / temperature).exp()
            ranks = _label_ranks(weights, voted, label.to(device), sorted(set(ks)), classes)
            for k, rank in ranks.items():
                correct = torch.stack([(rank < 1).sum(), (rank < 5).sum()])
                hits[k, temperature] += correct.cpu()
    total = len(queries.labels)
    return {
        (k, t): Accuracy(*(hits[k, t].double() / total).tolist()) for k in ks for t in temperatures
    }


def _label_ranks(
    weights: Tensor, voted: Tensor, labels: Tensor, ks: Sequence[int], classes: int
) -> dict[int, Tensor]:
    """Count, for each ``k``, the classes that stand before each query's label.

    Args:
        weights: Weight of each neighbour's vote ``(M, max(ks))``, the nearest first.
        voted: Class of each neighbour, alike.
        labels: ``(M,)``.
        ks: Ascending.
        classes: How many there are.
    """
    votes = torch.zeros(len(labels), classes, dtype=torch.float64, device=weights.device)
    wins_ties = torch.arange(classes, device=weights.device) < labels[:, None]
    ranks = {}
    counted = 0
    for k in ks:
        # Votes of the smaller k stay: those of the next neighbours are added.
        added = slice(counted, k)
        votes.scatter_add_(1, voted[:, added], weights[:, added])
        label_votes = votes.gather(1, labels[:, None])
        rank = ((votes > label_votes) | ((votes == label_votes) & wins_ties)).sum(1)
        ranks[k] = rank.masked_fill(label_votes[:, 0] == 0, classes + 5)
        counted = k
    return ranks


def _check(
    bank: Features, queries: Features, ks: Sequence[int], temperatures: Sequence[float]
) -> None:
    if not len(bank.labels) or not len(queries.labels):
        raise ValueError("k-NN needs at least one bank image and one query")
    if min(ks, default=0) < 1 or min(temperatures, default=0) <= 0:
        raise ValueError(f"k-NN needs k >= 1 and temperatures > 0, got {ks} and {temperatures}")
    bank_width = bank.features.shape[1]
    query_width = queries.features.shape[1]
    if bank_width != query_width:
        raise ValueError(f"bank features are {bank_width} wide, query features {query_width}")
    for name, table in (("bank", bank), ("query", queries)):
        blocks = torch.split(table.features, 8192)
        damaged = sum(int((~block.isfinite().all(1)).sum()) for block in blocks)
        if damaged:
            raise ValueError(f"{damaged} of {len(table.features)} {name} features are not finite")
