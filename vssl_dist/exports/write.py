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
from vssl_dist.exports.card import Card, ExportDescription
from vssl_dist.models.heads import GaussianBranch
from vssl_dist.run_folder import card_path_of, part_path_of

BACKBONE_PART, HEAD_PART, ONLINE_PART = "backbone", "head", "online"
TensorsByPart = Mapping[str, dict[str, Tensor]]
"""Tensors of parts of an export, by the part's name."""


def head_tensors(branch: nn.Module) -> dict[str, Tensor]:
    """Return a branch's tensors without its backbone's, on the CPU, by their names in it."""
    branch_tensors = state.cpu_state_dict(branch)
    return {
        name: tensor
        for name, tensor in branch_tensors.items()
        if not name.startswith(f"{BACKBONE_PART}.")
    }


def write_export(
    export_path: Path,
    branch: nn.Module,
    description: ExportDescription,
    extra_parts: TensorsByPart | None = None,
) -> None:
    """Write a branch's backbone, its posterior head if it has one, and the card.

    Whoever finds the card finds the rest: it comes last, and one that was written for other
    weights is removed first.  The card is ``description`` and the digests of all these files.

    Args:
        export_path: The backbone's ``.safetensors`` file; the card has the same name, in ``.json``.
        branch: What is evaluated; its ``backbone`` is a submodule.
        description: What the export says of itself.
        extra_parts: Further parts.

    Raises:
        OSError: Something could not be written; then there is no card.
    """
    bytes_by_path, digest_by_key = {}, {}
    head_part = {HEAD_PART: head_tensors(branch)} if isinstance(branch, GaussianBranch) else {}
    for part_name, tensors in (head_part | dict(extra_parts or {})).items():
        file_bytes = safetensors.torch.save(
            {name: tensor.contiguous() for name, tensor in tensors.items()}
        )
        bytes_by_path[part_path_of(export_path, part_name)] = file_bytes
        digest_by_key[f"{part_name}_sha256"] = hashlib.sha256(file_bytes).hexdigest()
    # The backbone after the rest: evaluations of a run look for backbones.
    bytes_by_path[export_path] = safetensors.torch.save(
        state.cpu_state_dict(branch.get_submodule(BACKBONE_PART))
    )
    digest_by_key["sha256"] = hashlib.sha256(bytes_by_path[export_path]).hexdigest()
    card_path = card_path_of(export_path)
    card = Card.model_validate(description.as_json() | digest_by_key)
    card_bytes = json.dumps(card.as_json(), indent=1).encode()
    for file_path in (*bytes_by_path, card_path):
        durable.refuse_link_out_of_folder(file_path)
    if card_path.is_file() and card_path.read_bytes() != card_bytes:
        card_path.unlink()
        durable.sync_to_disk(card_path.parent)
    for file_path, file_bytes in bytes_by_path.items():
        durable.write_durably(file_path, file_bytes)
    durable.write_durably(card_path, card_bytes)
