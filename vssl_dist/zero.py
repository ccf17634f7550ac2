"""What DeepSpeed is told: its whole configuration, derived from ours, and how it is started."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch
from torch import nn

from vssl_dist import dist
from vssl_dist.config import RunConfig


def ds_config(cfg: RunConfig, world_size: int, size: int) -> dict[str, Any]:
    """The dictionary for ``deepspeed.initialize``; there is no second file that could drift.

    Args:
        cfg: The run.
        world_size: Ranks.
        size: Parameters of the student.
    """
    stage = cfg.engine.zero_stage
    bucket = size + size % 2  # it takes no odd ones
    return {
        "train_micro_batch_size_per_gpu": cfg.micro_batch(world_size),
        "gradient_accumulation_steps": cfg.optim.accumulate,
        # Unset means 1.0.  At stage 0 the engine clips: it has the norm already, which DeepSpeed
        # then neither gives away nor checks.
        "gradient_clipping": cfg.optim.clip if stage > 0 else 0.0,
        # Not "bf16", which casts the student itself, batch norm and all.  The empty list: there
        # is no module whose gradients may be averaged in bfloat16.
        "torch_autocast": {
            "enabled": cfg.engine.autocast != "none",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        # Buckets are allocated in full, at every step: no larger than what there is to send.
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def under_deepspeed(
    cfg: RunConfig, student: nn.Module, optimizer: torch.optim.Optimizer, device: str
) -> Any:
    """The student as a DeepSpeed engine, which is called alike.

    Args:
        cfg: The run.
        student: On ``device``.
        optimizer: Of its parameters.
        device: ``"cpu"`` or ``"cuda"``.
    """
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read on import
    import deepspeed  # here, because a login node has no use for it

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # It calls, at every step, what torch has since given another name.
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor`", FutureWarning)
    # On a CPU it would compile an all-reduce for inference, which nothing here calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = ds_config(cfg, dist.world_size(), size=sum(p.numel() for p in student.parameters()))
    engine, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=config)
    if cfg.engine.compile:
        engine.compile()
    return engine
