"""Fine-tuning: the backbone and a linear classifier are trained together on labelled images.

A linear probe with an unfrozen backbone: its features change, so images pass through it in every
epoch, cropped and flipped as in supervised training by seeded draws.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vssl_dist import schedule
from vssl_dist.config import FinetuneConfig
from vssl_dist.console.bars import make_progress_bar
from vssl_dist.data.loader import Batch
from vssl_dist.data.passes import SeededEpoch, finetuning_batches
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.errors import DataError
from vssl_dist.evaluation.features.extract import FeatureFunction, ImageReading, extract_features
from vssl_dist.evaluation.scores.probe import split_by_class


@dataclass(frozen=True)
class LabelledImages:
    """The images that a classifier learns from."""

    dataset: Dataset
    ids: NDArray[np.int64]
    """Samples of the dataset that are used."""
    num_classes: int
    """Number of classes."""
    reading: ImageReading

    @property
    def labels(self) -> NDArray[np.int64]:
        """The class of each image, in the order of ``ids``."""
        return self.dataset.rows(self.ids)["label"].astype(np.int64)

    def augmented_batches(self, settings: FinetuneConfig, seed: int, epoch: int) -> Iterator[Batch]:
        """Yield every image once, in the order of this epoch, as one augmented view.

        The last batch is left out where it is not full, unless it is the only one.

        Raises:
            DataError: A shard cannot be read, storage does not answer, or too many images are
                damaged.
        """
        shuffled_ids = np.random.default_rng([seed, epoch]).permutation(self.ids)
        batches = finetuning_batches(
            self.dataset,
            replace(self.reading.backend_spec(), recipes=(settings.recipe,)),
            SeededEpoch(seed, epoch),
            backend=self.reading.backend,
            batch=settings.train_batch,
            ids=shuffled_ids[: self.steps_per_epoch(settings) * settings.train_batch],
            timeout_s=self.reading.timeout_s,
        )
        # Closed here, because counting may refuse the dataset while batches are still being made.
        with closing(batches):
            yield from self.reading.log_substitutions(self.dataset, batches)

    def steps_per_epoch(self, settings: FinetuneConfig) -> int:
        """Return the number of optimizer steps in an epoch."""
        return max(len(self.ids) // settings.train_batch, 1)


class Classifier(nn.Module):
    """A backbone and a linear layer that starts at zero."""

    def __init__(self, network: FeatureFunction, width: int, classes: int) -> None:
        super().__init__()
        # Copied, because several trainings start from the same network.  Raw pixels are no module:
        # there is nothing to train but the layer.
        self.backbone = (
            copy.deepcopy(network) if isinstance(network, nn.Module) else _FunctionModule(network)
        )
        self.head = nn.Linear(width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits ``(B, C)`` of images ``(B, 3, H, W)``."""
        logits: Tensor = self.head(self.backbone(images))
        return logits


