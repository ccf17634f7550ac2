"""The online probe learns as torch would, disturbs nothing and resumes where it was."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.exports import by_hand
from tests.support.photos import tiny_dataset
from tests.support.ranks import run_ranks
from vssl_dist.config import LinearConfig, OnlineConfig, RunConfig, load
from vssl_dist.errors import DataError, ExportError
from vssl_dist.evaluation.run import EvalSettings, evaluate
from vssl_dist.exports.read import load_export
from vssl_dist.methods import CONFIGS
from vssl_dist.models.linear_probe import Probe
from vssl_dist.online_probe import OnlineProbe, build_online_probe
from vssl_dist.run_folder import part_path_of
from vssl_dist.train import Preempted, train

CLASSES, WIDTH, STEPS = 3, 6, 8


def batches() -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, WIDTH, generator=random)
    pairs = []
    for _ in range(STEPS):
        labels = torch.randint(0, CLASSES, (32,), generator=random)
        pairs.append((5 + 3 * (centres[labels] + torch.randn(32, WIDTH, generator=random)), labels))
    return pairs


def learn(rank: int, world_size: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    probe = OnlineProbe(OnlineConfig(lr=0.5), CLASSES, STEPS)
    share = slice(rank * 32 // world_size, (rank + 1) * 32 // world_size)
    for number, (x, y) in enumerate(batches()):
        probe.step(x[share], y[share], number + 1)
    return probe._state, probe.pop_metrics()


def learn_on_this_rank() -> tuple[dict[str, object], dict[str, float]]:
    state, metrics = learn(torch.distributed.get_rank(), torch.distributed.get_world_size())
    return {name: tensor.tolist() for name, tensor in state.items()}, metrics


def test_it_takes_the_steps_of_torchs_sgd() -> None:
    linear = torch.nn.Linear(WIDTH, CLASSES)
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(linear.bias)
    right = 0
    optimizer = torch.optim.SGD(linear.parameters(), lr=1.0, momentum=0.9)
    for number, (x, y) in enumerate(batches()):
        rate = 0.5 * 32 / 256 * 0.5 * (1 + math.cos(math.pi * number / STEPS))
        # torch scales the velocity by each step's rate: so does the probe.
        optimizer.param_groups[0]["lr"] = rate
        logits = linear(F.batch_norm(x, None, None, training=True, eps=1e-5))
        right += int((logits.argmax(1) == y).sum())
        optimizer.zero_grad()
        F.cross_entropy(logits, y).backward()
        optimizer.step()
    state, metrics = learn(0, 1)
    torch.testing.assert_close(state["table"][:-1].T, linear.weight.data, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(state["table"][-1], linear.bias.data, rtol=1e-4, atol=1e-6)
    assert metrics == {"online_top1": right / (32 * STEPS)}
    assert metrics["online_top1"] > 0.5, "it learns: chance is 1/3"


def test_what_is_exported_classifies_raw_features_by_running_moments() -> None:
    probe = OnlineProbe(OnlineConfig(lr=0.5), CLASSES, STEPS)
    assert probe.export_tensors() == {}, "it has seen nothing"
    mean = var = None
    for number, (x, y) in enumerate(batches()):
        probe.step(x, y, number + 1)
        moments = x.mean(0), x.var(0, correction=0)
        mean = moments[0] if mean is None else 0.9 * mean + 0.1 * moments[0]
        var = moments[1] if var is None else 0.9 * var + 0.1 * moments[1]
    x, labels = batches()[-1]
    scaled = F.batch_norm(x, mean, var, training=False, eps=1e-5)
    table = probe._state["table"]
    exported = Probe(**probe.export_tensors()["online"])
    torch.testing.assert_close(exported.logits(x), scaled @ table[:-1] + table[-1])
    assert (exported.logits(x).argmax(1) == labels).float().mean() > 0.5


def test_the_number_of_ranks_changes_nothing() -> None:
    alone, metrics = learn(0, 1)
    for state, same in run_ranks(learn_on_this_rank, 2):
        assert same == metrics
        assert state == {name: tensor.tolist() for name, tensor in alone.items()}


def test_images_without_a_class_and_features_that_are_not_finite_teach_nothing() -> None:
    (x, y), (more, labels) = batches()[:2]
    clean, marked = (OnlineProbe(OnlineConfig(), CLASSES, STEPS) for _ in range(2))
    for probe in (clean, marked):
        probe.step(x, y, 1)
    marked.step(more.index_fill(0, torch.tensor([3]), math.nan), labels, 2)
    assert torch.equal(marked._state["table"], clean._state["table"])
    clean.pop_metrics(), marked.pop_metrics()
    marked.step(more, torch.full_like(labels, -1), 2)
    assert marked.pop_metrics() == {}
    marked.step(more, labels.index_fill(0, torch.arange(16), CLASSES), 3)
    assert marked._state["seen"] == 16
    assert marked._state["table"].isfinite().all()


def of_a_probe(**changes: Tensor) -> dict[str, Tensor]:
    table, moments = torch.zeros(WIDTH + 1, CLASSES), torch.zeros(WIDTH)
    count = torch.zeros((), dtype=torch.int64)
    state = {"table": table, "velocity": table.clone(), "mean": moments, "var": moments.clone()}
    return state | {"right": count, "seen": count.clone()} | changes


@pytest.mark.parametrize(
    "changes",
    [
        {"table": torch.zeros(WIDTH + 1, CLASSES + 1)},
        {"velocity": torch.zeros(WIDTH, CLASSES)},
        {"mean": torch.zeros(WIDTH + 1)},
        {"mean": torch.zeros(WIDTH, 1)},
        {"var": torch.zeros(())},
        {"seen": torch.zeros(())},
        {"more": torch.zeros(1)},
    ],
    ids=str,
)
def test_the_state_of_another_probe_is_refused(tmp_path: Path, changes: dict[str, Tensor]) -> None:
    probe = OnlineProbe(OnlineConfig(lr=0.1), CLASSES, STEPS)
    save_file(of_a_probe(), tmp_path / "online.safetensors")
    probe.load(tmp_path, "cpu")
    save_file(of_a_probe(**changes), tmp_path / "online.safetensors")
    with pytest.raises(Exception, match=r"."):
        probe.load(tmp_path, "cpu")
    assert probe.export_tensors()["online"]["weight"].shape == (WIDTH, CLASSES)


def test_a_dataset_without_classes_is_refused() -> None:
    with pytest.raises(DataError, match="nothing for a probe"):
        build_online_probe(OnlineConfig(), 1, 10)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    tiny_dataset(folder, samples=40, classes=4, split="val", first=500)
    return tiny_dataset(folder, samples=96, classes=4)


class Log:
    """Keeps what a training says of each step."""

    def __init__(self) -> None:
        self.lines: dict[int, dict[str, float]] = {}

    def __call__(self, metrics: Mapping[str, float], step: int) -> None:
        self.lines[step] = {k: v for k, v in metrics.items() if k.startswith("online_")}


def config(data: Path, out: Path, name: str, *overrides: str) -> RunConfig:
    return load(
        Path("configs/quickstart.yaml"),
        [
            f"name={name}", f"out={out}", f"data.train={data}", f"data.val={data.parent / 'val'}",
            "trace=true",
            "optim.global_batch=32", "data.streams=4", "data.window=16", "optim.max_steps=6",
            "optim.epochs=1000", "log_every=2", "vote_every=1", "evaluations=[]",
            "data.backend=reference", *overrides,
        ],
        methods=CONFIGS,
    )  # fmt: skip


def one_run(cfg: RunConfig, stop_at: int | None = None) -> Log:
    log, asked = Log(), iter(range(1, 100))
    stop = (lambda: next(asked) == stop_at) if stop_at else (lambda: False)
    train(cfg, device="cpu", should_stop=stop, on_export=lambda *_: None, log=log)
    return log


def runs_of(data: Path, out: Path) -> dict[str, object]:
    """Without, with, and with a stop after an odd step, when accuracy is half counted."""
    plain, probed, broken = (
        config(data, out, name, *extra)
        for name, extra in (
            ("plain", []),
            ("probed", ["online.lr=0.2"]),
            ("broken", ["online.lr=0.2"]),
        )
    )
    one_run(plain)
    straight = one_run(probed)
    with pytest.raises(Preempted):
        one_run(broken, stop_at=3)
    resumed = one_run(broken)
    return {
        "straight": straight.lines,
        "resumed": resumed.lines,
        "traces": [(c.dir / "trace.rank0.jsonl").read_text() for c in (plain, probed, broken)],
        "state": [
            (c.dir / "checkpoints" / "step-00000006" / "online.safetensors").read_bytes()
            for c in (probed, broken)
        ],
    }


@pytest.mark.slow
def test_the_method_is_bit_identical_with_it_and_the_probe_resumes_exactly(
    data: Path, tmp_path: Path
) -> None:
    (found,) = run_ranks(runs_of, 1, data, tmp_path)
    plain, probed, broken = found["traces"]
    assert "final" in json.loads(plain.splitlines()[-1])
    assert plain == probed == broken
    assert set(found["straight"]) == {2, 4, 6}
    assert all(0 <= line["online_top1"] <= 1 for line in found["straight"].values())
    assert found["resumed"] == {step: found["straight"][step] for step in (4, 6)}
    assert found["state"][0] == found["state"][1]

    task = LinearConfig(epochs=1, seeds=1, shares=(), lr=(0.1,), l2=(1e-3,))
    plain, probed = (
        tmp_path / n / "export/backbone-00000006.safetensors" for n in ("plain", "probed")
    )
    result = evaluate(probed, task)
    weights = load_file(part_path_of(probed, "online"))
    backbone, card = load_export(probed)
    images, labels = by_hand(data.parent / "val", card.normalise)
    with torch.inference_mode():
        predicted = (backbone(images) @ weights["weight"] + weights["bias"]).argmax(1)
    assert result["metrics"]["linear/online_top1"] == (predicted.numpy() == labels).mean()
    assert 0 <= result["results"]["online"]["ece"] <= 1
    assert all(path.with_name(plot).exists() for path in [probed] for plot in result["plots"])
    assert "online" not in evaluate(plain, task)["results"]
    settings = EvalSettings(train=data.parent / "val", val=data)
    elsewhere = evaluate(probed, task, settings)
    assert "online" not in elsewhere["results"], "its classes are others"
    part_path_of(probed, "online").unlink()
    with pytest.raises(ExportError, match=r"online-00000006\.safetensors: missing or damaged"):
        evaluate(probed, task.model_copy(update={"epochs": 2}))
