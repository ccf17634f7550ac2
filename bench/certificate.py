"""Every method's gradient does not depend on the number of ranks, and its loss is the formula's.

    python -m bench.certificate --out docs/certificate.md

World sizes: the gradient of one global batch in float64, two micro-steps, on 1, 2 and 4 processes
(gloo), averaged over the processes as the engine does.  Formulas: `bench.references`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before what a bare Python cannot import
    from vssl_dist.installed import require_packages

    require_packages()

import torch
import torch.distributed as td
import torch.multiprocessing as mp
from torch import Tensor, nn

from bench.references import loss_cases
from vssl_dist import dist
from vssl_dist.config import MethodConfig
from vssl_dist.config.paths import path_argument
from vssl_dist.durable import write_durably
from vssl_dist.environment import no_job_around
from vssl_dist.methods import METHODS, GlobalNoise, MicroStep, build_method
from vssl_dist.methods.barlow_twins import BarlowTwinsConfig
from vssl_dist.methods.byol import BYOLConfig
from vssl_dist.methods.dino import DINOConfig
from vssl_dist.methods.moco_v3 import MoCoV3Config
from vssl_dist.methods.simclr import SimCLRConfig
from vssl_dist.methods.simsiam import SimSiamConfig
from vssl_dist.methods.supervised import SupervisedConfig
from vssl_dist.methods.vicreg import VICRegConfig
from vssl_dist.methods.vje import VJEConfig
from vssl_dist.methods.vssl import VSSLConfig

WORLD_SIZES = (1, 2, 4)
IMAGE_SIZE, MICRO_BATCH_SIZE, NUM_MICRO_STEPS = 8, 16, 2
MIN_COSINE, MAX_NORM_DEVIATION = 0.999999, 1e-5
"""What is promised: at least this cosine, and a ratio of norms this close to 1."""
CONTROL_CASE = "simclr, batch norm per rank"


@dataclass(frozen=True)
class GradientResult:
    """What one world size makes of the global batch."""

    gradient: Tensor
    loss: float
    buffers: Tensor
    """Batch-norm statistics and DINO's centre after the step."""


@dataclass(frozen=True)
class ComparisonRow:
    """One method at one world size, against one process."""

    name: str
    world_size: int
    cosine: float
    norm_ratio: float
    loss: float
    """Relative difference of the loss."""
    buffers: float
    """Largest difference of any buffer, relative to its largest value."""

    @property
    def is_as_promised(self) -> bool:
        """Whether it is as promised."""
        return self.cosine >= MIN_COSINE and abs(self.norm_ratio - 1) <= MAX_NORM_DEVIATION


def method_configs() -> dict[str, MethodConfig]:
    """A small network of every method; VJE and VSSL also in their other branches."""
    network_options: dict[str, Any] = {"backbone": "resnet10_c16"}
    head_options: dict[str, Any] = network_options | {"hidden": 32, "dim": 16}
    return {
        "vje": VJEConfig(**network_options),
        "vje, target ema, 3 samples": VJEConfig(target="ema", samples=3, **network_options),
        "vje, own scales, learnt log radius, beta rising": VJEConfig(
            variances="separate",
            learn_radial_scale=True,
            radial="log",
            beta_warmup_epochs=9.0,
            **network_options,
        ),
        "vssl": VSSLConfig(**head_options),
        "vssl, B and no cosine": VSSLConfig(denoising="B", cosine="none", **head_options),
        "simclr": SimCLRConfig(**head_options),
        "byol": BYOLConfig(**head_options),
        "simsiam": SimSiamConfig(**head_options),
        "moco_v3": MoCoV3Config(temperature=0.2, normalise_prediction=True, **head_options),
        "barlow_twins": BarlowTwinsConfig(**head_options),
        "vicreg": VICRegConfig(**head_options),
        "dino": DINOConfig(
            local_crops=2, hidden=32, bottleneck=16, prototypes=24, **network_options
        ),
        "supervised": SupervisedConfig(classes=5, **network_options),
        CONTROL_CASE: SimCLRConfig(**head_options),
    }


def gradient_on_this_rank(name: str, cfg: MethodConfig) -> GradientResult:
    """Loss and gradient of the global batch, from this rank's rows of it."""
    torch.manual_seed(0)
    build = METHODS[cfg.name][1] if name == CONTROL_CASE else None
    method = build(cfg, IMAGE_SIZE, False) if build else build_method(cfg, IMAGE_SIZE)
    for network in (method.student, method.teacher):
        if network is not None:
            network.double().train()
            _disturb_weights(network)
    rows_per_rank = MICRO_BATCH_SIZE // dist.world_size()
    own_rows = slice(dist.rank() * rows_per_rank, (dist.rank() + 1) * rows_per_rank)
    losses = []
    for micro_step_index in range(NUM_MICRO_STEPS):
        views, labels = draw_micro_batch(cfg, micro_step_index)
        noise = GlobalNoise(1, 3, micro_step_index, dist.rank(), dist.world_size())
        micro_step = MicroStep(noise, 2.5, labels[own_rows])
        loss = method.loss([view[own_rows] for view in views], micro_step).loss
        torch.autograd.backward(loss / NUM_MICRO_STEPS)
        losses.append(loss.detach())
    gradients = [p.grad for p in method.student.parameters() if p.grad is not None]
    gradient = torch.cat([parameter_gradient.flatten() for parameter_gradient in gradients])
    rank_mean = dist.all_reduce(torch.cat([gradient, torch.stack(losses)])) / dist.world_size()
    buffers = torch.cat([b.flatten().double() for b in method.student.buffers()])
    return GradientResult(
        rank_mean[:-NUM_MICRO_STEPS], rank_mean[-NUM_MICRO_STEPS:].mean().item(), buffers
    )


