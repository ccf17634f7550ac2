"""The engine is one plain torch process, at every ZeRO stage; it resumes bit by bit.

What needs two ranks runs in one launch, because DeepSpeed takes long to start; the tests then
look at what came back.
"""

from __future__ import annotations

import hashlib
import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch._dynamo.utils
from safetensors.torch import load_file
from torch import nn

from tests.support.cards import description
from tests.support.plain import Images, arrays, plain_run, smooth_method
from tests.support.ranks import run_ranks
from vssl_dist import checkpoint, dist
from vssl_dist import engine as engine_module
from vssl_dist.config import RunConfig
from vssl_dist.data.loader import Batch
from vssl_dist.engine import PATIENCE, Diverged, Engine
from vssl_dist.errors import CheckpointError
from vssl_dist.methods.base import LossOutput, Method
from vssl_dist.methods.byol import BYOLConfig
from vssl_dist.methods.dino import DINOConfig
from vssl_dist.methods.vje import VJEConfig
from vssl_dist.models.backbones import build_backbone

STEPS, TOTAL, WARMUP = 5, 40, 2
METHODS = {
    "byol": BYOLConfig(backbone="resnet18_c16", hidden=64, dim=32),
    "vje": VJEConfig(backbone="resnet18_c16", hidden=128),
    "vje_ema": VJEConfig(backbone="resnet18_c16", target="ema"),
    "vje_learned": VJEConfig(
        backbone="resnet18_c16",
        hidden=128,
        variances="separate",
        learn_radial_scale=True,
        radial="log",
        beta_warmup_epochs=1.5,
    ),
    # Prototypes that rest for the first two steps; at the usual temperatures its gradient, some
    # hundred long, is known to 1e-6 only.
    "dino": DINOConfig(
        backbone="resnet18_c16",
        local_crops=0,
        hidden=64,
        bottleneck=16,
        prototypes=32,
        freeze_epochs=0.5,
        student_temperature=0.5,
        teacher_temperature=(0.3, 0.4),
    ),
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "base_lr": 0.005, "weight_decay": 0.01},
    "adamw": {"name": "adamw", "base_lr": 1e-3, "weight_decay": 0.1, "weight_decay_end": 0.4},
    "lars": {"name": "lars", "base_lr": 0.4, "weight_decay": 1e-4, "trust": 0.02},
}
RESUMED = [("vje_ema", "adamw"), ("dino", "lars")]
STAGES = (0, 1, 2)
BRANCHES: tuple[Literal["student", "teacher"], ...] = ("student", "teacher")
CASES = list(product(("byol", "vje"), ("sgd", "adamw"), (0.0, 0.3)))
FAST = [
    ("byol", "adamw", 0.3),
    ("vje", "sgd", 0.0),
    ("byol", "lars", 0.0),
    ("dino", "adamw", 0.3),
    ("vje_learned", "lars", 0.3),
]
OVERLAPPING = ("vje_learned", "lars", 0.3)
SLOW = [case for case in CASES if case not in FAST]


def run_config(
    stage: int = 0, method: str = "byol", optim: str = "sgd", clip: float = 0.0, **engine: Any
) -> RunConfig:
    batch = {"epochs": 10.0, "warmup_epochs": 0.5, "global_batch": 32, "accumulate": 2}
    return RunConfig.model_validate(
        {
            "name": "test",
            "seed": 3,
            "method": METHODS[method],
            "data": {
                "train": "unused",
                "image_size": 16,
                "views": ["cifar", "cifar"],
                "streams": 2,
            },
            "optim": OPTIMIZERS[optim] | batch | {"clip": clip},
            "engine": {"zero_stage": stage, "autocast": "none", "ema_decay": [0.99, 1.0]} | engine,
        }
    )


# What each rank does.


