"""Optimizers, which parameters weight decay reaches, and what changes from step to step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vssl_dist import schedule

if TYPE_CHECKING:  # all else here needs torch alone
    from vssl_dist.config import OptimConfig


def build_optimizer(cfg: OptimConfig, student: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the student's trainable parameters, at the peak learning rate.

    Its groups must exist before DeepSpeed sees it: ZeRO makes one flat vector of each group, in
    which a bias can no longer be told from a weight.  On a GPU a step is one kernel; on a CPU it is
    not, where AdamW's would round otherwise.

    Args:
        cfg: The ``optim`` block.
        student: The network to train, on the device where it will be.
    """
    groups = parameter_groups(cfg, student)
    fused = all(p.is_cuda for group in groups for p in group["params"]) or None
    if cfg.name == "sgd":
        return torch.optim.SGD(groups, lr=cfg.peak_lr, momentum=cfg.momentum, fused=fused)
    if cfg.name == "adamw":
        return torch.optim.AdamW(groups, lr=cfg.peak_lr, betas=cfg.betas, fused=fused)
    return LARS(_weights_in_one_group(groups), cfg)


def parameter_groups(cfg: OptimConfig, student: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters, those that weight decay spares in a group of their own.

    Spared are biases and normalisation weights, which are exactly the parameters with at most
    one dimension; ``decay_norm_and_bias`` treats them like the others.  Empty groups are left
    out.

    >>> from vssl_dist.config import OptimConfig
    >>> cfg = OptimConfig(base_lr=0.1, weight_decay=0.5)
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    >>> [(g["weight_decay"], len(g["params"])) for g in parameter_groups(cfg, net)]
    [(0.5, 1), (0.0, 3)]
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for parameter in student.parameters():
        if parameter.requires_grad:
            spare = parameter.ndim <= 1 and not cfg.decay_norm_and_bias
            (spared if spare else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": cfg.weight_decay, "decays": True},
        {"params": spared, "weight_decay": 0.0, "decays": False},
    ]
    return [group for group in groups if group["params"]]


def apply_schedules(
    optimizer: torch.optim.Optimizer,
    cfg: OptimConfig,
    step: int,
    total: int,
    steps_per_epoch: float,
) -> dict[str, float]:
    """Set what the schedules say for this step; returns ``lr`` and ``weight_decay``.

    Args:
        optimizer: One of `build_optimizer`.
        cfg: The ``optim`` block.
        step, total: Optimizer steps done, and of the whole run.
        steps_per_epoch: Optimizer steps per epoch: the measure of the warm-up.
    """
    warmup = round(cfg.warmup_epochs * steps_per_epoch)
    lr = schedule.warmup_cosine(step, total, warmup, cfg.peak_lr)
    end = cfg.weight_decay if cfg.weight_decay_end is None else cfg.weight_decay_end
    weight_decay = schedule.cosine(step, total, cfg.weight_decay, end)
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
    return {"lr": lr, "weight_decay": weight_decay}


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., 2017, arXiv 1708.03888), exact under ZeRO.

    With ``d = gradient + weight_decay * w``, an adapted parameter follows ``trust |w| / |d| * d``
    and any other ``d`` itself, both with momentum.  Biases and normalisation weights are not
    adapted, as in the code of SimCLR, BYOL, Barlow Twins and MoCo v3.

    All adapted weights are one group.  ZeRO hands the optimizer one rank's cut of that group's flat
    vector, whose weights' rates it cannot know by itself: `adapt_shard` is told them before each
    step.

    Args:
        groups: Parameter groups from `_weights_in_one_group`.
        cfg: The ``optim`` block.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], cfg: OptimConfig) -> None:
        super().__init__(groups, {"lr": cfg.peak_lr})
        self.momentum = cfg.momentum
        self.trust = cfg.trust
        self.trust_clip = cfg.trust_clip
        self._shard_rates: Tensor | None = None
        self._shard_sizes: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, which is used up; no ``closure``."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            updates = [weight.grad for weight in weights]
            if group["weight_decay"]:
                torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
            if group["adapted"] and weights[0].ndim == 1:
                updates[0].mul_(self._rate_of_each_element(weights[0]))
            elif group["adapted"]:
                squares = sums_of_squares(weights), sums_of_squares(updates)
                rates = self._rates(*squares, group["lr"])
                torch._foreach_mul_(updates, list(rates.unbind()))
            momenta = [self._momentum_of(weight) for weight in weights]
            torch._foreach_mul_(momenta, self.momentum)
            torch._foreach_add_(momenta, updates)
            torch._foreach_add_(weights, momenta, alpha=-group["lr"])

    def adapted_group(self) -> int | None:
        """Return the number of the group of adapted weights, None where there is none."""
        adapted = [number for number, group in enumerate(self.param_groups) if group["adapted"]]
        return adapted[0] if adapted else None

    def adapt_shard(
        self,
        gradient_squares: Tensor,
        weight_squares: Tensor,
        products: Tensor,
        *,
        sizes: Sequence[int],
        clip_factor: Tensor | float,
    ) -> None:
        """Set the rates of the next step for a shard of the adapted group.

        Args:
            gradient_squares, weight_squares, products: ``(n,)`` float64: ``|g|^2``, ``|w|^2`` and
                ``g . w`` of the whole weights that this shard holds pieces of.
            sizes: Number of elements of each piece, in order; padding may follow.
            clip_factor: What clipping has multiplied ``g`` by since.
        """
        group = self.param_groups[self._adapted]
        decay = group["weight_decay"]
        # |c g + v w|^2, written out: no rank has the whole of g and w.
        update_squares = clip_factor * (clip_factor * gradient_squares + 2 * decay * products)
        update_squares = (update_squares + decay**2 * weight_squares).clamp(min=0)
        rates = self._rates(weight_squares, update_squares, group["lr"])
        padding = group["params"][0].numel() - sum(sizes)
        self._shard_rates = torch.cat([rates, rates.new_ones(1)]).float()
        self._shard_sizes = torch.tensor([*sizes, padding], device=rates.device)

    @property
    def _adapted(self) -> int:
        number = self.adapted_group()
        assert number is not None
        return number

    def _rates(self, weight_squares: Tensor, update_squares: Tensor, lr: float) -> Tensor:
        """``trust |w| / |d|`` for ``(n,)`` weights; 1 where either norm is zero."""
        weight_norms, update_norms = weight_squares.sqrt(), update_squares.sqrt()
        rates = self.trust * weight_norms / update_norms
        if self.trust_clip:
            rates = (rates / lr if lr else torch.full_like(rates, torch.inf)).clamp(max=1.0)
        return torch.where((weight_norms > 0) & (update_norms > 0), rates, 1.0)

    def _rate_of_each_element(self, shard: Tensor) -> Tensor:
        assert self._shard_rates is not None
        assert self._shard_sizes is not None
        return torch.repeat_interleave(
            self._shard_rates, self._shard_sizes, output_size=shard.numel()
        )

    def _momentum_of(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum: Tensor = state["momentum"]
        return momentum

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state of this class, also one that has a group for each weight."""
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        numbers = iter(saved)
        regrouped = [
            group
            | {"params": [number for _, number in zip(group["params"], numbers, strict=False)]}
            for group in self.param_groups
        ]
        super().load_state_dict(state_dict | {"param_groups": regrouped})


def sums_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Squared norms ``(n,)`` of ``n`` tensors, each true to its type's precision.

    >>> sums_of_squares([torch.tensor([3.0, 4.0]), torch.tensor([[1.0]])])
    tensor([25.,  1.])
    """
    if tensors[0].is_cpu:
        # There a norm adds up one value after the other: wrong by 6e-4 for 16 million of them.
        return torch.stack([tensor.square().sum() for tensor in tensors])
    return torch.stack(torch._foreach_norm(list(tensors))).square()


def sums_of_products(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """Inner products ``(n,)`` of ``n`` pairs of flat tensors.

    >>> sums_of_products([torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 4.0])])
    tensor([11.])
    """
    if tensors[0].is_cpu:
        pairs = zip(tensors, others, strict=True)
        return torch.stack([(one * other).sum() for one, other in pairs])
    products = torch.cat(torch._foreach_mul(list(tensors), list(others)))
    lengths = torch.tensor([tensor.numel() for tensor in tensors])
    return torch.segment_reduce(products, "sum", lengths=lengths.to(products.device))


def _weights_in_one_group(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put weights (two dimensions or more), which LARS adapts, into a group without others."""
    split: list[dict[str, Any]] = []
    for group in groups:
        weights = [p for p in group["params"] if p.ndim > 1]
        others = [p for p in group["params"] if p.ndim <= 1]
        split += [group | {"params": weights, "adapted": True}] if weights else []
        split += [group | {"params": others, "adapted": False}] if others else []
    return split