@torch.no_grad()
def _disturb_weights(network: nn.Module) -> None:
    """Weights of a network on its way: no zeros, and a teacher that is not the student."""
    for parameter in network.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, dtype=torch.float64))


def draw_micro_batch(cfg: MethodConfig, number: int) -> tuple[list[Tensor], Tensor]:
    """Views ``(B, 3, S, S)`` of all ranks, and labels; DINO's local crops are half as large."""
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(
        MICRO_BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator, dtype=torch.float64
    )
    views = []
    for view in range(cfg.views_wanted):
        noise = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        size = IMAGE_SIZE if view < 2 else IMAGE_SIZE // 2
        views.append((images + 0.3 * noise)[..., :size, :size])
    return views, torch.randint(5, (MICRO_BATCH_SIZE,), generator=generator)


def _run_rank(rank: int, world_size: int, folder: str, names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    init_url = f"file://{folder}/store"
    td.init_process_group("gloo", init_method=init_url, rank=rank, world_size=world_size)
    result_by_method = {name: gradient_on_this_rank(name, method_configs()[name]) for name in names}
    if rank == 0:
        torch.save(result_by_method, f"{folder}/seen")
    td.barrier()
    td.destroy_process_group()


def results_at_world_size(world_size: int, names: Sequence[str]) -> dict[str, GradientResult]:
    """What ``world_size`` processes make of the same batches; one is this process."""
    if world_size == 1:
        return {name: gradient_on_this_rank(name, method_configs()[name]) for name in names}
    with tempfile.TemporaryDirectory() as folder, no_job_around():
        mp.spawn(  # type: ignore[attr-defined, no-untyped-call]
            _run_rank, (world_size, folder, names), nprocs=world_size
        )
        result_by_method: dict[str, GradientResult] = torch.load(
            Path(folder) / "seen", weights_only=False
        )
    return result_by_method


def comparison_rows(
    names: Sequence[str], world_sizes: Sequence[int] = WORLD_SIZES
) -> list[ComparisonRow]:
    """The table: every world size above 1 against one process."""
    single_process = results_at_world_size(1, names)
    table_rows = []
    for world_size in world_sizes:
        if world_size == 1:
            continue
        several_processes = results_at_world_size(world_size, names)
        table_rows += [
            _comparison_row(name, world_size, single_process[name], several_processes[name])
            for name in names
        ]
    return sorted(table_rows, key=lambda row: (names.index(row.name), row.world_size))


def _comparison_row(
    name: str, world_size: int, single: GradientResult, several: GradientResult
) -> ComparisonRow:
    gradient_norms = single.gradient.norm(), several.gradient.norm()
    cosine = (single.gradient @ several.gradient / (gradient_norms[0] * gradient_norms[1])).item()
    buffers = (single.buffers - several.buffers).abs().max() / single.buffers.abs().max()
    loss = abs(several.loss / single.loss - 1)
    return ComparisonRow(
        name,
        world_size,
        cosine,
        (gradient_norms[1] / gradient_norms[0]).item(),
        loss,
        buffers.item(),
    )


def markdown_report(table_rows: Sequence[ComparisonRow]) -> str:
    """Both tables as Markdown."""
    lines = [
        "# Certificate: the same gradient on any number of ranks, and the right one",
        "",
        f"`python -m bench.certificate` with torch {version('torch')}, float64, gloo on a CPU; "
        f"resnet10_c16, {NUM_MICRO_STEPS} micro-steps of {MICRO_BATCH_SIZE} images of "
        f"{IMAGE_SIZE} pixels, one forward pass per view (DINO: per size of crop), "
        "batch norm synchronised, noise included.",
        "",
        f"Against one process; promised: cosine at least {MIN_COSINE}, ratio of norms within "
        f"{MAX_NORM_DEVIATION:g} of 1.  The control leaves batch norm unsynchronised, "
        "and must fail.",
        "",
        "| method | ranks | 1 - cosine | norm ratio - 1 | loss | buffers | holds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r.name} | {r.world_size} | {abs(1 - r.cosine):.1e} | {r.norm_ratio - 1:+.1e} "
        f"| {r.loss:.1e} | {r.buffers:.1e} | {'yes' if r.is_as_promised else 'no'} |"
        for r in table_rows
    ]
    lines += [
        "",
        "Loss and gradient against a naive reference (`bench/references.py`: loops over images "
        "and pairs), the largest relative error of 5 random inputs.",
        "",
        "| method | loss | gradient |",
        "| --- | --- | --- |",
    ]
    for case in loss_cases():
        errors = [case.errors(seed) for seed in range(5)]
        lines.append(f"| {case.name} | {max(e[0] for e in errors):.1e} "
                     f"| {max(e[1] for e in errors):.1e} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write or print the tables; 1 when a promise does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=path_argument, help="Markdown file; else it is printed")
    out_file: Path | None = parser.parse_args().out
    table_rows = comparison_rows(list(method_configs()))
    text = markdown_report(table_rows)
    if out_file:
        write_durably(out_file, text.encode())
    else:
        print(text)
    return 0 if all(row.is_as_promised == (row.name != CONTROL_CASE) for row in table_rows) else 1


if __name__ == "__main__":
    sys.exit(main())
