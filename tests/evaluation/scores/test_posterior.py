"""A head and cached features give the Gaussian that training had, bit for bit, or one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from tests.support.exports import change, exported
from tests.support.heads import SMALL, exported_branch
from vssl_dist.durable import file_sha256
from vssl_dist.errors import ExportError
from vssl_dist.evaluation.scores.posterior import load_posterior
from vssl_dist.exports.read import load_export
from vssl_dist.exports.write import HEAD_PART
from vssl_dist.run_folder import part_path_of


@pytest.mark.parametrize("case", list(SMALL))
def test_backbone_and_head_are_the_branch_bit_for_bit(tmp_path: Path, case: str) -> None:
    path, branch = exported_branch(tmp_path, tmp_path, SMALL[case])
    images = torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    backbone, before = load_export(path)[0], torch.get_rng_state()
    posterior = load_posterior(path)
    assert torch.equal(before, torch.get_rng_state()), "nobody's random numbers are used up"
    assert posterior is not None
    with torch.no_grad():
        inferred, expected = posterior.infer(backbone(images)), branch(images)
    for name, value in expected._asdict().items():
        actual = getattr(inferred, name)
        assert (actual is None) == (value is None), name
        assert value is None or torch.equal(actual, value), name
    assert (inferred.scale_logvar is not None) == (case == "vje, all learnt")


def test_an_export_without_a_head_has_no_posterior(tmp_path: Path) -> None:
    assert load_posterior(exported(tmp_path / "export", tmp_path)[0]) is None


def test_a_head_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    path, _ = exported_branch(tmp_path / "a", tmp_path, SMALL["vje"])
    other, _ = exported_branch(tmp_path / "b", tmp_path, SMALL["vssl teacher"])
    head, own = part_path_of(path, HEAD_PART), part_path_of(path, HEAD_PART).read_bytes()
    with pytest.raises(ExportError, match="name the backbone-STEP file"):
        load_export(head)
    card = path.with_suffix(".json").read_text()

    def refused(words: str) -> None:
        with pytest.raises(ExportError, match=words) as error:
            load_posterior(path)
        assert "\n" not in str(error.value)
        assert str(path.parent) in str(error.value)

    head.write_bytes(own[:-1])
    refused("missing or damaged")
    head.unlink()
    refused("missing or damaged")
    flipped = bytearray(own)
    flipped[-1] ^= 1
    head.write_bytes(flipped)
    refused("not those its card was written for")
    head.write_bytes(part_path_of(other, HEAD_PART).read_bytes())
    change(path, head_sha256=json.loads(other.with_suffix(".json").read_text())["head_sha256"])
    refused("not those of vje as the card says")
    tensors = {name: tensor * torch.nan for name, tensor in load(own).items()}
    head.write_bytes(save(tensors))
    change(path, head_sha256=file_sha256(head))
    refused("not all of it is finite")
    path.with_suffix(".json").write_text(card)
    head.write_bytes(own)
    for config in ({}, {"method": {"name": "vae"}}, {"method": {"name": "vje", "dof": "three"}}):
        change(path, config=config)
        refused("does not say what method")
    change(path, config={"method": {"name": "simsiam", "backbone": "resnet18_c16"}})
    refused("simsiam has no posterior")
