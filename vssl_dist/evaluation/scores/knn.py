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

from vssl_dist.evaluation.scores.neighbours import find_neighbours
from vssl_dist.evaluation.scores.table import LabelledFeatures, TopAccuracy

_QUERIES_PER_VOTE_TABLE = 512


def knn_accuracy_grid(
    bank: LabelledFeatures,
    queries: LabelledFeatures,
    ks: Sequence[int],
    temperatures: Sequence[float],
    *,
    chunk_rows: tuple[int, int] = (8192, 8192),
    device: torch.device | str = "cpu",
) -> dict[tuple[int, float], TopAccuracy]:
    """Compute the accuracy for every ``k`` and temperature, from one search of the neighbours.

    Memory is bounded by ``chunk_rows``, not by the sizes.  Of equally similar bank images the one
    with the lower index is nearer, of classes with equal votes the lower one wins; a class
    without a vote is never right.  A ``k`` beyond the size of the bank means all of the bank.

    Args:
        bank: ``N`` labelled images, ``(N, D)``; need not be normalised.
        queries: ``M`` images to classify, ``(M, D)``; their labels may be unknown to the bank.
        ks: Numbers of neighbours.
        temperatures: What similarities are divided by in the votes' weights.
        chunk_rows: How many queries meet how many bank images at a time: the bank is read once for
            so many queries.  The result does not depend on it beyond rounding.
        device: Where the products are computed.

    Raises:
        ValueError: Nothing to compare, widths that differ, or features that are not finite.

    >>> four = LabelledFeatures(torch.eye(4), torch.arange(4))
    >>> knn_accuracy_grid(four, four, ks=[1], temperatures=[0.07])
    {(1, 0.07): TopAccuracy(top1=1.0, top5=1.0)}
    """
    _check_knn_inputs(bank, queries, ks, temperatures)
    k_temperature_pairs = [
        (k, temperature) for temperature in temperatures for k in sorted(set(ks))
    ]
    hits_by_pair = {pair: torch.zeros(2, dtype=torch.int64) for pair in k_temperature_pairs}
    class_count = int(torch.cat([bank.labels, queries.labels]).max()) + 1
    for query_block, labels in zip(
        *(torch.split(tensor, chunk_rows[0]) for tensor in queries), strict=True
    ):
        similarities, neighbour_rows = find_neighbours(
            bank.features, query_block, max(ks), chunk_rows[1], device
        )
        neighbour_labels = bank.labels.to(device)[neighbour_rows]
        # Few queries at a time: a table of votes per query and class would fill the memory.
        blocks_by_table = (
            torch.split(tensor, _QUERIES_PER_VOTE_TABLE)
            for tensor in (similarities, neighbour_labels, labels)
        )
        for (similarity, voted_labels, label), temperature in product(
            zip(*blocks_by_table, strict=True), temperatures
        ):
            # Relative to the nearest one: the same winner, and no overflow when it is cold.
            all_weights = ((similarity - similarity[:, :1]).double() / temperature).exp()
            label_ranks_by_k = _rank_labels_by_votes(
                all_weights, voted_labels, label.to(device), sorted(set(ks)), class_count
            )
            for k, label_rank in label_ranks_by_k.items():
                correct_counts = torch.stack([(label_rank < 1).sum(), (label_rank < 5).sum()])
                hits_by_pair[k, temperature] += correct_counts.cpu()
    query_count = len(queries.labels)
    return {
        (k, temperature): TopAccuracy(
            *(hits_by_pair[k, temperature].double() / query_count).tolist()
        )
        for k in ks
        for temperature in temperatures
    }


def _rank_labels_by_votes(
    vote_weights: Tensor,
    neighbour_labels: Tensor,
    labels: Tensor,
    ks: Sequence[int],
    class_count: int,
) -> dict[int, Tensor]:
    """Count, for each ``k``, the classes that stand before each query's label.

    Args:
        vote_weights: Weight of each neighbour's vote ``(M, max(ks))``, the nearest first.
        neighbour_labels: Class of each neighbour, alike.
        labels: ``(M,)``.
        ks: Ascending.
        class_count: How many there are.
    """
    votes_by_class = torch.zeros(
        len(labels), class_count, dtype=torch.float64, device=vote_weights.device
    )
    wins_ties = torch.arange(class_count, device=vote_weights.device) < labels[:, None]
    label_ranks_by_k = {}
    counted_neighbours = 0
    for k in ks:
        # Votes of the smaller k stay: those of the next neighbours are added.
        added_neighbours = slice(counted_neighbours, k)
        votes_by_class.scatter_add_(
            1, neighbour_labels[:, added_neighbours], vote_weights[:, added_neighbours]
        )
        label_votes = votes_by_class.gather(1, labels[:, None])
        label_rank = (
            (votes_by_class > label_votes) | ((votes_by_class == label_votes) & wins_ties)
        ).sum(1)
        label_ranks_by_k[k] = label_rank.masked_fill(label_votes[:, 0] == 0, class_count + 5)
        counted_neighbours = k
    return label_ranks_by_k


def _check_knn_inputs(
    bank: LabelledFeatures,
    queries: LabelledFeatures,
    ks: Sequence[int],
    temperatures: Sequence[float],
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
        feature_blocks = torch.split(table.features, 8192)
        non_finite_count = sum(int((~block.isfinite().all(1)).sum()) for block in feature_blocks)
        if non_finite_count:
            raise ValueError(
                f"{non_finite_count} of {len(table.features)} {name} features are not finite"
            )
