"""A gradient's norm, its clipping and the optimizer's step, at every ZeRO stage.

Whatever the stage, the host reads one number per step, the norm: whether it is finite decides
whether there is a step at all.  Where ZeRO has cut the gradient into shards, what clipping and LARS
need of it, and of the weights, travels in one all-reduce.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vssl_dist import dist
from vssl_dist.optim import LARS, sums_of_products, sums_of_squares


class WholeGradient:
    """The gradient at ZeRO stage 0, which every rank has whole.

    Args:
        engine: The DeepSpeed engine.
        student: The network that it trains.
        clip: Largest norm, 0 for none.
    """

    def __init__(self, engine: Any, student: nn.Module, clip: float) -> None:
        self.engine = engine
        self.clip = clip
        self.trained = [p for p in student.parameters() if p.requires_grad]
        self.norm_by_part = NormByPart(student, self.trained)

    def step(self) -> Tensor:
        """Clip and update, or skip where the norm is not finite.

        Returns:
            The norm before clipping, float32, infinite in a skipped step: see `was_skipped`.
        """
        for parameter in self.trained:
            if parameter.grad is None:  # as DeepSpeed has it where there are several ranks
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self.trained if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))
        self.norm_by_part.squares = norms.double().square()
        norm: Tensor = torch.linalg.vector_norm(norms)
        self.was_skipped = not math.isfinite(norm.item())
        if self.was_skipped:
            # Without gradients the optimizer has nothing to do, not even weight decay.
            self.engine.zero_grad()
            norm.fill_(torch.inf)
        elif self.clip:
            torch.nn.utils.clip_grads_with_norm_(self.trained, self.clip, norm)
        self.engine.step()
        return norm


class ShardedGradient:
    """The gradient at ZeRO stages 1 and 2, of which each rank has a cut of every group's vector.

    DeepSpeed would all-reduce a norm per group and read what it needs of them several times, and
    LARS would need two more numbers per weight.  Here DeepSpeed asks this for the norm instead.

    Args:
        engine: The DeepSpeed engine, which must not clip by itself.
        student: The network that it trains.
        clip: Largest norm, 0 for none.
    """

    def __init__(self, engine: Any, student: nn.Module, clip: float) -> None:
        self.engine = engine
        self.zero = engine.optimizer
        self.clip = clip
        parameters = [p for group in self.zero.bit16_groups for p in group]
        numbers = {id(parameter): number for number, parameter in enumerate(parameters)}
        # A shard holds parameters that follow each other, the first and the last of them in part.
        self.first_of_group = [
            numbers[id(owned[0])] if owned else 0 for owned in self.zero.params_in_partition
        ]
        self.norm_by_part = NormByPart(student, parameters)
        self.zero.scaled_global_norm = self._measure

    def step(self) -> Tensor:
        """Clip and update, or skip where the norm is not finite.

        Returns:
            The norm before clipping, float32, infinite in a skipped step: see `was_skipped`.
        """
        self.engine.step()
        return self.norm

    @torch.no_grad()
    def _measure(self, norm_type: int = 2) -> float:
        """Measure and clip in the middle of DeepSpeed's step, which skips where this is infinite.

        Args:
            norm_type: Ignored: DeepSpeed knows no other.
        """
        cuts = [self._cut(group) for group in range(len(self.zero.bit16_groups))]
        lars = self.zero.optimizer if isinstance(self.zero.optimizer, LARS) else None
        adapted = lars.adapted_group() if lars else None
        rows = 1 if adapted is None else 3
        squares = torch.zeros(
            rows, len(self.norm_by_part), dtype=torch.float64, device=self.zero.device
        )
        for group, gradients in enumerate(cuts):
            if gradients:
                owned = slice(
                    self.first_of_group[group], self.first_of_group[group] + len(gradients)
                )
                squares[0, owned] = sums_of_squares(gradients).double()
                if group == adapted:
                    weights = self._weights(group, gradients)
                    squares[1, owned] = sums_of_squares(weights).double()
                    squares[2, owned] = sums_of_products(gradients, weights).double()
        squares = dist.all_reduce(squares)
        self.norm_by_part.squares = squares[0]
        self.norm = squares[0].sum().sqrt().float()
        norm = self.norm.item()
        self.was_skipped = not math.isfinite(norm)
        if self.was_skipped:
            self.norm.fill_(torch.inf)
            return math.inf
        clip_factor = self._clip(cuts) if self.clip else 1.0
        if lars and adapted is not None:
            first, count = self.first_of_group[adapted], len(cuts[adapted])
            lars.adapt_shard(
                *squares[:, first : first + count].unbind(),
                sizes=[gradient.numel() for gradient in cuts[adapted]],
                clip_factor=clip_factor,
            )
        return norm

    def _cut(self, group: int) -> list[Tensor]:
        """This rank's gradients in a group, flat; without the padding that may follow them."""
        gradients = [
            gradient.reshape(-1)
            for gradient in self.zero.averaged_gradients[group]
            if not getattr(gradient, "_zero_padding", False)
        ]
        return gradients[: len(self.zero.params_in_partition[group])]

    def _weights(self, group: int, gradients: Sequence[Tensor]) -> list[Tensor]:
        flat = self.zero.single_partition_of_fp32_groups[group].detach()
        sizes = [gradient.numel() for gradient in gradients]
        return list(flat[: sum(sizes)].split(sizes))

    def _clip(self, cuts: Sequence[Sequence[Tensor]]) -> Tensor:
        """Scale the gradient down to the limit; return the factor."""
        # DeepSpeed's own formula, to the bit.
        factor: Tensor = 1.0 / torch.clamp((self.norm + 1e-6) / self.clip, min=1.0)
        if gradients := [gradient for cut in cuts for gradient in cut]:  # else all is padding
            torch._foreach_mul_(gradients, factor)
        return factor


class NormByPart:
    """Norms of the gradient of ``backbone`` and of all the rest, the ``head``.

    Args:
        student: The network.
        parameters: Its trained parameters, in the order of `squares`.

    >>> student = nn.ModuleDict({"backbone": nn.Linear(2, 1), "posterior": nn.Linear(1, 1)})
    >>> norm_by_part = NormByPart(student, list(student.parameters()))
    >>> norm_by_part.squares = torch.tensor([2.0, 1.0, 1.0, 1.0])
    >>> [round(norm.item() ** 2) for norm in norm_by_part.read().values()]
    [3, 2]
    """

    squares: Tensor
    """``(P,)``: each parameter's squared norm in the last step."""

    def __init__(self, student: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        names = {id(parameter): name for name, parameter in student.named_parameters()}
        inside = torch.tensor([names[id(p)].startswith("backbone.") for p in parameters])
        device = parameters[0].device
        self.members = {"backbone": inside.to(device), "head": ~inside.to(device)}
        self.parts = [
            part for part, members in {"backbone": inside, "head": ~inside}.items() if members.any()
        ]

    def __len__(self) -> int:
        return len(self.members["head"])

    def read(self) -> dict[str, Tensor]:
        """Return ``grad_norm_backbone`` and ``grad_norm_head``, infinite where not finite.

        A part without a trained parameter is left out.
        """
        totals = {
            part: torch.where(self.members[part], self.squares, 0.0).sum().sqrt().float()
            for part in self.parts
        }
        return {
            f"grad_norm_{part}": torch.where(norm.isfinite(), norm, torch.inf)
            for part, norm in totals.items()
        }
