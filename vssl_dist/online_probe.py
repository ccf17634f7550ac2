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
from vssl_dist.exports.write import ONLINE_PART
from vssl_dist.models.linear_probe import Probe, Scaling

_STATE_FILE_NAME = f"{ONLINE_PART}.safetensors"
_SGD_MOMENTUM = 0.9
_RUNNING_MOMENTS_RATE = 0.1
_VARIANCE_EPS = 1e-5


class OnlineProbe:
    """Multinomial logistic regression by SGD on features scaled by their batch's moments.

    The accuracy that it logs is of images before it learns from them: augmented training images,
    classified while the features still change, and so below what a probe of the finished backbone
    reaches.  Task ``linear`` says what it makes of held-out images: each export holds the probe as
    it then was.  With accumulation it learns from the last micro-step of each step.

    Args:
        cfg: Its learning rate.
        classes: Number of classes of the training set.
        total_steps: Step at which its learning rate ends.
    """

    def __init__(self, cfg: OnlineConfig, classes: int, total_steps: int) -> None:
        self.cfg = cfg
        self.classes = classes
        self.total_steps = total_steps
        # Empty until the first step tells the width of the features.
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
        x = dist.all_gather(embedding.detach().float())
        y = dist.all_gather(labels)
        var, mean = torch.var_mean(x, dim=0, correction=0)
        if not self._state:
            self._state = self._start(mean, var)
        is_labelled = (y >= 0) & (y < self.classes)
        y = torch.where(is_labelled, y, 0)
        # The column of ones makes the table's last row the biases.
        x = F.pad((x - mean) / (var + _VARIANCE_EPS).sqrt(), (0, 1), value=1.0)
        logits = x @ self._state["table"]
        logit_gradient = (logits.softmax(1) - F.one_hot(y, self.classes)) * is_labelled[:, None]
        gradient = x.T @ logit_gradient / is_labelled.sum().clamp_min(1)
        velocity = _SGD_MOMENTUM * self._state["velocity"] + gradient
        peak_lr = self.cfg.lr * len(x) / 256
        step_lr = schedule.cosine(step - 1, self.total_steps, peak_lr, 0.0)
        is_correct = (logits.argmax(1) == y) & is_labelled
        self._update("velocity", velocity, gradient)
        self._update("table", self._state["table"] - step_lr * self._state["velocity"], gradient)
        self._update("mean", self._state["mean"].lerp(mean, _RUNNING_MOMENTS_RATE), gradient)
        self._update("var", self._state["var"].lerp(var, _RUNNING_MOMENTS_RATE), gradient)
        # Counted on the device: reading them would make the host wait at every step.
        self._state["right"] += is_correct.sum()
        self._state["seen"] += is_labelled.sum()

    def pop_metrics(self) -> dict[str, float]:
        """Return ``online_top1`` since the last call, over all ranks; nothing if nothing was seen.

        The counts begin anew.
        """
        if not self._state or not self._state["seen"]:
            return {}
        correct_count = self._state["right"].item()
        seen_count = self._state["seen"].item()
        self._state["right"].zero_()
        self._state["seen"].zero_()
        return {"online_top1": correct_count / seen_count}

    def export_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return what an export holds: ``weight`` ``(D, C)``, ``bias`` ``(C,)`` for raw features.

        The features' moments are the running ones of the last batches.
        """
        if not self._state:
            return {}
        table = self._state["table"]
        scaling = Scaling(self._state["mean"], (self._state["var"] + _VARIANCE_EPS).sqrt())
        return {ONLINE_PART: Probe.of_scaled(table[:-1], table[-1], scaling)._asdict()}

    def save(self, folder: Path) -> None:
        """Write all that the next step depends on; every rank calls this."""
        if dist.rank() == 0:
            save_file(
                {name: tensor.contiguous() for name, tensor in self._state.items()},
                folder / _STATE_FILE_NAME,
            )

    def load(self, folder: Path, device: str) -> None:
        """Continue as if :meth:`save` had just returned.

        Raises:
            Exception: The file is no such state, or that of a probe of other features.
        """
        stored_state = load_file(folder / _STATE_FILE_NAME, device=device)
        if stored_state:  # it is empty before the first step
            # The stored mean tells the width, and every other tensor must fit it.
            expected_state = self._start(stored_state["mean"].float(), stored_state["mean"].float())
            if (
                _shapes_and_dtypes(stored_state) != _shapes_and_dtypes(expected_state)
                or stored_state["mean"].ndim != 1
            ):
                raise ValueError(f"{_STATE_FILE_NAME} holds other tensors than a probe's")
        self._state = stored_state

    def _start(self, mean: Tensor, var: Tensor) -> dict[str, Tensor]:
        """Make a state of zeros: the objective is convex, and no generator is touched."""
        zero_table = mean.new_zeros(len(mean) + 1, self.classes)
        zero_count = torch.zeros((), dtype=torch.int64, device=mean.device)
        # Moments that are not finite would never leave a running average.
        moments = {"mean": mean.nan_to_num(), "var": var.nan_to_num(1.0)}
        zero_counts = {"right": zero_count, "seen": zero_count.clone()}
        return {"table": zero_table, "velocity": zero_table.clone()} | moments | zero_counts

    def _update(self, name: str, value: Tensor, gradient: Tensor) -> None:
        """Set a tensor of the state, unless the gradient is not finite."""
        # Chosen on the device, like the counts.
        self._state[name] = torch.where(gradient.isfinite().all(), value, self._state[name])


def _shapes_and_dtypes(state: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}


class NoOnlineProbe:
    """The probe of a run without one, so that the loop never asks."""

    def step(self, embedding: Tensor, labels: Tensor, step: int) -> None:
        """Learn nothing."""

    def pop_metrics(self) -> dict[str, float]:
        """Return no metrics."""
        return {}

    def export_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return no tensors to export."""
        return {}

    def save(self, folder: Path) -> None:
        """Write nothing."""

    def load(self, folder: Path, device: str) -> None:
        """Read nothing."""


def build_online_probe(
    cfg: OnlineConfig | None, classes: int, total_steps: int
) -> OnlineProbe | NoOnlineProbe:
    """Build the probe of a run, or one that does nothing where the config asks for none.

    Raises:
        DataError: The training set has no classes to tell apart.
    """
    if cfg is None:
        return NoOnlineProbe()
    if classes < 2:
        raise DataError(
            f"online: the training set has {classes} classes, there is nothing for a probe to "
            "tell apart: leave out the key online"
        )
    return OnlineProbe(cfg, classes, total_steps)
