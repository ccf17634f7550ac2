"""Steps of the shipped recipes under DeepSpeed, without data and fed by the loader."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from bench.gpu.section import Results, Setting, as_error, measure_step, step_ms
from bench.loader_gpu import SINGLE_RANK_ENVIRONMENT
from vssl_dist import config, dist
from vssl_dist.config import RunConfig
from vssl_dist.data.loader import Batch
from vssl_dist.engine import Engine
from vssl_dist.methods import CONFIGS, build_method
from vssl_dist.models.determinism import select_kernels

_CONFIGS = Path(__file__).parents[2] / "configs"
_FLAGS: Sequence[Sequence[str]] = (
    ["optim.global_batch=64"],
    ["optim.global_batch=256"],
    ["optim.global_batch=64", "engine.deterministic=false"],
    ["optim.global_batch=32"],
    ["optim.global_batch=512"],
    ["optim.global_batch=64", "engine.zero_stage=0"],
    ["optim.global_batch=64", "engine.compile=true"],
)


def measure_recipe(name: str, setting: Setting) -> Results:
    """Images (of all their views) per second of `Engine.train_step` on views that lie ready.

    Args:
        name: Of the shipped config.
        setting: Where it runs.
    """
    _join_process_group(setting)
    flags = (["optim.global_batch=16"],) if setting.is_dry else _FLAGS
    for overrides in flags:
        if setting.is_over:
            return
        title = " ".join(overrides)
        try:
            yield title, _recipe_figures(_recipe(name, overrides, setting), setting)
        except Exception as error:
            yield title, as_error(error)


def _join_process_group(setting: Setting) -> None:
    os.environ |= SINGLE_RANK_ENVIRONMENT | {"DS_ACCELERATOR": setting.device}
    dist.init(setting.device)


def _recipe(name: str, overrides: Iterable[str], setting: Setting) -> RunConfig:
    tiny: Sequence[str] = ()
    if setting.is_dry:
        is_vit = "vit" in name
        backbone = "vit_tiny_patch16_224" if is_vit else "resnet10_c16"
        tiny = [f"method.backbone={backbone}", "data.image_size=32"]
    path = _CONFIGS / f"{name}.yaml"
    return config.load(path, [*tiny, "data.streams=1", *overrides], methods=CONFIGS)


def _build_engine(cfg: RunConfig, device: str) -> Engine:
    select_kernels(cfg.engine.deterministic, device)
    method = build_method(cfg.method, cfg.data.image_size, cfg.data.sides)
    # So far from the end that the learning rate stays at the foot of its warm-up: noise is no data.
    return Engine(cfg, method, total_steps=10**9, steps_per_epoch=10**6, device=device)


def _ready_batch(cfg: RunConfig, device: str) -> Batch:
    rows = cfg.optim.global_batch
    views = [torch.randn(rows, 3, side, side, device=device) for side in cfg.data.sides]
    labels = torch.zeros(rows, dtype=torch.int64, device=device)
    return Batch(torch.arange(rows), views, labels)


def _recipe_figures(cfg: RunConfig, setting: Setting) -> dict[str, Any]:
    engine, batch = _build_engine(cfg, setting.device), _ready_batch(cfg, setting.device)
    step = partial(engine.train_step, [batch])
    on_gpu = setting.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    figures = measure_step(step, setting)
    figures["images_per_s"] = 1000 * cfg.optim.global_batch / figures["step_ms"]
    if on_gpu:
        figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return figures


def measure_feeding(setting: Setting) -> Results:
    """The loader alone, the steps alone, and both: what one takes from the other.

    ``data_wait_share`` is the share of the time in which a step waits for its views.
    """
    from bench.loader import write_shards
    from bench.loader_ours import our_batches, run_config
    from bench.shard import write_folder

    _join_process_group(setting)
    rows, images, batches, side = (8, 32, 2, 32) if setting.is_dry else (256, 2048, 20, 224)
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder) / "images", images)
        shards = write_shards(Path(folder) / "images", Path(folder) / "shards")
        data = run_config(shards, batch=rows, cores=cores, side=side)
        fed_batches = our_batches(data, setting.device)
        for _ in islice(fed_batches, 6):  # what lies ready, and the pipelines' start
            pass
        start = time.perf_counter()
        for _ in islice(fed_batches, batches):
            pass
        setting.synchronise()
        yield "loader_images_per_s", rows * batches / (time.perf_counter() - start)
        cfg = _recipe("in1k_vje", [f"optim.global_batch={rows}"], setting)
        engine, ready = _build_engine(cfg, setting.device), _ready_batch(cfg, setting.device)
        yield (
            "steps_images_per_s",
            1000 * rows / step_ms(partial(engine.train_step, [ready]), setting),
        )
        waited_s, start = 0.0, time.perf_counter()
        for _ in range(batches):
            begin = time.perf_counter()
            batch = next(fed_batches)
            waited_s += time.perf_counter() - begin
            engine.train_step([batch])
        setting.synchronise()
        seconds = time.perf_counter() - start
        yield "fed_images_per_s", rows * batches / seconds
        yield "data_wait_share", waited_s / seconds
