"""What a training hands to evaluations: a backbone, its posterior where it has one, and a card.

`export/backbone-STEP.safetensors` holds plain float32 tensors under the names that torchvision or
timm gave them.  Of a branch with Gaussian outputs, `export/head-STEP.safetensors` holds the rest:
what turns the backbone's features into mean and variance.  Other parts that belong to these
weights, such as a classifier of their features, lie in files of the same kind.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from vssl_dist import durable, state
from vssl_dist.exports.card import Card, Description
from vssl_dist.models.heads import GaussianBranch
from vssl_dist.run_folder import card_of, part_of

BACKBONE, HEAD, ONLINE = "backbone", "head", "online"
Parts = Mapping[str, dict[str, Tensor]]
"""Tensors of parts of an export, by the part's name."""


def head_tensors(branch: nn.Module) -> dict[str, Tensor]:
    """All tensors of a branch but its backbone's, on the CPU, by their names in the branch."""
    tensors = state.plain(branch)
    return {k: v for k, v in tensors.items() if not k.startswith(f"{BACKBONE}.")}


def write_export(
    path: Path, branch: nn.Module, description: Description, more: Parts | None = None
) -> None:
    """Write a branch's backbone, its posterior head if it has one, and the card.

    Whoever finds the card finds the rest: it comes last, and one that was written for other
    weights is removed first.  The card is ``description`` and the digests of all these files.

    Args:
        path: Of the backbone's ``.safetensors`` file; the card has the same name, in ``.json``.
        branch: What is evaluated; its ``backbone`` is a submodule.
        description: What the export says of itself.
        more: Further parts.

    Raises:
        OSError: Something could not be written; then there is no card.
    """
    parts, digests = {}, {}
    head = {HEAD: head_tensors(branch)} if isinstance(branch, GaussianBranch) else {}
    for part, tensors in (head | dict(more or {})).items():
        packed = safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()})
        parts[part_of(path, part)] = packed
        digests[f"{part}_sha256"] = hashlib.sha256(packed).hexdigest()
    # The backbone after the rest: evaluations of a run look for backbones.
    parts[path] = safetensors.torch.save(state.plain(branch.get_submodule(BACKBONE)))
    digests["sha256"] = hashlib.sha256(parts[path]).hexdigest()
    place = card_of(path)
    card = Card.model_validate(description.as_json() | digests)
    facts = json.dumps(card.as_json(), indent=1).encode()
    for file in (*parts, place):
        durable.refuse_way_out(file)
    if place.is_file() and place.read_bytes() != facts:
        place.unlink()
        durable.sync(place.parent)
    for file, packed in parts.items():
        durable.publish(file, packed)
    durable.publish(place, facts)
