"""The comparison of neighbour searches compares what it says, at any size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import knn


def test_all_contestants_find_the_same_neighbours() -> None:
    size = knn.ProblemSize(bank_size=3000, num_queries=40, feature_width=8)
    bank, queries = size.draw_features()
    expected = knn.full_product_search(bank.double(), queries.double(), 5)
    for search in knn.searches_by_name().values():
        assert torch.equal(search(bank, queries, 5), expected)
    seconds = knn.measure_seconds(size, k=5, rounds=2)
    assert all(len(times) == 2 for times in seconds.values())


def test_faiss_is_among_them_where_it_is_installed() -> None:
    pytest.importorskip("faiss", reason="pip install .[compare]")
    assert list(knn.searches_by_name()) == ["ours", "naive", "faiss"]


def test_a_ratio_is_their_time_over_ours() -> None:
    row = knn.table_row(
        knn.ProblemSize(10, 2, 4), 1, {"ours": [1.0, 2.0, 2.0], "naive": [3.0, 4.0, 1.0]}
    )
    assert row == "| 10 x 4, 2 queries, k = 1 | 1.00 s (1.00 x) | 1.00 s (2.00 x) |"


def test_the_bank_is_read_once_for_up_to_8192_queries() -> None:
    assert knn.SearchCost(10.0, 0.5, 1.0).total_s(8192) == 10 + 4096
    assert knn.SearchCost(10.0, 0.5, 1.0).total_s(8193) == 20 + 4096.5


def test_the_large_bank_works_small_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bank.npy").write_bytes(b"mine")
    small = ["--scale-bank", "9000", "--width", "16", "--scale-queries", "3", "12"]
    knn.main(["--scale", str(tmp_path), *small])
    said = capsys.readouterr().out
    assert "9,000 x 16 float16" in said
    assert "extrapolated from 3 and 12 queries" in said
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"mine"]
