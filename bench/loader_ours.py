"""This project's loader as one of those that are measured, and where its time goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.loader_peers import RECIPE_NAME, VIEW_SIDE, Batches
from vssl_dist.config import RunConfig
from vssl_dist.data.backends.base import BackendSpec
from vssl_dist.data.backends.build import build_backend
from vssl_dist.data.damage.replace import read_with_substitutes
from vssl_dist.data.loader import build_loader
from vssl_dist.data.plan import SampleOrder
from vssl_dist.data.store.dataset import Dataset, Samples
from vssl_dist.data.views import draw
from vssl_dist.methods.vje import VJEConfig

NUM_STREAMS = 4
READ_STAGE, RENDER_STAGE = "read and check", "decode and render"


def run_config(
    shards: Path, *, batch: int, cores: int, side: int = VIEW_SIDE, backend: str = "dali"
) -> RunConfig:
    """A run of one rank over the shards: two views of ``side`` pixels of each image."""
    return RunConfig.model_validate(
        {
            "name": "bench",
            "method": VJEConfig(),
            "data": {
                "train": str(shards),
                "image_size": side,
                "views": [RECIPE_NAME, RECIPE_NAME],
                "streams": NUM_STREAMS,
                "window": 256,
                "threads": cores,
                "backend": backend,
            },
            "optim": {"base_lr": 0.1, "epochs": 1, "global_batch": batch},
        }
    )


def our_batches(cfg: RunConfig, device: str = "cpu") -> Batches:
    """Its batches, for ever."""
    return iter(build_loader(cfg, rank=0, world_size=1, device=device))


def stage_seconds(cfg: RunConfig, batches: int, device: str) -> dict[str, float]:
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
    seconds_by_stage: dict[str, float] = {}

    def timed(stage: str, stage_function: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = stage_function()
        seconds_by_stage[stage] = seconds_by_stage.get(stage, 0.0) + time.perf_counter() - start
        return result

    def time_batch(batch_start: int) -> None:
        ids, epochs = timed("plan", lambda: plan.micro_batch_ids(batch_start, 0, 1))

        def render(samples: Samples) -> list[torch.Tensor]:
            sizes = np.stack([samples.height, samples.width], axis=1)
            views = list(enumerate(data.views))
            draws = timed("draw", lambda: [draw(r, 0, v, ids, epochs, sizes) for v, r in views])
            rendered_views: list[torch.Tensor] = timed(
                RENDER_STAGE, lambda: backend(samples, draws)
            )
            return rendered_views

        timed(READ_STAGE, lambda: read_with_substitutes(dataset, ids, render))

    for number in range(batches + 1):
        if number == 1:  # the batch before has built the pipeline
            seconds_by_stage.clear()
        time_batch(number * plan.micro_batch)
    seconds_by_stage[READ_STAGE] -= seconds_by_stage["draw"] + seconds_by_stage[RENDER_STAGE]
    return seconds_by_stage


def print_stage_shares(seconds_by_stage: dict[str, float]) -> None:
    """Print the stages' shares."""
    total_s = sum(seconds_by_stage.values())
    print("\n| stage of vssl-dist, DALI | share of its time |\n|---|---|")
    for stage, seconds in seconds_by_stage.items():
        print(f"| {stage} | {seconds / total_s:.2%} |")
    print(
        f"| all but decoding and rendering | {1 - seconds_by_stage[RENDER_STAGE] / total_s:.2%} |"
    )
