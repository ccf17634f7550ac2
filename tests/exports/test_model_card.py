"""What an export says of itself, and that a hub's own parser reads it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from tests.support.cards import portable_card
from tests.support.exports import change, exported
from tests.support.photos import tiny_dataset
from tests.support.ranks import run_ranks
from vssl_dist.config import KnnConfig, RunConfig, load
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.evaluation.run import evaluate
from vssl_dist.exports.card import NO_LICENCE_STATEMENT, PortableCard
from vssl_dist.exports.formats import convert_export
from vssl_dist.exports.model_card import format_model_card, read_evaluation_figures
from vssl_dist.exports.read import load_export, read_card
from vssl_dist.methods import CONFIGS
from vssl_dist.text import escape_markdown
from vssl_dist.train import train
from vssl_dist.vision import torchvision

ROOT = Path(__file__).parents[2]


def read(text: str) -> ModelCard:
    return ModelCard(text)


@pytest.mark.parametrize(
    ("licence", "license", "name"),
    [
        (None, None, None),
        ("cc-by-nc-4.0", "cc-by-nc-4.0", None),
        ("ours: ask | us # first", "other", "ours: ask | us # first"),
    ],
)
def test_the_hub_reads_the_licence_whatever_signs_are_in_it(
    licence: str | None, license: str | None, name: str | None
) -> None:
    told = licence or NO_LICENCE_STATEMENT
    card = portable_card(config={"licence": licence}, licence=told)
    found = read(format_model_card(card, "import timm", "timm"))
    assert found.data.to_dict().get("license") == license
    assert found.data.to_dict().get("license_name") == name
    assert found.data.library_name == "timm"
    assert f"| licence | {told.replace('|', chr(92) + '|')} |" in found.text


def test_an_export_of_an_older_version_is_described_as_far_as_it_goes(tmp_path: Path) -> None:
    path, _ = exported(tmp_path, tmp_path)
    card = PortableCard.model_validate(read_card(path).as_json() | {"width": 128})
    text = format_model_card(card, "import timm", "timm")
    assert "by unknown method" in text
    assert "| training data | fingerprint unknown |" in text
    assert "None were at hand." in text


def test_figures_of_earlier_versions_have_the_names_of_today() -> None:
    card = portable_card(metrics={"loss": 0.5, "alignment": 0.25, "online/top1": 0.75})
    text = format_model_card(card, "import timm", "timm")
    for name, value in {"loss": 0.5, "alignment_cos": 0.25, "online_top1": 0.75}.items():
        assert f"| training | {name} | {value} |" in text.replace("\\", "")


def test_only_evaluations_of_these_very_weights_are_told(tmp_path: Path) -> None:
    path, _ = exported(tmp_path, tmp_path)
    sha = read_card(path).sha256
    results = {
        "knn-00000040": (sha, {"top1": 0.5}),
        "ood-00000040-on-12345678": (sha, {"auroc": 0.75}),
        "linear-00000040": ("f" * 64, {"top1": 0.9}),
        "knn-00000080": (sha, {"top1": 0.9}),
    }
    for name, (of, metrics) in results.items():
        result = {"export_sha256": of, "metrics": metrics}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    (tmp_path / ".knn-00000040.attempts.json").write_text("[1]")
    want = {"knn": {"top1": 0.5}, "ood-on-12345678": {"auroc": 0.75}}
    assert read_evaluation_figures(path, read_card(path)) == want
    made = convert_export(path, "torch_export")
    extra = {"card.json": ""}
    torch.export.load(made, extra_files=extra)
    assert json.loads(extra["card.json"])["evaluations"] == want
    change(path, sha256="0" * 64)
    assert read_evaluation_figures(path, read_card(path)) == {}


def trained(cfg: RunConfig) -> Mapping[int, Mapping[str, float]]:
    """A training's own account, by step."""
    lines: dict[int, Mapping[str, float]] = {}
    train(
        cfg,
        device="cpu",
        should_stop=lambda: False,
        on_export=lambda *_: None,
        log=lambda told, step: lines.update({step: told}),
    )
    return lines


@pytest.mark.slow
def test_the_card_of_a_training_tells_data_code_figures_and_licence_and_goes_to_the_hub(
    tmp_path: Path,
) -> None:
    photos = tmp_path / "photos"
    val = tiny_dataset(photos, samples=40, classes=4, split="val", first=500)
    data = tiny_dataset(photos, samples=96, classes=4)
    changes = [
        "name=card", f"out={tmp_path}", f"data.train={data}", f"data.val={val}",
        "method.backbone=resnet18", "data.image_size=96", "data.backend=reference",
        "optim.global_batch=32", "data.streams=4", "optim.max_steps=3", "optim.epochs=1000",
        "online.lr=0.1", "evaluations=[]", "licence=cc-by-4.0",
    ]  # fmt: skip
    cfg = load(ROOT / "configs" / "quickstart.yaml", changes, methods=CONFIGS)
    (lines,) = run_ranks(trained, 1, cfg)

    path = cfg.dir / "export" / "backbone-00000003.safetensors"
    backbone, card = load_export(path)
    assert card.fingerprint == Dataset.open(data).fingerprint
    assert card.licence == "cc-by-4.0"
    assert {"loss", "embedding_spread", "online_top1"} <= card.metrics.keys()
    assert card.metrics.items() <= lines[3].items()
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert card.versions["commit"].removesuffix("-dirty") == head.stdout.strip()

    accuracy = evaluate(path, KnnConfig(k=(5,), temperature=(0.07,)))["metrics"]
    folder = convert_export(path, "timm")
    told = ModelCard.load(folder / "README.md")
    assert told.data.license == "cc-by-4.0"
    assert told.data.tags == ["vssl-dist", "vje"]
    for figure, value in accuracy.items():
        assert (
            f"| knn | {figure.removeprefix('knn/')} | {escape_markdown(f'{value:.6g}')} |"
            in told.text
        )
    assert (
        f"| training | loss | {escape_markdown(format(card.metrics['loss'], '.6g'))} |" in told.text
    )
    assert card.fingerprint in told.text
    torchvision()
    import timm

    images = torch.randn(2, 3, 96, 96)
    opened = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    torch.testing.assert_close(opened(images), backbone(images))
