"""An export is whole or has no card, whatever happens while it is written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.support.cards import description
from vssl_dist import durable
from vssl_dist.exports.write import (
    HEAD_PART,
    write_export,
)
from vssl_dist.models.heads import GaussianBranch, ProjectionBranch
from vssl_dist.run_folder import part_path_of


def branch(seed: int) -> GaussianBranch:
    torch.manual_seed(seed)
    return GaussianBranch(nn.Linear(3, 4), nn.Linear(4, 10), nn.Linear(5, 5))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_head_is_the_branch_without_its_backbone(tmp_path: Path) -> None:
    path, network = tmp_path / "backbone-00000007.safetensors", branch(0)
    write_export(path, network, description(step=7))
    assert files(tmp_path) == [
        "backbone-00000007.json",
        "backbone-00000007.safetensors",
        "head-00000007.safetensors",
    ]
    parts = {f"backbone.{name}": tensor for name, tensor in load_file(path).items()}
    parts |= load_file(part_path_of(path, HEAD_PART))
    state = network.state_dict()
    assert parts.keys() == state.keys()
    assert all(torch.equal(parts[name], state[name]) for name in state)
    card = json.loads(path.with_suffix(".json").read_text())
    assert card == description(step=7).as_json() | {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "head_sha256": hashlib.sha256(part_path_of(path, HEAD_PART).read_bytes()).hexdigest(),
    }


def test_another_part_lies_beside_with_its_digest_on_the_card(tmp_path: Path) -> None:
    path, weight = tmp_path / "backbone-00000007.safetensors", torch.arange(6.0).view(2, 3).T
    write_export(path, branch(0), description(), {"online": {"weight": weight}})
    place = tmp_path / "online-00000007.safetensors"
    assert torch.equal(load_file(place)["weight"], weight)
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["online_sha256"] == hashlib.sha256(place.read_bytes()).hexdigest()
    assert "head_sha256" in card


def test_a_branch_without_a_gaussian_has_no_head(tmp_path: Path) -> None:
    path = tmp_path / "backbone-00000007.safetensors"
    write_export(path, ProjectionBranch(nn.Linear(3, 4), nn.Linear(4, 2)), description())
    assert files(tmp_path) == ["backbone-00000007.json", "backbone-00000007.safetensors"]
    assert "head_sha256" not in json.loads(path.with_suffix(".json").read_text())


@pytest.mark.parametrize("lost", [0, 1, 2])
@pytest.mark.parametrize("before", [None, 1, 2])
def test_a_kill_between_files_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int | None, lost: int
) -> None:
    path, publish = tmp_path / "backbone-00000007.safetensors", durable.write_durably
    if before is not None:
        write_export(path, branch(before), description())
    written = []

    def dying(place: Path, data: bytes) -> None:
        if len(written) == lost:
            raise KeyboardInterrupt
        written.append(place)
        publish(place, data)

    monkeypatch.setattr(durable, "write_durably", dying)
    with pytest.raises(KeyboardInterrupt):
        write_export(path, branch(1), description())
    card = path.with_suffix(".json")
    assert card.exists() == (before == 1), "only where the same bytes lay there before"
    if card.exists():
        facts = json.loads(card.read_text())
        for place, key in ((path, "sha256"), (part_path_of(path, HEAD_PART), "head_sha256")):
            assert hashlib.sha256(place.read_bytes()).hexdigest() == facts[key]
    monkeypatch.undo()
    write_export(path, branch(1), description())
    facts = json.loads(card.read_text())
    assert (
        hashlib.sha256(part_path_of(path, HEAD_PART).read_bytes()).hexdigest()
        == facts["head_sha256"]
    )
