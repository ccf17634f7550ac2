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

from vssl_dist.console.bars import progress_bar
from vssl_dist.evaluation.scores.probe import ProbeData, accuracy, blocks, fit_scaling, split
from vssl_dist.evaluation.scores.sgd_probes import Optimizer, train_sgd_probes
from vssl_dist.models.linear_probe import Probe, Scaling

_MOST_ITERATIONS = 500


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


def fit_logistic(
    data: ProbeData, l2: Sequence[float], *, tolerance: float = 1e-5
) -> dict[float, Probe]:
    """Fit multinomial logistic regressions: mean cross-entropy + ``l2 / 2 * |weights|^2``.

    Weights are those of scaled features; biases are not penalised.  scikit-learn's ``C`` is
    ``1 / (l2 * rows)``.  L-BFGS starts from the next larger ``l2``'s solution; features are read
    a block at a time.

    Args:
        data: Images and labels.
        l2: Weights of the penalty.
        tolerance: Largest entry of the gradient at the end, if rounding allows.

    Returns:
        A float64 probe on the CPU for each ``l2``.
    """
    data = data.contiguous()
    scaling = fit_scaling(data.features, data.rows)
    width = len(scaling.mean)
    flat_table: NDArray[np.float64] = np.zeros((width + 1) * data.classes)
    probes = {}
    # SciPy's few and tiny products would keep all cores busy waiting, which the loss needs.
    with progress_bar() as progress, threadpool_limits(1, user_api="blas"):
        bar = progress.add_task("logistic regression", total=len(l2))
        # From strong to weak: a flat problem's solution is a good start for the next sharper one.
        for penalty in sorted(l2, reverse=True):
            solution = minimize(
                lambda flat, penalty=penalty: _loss(flat, data, scaling, penalty),
                flat_table,
                jac=True,
                method="L-BFGS-B",
                options={"maxiter": _MOST_ITERATIONS, "gtol": tolerance, "ftol": 1e-12},
            )
            flat_table = solution.x
            table = torch.from_numpy(flat_table.reshape(width + 1, data.classes).copy())
            probes[penalty] = Probe.of_scaled(table[:-1], table[-1], scaling)
            progress.update(bar, advance=1)
    return {penalty: probes[penalty] for penalty in l2}


def _loss(
    flat_table: NDArray[np.float64], data: ProbeData, scaling: Scaling, l2: float
) -> tuple[float, NDArray[np.float64]]:
    """Compute the objective and its gradient at a table ``(D + 1, C)`` of weights and biases."""
    table = torch.from_numpy(flat_table.reshape(-1, data.classes))
    # Logits from raw features by the equivalent probe: scaled features are never stored.
    probe = Probe.of_scaled(table[:-1], table[-1], scaling)
    loss = 0.0
    gradient = torch.zeros_like(table)
    for x, labels in blocks(data.features, data.rows):
        x, labels = x.to(data.device), labels.to(data.device)
        logits = x @ probe.weight.to(x) + probe.bias.to(x)
        log_p = logits.double().log_softmax(1)
        loss -= float(log_p.gather(1, labels[:, None]).sum())
        residual = log_p.exp() - F.one_hot(labels, data.classes)
        gradient[:-1] += (x.T @ residual.to(x)).double().cpu()
        gradient[-1] += residual.sum(0).cpu()
    # What the raw features give, as the gradient with respect to scaled ones.
    gradient[:-1] = (gradient[:-1] - scaling.mean[:, None] * gradient[-1]) / scaling.std[:, None]
    gradient /= len(data.rows)
    gradient[:-1] += l2 * table[:-1]
    penalty = 0.5 * l2 * float(table[:-1].square().sum())
    return loss / len(data.rows) + penalty, gradient.numpy().ravel()


def choose_l2(data: ProbeData, l2: Sequence[float], held_out: float, seed: int) -> L2Choice:
    """Choose among ``l2`` on held-out training images.

    Returns:
        ``l2``, ``held_out`` (accuracy of each on how many ``held_out_images``); the middle one
        where no image can be held out.  Of equal ones the larger wins.
    """
    fit_rows, held_out_rows = split(data.features.labels, data.rows, held_out, seed)
    if not len(held_out_rows) or len(l2) == 1:
        return {"l2": sorted(l2)[len(l2) // 2], "held_out": {}, "held_out_images": 0}
    # Looser than the final fit: it only has to rank the penalties.
    probes = fit_logistic(data.with_rows(fit_rows), l2, tolerance=1e-4)
    top1 = {
        penalty: accuracy(probe, data.features, held_out_rows).top1
        for penalty, probe in probes.items()
    }
    best = max(top1, key=lambda penalty: (top1[penalty], penalty))
    return {
        "l2": best,
        "held_out": {f"{penalty:g}": value for penalty, value in top1.items()},
        "held_out_images": len(held_out_rows),
    }


def choose_lr(
    data: ProbeData,
    lr: Sequence[float],
    held_out: float,
    *,
    epochs: int,
    batch: int,
    optimizer: Optimizer = "sgd",
) -> LrChoice:
    """Choose among learning rates on held-out training images; see `choose_l2`.

    Of equal ones the smaller wins.
    """
    fit_rows, held_out_rows = split(data.features.labels, data.rows, held_out, seed=0)
    if not len(held_out_rows) or len(lr) == 1:
        return {"lr": sorted(lr)[len(lr) // 2], "held_out": {}, "held_out_images": 0}
    fit_data = data.with_rows(fit_rows)
    probes = train_sgd_probes(fit_data, lr, [0], epochs=epochs, batch=batch, optimizer=optimizer)
    top1 = {rate: accuracy(probes[0, rate], data.features, held_out_rows).top1 for rate in lr}
    best = max(top1, key=lambda rate: (top1[rate], -rate))
    return {
        "lr": best,
        "held_out": {f"{rate:g}": value for rate, value in top1.items()},
        "held_out_images": len(held_out_rows),
    }
