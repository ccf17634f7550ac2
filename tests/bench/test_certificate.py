"""The certificate holds, and its control shows that it could fail."""

from __future__ import annotations

import pytest

from bench.certificate import (
    CONTROL_CASE,
    ComparisonRow,
    comparison_rows,
    markdown_report,
    method_configs,
)
from bench.references import LossCase, loss_cases
from vssl_dist.methods import METHODS


@pytest.mark.parametrize("case", loss_cases(), ids=lambda case: case.name)
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_gradient_are_those_of_a_naive_reference(case: LossCase, seed: int) -> None:
    assert max(case.errors(seed)) < 1e-12


def test_a_wrong_factor_or_gradient_is_seen() -> None:
    byol, simsiam = loss_cases()[:2]
    loss, gradient = LossCase("", byol.shapes, simsiam.ours, byol.naive).errors()
    assert loss > 0.1
    assert gradient == pytest.approx(0.75)  # half a cosine against 2 - 2 cosines


def holds_but_for_the_control(found: list[ComparisonRow]) -> None:
    assert {row.name for row in found} == set(method_configs())
    for row in found:
        assert row.is_as_promised == (row.name != CONTROL_CASE), row
        if row.is_as_promised:
            assert row.loss < 1e-9, row
            assert row.buffers < 1e-9, row


def test_every_method_is_certified() -> None:
    assert {cfg.name for cfg in method_configs().values()} == set(METHODS)


def test_two_ranks_have_the_gradient_of_one() -> None:
    found = comparison_rows(list(method_configs()), world_sizes=(2,))
    assert len(found) == len(method_configs())
    holds_but_for_the_control(found)
    text = markdown_report(found)
    assert text.count("| yes |") == len(found) - 1
    assert "| barlow_twins | 2 |" in text


@pytest.mark.slow
def test_four_ranks_have_the_gradient_of_one() -> None:
    holds_but_for_the_control(comparison_rows(list(method_configs()), world_sizes=(4,)))
