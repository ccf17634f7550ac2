"""The posterior of a variational export: mean and variance from features that are already there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from vssl_dist.config import MethodConfig
from vssl_dist.errors import ExportError
from vssl_dist.exports.card import Card
from vssl_dist.exports.read import check_tensor_shapes, load_export_part, read_card
from vssl_dist.exports.write import BACKBONE_PART, HEAD_PART
from vssl_dist.jsonfile import describe_first_error
from vssl_dist.methods import CONFIGS, build_method
from vssl_dist.methods.base import Variational
from vssl_dist.models.heads import Gaussian, GaussianBranch
from vssl_dist.run_folder import part_path_of
from vssl_dist.text import printable


def posterior_method_names() -> list[str]:
    """Name the methods whose exports have a posterior."""
    return [name for name, cfg in CONFIGS.items() if cfg.has_posterior]


def has_embedding_density(card: Card) -> bool:
    """Tell whether the export with this card has likelihoods of an embedding."""
    cfg = CONFIGS.get(card.method)
    return cfg is not None and cfg.has_embedding_density and HEAD_PART in card.parts


@dataclass(frozen=True)
class Posterior:
    """The frozen head of a variational method, which infers Gaussians from features.

    >>> branch = GaussianBranch(nn.Identity(), nn.Linear(4, 6)).eval()
    >>> cfg = CONFIGS[posterior_method_names()[0]]()
    >>> Posterior(branch, cfg).infer(torch.zeros(2, 4)).mu.shape
    torch.Size([2, 3])
    """

    branch: GaussianBranch
    """The branch that infers, in eval mode on the CPU; only its `infer` is used."""
    cfg: Variational
    """The method's config, which knows its likelihoods and bounds."""

    def infer(self, features: Tensor) -> Gaussian:
        """Infer the Gaussian of each image from its features.

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
        """Infer the Gaussian of a view that another view's posterior is to explain; see `infer`.

        A predictor, which in training stands in the student alone, is left out: one network plays
        both parts, because an export has one.
        """
        branch = self.branch
        if branch.predictor is not None:
            branch = GaussianBranch(branch.backbone, branch.posterior)
        return self._inferred(branch, features)

    def _inferred(self, branch: GaussianBranch, features: Tensor) -> Gaussian:
        with torch.inference_mode():
            gaussian = branch.infer(features.float())
        if not (gaussian.mu.isfinite().all() and gaussian.logvar.isfinite().all()):
            raise ExportError("the posterior head is damaged: its mean or variance is not finite")
        return gaussian


def load_posterior(export_path: Path) -> Posterior | None:
    """Load the posterior of an export.

    Args:
        export_path: The backbone's ``.safetensors`` file; head and card lie beside it.

    Returns:
        None if the export's card names no head: the method has none, or the export is from before
        heads were exported.

    Raises:
        ExportError: One line: the head is missing, damaged, or does not fit the card.
    """
    tensors = load_export_part(export_path, HEAD_PART)
    if tensors is None:
        return None
    card = read_card(export_path)
    head_path = part_path_of(export_path, HEAD_PART)
    cfg = _method_config(head_path, card)
    with torch.device("meta"):  # a card may ask for more memory than the file's tensors need
        branch_tensors = _untrained_branch(head_path, cfg, card).state_dict()
    expected_tensors = {
        name: tensor
        for name, tensor in branch_tensors.items()
        if not name.startswith(f"{BACKBONE_PART}.")
    }
    check_tensor_shapes(head_path, tensors, expected_tensors, cfg.name)
    branch = _untrained_branch(head_path, cfg, card)
    # Features are computed elsewhere and stored: the head begins where the backbone ends.
    branch.backbone = nn.Identity()
    branch.load_state_dict(tensors)
    return Posterior(branch.eval(), _require_variational(head_path, cfg))


def _method_config(head_path: Path, card: Card) -> MethodConfig:
    unknown_method_message = f"{head_path}: its card does not say what method it is the head of"
    method = card.config.method
    if method is None or method.name not in CONFIGS:
        reason = "config.method is missing" if method is None else f"unknown: {method.name}"
        raise ExportError(f"{unknown_method_message} ({reason})")
    try:
        return CONFIGS[method.name].model_validate(method.as_json())
    except ValidationError as error:
        raise ExportError(
            f"{unknown_method_message} (config.method.{describe_first_error(error)})"
        ) from error


def _require_variational(head_path: Path, cfg: MethodConfig) -> Variational:
    if not isinstance(cfg, Variational):
        raise ExportError(_no_posterior_message(head_path, cfg))
    return cfg


def _no_posterior_message(head_path: Path, cfg: MethodConfig) -> str:
    return f"{head_path}: method {cfg.name} has no posterior, but the card says it is one's head"


def _untrained_branch(head_path: Path, cfg: MethodConfig, card: Card) -> GaussianBranch:
    try:
        # Initial weights are drawn and thrown away: the caller's generator must not notice.
        with torch.random.fork_rng(devices=[]):
            method = build_method(cfg, card.image_size)
    except (ValueError, RuntimeError, TypeError, OverflowError) as error:
        reason = printable(" ".join(str(error).split())[:200])
        raise ExportError(f"{head_path}: its card describes no network ({reason})") from error
    branch = method.teacher if method.evaluated == "teacher" else method.student
    if not isinstance(branch, GaussianBranch):
        raise ExportError(_no_posterior_message(head_path, cfg))
    return branch
