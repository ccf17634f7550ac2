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

from bench.references import cases
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
SIZE, MICRO_BATCH, ACCUMULATE = 8, 16, 2
COSINE, NORM = 0.999999, 1e-5
"""What is promised: at least this cosine, and a ratio of norms this close to 1."""
CONTROL = "simclr, batch norm per rank"


@dataclass(frozen=True)
class Seen:
    """What one world size makes of the global batch."""

    gradient: Tensor
    loss: float
    buffers: Tensor
    """Batch-norm statistics and DINO's centre after the step."""


@dataclass(frozen=True)
class Row:
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
    def holds(self) -> bool:
        """Whether it is as promised."""
        return self.cosine >= COSINE and abs(self.norm_ratio - 1) <= NORM


def methods() -> dict[str, MethodConfig]:
    """A small network of every method; VJE and VSSL also in their other branches."""
    small: dict[str, Any] = {"backbone": "resnet10_c16"}
    head: dict[str, Any] = small | {"hidden": 32, "dim": 16}
    return {
        "vje": VJEConfig(**small),
        "vje, target ema, 3 samples": VJEConfig(target="ema", samples=3, **small),
        "vje, own scales, learnt log radius, beta rising": VJEConfig(
            variances="separate",
            learn_radial_scale=True,
            radial="log",
            beta_warmup_epochs=9.0,
            **small,
        ),
        "vssl": VSSLConfig(**head),
        "vssl, B and no cosine": VSSLConfig(denoising="B", cosine="none", **head),
        "simclr": SimCLRConfig(**head),
        "byol": BYOLConfig(**head),
        "simsiam": SimSiamConfig(**head),
        "moco_v3": MoCoV3Config(temperature=0.2, normalise_prediction=True, **head),
        "barlow_twins": BarlowTwinsConfig(**head),
        "vicreg": VICRegConfig(**head),
        "dino": DINOConfig(local_crops=2, hidden=32, bottleneck=16, prototypes=24, **small),
        "supervised": SupervisedConfig(classes=5, **small),
        CONTROL: SimCLRConfig(**head),
    }


def on_this_rank(name: str, cfg: MethodConfig) -> Seen:
    """Loss and gradient of the global batch, from this rank's rows of it."""
    torch.manual_seed(0)
    build = METHODS[cfg.name][1] if name == CONTROL else None
    method = build(cfg, SIZE, False) if build else build_method(cfg, SIZE)
    for network in (method.student, method.teacher):
        if network is not None:
            network.double().train()
            _disturb(network)
    rows = MICRO_BATCH // dist.world_size()
    mine = slice(dist.rank() * rows, (dist.rank() + 1) * rows)
    losses = []
    for number in range(ACCUMULATE):
        views, labels = micro_batch(cfg, number)
        noise = GlobalNoise(1, 3, number, dist.rank(), dist.world_size())
        now = MicroStep(noise, 2.5, labels[mine])
        loss = method.loss([view[mine] for view in views], now).loss
        torch.autograd.backward(loss / ACCUMULATE)
        losses.append(loss.detach())
    parts = [p.grad for p in method.student.parameters() if p.grad is not None]
    gradient = torch.cat([part.flatten() for part in parts])
    mean = dist.all_reduce(torch.cat([gradient, torch.stack(losses)])) / dist.world_size()
    buffers = torch.cat([b.flatten().double() for b in method.student.buffers()])
    return Seen(mean[:-ACCUMULATE], mean[-ACCUMULATE:].mean().item(), buffers)


@torch.no_grad()
def _disturb(network: nn.Module) -> None:
    """Weights of a network on its way: no zeros, and a teacher that is not the student."""
    for parameter in network.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, dtype=torch.float64))


