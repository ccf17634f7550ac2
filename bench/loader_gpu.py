"""What a GPU adds to the loader's measurement: how busy it is, and who lives on the views."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from threading import Event, Thread

import torch

from vssl_dist import dist
from vssl_dist.config import RunConfig
from vssl_dist.data.loader import Batch
from vssl_dist.engine import Engine
from vssl_dist.methods import LossOutput, build_method
from vssl_dist.models.determinism import select_kernels

SINGLE_RANK_ENVIRONMENT = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}


def endless_training_steps(cfg: RunConfig, device: str) -> Iterator[LossOutput]:
    """Training steps of one rank whose views are always there: what a loader has to keep up with.

    Opens the process group of this process.

    Args:
        cfg: The run; ``accumulate`` is 1.
        device: ``"cpu"`` or ``"cuda"``.
    """
    os.environ.update(SINGLE_RANK_ENVIRONMENT)
    dist.init(device)
    select_kernels(cfg.engine.deterministic, device)  # as training does
    method = build_method(cfg.method, cfg.data.image_size, cfg.data.sides)
    # So far from the end that the learning rate stays at the foot of its warm-up: noise is no data.
    engine = Engine(cfg, method, total_steps=10**9, steps_per_epoch=10**6, device=device)
    rows = cfg.optim.global_batch
    views = [torch.randn(rows, 3, side, side, device=device) for side in cfg.data.sides]
    labels = torch.zeros(rows, dtype=torch.int64, device=device)
    batch = Batch(torch.arange(rows), views, labels)
    while True:
        yield engine.train_step([batch])


class BusyMonitor:
    """Within, looks every so often at how busy something is.

    Args:
        read: Percent of the last moments in which it was, such as `torch.cuda.utilization`, whose
            moments are up to a second long: what is measured must last several.
        every_s: Seconds between two looks.

    >>> import time
    >>> with BusyMonitor(lambda: 50.0, every_s=0.01) as busy:
    ...     time.sleep(0.1)
    >>> busy.mean_percent
    50.0
    """

    def __init__(self, read: Callable[[], float], every_s: float = 0.1) -> None:
        self._read_percent, self._every_s = read, every_s
        self._percents: list[float] = []
        self._stop_event = Event()
        self._thread = Thread(target=self._sample_percents, daemon=True)

    def __enter__(self) -> BusyMonitor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_event.set()
        self._thread.join()

    @property
    def mean_percent(self) -> float:
        """Mean of what was seen; not a number if that was too short to see anything."""
        return statistics.fmean(self._percents) if self._percents else float("nan")

    def _sample_percents(self) -> None:
        while not self._stop_event.wait(self._every_s):
            self._percents.append(self._read_percent())
