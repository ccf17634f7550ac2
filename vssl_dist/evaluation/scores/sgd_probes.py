"""Many linear classifiers of the same features, trained at once by gradient descent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vssl_dist.console.bars import make_progress_bar
from vssl_dist.evaluation.scores.probe import ProbeData, compute_scaling
from vssl_dist.models.linear_probe import Probe, Scaling

_SGD_MOMENTUM = 0.9
_LARS_TRUST_COEFFICIENT = 0.001
ProbeOptimizerName = Literal["sgd", "lars"]


def train_sgd_probes(
    probe_data: ProbeData,
    lr: Sequence[float],
    seeds: Sequence[int],
    *,
    epochs: int,
    batch_size: int,
    optimizer: ProbeOptimizerName = "sgd",
) -> dict[tuple[int, float], Probe]:
    """Train a probe for every seed and learning rate at once: one batched product per step.

    Momentum 0.9 and no weight decay; the learning rate is ``lr * batch / 256`` at first and falls
    to 0 on half a cosine.  A seed decides the initial weights and the order.

    Args:
        probe_data: Images and labels.
        lr: Peak learning rates per 256 images.
        seeds: One independent training each.
        epochs: Passes over the images.
        batch_size: Images per step.
        optimizer: SGD, or LARS (You et al., 2017), under which the gradient ``g`` of a weight
            matrix ``w``, though not that of biases, is scaled by ``0.001 |w| / |g|``.

    Returns:
        A float32 probe on the device for each ``(seed, lr)``; not finite where it diverged.
    """
    scaling = compute_scaling(probe_data.features, probe_data.row_numbers)
    probe_grid = _ProbeGrid.draw_initial(probe_data, lr, seeds, len(scaling.mean))
    batch_size = min(batch_size, len(probe_data.row_numbers))
    peak_lr_by_column = (
        torch.tensor(lr, device=probe_data.device).repeat_interleave(probe_data.num_classes)
        * batch_size
        / 256
    )
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    mean, std = (tensor.float().to(probe_data.device) for tensor in scaling)
    steps_per_epoch = math.ceil(len(probe_data.row_numbers) / batch_size)
    with make_progress_bar() as progress:
        bar_id = progress.add_task(f"{optimizer.upper()} probes", total=epochs)
        for epoch in range(epochs):
            image_order_by_seed = torch.stack(
                [
                    torch.randperm(len(probe_data.row_numbers), generator=generator)
                    for generator in generators
                ]
            )
            for step, batch_positions in enumerate(
                torch.split(image_order_by_seed, batch_size, dim=1)
            ):
                rows = probe_data.row_numbers[batch_positions]
                x = probe_data.features.features[rows].float().to(probe_data.device)
                progress_share = (epoch * steps_per_epoch + step) / (epochs * steps_per_epoch)
                probe_grid.step(
                    (x - mean) / std,
                    probe_data.features.labels[rows].to(probe_data.device),
                    peak_lr_by_column * 0.5 * (1 + math.cos(math.pi * progress_share)),
                    optimizer,
                )
            progress.update(bar_id, completed=epoch + 1)
    return probe_grid.probes(lr, seeds, scaling)


class _ProbeGrid:
    """Weights ``(S, D + 1, L * C)`` of S seeds and L learning rates, and their momentum.

    Biases are in the last row.  The probes of one seed stand side by side, because they see the
    same batches: one product serves all learning rates.
    """

    def __init__(self, table: Tensor, classes: int) -> None:
        self.weights_and_biases = table
        self.num_classes = classes
        self.momentum_buffer = torch.zeros_like(table)

    @classmethod
    def draw_initial(
        cls, data: ProbeData, lr: Sequence[float], seeds: Sequence[int], width: int
    ) -> _ProbeGrid:
        """Draw small random weights, the same for every learning rate; biases are 0."""
        table_by_seed = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            weights = 0.01 * torch.randn(width, data.num_classes, generator=generator)
            table_by_seed.append(F.pad(weights, (0, 0, 0, 1)).repeat(1, len(lr)))
        return cls(torch.stack(table_by_seed).to(data.device), data.num_classes)

    def step(
        self, x: Tensor, labels: Tensor, lr_by_column: Tensor, optimizer: ProbeOptimizerName
    ) -> None:
        """Take a step on ``(S, B, D)`` and ``(S, B)`` with a rate ``(L * C,)`` per column."""
        logits = torch.bmm(x, self.weights_and_biases[:, :-1]) + self.weights_and_biases[:, -1:]
        seed_count, batch_images, column_count = logits.shape
        logits_by_probe = logits.view(
            seed_count, batch_images, column_count // self.num_classes, self.num_classes
        )
        one_hot_labels = F.one_hot(labels, self.num_classes)[:, :, None]
        # The gradient of the mean cross-entropy with respect to the logits.
        logit_gradient = ((logits_by_probe.softmax(-1) - one_hot_labels) / batch_images).view_as(
            logits
        )
        self.momentum_buffer *= _SGD_MOMENTUM
        if optimizer == "sgd":
            self.momentum_buffer[:, :-1].baddbmm_(x.transpose(1, 2), logit_gradient)
        else:
            self.momentum_buffer[:, :-1] += self._lars_update(
                torch.bmm(x.transpose(1, 2), logit_gradient)
            )
        self.momentum_buffer[:, -1] += logit_gradient.sum(1)
        self.weights_and_biases -= lr_by_column * self.momentum_buffer

    def _lars_update(self, gradient: Tensor) -> Tensor:
        """Scale the weights' gradient ``(S, D, L * C)`` as LARS does, each probe by itself."""
        shape_by_probe = (*gradient.shape[:2], -1, self.num_classes)
        weight_norm = torch.linalg.vector_norm(
            self.weights_and_biases[:, :-1].view(shape_by_probe), dim=(1, 3)
        )
        gradient_norm = torch.linalg.vector_norm(gradient.view(shape_by_probe), dim=(1, 3))
        is_defined = (weight_norm > 0) & (gradient_norm > 0)
        trust_ratio = torch.where(
            is_defined, _LARS_TRUST_COEFFICIENT * weight_norm / gradient_norm, 1.0
        )
        return gradient * trust_ratio.repeat_interleave(self.num_classes, dim=1)[:, None]

    def probes(
        self, lr: Sequence[float], seeds: Sequence[int], scaling: Scaling
    ) -> dict[tuple[int, float], Probe]:
        """Return the probes of raw features as they are now, by seed and learning rate."""
        scaling = Scaling(
            *(tensor.float().to(self.weights_and_biases.device) for tensor in scaling)
        )
        probes = {}
        for seed, seed_table in zip(seeds, self.weights_and_biases, strict=True):
            for lr_of_probe, table in zip(
                lr, torch.split(seed_table, self.num_classes, dim=1), strict=True
            ):
                probes[seed, lr_of_probe] = Probe.of_scaled(table[:-1], table[-1], scaling)
        return probes