class Trainee:
    """An engine with the images that it is shown."""

    def __init__(
        self, cfg: RunConfig, build: Callable[[RunConfig], Method] = smooth_method
    ) -> None:
        torch.manual_seed(dist.rank())  # only rank 0 starts from the weights of plain_run
        method = build(cfg)
        self.images = Images(cfg)
        self.engine = Engine(
            cfg, method, total_steps=TOTAL, steps_per_epoch=2.0 * WARMUP, device="cpu"
        )

    def batches(self) -> list[Batch]:
        return self.images.of_step(self.engine.step, dist.rank(), dist.world_size())

    def train(self, steps: int = 1, by_part: bool = False) -> list[dict[str, float]]:
        outputs = [self.engine.train_step(self.batches(), by_part) for _ in range(steps)]
        return [dist.mean_over_ranks({"loss": out.loss} | out.metrics) for out in outputs]

    def losses(self, steps: int) -> list[str]:
        return [value["loss"].hex() for value in self.train(steps)]


def equality_run(cfg: RunConfig) -> dict[str, Any]:
    trainee = Trainee(cfg)
    values = trainee.train(STEPS, by_part=True)
    parts = ("grad_norm_backbone", "grad_norm_head")
    return {
        "loss": [value["loss"] for value in values],
        "grad_norm": [value["grad_norm"] for value in values],
        "parts": [tuple(value[part] for part in parts) for value in values],
        "metrics": values[-1],
        "student": arrays(trainee.engine.student),
        "teacher": arrays(trainee.engine.method.teacher),
    }


def equality_runs(cases: list[tuple[str, str, float]]) -> dict[Any, dict[str, Any]]:
    return {
        (stage, *case): equality_run(run_config(stage, *case)) for stage in STAGES for case in cases
    }


def overlapping_run(stage: int) -> dict[str, Any]:
    """With what DeepSpeed is asked for on GPUs: small buckets, sent while the next are computed."""
    ds_config = engine_module.ds_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "OVERLAPPING_BUCKET", 5000)
        patch.setattr(engine_module, "ds_config", lambda *args: ds_config(*args[:-1], "cuda"))
        return equality_run(run_config(stage, *OVERLAPPING))


def resumed_and_straight(stage: int, method: str, optim: str, folder: Path) -> dict[str, Any]:
    """A run of 4 steps, and one that is saved after 2 and continued by another engine."""
    autocast = "bfloat16" if stage == 1 else "none"
    cfg = run_config(stage, method, optim, 0.3, autocast=autocast)
    straight = Trainee(cfg)
    straight.train(2)
    torch.manual_seed(50 + dist.rank())
    folder.mkdir(exist_ok=True)
    dist.barrier()
    straight.engine.save(folder)
    drawn = torch.rand(3).tolist()
    losses = straight.losses(2)
    (folder / "latest").write_text("elsewhere")
    torch.manual_seed(7)
    other = Trainee(cfg)
    other.train(1)
    other.engine.load(folder)
    found = {"step": other.engine.step, "drawn": torch.rand(3).tolist()}
    return {
        "straight": {"step": 2, "drawn": drawn, "losses": losses, **straight.engine.digests()},
        "resumed": found | {"losses": other.losses(2), **other.engine.digests()},
    }