class _FunctionModule(nn.Module):
    """A function without weights as a module."""

    def __init__(self, network: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


@dataclass(frozen=True)
class FinetuneRun:
    """The settings in which the trainings of one task differ."""

    lr: float
    """Peak learning rate per 256 images."""
    epochs: int
    seed: int = 0
    """Key of the order, of the views and of what is random inside the network."""


class DivergedError(DataError):
    """Raised when the loss is not finite any more."""


class LrChoice(TypedDict):
    """The chosen learning rate, and what the choice rests on."""

    lr: float
    held_out: dict[str, float]
    """Accuracy on held-out images by learning rate; 0 where training diverged."""
    held_out_images: int


def choose_lr(network: FeatureFunction, data: LabelledImages, settings: FinetuneConfig) -> LrChoice:
    """Choose among ``settings.lr`` on held-out training images, after a short training on the rest.

    Of equally good rates the smallest is chosen; where no image can be held out, the middle one.
    """
    candidate_lrs = sorted(settings.lr)
    image_rows = torch.arange(len(data.ids))
    fit_rows, held_out_rows = split_by_class(
        torch.from_numpy(data.labels), image_rows, settings.held_out, seed=0
    )
    if not len(held_out_rows) or len(candidate_lrs) == 1:
        return {"lr": candidate_lrs[len(candidate_lrs) // 2], "held_out": {}, "held_out_images": 0}
    fit_images = replace(data, ids=data.ids[fit_rows.numpy()])
    accuracy_by_lr: dict[float, float] = {}
    for lr in candidate_lrs:
        short_run = FinetuneRun(lr, min(settings.search_epochs, settings.epochs))
        try:
            classifier, _ = finetune(network, fit_images, settings, short_run)
        except DivergedError:
            accuracy_by_lr[lr] = 0.0
            continue
        # The "features" of the classifier are its logits.
        held_out_logits = extract_features(
            classifier, data.dataset, data.reading, ids=data.ids[held_out_rows.numpy()]
        )
        is_right = held_out_logits.features.argmax(1) == held_out_logits.labels
        accuracy_by_lr[lr] = float(is_right.double().mean())
    best_lr = max(accuracy_by_lr, key=lambda lr: (accuracy_by_lr[lr], -lr))
    held_out_accuracies = {f"{lr:g}": accuracy for lr, accuracy in accuracy_by_lr.items()}
    return {"lr": best_lr, "held_out": held_out_accuracies, "held_out_images": len(held_out_rows)}


def finetune(
    network: FeatureFunction, data: LabelledImages, settings: FinetuneConfig, run: FinetuneRun
) -> tuple[Classifier, list[float]]:
    """Train a copy of a backbone and a classifier of its features.

    Args:
        network: ``(B, 3, H, W)`` to ``(B, D)``; stays as it is.
        data: Images and labels.
        settings: Recipe, optimizer and batch of the task.
        run: Learning rate, length and seed of this training.

    Returns:
        The classifier in eval mode and the mean loss of each epoch.

    Raises:
        DataError: Training diverged, or a shard is damaged.
    """
    device = data.reading.device
    total_steps = data.steps_per_epoch(settings) * run.epochs
    peak_lr = run.lr * settings.train_batch / 256  # the linear scaling rule
    # Forked, so that what the caller draws next does not depend on this training.
    with torch.random.fork_rng(devices=[torch.device(device)] if device != "cpu" else []):
        torch.manual_seed(run.seed)
        classifier = _build_classifier(network, data)
        optimizer = _build_optimizer(classifier, settings, peak_lr)
        mean_loss_by_epoch: list[float] = []
        step = 0
        with make_progress_bar() as progress:
            bar_id = progress.add_task(f"fine-tuning, lr {run.lr:g}", total=total_steps)
            for epoch in range(run.epochs):
                step_losses = []
                for batch in data.augmented_batches(settings, run.seed, epoch):
                    step_lr = schedule.cosine(step, total_steps, peak_lr, 0.0)
                    step_losses.append(_train_step(classifier, optimizer, batch, step_lr))
                    step += 1
                    progress.update(bar_id, completed=step)
                mean_loss_by_epoch.append(float(torch.stack(step_losses).mean()))
                if not math.isfinite(mean_loss_by_epoch[-1]):
                    raise DivergedError(
                        f"finetune: the loss is not finite in epoch {epoch + 1}: lower lr "
                        f"({run.lr:g})"
                    )
    return classifier.eval(), mean_loss_by_epoch


def _build_classifier(network: FeatureFunction, data: LabelledImages) -> Classifier:
    image_side = data.reading.image_size
    if isinstance(network, nn.Module):
        network.cpu().eval()
    # Asked of an image, because a function such as raw_pixels states no width.
    with torch.inference_mode():
        width = network(torch.zeros(1, 3, image_side, image_side)).shape[1]
    return Classifier(network, width, data.num_classes).to(data.reading.device).train()


def _build_optimizer(
    model: nn.Module, settings: FinetuneConfig, peak_lr: float
) -> torch.optim.Optimizer:
    # Biases and the parameters of normalisation layers are vectors; decay is for matrices.
    matrix_params = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vector_params = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    param_groups: list[dict[str, Any]] = [
        {"params": matrix_params, "weight_decay": settings.weight_decay},
        {"params": vector_params, "weight_decay": 0.0},
    ]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(param_groups, lr=peak_lr)
    return torch.optim.SGD(param_groups, lr=peak_lr, momentum=0.9)


def _train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, step_lr: float
) -> Tensor:
    for param_group in optimizer.param_groups:
        param_group["lr"] = step_lr
    loss = F.cross_entropy(model(batch.views[0]), batch.labels)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach()
