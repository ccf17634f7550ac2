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
    """Return a branch's tensors without its backbone's, on the CPU, by their names in it."""
    tensors = state.cpu_state_dict(branch)
    return {k: v for k, v in tensors.items() if not k.startswith(f"{BACKBONE}.")}


def write_export(
    path: Path, branch: nn.Module, description: Description, extra_parts: Parts | None = None
) -> None:
    """Write a branch's backbone, its posterior head if it has one, and the card.

    Whoever finds the card finds the rest: it comes last, and one that was written for other
    weights is removed first.  The card is ``description`` and the digests of all these files.

    Args:
        path: The backbone's ``.safetensors`` file; the card has the same name, in ``.json``.
        branch: What is evaluated; its ``backbone`` is a submodule.
        description: What the export says of itself.
        extra_parts: Further parts.

    Raises:
        OSError: Something could not be written; then there is no card.
    """
    files, digests = {}, {}
    head = {HEAD: head_tensors(branch)} if isinstance(branch, GaussianBranch) else {}
    for part, tensors in (head | dict(extra_parts or {})).items():
        packed = safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()})
        files[part_of(path, part)] = packed
        digests[f"{part}_sha256"] = hashlib.sha256(packed).hexdigest()
    # The backbone after the rest: evaluations of a run look for backbones.
    files[path] = safetensors.torch.save(state.cpu_state_dict(branch.get_submodule(BACKBONE)))
    digests["sha256"] = hashlib.sha256(files[path]).hexdigest()
    card_path = card_of(path)
    card = Card.model_validate(description.as_json() | digests)
    facts = json.dumps(card.as_json(), indent=1).encode()
    for file in (*files, card_path):
        durable.refuse_link_out_of_folder(file)
    if card_path.is_file() and card_path.read_bytes() != facts:
        card_path.unlink()
        durable.sync(card_path.parent)
    for file, packed in files.items():
        durable.publish(file, packed)
    durable.publish(card_path, facts)