class Tiny:
    """A student and a teacher small enough for what is not about numbers."""

    evaluated: Literal["student", "teacher"] = "teacher"

    def __init__(self, cfg: RunConfig) -> None:
        self.student: nn.Module = nn.Sequential()
        self.student.add_module("backbone", nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
        self.student.add_module("head", nn.Sequential(nn.Flatten(), nn.Linear(4 * 14 * 14, 8)))
        self.teacher: nn.Module | None = nn.Sequential()
        self.teacher.add_module("backbone", nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
        self.constant = 0.0

    def loss(self, views: Any, noise: Any) -> LossOutput:
        assert self.teacher is not None
        with torch.no_grad():
            target = self.teacher(views[1]).mean()
        out = self.student(views[0])
        return LossOutput((out - target).square().mean() + self.constant, out.detach())


@contextmanager
def faulty(trainee: Trainee, kind: str) -> Iterator[list[Batch]]:
    """Batches of the next step, on rank 1 with a NaN pixel or a loss that is infinite."""
    batches, method = trainee.batches(), trainee.engine.method
    if dist.rank() == 1 and kind == "nan":
        batches[0].views[0][0, 0, 0, 0] = torch.nan
    elif dist.rank() == 1:
        method.constant = torch.inf  # type: ignore[attr-defined]
    yield batches
    method.constant = 0.0  # type: ignore[attr-defined]


def skipping(stage: int) -> dict[str, Any]:
    """A run with two faulty steps in a row, and one that never saw these steps."""
    hurt, spared = (Trainee(run_config(stage, optim="adamw", clip=1.0), Tiny) for _ in range(2))
    for trainee in (hurt, spared):
        trainee.train(3)
    before = hurt.engine.digests()
    metrics = []
    for kind in ("nan", "infinite"):
        with faulty(hurt, kind) as batches:
            out = hurt.engine.train_step(batches)
        metrics.append((out.metrics["skipped_steps"].item(), out.metrics["grad_norm"].item()))
    after = hurt.engine.digests()
    unchanged = all(after[part] == before[part] for part in ("weights", "teacher"))
    spared.engine.step += 2
    same = hurt.losses(2) == spared.losses(2) and hurt.engine.digests() == spared.engine.digests()
    return {"metrics": metrics, "unchanged": unchanged, "same": same, "step": hurt.engine.step}


def refusal(work: Callable[[], object], kind: type[Exception] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        work()
    return str(caught.value)


def endless_nan() -> str:
    trainee = Trainee(run_config(1), Tiny)

    def train() -> None:
        for _ in range(PATIENCE):
            with faulty(trainee, "nan") as batches:
                trainee.engine.train_step(batches)

    return refusal(train, Diverged)


def failing_saves(root: Path) -> dict[str, Any]:
    """Rank 1, then rank 0, cannot write; the run goes on like one that never tried to save."""
    trainee, other = (Trainee(run_config(1), Tiny) for _ in range(2))
    refusals = []

    def commit() -> None:
        step = trainee.engine.step
        checkpoint.commit_checkpoint(root, step=step, write_files=trainee.engine.save, facts={})

    for victim in (1, 0):
        trainee.train(1)
        if dist.rank() == victim:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
        refusals.append(refusal(commit))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**40, resource.RLIM_INFINITY))
    other.train(2)
    same = trainee.engine.digests() == other.engine.digests()
    commit()
    found = checkpoint.find_newest_checkpoint(root)
    return {"refusals": refusals, "same": same, "saved": found and found.step}


def wrong_loads(folder: Path) -> dict[str, str]:
    """Refusals of what another number of ranks or another stage saved, and of NaN weights."""
    one, two = (Trainee(run_config(stage), Tiny) for stage in (1, 2))
    folder.mkdir(exist_ok=True)
    dist.barrier()
    one.engine.save(folder)
    dist.barrier()
    refusals = {"stage": refusal(lambda: two.engine.load(folder))}
    dist.barrier()
    facts = json.loads((folder / "engine.json").read_text())
    if dist.rank() == 0:
        (folder / "engine.json").write_text(json.dumps(facts | {"world_size": 4}))
    dist.barrier()
    refusals["ranks"] = refusal(lambda: one.engine.load(folder))
    lars = Trainee(run_config(1, optim="lars"), Tiny)
    dist.barrier()
    if dist.rank() == 0:
        old_facts = {name: facts[name] for name in facts if name != "optimizer_groups"}
        (folder / "engine.json").write_text(json.dumps(old_facts))
    dist.barrier()
    refusals["lars"] = refusal(lambda: lars.engine.load(folder))
    if dist.rank() == 1:
        next(one.engine.student.parameters()).data[0] = torch.nan
    refusals["nan"] = refusal(lambda: one.engine.save(folder))
    return refusals


def exports(folder: Path) -> dict[str, Any]:
    """Exports of a network in the channels-last layout, and the two that they came from."""
    trainee = Trainee(run_config(1, channels_last=True))
    trainee.train(1)
    method = trainee.engine.method
    for branch in BRANCHES:
        method.evaluated = branch
        trainee.engine.export(folder / "export" / f"{branch}.safetensors", description())
    blocked = folder / "file"
    blocked.touch()
    failure = refusal(
        lambda: trainee.engine.export(blocked / "backbone.safetensors", description())
    )
    branches = {"student": arrays(trainee.engine.student), "teacher": arrays(method.teacher)}
    return branches | {"failure": failure}


def two_ranks(folder: Path) -> dict[str, Any]:
    return {
        "equality": equality_runs(FAST),
        "overlapping": {stage: overlapping_run(stage) for stage in (1, 2)},
        "resume": {
            (stage, *case): resumed_and_straight(stage, *case, folder / f"resume{stage}{case[0]}")
            for stage, case in product(STAGES, RESUMED)
        },
        "skipping": {stage: skipping(stage) for stage in STAGES},
        "endless": endless_nan(),
        "failing saves": failing_saves(folder / "commits"),
        "wrong loads": wrong_loads(folder / "wrong"),
        "exports": exports(folder),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def seen(folder: Path) -> list[dict[str, Any]]:
    """What each of two ranks saw."""
    return run_ranks(two_ranks, 2, folder, timeout_s=600)


# What must be true of it.


def largest_error(ours: dict[str, Any], plain: dict[str, Any], network: str) -> float:
    """The largest difference of any value, relative to its tensor's largest or to 1."""
    assert ours[network].keys() == plain[network].keys()
    errors = [
        np.abs(ours[network][name].astype(np.float64) - want).max() / max(1.0, np.abs(want).max())
        for name, want in plain[network].items()
    ]
    return float(max(errors, default=0.0))


def assert_equal_runs(ours: dict[str, Any], plain: dict[str, Any]) -> None:
    size = max(1.0, *(abs(loss) for loss in plain["loss"]))
    np.testing.assert_allclose(ours["loss"], plain["loss"], rtol=0, atol=1e-6 * size)
    np.testing.assert_allclose(ours["grad_norm"], plain["grad_norm"], rtol=1e-6)
    # A part of the norm has fewer terms to average rounding over than the whole.
    np.testing.assert_allclose(ours["parts"], plain["parts"], rtol=1e-5)
    for network in ("student", "teacher"):
        assert largest_error(ours, plain, network) <= 1e-6
    first = "backbone.conv1.weight"
    moved = np.abs(plain["student"][first] - plain["before"][first]).max()
    assert moved > 2e-5  # else equality would mean nothing


@pytest.fixture(scope="module")
def plain() -> Callable[..., dict[str, Any]]:
    runs: dict[Any, dict[str, Any]] = {}

    def run(*case: Any) -> dict[str, Any]:
        if case not in runs:
            runs[case] = plain_run(run_config(0, *case), STEPS, TOTAL, WARMUP, smooth_method)
        return runs[case]

    return run


@pytest.mark.parametrize("case", FAST, ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_are_one_plain_process(
    seen: list[dict[str, Any]], plain: Any, stage: int, case: tuple[str, str, float]
) -> None:
    for rank in seen:
        assert_equal_runs(rank["equality"][stage, *case], plain(*case))


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_that_are_sent_in_buckets_during_the_backward_pass_are_the_same(
    seen: list[dict[str, Any]], plain: Any, stage: int
) -> None:
    for rank in seen:
        assert_equal_runs(rank["overlapping"][stage], plain(*OVERLAPPING))


def test_all_ranks_report_the_gradient_norm_and_the_schedules(seen: list[dict[str, Any]]) -> None:
    for stage, case in product(STAGES, FAST):
        metrics = seen[0]["equality"][stage, *case]["metrics"]
        assert metrics == seen[1]["equality"][stage, *case]["metrics"]
        assert metrics["skipped_steps"] == 0
        optim = run_config(stage, *case).optim
        last = STEPS - 1
        lr = optim.base_lr / 8 * (1 + np.cos(np.pi * (last - WARMUP) / (TOTAL - WARMUP))) / 2
        assert metrics["lr"] == pytest.approx(lr, rel=1e-12)
        decay = 1 - 0.01 * (1 + np.cos(np.pi * last / TOTAL)) / 2
        assert metrics["ema_decay"] == pytest.approx(decay, rel=1e-12)


@pytest.mark.parametrize("case", RESUMED, ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(
    seen: list[dict[str, Any]], stage: int, case: tuple[str, str]
) -> None:
    both = [rank["resume"][stage, *case] for rank in seen]
    for runs in both:
        assert runs["resumed"] == runs["straight"]
        assert runs["straight"]["losses"][0] != runs["straight"]["losses"][1]
    assert both[0]["straight"]["drawn"] != both[1]["straight"]["drawn"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_with_a_non_finite_loss_on_one_rank_never_happened(
    seen: list[dict[str, Any]], stage: int
) -> None:
    for rank in seen:
        skipping = rank["skipping"][stage]
        assert skipping["metrics"] == [(1.0, np.inf), (2.0, np.inf)]
        assert skipping["unchanged"]
        assert skipping["same"]
        assert skipping["step"] == 7


def test_a_run_that_can_no_longer_step_stops_on_all_ranks(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["endless"] == seen[1]["endless"]
    assert "10 steps on end" in seen[0]["endless"]


def test_a_rank_that_cannot_save_stops_the_commit_and_not_the_run(
    seen: list[dict[str, Any]],
) -> None:
    for rank in seen:
        first, second = rank["failing saves"]["refusals"]
        assert first.startswith("rank 1: ")
        assert second.startswith("rank 0: ")
        assert rank["failing saves"]["same"]
        assert rank["failing saves"]["saved"] == 2


def test_other_layouts_and_broken_weights_are_refused_in_one_line(
    seen: list[dict[str, Any]],
) -> None:
    for rank in seen:
        assert rank["wrong loads"]["stage"].endswith("was saved with zero_stage 1, not 2")
        assert rank["wrong loads"]["ranks"].endswith("was saved with world_size 4, not 2")
        assert "holds a shard of LARS per weight" in rank["wrong loads"]["lars"]
        assert rank["wrong loads"]["nan"] == "the weights after step 0 are not finite"


def test_an_export_is_the_evaluated_backbone_in_plain_tensors(
    seen: list[dict[str, Any]], folder: Path
) -> None:
    whole = {f"{branch}.{kind}" for branch in BRANCHES for kind in ("json", "safetensors")}
    assert {p.name for p in (folder / "export").iterdir()} == whole
    found = seen[0]["exports"]
    for branch in BRANCHES:
        path = folder / "export" / f"{branch}.safetensors"
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        card = json.loads(path.with_suffix(".json").read_text())
        assert card == description().as_json() | {"sha256": sha256}
        backbone, _ = build_backbone("resnet18_c16", image_size=16)
        backbone.load_state_dict(load_file(path))
        for name, value in arrays(backbone).items():
            np.testing.assert_array_equal(value, found[branch][f"backbone.{name}"])
    assert found["failure"] == seen[1]["exports"]["failure"]
    assert found["failure"].startswith("rank 0: ")


def one_rank() -> list[dict[str, Any]]:
    return [equality_run(run_config(stage, "vje", "adamw", 0.3)) for stage in (0, 1)]


@pytest.mark.slow
def test_one_rank_is_one_plain_process(plain: Any) -> None:
    for run in run_ranks(one_rank, 1)[0]:
        assert_equal_runs(run, plain("vje", "adamw", 0.3))


def compiled() -> dict[str, Any]:
    found = equality_run(run_config(1, "byol", "sgd", compile=True))
    return found | {"counted": dict(torch._dynamo.utils.counters["stats"])}


def two_ranks_for_long() -> dict[str, Any]:
    return {"compiled": compiled(), "equality": equality_runs(SLOW)}


@pytest.fixture(scope="module")
def seen_late() -> list[dict[str, Any]]:
    """What each of two ranks saw of what takes long."""
    return run_ranks(two_ranks_for_long, 2, timeout_s=1200)


@pytest.mark.slow
def test_two_ranks_are_one_plain_process_for_every_method_and_optimizer(
    seen_late: list[dict[str, Any]], plain: Any
) -> None:
    for rank in seen_late:
        for (_, *case), ours in rank["equality"].items():
            assert_equal_runs(ours, plain(*case))


@pytest.mark.slow
def test_the_compiled_network_is_the_plain_one_its_batch_norm_over_both_ranks_included(
    seen_late: list[dict[str, Any]], plain: Any
) -> None:
    for rank in seen_late:
        assert_equal_runs(rank["compiled"], plain("byol", "sgd"))
        # Else what was compared was not compiled, or fell to pieces at each collective.
        assert rank["compiled"]["counted"]["unique_graphs"] == 1
