"""The online probe: a linear classifier that learns beside a method, from its features as they are.

It sees what the backbone makes of the first view of each image, detached, and never touches what
it is given: without it the method's weights are bit for bit the same.  Every rank takes the same
step on the features of all ranks, so it does not matter how many they are.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from vssl_dist import dist, schedule
from vssl_dist.config import OnlineConfig
from vssl_dist.data.shards import DataError

_FILE = "online.safetensors"
_MOMENTUM = 0.9
_TINY = 1e-5


class OnlineProbe:
    """Multinomial logistic regression by SGD on features scaled by their batch's moments.

    The accuracy that it reports is of images before it learns from them: augmented training
    images, classified while the features still change, and so below what a probe of the finished
    backbone reaches.  With accumulation it learns from the last micro-step of each step.

    Args:
        cfg: Its learning rate.
        classes: Of the training set.
        total_steps: Where its learning rate ends.
    """

    def __init__(self, cfg: OnlineConfig, classes: int, total_steps: int) -> None:
        self.cfg, self.classes, self.total_steps = cfg, classes, total_steps
        self._state: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, embedding: Tensor, labels: Tensor, step: int) -> None:
        """Classify, count what is right, then learn; all ranks call this.

        A batch that gives no finite gradient changes nothing.

        Args:
            embedding: This rank's features ``(B, D)`` of any floating dtype.
            labels: ``(B,)`` int64; images whose label is no class are left out.
            step: Optimizer steps that the method has done, this one included.
        """
        x, y = dist.all_gather(embedding.detach().float()), dist.all_gather(labels)
        if not self._state:
            self._state = self._start(x)
        known = (y >= 0) & (y < self.classes)
        y = torch.where(known, y, 0)
        var, mean = torch.var_mean(x, dim=0, correction=0)
        x = F.pad((x - mean) / (var + _TINY).sqrt(), (0, 1), value=1.0)
        logits = x @ self._state["table"]
        residual = (logits.softmax(1) - F.one_hot(y, self.classes)) * known[:, None]
        gradient = x.T @ residual / known.sum().clamp_min(1)
        velocity = _MOMENTUM * self._state["velocity"] + gradient
        peak = self.cfg.lr * len(x) / 256
        rate = schedule.cosine(step - 1, self.total_steps, peak, 0.0)
        right = (logits.argmax(1) == y) & known
        self._move("velocity", velocity, where=gradient)
        self._move("table", self._state["table"] - rate * self._state["velocity"], where=gradient)
        self._state["right"] += right.sum()
        self._state["seen"] += known.sum()

    def read(self) -> dict[str, float]:
        """``online/top1`` since the last call, over all ranks; nothing if nothing was seen."""
        if not self._state or not self._state["seen"]:
            return {}
        right, seen = self._state["right"].item(), self._state["seen"].item()
        self._state["right"].zero_()
        self._state["seen"].zero_()
        return {"online/top1": right / seen}

    def save(self, folder: Path) -> None:
        """Write all that its next step depends on; every rank calls this."""
        if dist.rank() == 0:
            save_file({k: v.contiguous() for k, v in self._state.items()}, folder / _FILE)

    def load(self, folder: Path, device: str) -> None:
        """Continue as if :meth:`save` had just returned."""
        self._state = load_file(folder / _FILE, device=device)

    def _start(self, x: Tensor) -> dict[str, Tensor]:
        """Zeros: the objective is convex, and no generator is touched."""
        table = x.new_zeros(x.shape[1] + 1, self.classes)
        count = torch.zeros((), dtype=torch.int64, device=x.device)
        counts = {"right": count, "seen": count.clone()}
        return {"table": table, "velocity": table.clone()} | counts

    def _move(self, name: str, value: Tensor, where: Tensor) -> None:
        self._state[name] = torch.where(where.isfinite().all(), value, self._state[name])


class NoProbe:
    """What a run without a probe has, so that the loop never asks."""

    def step(self, embedding: Tensor, labels: Tensor, step: int) -> None:
        """Nothing."""

    def read(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def save(self, folder: Path) -> None:
        """Nothing."""

    def load(self, folder: Path, device: str) -> None:
        """Nothing."""


def build_probe(cfg: OnlineConfig | None, classes: int, total_steps: int) -> OnlineProbe | NoProbe:
    """The probe of a run, if it wants one.

    Raises:
        DataError: The training set has no classes to tell apart.
    """
    if cfg is None:
        return NoProbe()
    if classes < 2:
        raise DataError(
            f"online: the training set has {classes} classes, there is nothing for a probe to "
            "tell apart: leave out the key online"
        )
    return OnlineProbe(cfg, classes, total_steps)
