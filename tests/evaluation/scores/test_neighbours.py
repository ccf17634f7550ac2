"""The search that skips is the search that does not, whatever the order of the bank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from vssl_dist.evaluation.scores.neighbours import find_neighbours

WIDTH = 6


def brute(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Everything, sorted."""
    found = normalize(queries.float(), dim=1) @ normalize(bank.float(), dim=1).T
    order = found.argsort(dim=1, descending=True, stable=True)[:, :k]
    return found.gather(1, order), order


def cloud(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 15, 16, 17, 700])
@pytest.mark.parametrize("k", [1, 3, 40, 900])
@pytest.mark.parametrize("chunk", [1, 16, 50, 333, 8192])
def test_the_nearest_are_those_of_a_full_sort(size: int, k: int, chunk: int) -> None:
    bank, queries = cloud(size, 1), cloud(5, 2)
    similarity, rows = find_neighbours(bank, queries, k, chunk)
    expected, order = brute(bank, queries, k)
    torch.testing.assert_close(similarity, expected)
    assert torch.equal(rows, order)


@pytest.mark.parametrize("falling", [False, True])
def test_a_bank_sorted_by_similarity_is_searched_as_any_other(falling: bool) -> None:
    bank, query = cloud(2000, 3), cloud(1, 4)
    order = (normalize(bank, dim=1) @ normalize(query, dim=1)[0]).argsort(descending=falling)
    similarity, rows = find_neighbours(bank[order], query, 20, 256)
    expected, found = brute(bank[order], query, 20)
    torch.testing.assert_close(similarity, expected)
    assert torch.equal(rows, found)


@pytest.mark.parametrize("chunk", [64, 160, 4096])
def test_copies_of_one_image_are_found_from_the_first_on(chunk: int) -> None:
    same = torch.ones(1000, WIDTH)
    assert torch.equal(find_neighbours(same, same[:3], 7, chunk)[1], torch.arange(7).expand(3, 7))
    # Exact ties across chunks: axes give similarities of 0 and 1 alone.
    axes = torch.eye(WIDTH)[torch.arange(1000) % WIDTH]
    assert torch.equal(
        find_neighbours(axes, torch.eye(WIDTH), 200, chunk)[1],
        brute(axes, torch.eye(WIDTH), 200)[1],
    )


def test_more_queries_than_are_held_at_a_time_are_searched_alike() -> None:
    bank, queries = cloud(90, 5), cloud(8192 + 700, 6)
    similarity, rows = find_neighbours(bank, queries, 4, 32)
    expected, order = brute(bank, queries, 4)
    torch.testing.assert_close(similarity, expected)
    assert torch.equal(rows, order)
