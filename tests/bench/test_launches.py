"""Steps keep their budgets of launches, collectives and host waits, on calls that a GPU takes."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
import torch.distributed as td
import yaml
from torch import Tensor, nn

from bench import launches
from bench.fake_step import StepCount, count_step, fake_ranks
from bench.launch_counter import FakeCuda, HostReads, LaunchCounter, Traffic
from tests.support.cuda_contract import CudaContract

FILES = {path.stem: path for path in (launches.ROOT / "configs").glob("*.yaml")}
OFTEN = sorted(name for name in FILES if name.startswith(("cifar10_", "in1k_")))
"""Counted on 64 ranks at each change; the others, and other numbers of ranks, are slow."""
ON_META = torch.empty(3, device="meta")
STEPS = [
    pytest.param(name, ranks, marks=() if ranks == 64 and name in OFTEN else pytest.mark.slow)
    for ranks in launches.RANKS
    for name in sorted(FILES)
]
SMALL = ("cifar10_byol", "cifar10_vje", "cifar10_supervised")
REFERENCES = [
    pytest.param(name, ranks, marks=() if ranks == 64 and name in SMALL else pytest.mark.slow)
    for ranks in launches.RANKS
    for name in sorted(FILES)
]


@cache
def step(name: str, ranks: int, *overrides: str) -> StepCount:
    """This project's step, every call checked as a GPU would."""
    cfg = launches.load_recipe(FILES[name], ranks, *overrides)
    with fake_ranks(ranks):
        return count_step(cfg, gpu=partial(CudaContract, gpu="meta"), gpu_of_numbers=CudaContract)


@pytest.mark.parametrize(("name", "ranks"), STEPS)
def test_a_step_keeps_its_budget_in_calls_that_a_gpu_takes(name: str, ranks: int) -> None:
    cfg = launches.load_recipe(FILES[name], ranks)
    reference = launches.reference_of(name, ranks)
    missed = launches.broken_goals(cfg, ranks, step(name, ranks), reference)
    missed.pop("sharded_lars", None)  # which has a test of its own
    if ranks == 1:
        # ZeRO keeps a second copy of the weights there, which a small network's step copies.
        missed.pop("launches", None)
    assert not missed, "\n".join(missed.values())


@pytest.mark.parametrize(("name", "ranks"), REFERENCES)
def test_the_committed_reference_is_what_the_program_counts(name: str, ranks: int) -> None:
    cfg = launches.load_recipe(FILES[name], ranks)
    with fake_ranks(ranks):
        counts = launches.as_counts(count_step(cfg, reference=True))
    remedy = "python -m bench.launches --write"
    assert counts == launches.reference_of(name, ranks), remedy


def test_the_committed_file_has_every_recipe_and_no_count_of_this_project() -> None:
    budget = yaml.safe_load(launches.BUDGET_PATH.read_text())
    assert set(budget) == {"goals", "reference"}
    assert set(budget["reference"]) == set(FILES)
    assert {tuple(counts) for counts in budget["reference"].values()} == {launches.RANKS}


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("name", ["cifar10_byol", "cifar10_vje"])
def test_the_host_waits_once_a_step_at_every_zero_stage(name: str, stage: int) -> None:
    assert step(name, 64, f"engine.zero_stage={stage}").host_syncs == 1


@pytest.mark.xfail(strict=True, reason="DeepSpeed gathers LARS's two groups one by one")
@pytest.mark.parametrize("stage", [1, 2])
def test_sharded_lars_sends_its_norms_once_and_gathers_its_weights_once(stage: int) -> None:
    count = step("cifar10_byol", 64, f"engine.zero_stage={stage}")
    assert count.traffic["optimizer"].count == launches.goals().sharded_lars == 2


