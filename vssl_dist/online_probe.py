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
from vssl_dist.errors import DataError
from vssl_dist.exports.write import ONLINE
from vssl_dist.models.linear_probe import Probe, Scaling

_FILE = f"{ONLINE}.safetensors"
_MOMENTUM = 0.9
_MOMENTS = 0.1
_TINY = 1e-5


class OnlineProbe:
    """Multinomial logistic regression by SGD on features scaled by their batch's moments.

    The accuracy that it logs is of images before it learns from them: augmented training images,
    classified while the features still change, and so below what a probe of the finished backbone
    reaches.  Task ``linear`` says what it makes of held-out images: each export holds the probe as
    it then was.  With accumulation it learns from the last micro-step of each step.

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
        var, mean = torch.var_mean(x, dim=0, correction=0)
        if not self._state:
            self._state = self._start(mean, var)
        known = (y >= 0) & (y < self.classes)
        y = torch.where(known, y, 0)
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
        self._move("mean", self._state["mean"].lerp(mean, _MOMENTS), where=gradient)
        self._move("var", self._state["var"].lerp(var, _MOMENTS), where=gradient)
        self._state["right"] += right.sum()
        self._state["seen"] += known.sum()

    def read(self) -> dict[str, float]:
        """``online_top1`` since the last call, over all ranks; nothing if nothing was seen."""
        if not self._state or not self._state["seen"]:
            return {}
        right, seen = self._state["right"].item(), self._state["seen"].item()
        self._state["right"].zero_()
        self._state["seen"].zero_()
        return {"online_top1": right / seen}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What an export holds of it: ``weight`` ``(D, C)`` and ``bias`` ``(C,)`` for raw features.

        The features' moments are the running ones of the last batches.
        """
        if not self._state:
            return {}
        table = self._state["table"]
        scaling = Scaling(self._state["mean"], (self._state["var"] + _TINY).sqrt())
        return {ONLINE: Probe.of_scaled(table[:-1], table[-1], scaling)._asdict()}

    def save(self, folder: Path) -> None:
        """Write all that its next step depends on; every rank calls this."""
        if dist.rank() == 0:
            save_file({k: v.contiguous() for k, v in self._state.items()}, folder / _FILE)

    def load(self, folder: Path, device: str) -> None:
        """Continue as if :meth:`save` had just returned.

        Raises:
            Exception: The file is no such state, or that of a probe of other features.
        """
        state = load_file(folder / _FILE, device=device)
        if state:  # it is empty before the first step
            wanted = self._start(*[state["mean"].float()] * 2)
            kinds = [{k: (t.shape, t.dtype) for k, t in each.items()} for each in (state, wanted)]
            if kinds[0] != kinds[1] or state["mean"].ndim != 1:
                raise ValueError(f"{_FILE} holds other tensors than a probe's")
        self._state = state

    def _start(self, mean: Tensor, var: Tensor) -> dict[str, Tensor]:
        """Zeros: the objective is convex, and no generator is touched."""
        table = mean.new_zeros(len(mean) + 1, self.classes)
        count = torch.zeros((), dtype=torch.int64, device=mean.device)
        # Moments that are not finite would never leave a running average.
        moments = {"mean": mean.nan_to_num(), "var": var.nan_to_num(1.0)}
        counts = {"right": count, "seen": count.clone()}
        return {"table": table, "velocity": table.clone()} | moments | counts

    def _move(self, name: str, value: Tensor, where: Tensor) -> None:
        self._state[name] = torch.where(where.isfinite().all(), value, self._state[name])


class NoProbe:
    """What a run without a probe has, so that the loop never asks."""

    def step(self, embedding: Tensor, labels: Tensor, step: int) -> None:
        """Nothing."""

    def read(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
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
