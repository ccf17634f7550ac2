"""What a training hands to evaluations: a backbone, its posterior where it has one, and a card.

`export/backbone-STEP.safetensors` holds plain float32 tensors under the names that torchvision or
timm gave them.  Of a branch with Gaussian outputs, `export/head-STEP.safetensors` holds the rest:
what turns the backbone's features into mean and variance.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from vssl_dist import durable, state
from vssl_dist.models.heads import GaussianBranch

BACKBONE = "backbone"


def head_of(path: Path) -> Path:
    """Where the posterior head of an export lies.

    >>> head_of(Path("export/backbone-00000600.safetensors")).name
    'head-00000600.safetensors'
    """
    return path.with_name(f"head-{path.name.removeprefix(f'{BACKBONE}-')}")


def head_tensors(branch: nn.Module) -> dict[str, Tensor]:
    """All tensors of a branch but its backbone's, on the CPU, by their names in the branch."""
    tensors = state.plain(branch)
    return {k: v for k, v in tensors.items() if not k.startswith(f"{BACKBONE}.")}


def write_export(path: Path, branch: nn.Module, card: dict[str, Any]) -> None:
    """Write a branch's backbone, its posterior head if it has one, and ``card`` with their digests.

    Whoever finds the card finds the rest: it comes last, and one that was written for other
    weights is removed first.  The card gains ``sha256`` and, with a head, ``head_sha256``.

    Args:
        path: Of the backbone's ``.safetensors`` file; the card has the same name, in ``.json``.
        branch: What is evaluated; its ``backbone`` is a submodule.
        card: What the export says of itself, as JSON values.

    Raises:
        OSError: Something could not be written; then there is no card.
    """
    parts, digests = {}, {}
    if isinstance(branch, GaussianBranch):
        head = safetensors.torch.save(head_tensors(branch))
        parts[head_of(path)] = head
        digests["head_sha256"] = hashlib.sha256(head).hexdigest()
    # The backbone after the head: evaluations of a run look for backbones.
    parts[path] = safetensors.torch.save(state.plain(branch.get_submodule(BACKBONE)))
    digests["sha256"] = hashlib.sha256(parts[path]).hexdigest()
    place = path.with_suffix(".json")
    facts = json.dumps(card | digests, indent=1).encode()
    if place.exists() and place.read_bytes() != facts:
        place.unlink()
        durable.sync(place.parent)
    for file, tensors in parts.items():
        durable.publish(file, tensors)
    durable.publish(place, facts)
