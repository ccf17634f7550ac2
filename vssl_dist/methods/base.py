"""The interface of a method: all that the engine and the evaluations ask of one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vssl_dist.errors import ConfigError
from vssl_dist.models.heads import Gaussian


@dataclass(frozen=True)
class LossOutput:
    """The result of a loss function: the loss, an embedding and metrics.

    >>> output = LossOutput(torch.tensor(1.0), torch.zeros(2, 3), lambda: {"kl": torch.tensor(0.5)})
    >>> output.metrics["kl"].item()
    0.5
    """

    loss: Tensor
    """Scalar to minimise: the mean over this rank's images."""
    embedding: Tensor
    """Backbone's output for this rank's first view, ``(B, D)``, detached."""
    compute_metrics: Callable[[], dict[str, Tensor]] = dict
    """Computes `metrics`, which most steps do without: called once, before backward, or never."""

    @cached_property
    @torch.no_grad()
    def metrics(self) -> dict[str, Tensor]:
        """Detached scalars, still on the device: reading them is the tracker's cost."""
        return self.compute_metrics()


class Noise(Protocol):
    """The only source of randomness inside a loss."""

    def normal(self, branch: str, shape: Sequence[int]) -> Tensor:
        """Standard normal draws ``shape`` whose first dimension is this rank's images."""
        ...


@dataclass(frozen=True)
class MicroStep:
    """All that a loss may know besides the pixels.

    It is a `Noise`, and most methods ask for no more than that.

    >>> step = MicroStep(GlobalNoise(seed=0, step=0, micro_step=0), 1.5, torch.tensor([7, 3]))
    >>> step.normal("z", (2, 4)).shape, step.epoch
    (torch.Size([2, 4]), 1.5)
    """

    noise: Noise
    epoch: float
    """Epochs trained so far, with their fraction: what the schedules inside a loss follow."""
    labels: Tensor
    """``(B,)`` int64, the classes of this rank's images: for the supervised control alone."""

    def normal(self, branch: str, shape: Sequence[int]) -> Tensor:
        """Standard normal draws; see `Noise`."""
        return self.noise.normal(branch, shape)


class Method(Protocol):
    """A self-supervised method: networks and a loss."""

    student: nn.Module
    """Network that is trained; the engine replaces it by the DeepSpeed engine around it."""
    teacher: nn.Module | None
    """EMA of the student, float32, outside DeepSpeed; None where there is no teacher."""
    evaluated: Literal["student", "teacher"]
    """Network whose backbone is exported and judged."""

    def loss(self, views: Sequence[Tensor], micro_step: MicroStep, /) -> LossOutput:
        """Loss of ``V`` views, each ``(B, 3, H, W)`` (``H, W`` may differ), of the same images."""
        ...


Density = Literal["polar", "cartesian"]
"""Coordinates in which likelihoods of an embedding are densities; see ``OodConfig.density``."""


class Evidence(NamedTuple):
    """The terms that say how well a posterior explains an observation."""

    likelihood: Tensor
    """Expected log-likelihood, in nats."""
    bound: Tensor
    """The bound that training raised: the likelihood less its penalties."""


@runtime_checkable
class Variational(Protocol):
    """The interface through which evaluations let a method's posterior judge images.

    The method's config answers, because an export has it, and of the method nothing else but
    weights.  Its ``has_posterior`` is set, and the evaluated branch is a `GaussianBranch`.
    """

    @property
    def name(self) -> str:
        """The method's name."""
        ...

    @property
    def judges_one_view(self) -> bool:
        """Whether an image of which there is one view can be judged: what is observed of it is
        no part of the posterior that is to explain it."""
        ...

    @property
    def draws_latents(self) -> bool:
        """Whether `judge` depends on its draws; else zeros do, which put latents at their mean."""
        ...

    def bound_logvar(self, logvar: Tensor, /) -> Tensor:
        """Bring log-variances ``(..., D)`` into the bounds that training keeps them in."""
        ...

    def judge(
        self, posterior: Gaussian, observed: Gaussian, eps: Tensor, density: Density, /
    ) -> Evidence:
        """Tell how well posteriors explain observed images.

        Args:
            posterior: Output of the branch for the images that explain, ``(..., D)``.
            observed: Output for the images that are explained, ``(..., D)``.
            eps: Standard normal draws ``(S, ..., D)``.
            density: For methods whose ``has_embedding_density`` is set; others ignore it.

        Returns:
            Terms ``(...)``, means over the draws.
        """
        ...


def two_views(views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The two views of a method that compares two.

    Raises:
        ConfigError: The run's ``data.views`` makes another number of them.
    """
    if len(views) != 2:
        raise ConfigError(
            f"data.views: this method compares 2 views, not {len(views)}: list two recipes"
        )
    return views[0], views[1]


class GlobalNoise:
    """Noise that does not depend on the number of ranks.

    Every rank draws the rows of the whole global micro-batch from a generator keyed by
    ``(seed, step, micro_step, branch)`` and keeps its own; ranks own contiguous rows.

    >>> whole = GlobalNoise(seed=0, step=3, micro_step=0).normal("z", (4, 2))
    >>> half = GlobalNoise(seed=0, step=3, micro_step=0, rank=1, world_size=2)
    >>> torch.equal(half.normal("z", (2, 2)), whole[2:])
    True
    """

    def __init__(
        self,
        seed: int,
        step: int,
        micro_step: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.key = f"{seed}/{step}/{micro_step}"
        self.rank = rank
        self.world_size = world_size
        self.device = device

    def normal(self, branch: str, shape: Sequence[int]) -> Tensor:
        """Standard normal float32 ``shape``, whose first dimension is this rank's images."""
        digest = hashlib.blake2b(f"{self.key}/{branch}".encode(), digest_size=8).digest()
        generator = torch.Generator(self.device)
        generator.manual_seed(int.from_bytes(digest, "big") >> 1)
        rows, *feature_shape = shape
        # Every rank draws all rows and keeps its own: any number of ranks sees the same noise.
        all_rows = torch.randn(
            rows * self.world_size, *feature_shape, generator=generator, device=self.device
        )
        return all_rows[self.rank * rows : (self.rank + 1) * rows]
