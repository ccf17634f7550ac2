"""This project's loader as one of those that are measured, and where its time goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.loader_peers import RECIPE, SIDE, Batches
from vssl_dist.config import RunConfig
from vssl_dist.data.backends.base import BackendSpec
from vssl_dist.data.backends.build import build_backend
from vssl_dist.data.damage.replace import read_with_substitutes
from vssl_dist.data.loader import build_loader
from vssl_dist.data.plan import SampleOrder
from vssl_dist.data.store.dataset import Dataset, Samples
from vssl_dist.data.views import draw
from vssl_dist.methods.vje import VJEConfig

STREAMS = 4
READ, RENDER = "read and check", "decode and render"


def run_config(
    shards: Path, *, batch: int, cores: int, side: int = SIDE, backend: str = "dali"
) -> RunConfig:
    """A run of one rank over the shards: two views of ``side`` pixels of each image."""
    return RunConfig.model_validate(
        {
            "name": "bench",
            "method": VJEConfig(),
            "data": {
                "train": str(shards),
                "image_size": side,
                "views": [RECIPE, RECIPE],
                "streams": STREAMS,
                "window": 256,
                "threads": cores,
                "backend": backend,
            },
            "optim": {"base_lr": 0.1, "epochs": 1, "global_batch": batch},
        }
    )


def ours(cfg: RunConfig, device: str = "cpu") -> Batches:
    """Its batches, for ever."""
    return iter(build_loader(cfg, rank=0, world_size=1, device=device))


def stages(cfg: RunConfig, batches: int, device: str) -> dict[str, float]:
    """Seconds that each stage takes for so many batches."""
    dataset = Dataset.open(cfg.data.train)
    data, optim = cfg.data, cfg.optim
    plan = SampleOrder(
        dataset.shard_sizes,
        seed=0,
        streams=data.streams,
        window=data.window,
        global_batch=optim.global_batch,
        accumulate=1,
    )
    spec = BackendSpec(data.views, data.image_size, data.normalise, data.threads, device)
    backend = build_backend("dali", spec)
    spent: dict[str, float] = {}

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        spent[stage] = spent.get(stage, 0.0) + time.perf_counter() - start
        return result

    def shown(at: int) -> None:
        ids, epochs = timed("plan", lambda: plan.micro_batch_ids(at, 0, 1))

        def render(samples: Samples) -> list[torch.Tensor]:
            sizes = np.stack([samples.height, samples.width], axis=1)
            views = list(enumerate(data.views))
            draws = timed("draw", lambda: [draw(r, 0, v, ids, epochs, sizes) for v, r in views])
            made: list[torch.Tensor] = timed(RENDER, lambda: backend(samples, draws))
            return made

        timed(READ, lambda: read_with_substitutes(dataset, ids, render))

    for number in range(batches + 1):
        if number == 1:  # the batch before has built the pipeline
            spent.clear()
        shown(number * plan.micro_batch)
    spent[READ] -= spent["draw"] + spent[RENDER]
    return spent


def report_stages(spent: dict[str, float]) -> None:
    """Print the stages' shares."""
    whole = sum(spent.values())
    print("\n| stage of vssl-dist, DALI | share of its time |\n|---|---|")
    for stage, seconds in spent.items():
        print(f"| {stage} | {seconds / whole:.2%} |")
    print(f"| all but decoding and rendering | {1 - spent[RENDER] / whole:.2%} |")