def micro_batch(cfg: MethodConfig, number: int) -> tuple[list[Tensor], Tensor]:
    """Views ``(MICRO_BATCH, 3, S, S)`` of all ranks, and labels; DINO's local crops are half."""
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(MICRO_BATCH, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    views = []
    for view in range(cfg.views_wanted):
        noise = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        size = SIZE if view < 2 else SIZE // 2
        views.append((images + 0.3 * noise)[..., :size, :size])
    return views, torch.randint(5, (MICRO_BATCH,), generator=generator)


def _rank(rank: int, world_size: int, folder: str, names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    td.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    seen = {name: on_this_rank(name, methods()[name]) for name in names}
    if rank == 0:
        torch.save(seen, f"{folder}/seen")
    td.barrier()
    td.destroy_process_group()


def run(world_size: int, names: Sequence[str]) -> dict[str, Seen]:
    """What ``world_size`` processes make of the same batches; one is this process."""
    if world_size == 1:
        return {name: on_this_rank(name, methods()[name]) for name in names}
    with tempfile.TemporaryDirectory() as folder, no_job_around():
        mp.spawn(  # type: ignore[attr-defined, no-untyped-call]
            _rank, (world_size, folder, names), nprocs=world_size
        )
        seen: dict[str, Seen] = torch.load(Path(folder) / "seen", weights_only=False)
    return seen


def rows(names: Sequence[str], world_sizes: Sequence[int] = WORLD_SIZES) -> list[Row]:
    """The table: every world size above 1 against one process."""
    one = run(1, names)
    found = []
    for world_size in world_sizes:
        if world_size == 1:
            continue
        many = run(world_size, names)
        found += [_row(name, world_size, one[name], many[name]) for name in names]
    return sorted(found, key=lambda row: (names.index(row.name), row.world_size))


def _row(name: str, world_size: int, one: Seen, many: Seen) -> Row:
    norms = one.gradient.norm(), many.gradient.norm()
    cosine = (one.gradient @ many.gradient / (norms[0] * norms[1])).item()
    buffers = (one.buffers - many.buffers).abs().max() / one.buffers.abs().max()
    loss = abs(many.loss / one.loss - 1)
    return Row(name, world_size, cosine, (norms[1] / norms[0]).item(), loss, buffers.item())


def report(found: Sequence[Row]) -> str:
    """Both tables as Markdown."""
    lines = [
        "# Certificate: the same gradient on any number of ranks, and the right one",
        "",
        f"`python -m bench.certificate` with torch {version('torch')}, float64, gloo on a CPU; "
        f"resnet10_c16, {ACCUMULATE} micro-steps of {MICRO_BATCH} images of {SIZE} pixels, one "
        "forward pass per view (DINO: per size of crop), batch norm synchronised, noise included.",
        "",
        f"Against one process; promised: cosine at least {COSINE}, ratio of norms within {NORM:g} "
        "of 1.  The control leaves batch norm unsynchronised, and must fail.",
        "",
        "| method | ranks | 1 - cosine | norm ratio - 1 | loss | buffers | holds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r.name} | {r.world_size} | {abs(1 - r.cosine):.1e} | {r.norm_ratio - 1:+.1e} "
        f"| {r.loss:.1e} | {r.buffers:.1e} | {'yes' if r.holds else 'no'} |"
        for r in found
    ]
    lines += [
        "",
        "Loss and gradient against a naive reference (`bench/references.py`: loops over images "
        "and pairs), the largest relative error of 5 random inputs.",
        "",
        "| method | loss | gradient |",
        "| --- | --- | --- |",
    ]
    for case in cases():
        errors = [case.errors(seed) for seed in range(5)]
        lines.append(f"| {case.name} | {max(e[0] for e in errors):.1e} "
                     f"| {max(e[1] for e in errors):.1e} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write or print the tables; 1 when a promise does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=path_argument, help="Markdown file; else it is printed")
    out: Path | None = parser.parse_args().out
    found = rows(list(methods()))
    text = report(found)
    if out:
        write_durably(out, text.encode())
    else:
        print(text)
    return 0 if all(row.holds == (row.name != CONTROL) for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