def test_the_norms_of_a_resnet50_send_what_its_channels_take() -> None:
    with fake_ranks(64):
        cfg = launches.load_recipe(FILES["in1k_supervised"], 64)
        norm = count_step(cfg, reference=True).traffic["norm"]
    with torch.device("meta"):
        from torchvision.models import resnet50

        widths = [m.num_features for m in resnet50().modules() if isinstance(m, nn.BatchNorm2d)]
    # Mean, deviation and count forth, two sums back, float32.
    assert norm == Traffic(2 * len(widths), 4 * sum(4 * width + 1 for width in widths))


def _counted(call: object) -> LaunchCounter:
    counter = LaunchCounter()
    with FakeCuda(), HostReads(counter), counter:
        call()  # type: ignore[operator]
    return counter


def test_views_are_no_launches_and_copies_are() -> None:
    x = torch.ones(4, 6)
    assert _counted(lambda: x.t().detach()[1:].view(5, 4).unbind()).launches == 0
    assert _counted(lambda: x.t().contiguous()).by_op == {"aten::clone": 1}


def test_a_linear_layer_with_its_gradient_is_the_products_that_calculus_asks_for() -> None:
    layer, x = nn.Linear(3, 2).to("meta"), torch.empty(5, 3, device="meta", requires_grad=True)
    counter = _counted(lambda: layer(x).sum().backward())
    assert counter.by_op["aten::mm"] == 2  # of the weight and of the input
    assert counter.by_op["aten::sum"] == 2  # the loss, and the bias's gradient
    assert counter.by_op["aten::addmm"] == 1


def test_a_foreach_call_is_one_launch_unless_its_tensors_differ_in_type_or_shape() -> None:
    def counted(ours: list[Tensor], others: list[Tensor]) -> int:
        return _counted(lambda: torch._foreach_copy_(ours, others)).launches

    floats, counts = [torch.zeros(2), torch.zeros(3)], [torch.zeros(2), torch.tensor([1, 2, 3])]
    assert counted(floats, floats) == 1
    assert counted(counts, counts) == 2
    assert counted(floats, [torch.zeros(2), torch.zeros(1)]) == 2


@pytest.mark.parametrize(
    ("waits", "call"),
    [
        (1, lambda: torch.ones(()).item()),
        (1, lambda: bool(torch.ones(()).isfinite())),
        (1, lambda: torch.ones(3).tolist()),
        (1, lambda: torch.ones(3).nonzero()),
        (1, lambda: ON_META[ON_META > 0]),
        (0, lambda: ON_META[ON_META.long()]),
        (0, lambda: torch.ones(3).sum()),
        (0, lambda: torch.empty(3, device="meta").copy_(torch.ones(3))),
    ],
)  # fmt: skip
def test_the_host_waits_where_it_reads_a_number_or_a_shape(waits: int, call: object) -> None:
    assert _counted(call).host_syncs == waits


def test_a_collective_counts_what_one_rank_puts_in() -> None:
    counter = LaunchCounter()
    with fake_ranks(8), counter:
        td.all_reduce(torch.zeros(3))
        td.all_gather_single(torch.zeros(8, 5), torch.zeros(1, 5))
    assert counter.traffic == {"loss": Traffic(2, 4 * (3 + 5))}
    assert "c10d" not in "".join(counter.by_op)


def test_what_misses_a_goal_names_recipe_count_goal_and_operators() -> None:
    cfg = launches.load_recipe(FILES["cifar10_byol"], 8)
    traffic = {purpose: Traffic(9, 90) for purpose in ("norm", "loss", "gradient", "optimizer")}
    count = StepCount(200, traffic, 3, {"aten::mul": 150, "aten::add": 50}, {})
    reference = {"launches": 100, "norm": 10}
    assert list(launches.broken_goals(cfg, 8, count, reference).values()) == [
        "cifar10_byol on 8 ranks: 200 launches, 125 allowed (1.25 x 100); most are "
        "aten::mul 150, aten::add 50",
        "cifar10_byol on 8 ranks: 9 collectives of batch norm, 5 allowed (0.5 x 10)",
        "cifar10_byol on 8 ranks: 3 host synchronisations, 1 allowed",
        "cifar10_byol on 8 ranks: 9 collectives of the optimizer, 2 allowed",
    ]
