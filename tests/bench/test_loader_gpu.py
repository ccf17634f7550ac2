"""What the loader's measurement takes on a GPU: real steps, and how busy it was."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest
import torch

from bench.loader_gpu import BusyMonitor

ROOT = Path(__file__).parents[2]
STEPS = """
from itertools import islice
from pathlib import Path
import torch
from bench.loader_gpu import endless_training_steps
from vssl_dist import config
from vssl_dist.methods import CONFIGS

torch.manual_seed(0)
small = ["method.backbone=resnet10_c16", "optim.global_batch=16", "data.streams=1"]
cfg = config.load(Path("configs/cifar10_vje.yaml"), small, methods=CONFIGS)
for out in islice(endless_training_steps(cfg, "cpu"), 3):
    print(float(out.loss), float(out.metrics["grad_norm"]), float(out.metrics["skipped_steps"]))
"""


def test_steps_are_the_engines_own_and_none_is_skipped() -> None:
    # In a process of its own: it opens a process group.
    done = subprocess.run(
        [sys.executable, "-c", STEPS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rows = [[float(word) for word in line.split()] for line in done.stdout.splitlines()[-3:]]
    assert all(math.isfinite(loss) and norm > 0 for loss, norm, _ in rows)
    assert [skipped for *_, skipped in rows] == [0, 0, 0]


def test_busy_is_the_mean_of_what_was_read_while_it_lasted() -> None:
    readings = count(0, 10)
    with BusyMonitor(lambda: float(next(readings)), every_s=0.005) as busy:
        time.sleep(0.1)
    seen = next(readings) // 10
    assert seen > 2
    assert busy.mean_percent == pytest.approx(5 * (seen - 1))


@pytest.mark.gpu
def test_a_gpu_that_multiplies_matrices_is_seen_at_work() -> None:
    with BusyMonitor(torch.cuda.utilization) as idle:
        time.sleep(2)
    a = torch.randn(8192, 8192, device="cuda")
    with BusyMonitor(torch.cuda.utilization) as busy:
        until = time.monotonic() + 3
        while time.monotonic() < until:
            a @ a
            torch.cuda.synchronize()
    assert busy.mean_percent > 50 > idle.mean_percent
