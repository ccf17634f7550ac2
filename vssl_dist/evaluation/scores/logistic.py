"""Linear classification of frozen features: logistic regression, and what probes are chosen on.

Features are computed once, without augmentation, and scaled by the mean and standard deviation of
the images that are trained on.  Learning rate and regularisation are chosen on images held out of
the training set, never on those that the accuracy is reported of; then all training images are
used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

from vssl_dist.console.bars import make_progress_bar
from vssl_dist.evaluation.scores.probe import (
    ProbeData,
    compute_scaling,
    iterate_blocks,
    probe_accuracy,
    split_by_class,
)
from vssl_dist.evaluation.scores.sgd_probes import ProbeOptimizerName, train_sgd_probes
from vssl_dist.models.linear_probe import Probe, Scaling

_MAX_LBFGS_ITERATIONS = 500


class L2Choice(TypedDict):
    """A penalty and how it was chosen, as a result file holds them."""

    l2: float
    held_out: dict[str, float]
    """Top-1 accuracy of each penalty on held-out training images."""
    held_out_images: int


class LrChoice(TypedDict):
    """A learning rate and how it was chosen, as a result file holds them."""

    lr: float
    held_out: dict[str, float]
    """Top-1 accuracy of each learning rate on held-out training images."""
    held_out_images: int


def fit_logistic_probes(
    probe_data: ProbeData, l2: Sequence[float], *, gradient_tolerance: float = 1e-5
) -> dict[float, Probe]:
    """Fit multinomial logistic regressions: mean cross-entropy + ``l2 / 2 * |weights|^2``.

    Weights are those of scaled features; biases are not penalised.  scikit-learn's ``C`` is
    ``1 / (l2 * rows)``.  L-BFGS starts from the next larger ``l2``'s solution; features are read
    a block at a time.

    Args:
        probe_data: Images and labels.
        l2: Weights of the penalty.
        gradient_tolerance: Largest entry of the gradient at the end, if rounding allows.

    Returns:
        A float64 probe on the CPU for each ``l2``.
    """
    probe_data = probe_data.with_contiguous_rows()
    scaling = compute_scaling(probe_data.features, probe_data.row_numbers)
    width = len(scaling.mean)
    flat_start: NDArray[np.float64] = np.zeros((width + 1) * probe_data.num_classes)
    probes = {}
    # SciPy's few and tiny products would keep all cores busy waiting, which the loss needs.
    with make_progress_bar() as progress, threadpool_limits(1, user_api="blas"):
        bar_id = progress.add_task("logistic regression", total=len(l2))
        # From strong to weak: a flat problem's solution is a good start for the next sharper one.
        for l2_penalty in sorted(l2, reverse=True):
            minimised = minimize(
                lambda flat_weights, l2_penalty=l2_penalty: _loss_and_gradient(
                    flat_weights, probe_data, scaling, l2_penalty
                ),
                flat_start,
                jac=True,
                method="L-BFGS-B",
                options={
                    "maxiter": _MAX_LBFGS_ITERATIONS,
                    "gtol": gradient_tolerance,
                    "ftol": 1e-12,
                },
            )
            flat_start = minimised.x
            weights_and_biases = torch.from_numpy(
                flat_start.reshape(width + 1, probe_data.num_classes).copy()
            )
            probes[l2_penalty] = Probe.of_scaled(
                weights_and_biases[:-1], weights_and_biases[-1], scaling
            )
            progress.update(bar_id, advance=1)
    return {l2_penalty: probes[l2_penalty] for l2_penalty in l2}


def _loss_and_gradient(
    flat_weights: NDArray[np.float64], probe_data: ProbeData, scaling: Scaling, l2: float
) -> tuple[float, NDArray[np.float64]]:
    """Compute the objective and its gradient at a table ``(D + 1, C)`` of weights and biases."""
    weights_and_biases = torch.from_numpy(flat_weights.reshape(-1, probe_data.num_classes))
    # Logits from raw features by the equivalent probe: scaled features are never stored.
    probe = Probe.of_scaled(weights_and_biases[:-1], weights_and_biases[-1], scaling)
    loss = 0.0
    gradient = torch.zeros_like(weights_and_biases)
    for x, labels in iterate_blocks(probe_data.features, probe_data.row_numbers):
        x, labels = x.to(probe_data.device), labels.to(probe_data.device)
        logits = x @ probe.weight.to(x) + probe.bias.to(x)
        log_probabilities = logits.double().log_softmax(1)
        loss -= float(log_probabilities.gather(1, labels[:, None]).sum())
        logit_gradient = log_probabilities.exp() - F.one_hot(labels, probe_data.num_classes)
        gradient[:-1] += (x.T @ logit_gradient.to(x)).double().cpu()
        gradient[-1] += logit_gradient.sum(0).cpu()
    # What the raw features give, as the gradient with respect to scaled ones.
    gradient[:-1] = (gradient[:-1] - scaling.mean[:, None] * gradient[-1]) / scaling.std[:, None]
    gradient /= len(probe_data.row_numbers)
    gradient[:-1] += l2 * weights_and_biases[:-1]
    penalty = 0.5 * l2 * float(weights_and_biases[:-1].square().sum())
    return loss / len(probe_data.row_numbers) + penalty, gradient.numpy().ravel()


def choose_l2_penalty(
    probe_data: ProbeData, l2: Sequence[float], held_out_share: float, seed: int
) -> L2Choice:
    """Choose among ``l2`` on held-out training images.

    Returns:
        ``l2``, ``held_out`` (accuracy of each on how many ``held_out_images``); the middle one
        where no image can be held out.  Of equal ones the larger wins.
    """
    fit_rows, held_out_rows = split_by_class(
        probe_data.features.labels, probe_data.row_numbers, held_out_share, seed
    )
    if not len(held_out_rows) or len(l2) == 1:
        return {"l2": sorted(l2)[len(l2) // 2], "held_out": {}, "held_out_images": 0}
    # Looser than the final fit: it only has to rank the penalties.
    probes = fit_logistic_probes(probe_data.with_rows(fit_rows), l2, gradient_tolerance=1e-4)
    top1_by_penalty = {
        penalty: probe_accuracy(probe, probe_data.features, held_out_rows).top1
        for penalty, probe in probes.items()
    }
    best_penalty = max(top1_by_penalty, key=lambda penalty: (top1_by_penalty[penalty], penalty))
    return {
        "l2": best_penalty,
        "held_out": {f"{penalty:g}": top1 for penalty, top1 in top1_by_penalty.items()},
        "held_out_images": len(held_out_rows),
    }


def choose_lr(
    probe_data: ProbeData,
    lr: Sequence[float],
    held_out_share: float,
    *,
    epochs: int,
    batch_size: int,
    optimizer: ProbeOptimizerName = "sgd",
) -> LrChoice:
    """Choose among learning rates on held-out training images; see `choose_l2_penalty`.

    Of equal ones the smaller wins.
    """
    fit_rows, held_out_rows = split_by_class(
        probe_data.features.labels, probe_data.row_numbers, held_out_share, seed=0
    )
    if not len(held_out_rows) or len(lr) == 1:
        return {"lr": sorted(lr)[len(lr) // 2], "held_out": {}, "held_out_images": 0}
    fit_data = probe_data.with_rows(fit_rows)
    probes = train_sgd_probes(
        fit_data, lr, [0], epochs=epochs, batch_size=batch_size, optimizer=optimizer
    )
    top1_by_lr = {
        rate: probe_accuracy(probes[0, rate], probe_data.features, held_out_rows).top1
        for rate in lr
    }
    best_lr = max(top1_by_lr, key=lambda rate: (top1_by_lr[rate], -rate))
    return {
        "lr": best_lr,
        "held_out": {f"{rate:g}": top1 for rate, top1 in top1_by_lr.items()},
        "held_out_images": len(held_out_rows),
    }
