"""The posterior of a variational export: mean and variance from features that are already there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from vssl_dist.config import MethodConfig
from vssl_dist.evaluation.exports import ExportError, check_shapes, load_beside, read_card
from vssl_dist.export import BACKBONE, HEAD, beside
from vssl_dist.methods import CONFIGS, build_method
from vssl_dist.models.heads import Gaussian, GaussianBranch
from vssl_dist.text import printable

VARIATIONAL = tuple(name for name, cfg in CONFIGS.items() if cfg.has_posterior)
"""The methods whose exports have a posterior."""


def has_embedding_density(card: Mapping[str, Any]) -> bool:
    """Whether the export with this card has likelihoods of an embedding, as VJE's have."""
    cfg = CONFIGS.get(card.get("method", ""))
    return cfg is not None and cfg.has_embedding_density and f"{HEAD}_sha256" in card


@dataclass(frozen=True)
class Posterior:
    """What stands behind the backbone of a variational method, frozen.

    >>> branch = GaussianBranch(nn.Identity(), nn.Linear(4, 6)).eval()
    >>> Posterior(branch, CONFIGS["vje"]()).infer(torch.zeros(2, 4)).mu.shape
    torch.Size([2, 3])
    """

    branch: GaussianBranch
    """In eval mode on the CPU; only its `infer` is used."""
    cfg: MethodConfig
    """The method's own keys: what its likelihoods and bounds are."""

    def infer(self, features: Tensor) -> Gaussian:
        """The Gaussian of each image, from its features.

        Args:
            features: What the backbone made of the images, ``(M, width)`` of any floating dtype.

        Returns:
            Embedding ``(M, width)``, mean and log-variance ``(M, D)``, float32 on the CPU; the
            log-variance not yet bounded, as in training.

        Raises:
            ExportError: The head turns finite features into something that is not finite.
        """
        return self._inferred(self.branch, features)

    def target(self, features: Tensor) -> Gaussian:
        """As `infer`, of a view that another view's posterior is to explain.

        A predictor, which in training stands in the student alone, is left out: one network plays
        both parts, because an export has one.
        """
        branch = self.branch
        if branch.predictor is not None:
            branch = GaussianBranch(branch.backbone, branch.posterior)
        return self._inferred(branch, features)

    def _inferred(self, branch: GaussianBranch, features: Tensor) -> Gaussian:
        with torch.inference_mode():
            found = branch.infer(features.float())
        if not (found.mu.isfinite().all() and found.logvar.isfinite().all()):
            raise ExportError("the posterior head is damaged: its mean or variance is not finite")
        return found


def load_posterior(path: Path) -> Posterior | None:
    """The posterior of an export.

    Args:
        path: The backbone's ``.safetensors`` file; head and card lie beside it.

    Returns:
        None if the export's card names no head: the method has none, or the export is from before
        heads were exported.

    Raises:
        ExportError: One line: the head is missing, damaged, or does not fit the card.
    """
    tensors = load_beside(path, HEAD)
    if tensors is None:
        return None
    card, place = read_card(path), beside(path, HEAD)
    cfg = _method(place, card)
    with torch.device("meta"):  # a card may ask for more memory than the file's tensors need
        shapes = _untrained(place, cfg, card).state_dict()
    wanted = {k: v for k, v in shapes.items() if not k.startswith(f"{BACKBONE}.")}
    check_shapes(place, tensors, wanted, cfg.name)
    branch = _untrained(place, cfg, card)
    branch.backbone = nn.Identity()
    branch.load_state_dict(tensors)
    return Posterior(branch.eval(), cfg)


def _method(place: Path, card: dict[str, Any]) -> MethodConfig:
    try:
        raw = card["config"]["method"]
        return CONFIGS[raw["name"]].model_validate(raw)
    except (KeyError, TypeError, ValidationError) as error:
        reason = printable(str(error).splitlines()[0][:200])
        raise ExportError(
            f"{place}: its card does not say what method it is the head of ({reason})"
        ) from error


def _untrained(place: Path, cfg: MethodConfig, card: dict[str, Any]) -> GaussianBranch:
    try:
        with torch.random.fork_rng(devices=[]):
            method = build_method(cfg, card["image_size"])
    except (ValueError, RuntimeError, TypeError, OverflowError) as error:
        reason = printable(" ".join(str(error).split())[:200])
        raise ExportError(f"{place}: its card describes no network ({reason})") from error
    branch = method.teacher if method.evaluated == "teacher" else method.student
    if not isinstance(branch, GaussianBranch):
        raise ExportError(
            f"{place}: method {cfg.name} has no posterior, but the card says it is one's head"
        )
    return branch
