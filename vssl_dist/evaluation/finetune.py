"""Fine-tuning: the backbone and a linear classifier trained together on labelled images.

The same job as a probe's with the backbone unfrozen, so images pass through it again and again:
cropped and flipped, as supervised training does, by the data plane and its seeded draws.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vssl_dist import schedule
from vssl_dist.config import FinetuneConfig
from vssl_dist.console.bars import progress_bar
from vssl_dist.data.loader import Batch
from vssl_dist.data.passes import SeededEpoch, finetuning_batches
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.errors import DataError
from vssl_dist.evaluation.features.extract import Forward, Reading, extract
from vssl_dist.evaluation.scores.probe import split


@dataclass(frozen=True)
class Labelled:
    """The images to learn from."""

    dataset: Dataset
    ids: NDArray[np.int64]
    classes: int
    reading: Reading

    @property
    def labels(self) -> NDArray[np.int64]:
        """The class of each."""
        return self.dataset.rows(self.ids)["label"].astype(np.int64)

    def epoch(self, settings: FinetuneConfig, seed: int, epoch: int) -> Iterator[Batch]:
        """Every image once, in an order of its own, as one augmented view.

        The last batch is left out where it is not full, unless it is the only one.

        Raises:
            DataError: A shard cannot be read, storage does not answer, or too many images are
                damaged.
        """
        order = np.random.default_rng([seed, epoch]).permutation(self.ids)
        batches = finetuning_batches(
            self.dataset,
            replace(self.reading.spec(), recipes=(settings.recipe,)),
            SeededEpoch(seed, epoch),
            backend=self.reading.backend,
            batch=settings.train_batch,
            ids=order[: self.steps(settings) * settings.train_batch],
            timeout_s=self.reading.timeout_s,
        )
        # Closed here, because counting may refuse the dataset while batches are still being made.
        with closing(batches):
            yield from self.reading.counted(self.dataset, batches)

    def steps(self, settings: FinetuneConfig) -> int:
        """Optimizer steps of an epoch."""
        return max(len(self.ids) // settings.train_batch, 1)


class Classifier(nn.Module):
    """A backbone and a linear layer, which starts at zero."""

    def __init__(self, network: Forward, width: int, classes: int) -> None:
        super().__init__()
        # What is no module (raw pixels) has nothing to train but the layer.
        self.backbone = (
            copy.deepcopy(network) if isinstance(network, nn.Module) else _Fixed(network)
        )
        self.head = nn.Linear(width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to logits ``(B, C)``."""
        logits: Tensor = self.head(self.backbone(images))
        return logits


class _Fixed(nn.Module):
    def __init__(self, network: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


@dataclass(frozen=True)
class Schedule:
    """One training among those of a task."""

    lr: float
    """Peak learning rate per 256 images."""
    epochs: int
    seed: int = 0
    """Of the order, the views and what is random inside the network."""


class DivergedError(DataError):
    """The loss is not finite any more."""


def best_lr(network: Forward, data: Labelled, settings: FinetuneConfig) -> dict[str, Any]:
    """Choose among ``settings.lr`` on held-out training images, after a short training on the rest.

    Returns:
        ``lr``, ``held_out`` (accuracy of each on how many ``held_out_images``, 0 where it
        diverged); the middle one where no image can be held out.  Of equal ones the smaller wins.
    """
    rates, every = sorted(settings.lr), torch.arange(len(data.ids))
    fit, check = split(torch.from_numpy(data.labels), every, settings.held_out, seed=0)
    if not len(check) or len(rates) == 1:
        return {"lr": rates[len(rates) // 2], "held_out": {}, "held_out_images": 0}
    rest, found = replace(data, ids=data.ids[fit.numpy()]), {}
    for rate in rates:
        plan = Schedule(rate, min(settings.search_epochs, settings.epochs))
        try:
            model, _ = finetune(network, rest, settings, plan)
        except DivergedError:
            found[rate] = 0.0
            continue
        logits = extract(model, data.dataset, data.reading, ids=data.ids[check.numpy()])
        right = logits.features.argmax(1) == logits.labels
        found[rate] = float(right.double().mean())
    best = max(found, key=lambda rate: (found[rate], -rate))
    shown = {f"{rate:g}": value for rate, value in found.items()}
    return {"lr": best, "held_out": shown, "held_out_images": len(check)}


def finetune(
    network: Forward, data: Labelled, settings: FinetuneConfig, plan: Schedule
) -> tuple[Classifier, list[float]]:
    """Train a copy of a backbone and a classifier of its features.

    Args:
        network: ``(B, 3, H, W)`` to ``(B, D)``; stays as it is.
        data: Images and labels.
        settings: How.
        plan: How fast, how long.

    Returns:
        The classifier in eval mode and the mean loss of each epoch.

    Raises:
        DataError: Training diverged, or a shard is damaged.
    """
    device, total = data.reading.device, data.steps(settings) * plan.epochs
    peak = plan.lr * settings.train_batch / 256
    with torch.random.fork_rng(devices=[torch.device(device)] if device != "cpu" else []):
        torch.manual_seed(plan.seed)
        model = _start(network, data)
        optimizer = _optimizer(model, settings, peak)
        losses: list[float] = []
        done = 0
        with progress_bar() as shown:
            task = shown.add_task(f"fine-tuning, lr {plan.lr:g}", total=total)
            for epoch in range(plan.epochs):
                sums = []
                for batch in data.epoch(settings, plan.seed, epoch):
                    rate = schedule.cosine(done, total, peak, 0.0)
                    sums.append(_step(model, optimizer, batch, rate))
                    done += 1
                    shown.update(task, completed=done)
                losses.append(float(torch.stack(sums).mean()))
                if not math.isfinite(losses[-1]):
                    raise DivergedError(
                        f"finetune: the loss is not finite in epoch {epoch + 1}: lower lr "
                        f"({plan.lr:g})"
                    )
    return model.eval(), losses


def _start(network: Forward, data: Labelled) -> Classifier:
    side = data.reading.image_size
    if isinstance(network, nn.Module):
        network.cpu().eval()
    with torch.inference_mode():
        width = network(torch.zeros(1, 3, side, side)).shape[1]
    return Classifier(network, width, data.classes).to(data.reading.device).train()


def _optimizer(model: nn.Module, settings: FinetuneConfig, peak: float) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    free = [p for p in model.parameters() if p.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=peak)
    return torch.optim.SGD(groups, lr=peak, momentum=0.9)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, rate: float) -> Tensor:
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = F.cross_entropy(model(batch.views[0]), batch.labels)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach()
