"""Every file in ``configs/`` is read, built, and takes two real steps on a CPU."""

from __future__ import annotations

import gc
import json
import math
import re
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.plain import photographs
from tests.support.ranks import run_ranks
from vssl_dist import config
from vssl_dist.config import KnnConfig
from vssl_dist.data.loader import Batch
from vssl_dist.engine import Engine
from vssl_dist.methods import CONFIGS, METHODS, build_method

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
TEACHERS = {"byol", "dino", "moco_v3", "vssl"}
DATASETS = ("cifar10", "cifar100", "stl10", "in100", "in1k")
IMAGES, SIZE, PATCHES = 4, 16, 32
"""A ViT needs two patches of 16 pixels on a side, for DINO's local crops to have one."""
BIG = "in1k_"
ONE_EACH = [
    "in1k_vje", "cifar100_vssl", "stl10_byol", "in100_moco_v3", "in1k_simsiam",
    "cifar100_simclr", "stl10_vicreg", "in100_barlow_twins", "cifar10_dino", "stl10_supervised",
]  # fmt: skip
"""Every method and every dataset, in the fast tier with a narrow backbone."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_config_loads_and_its_method_builds(path: Path) -> None:
    cfg = config.load(path, methods=CONFIGS)
    assert cfg.name == path.stem
    assert len(cfg.data.views) == cfg.method.views_wanted
    assert cfg.evaluations or "no_evaluations" in cfg.silence
    with torch.device("meta"):
        method = build_method(cfg.method, cfg.data.image_size)
    assert hasattr(method.student, "backbone")
    assert (method.teacher is not None) == (cfg.method.name in TEACHERS)
    assert cfg.micro_batch(64 if path.stem.startswith(BIG) else 2) > 1


def test_every_method_has_a_recipe_for_every_dataset() -> None:
    names = {path.stem for path in FILES}
    assert {f"{dataset}_{method}" for dataset in DATASETS for method in METHODS} <= names
    for dataset in DATASETS:
        for method in METHODS:
            cfg = config.load(FILES[0].with_name(f"{dataset}_{method}.yaml"), methods=CONFIGS)
            assert cfg.method.name == method
            assert dataset in cfg.data.train.parts
    assert {name.split("_", 1)[1] for name in ONE_EACH} == set(METHODS)
    assert {name.split("_")[0] for name in ONE_EACH} == set(DATASETS)


def head(path: Path) -> str:
    """The comment at the head of a file as one line."""
    lines = path.read_text().splitlines()
    return " ".join(line.lstrip("# ") for line in takewhile(lambda x: x.startswith("#"), lines))


def test_comment_at_the_head_says_how_to_run_it() -> None:
    for path in FILES:
        assert re.search(rf"launch/\w+\.py .*configs/{path.name}", head(path)), path.name


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.stem.split("_")[0] in DATASETS], ids=lambda path: path.stem
)
def test_comment_at_the_head_says_whence_its_numbers_come_what_to_expect_and_the_cost(
    path: Path,
) -> None:
    parts = ["Where the numbers come from", "chosen here", "To compare with: ", "GPU-hours: "]
    places = [head(path).find(part) for part in parts]
    assert -1 not in places, f"{path.name} lacks {parts[places.index(-1)]!r}"
    if path.stem.endswith(("_vje", "_vssl")):
        assert "paper's recipe is not known here" in head(path)


def test_pretraining_on_stl10_sees_the_images_without_labels_and_is_judged_by_those_with() -> None:
    for path in FILES:
        cfg = config.load(path, methods=CONFIGS)
        unlabelled = path.stem.startswith("stl10_") and cfg.method.name != "supervised"
        assert (cfg.data.train.name == "train+unlabeled") == unlabelled, path.name
        assert cfg.data.bank == (Path("data/stl10/train") if unlabelled else None), path.name


def test_every_knn_of_a_recipe_has_both_votes() -> None:
    for path in FILES:
        for task in config.load(path, methods=CONFIGS).evaluations:
            if isinstance(task, KnnConfig):
                assert 0.07 in task.temperature, path.name
                assert math.inf in task.temperature, path.name


def two_steps(paths: list[Path], backbone: str | None = None) -> dict[str, dict[str, Any]]:
    """Loss and change of the weights of each config in the real engine, on photographs."""
    found = {}
    for path in paths:
        try:
            found[path.stem] = _two_steps(path, backbone)
        except Exception as error:
            error.add_note(f"in {path.name}")
            raise
    return found


def _two_steps(path: Path, backbone: str | None) -> dict[str, Any]:
    whole = config.load(path, methods=CONFIGS)
    named = backbone or whole.method.backbone
    size = PATCHES if "vit" in named else SIZE
    views = [view.model_dump(mode="json") for view in whole.data.views]
    small = {
        "method.backbone": named,
        "data.image_size": size,
        "data.views": [view | {"size": view["size"] and size // 2} for view in views],
        "data.streams": 1,
        "optim.global_batch": IMAGES,
        "optim.warmup_epochs": 0,
        "engine.autocast": "none",
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in small.items()]
    cfg = config.load(path, overrides, methods=CONFIGS)
    torch.manual_seed(0)
    method = build_method(cfg.method, size)
    engine = Engine(cfg, method, total_steps=10, steps_per_epoch=5.0, device="cpu")
    before = [p.detach().clone() for p in engine.student.parameters() if p.requires_grad]
    outs = [engine.train_step([batch(cfg, step)]) for step in range(2)]
    moved = [p for p in engine.student.parameters() if p.requires_grad]
    changed = [not torch.equal(p, old) for p, old in zip(moved, before, strict=True)]
    found = {
        "losses": [out.loss.item() for out in outs],
        "skipped": outs[-1].metrics["skipped_steps"].item(),
        "changed": sum(changed) / len(changed),
        "finite": all(bool(p.isfinite().all()) for p in moved),
    }
    engine.ds.destroy()
    gc.collect()  # the next network takes the room of this one
    return found


def batch(cfg: config.RunConfig, step: int) -> Batch:
    """Photographs, their views of the sizes that the recipes ask for, halved to fit."""
    whole = cfg.data.image_size
    images = photographs(whole, count=2 * IMAGES)[step * IMAGES : (step + 1) * IMAGES]
    views = []
    for number, recipe in enumerate(cfg.data.views):
        size = whole // 2 if recipe.size else whole
        views.append((images * (1 + 0.1 * number))[..., :size, :size].contiguous())
    ids = torch.arange(IMAGES)
    return Batch(ids, views, ids)


def assert_trained(found: dict[str, dict[str, Any]], files: list[Path]) -> None:
    assert set(found) == {path.stem for path in files}
    for name, run in found.items():
        assert run["skipped"] == 0, name
        assert run["finite"], name
        assert all(loss == loss for loss in run["losses"]), name
        assert run["losses"][0] != run["losses"][1], name
        # Norms inside a branch that starts as zero hardly move before its last one has.
        assert run["changed"] > 0.75, name


def test_each_method_takes_two_real_steps_with_a_narrow_backbone() -> None:
    files = [path for path in FILES if path.stem in ONE_EACH]
    assert_trained(run_ranks(two_steps, 1, files, "resnet10_c16", timeout_s=300)[0], files)


@pytest.fixture(scope="module")
def stepped() -> dict[str, dict[str, Any]]:
    """Two steps of every file, one after the other in one rank."""
    found: dict[str, dict[str, Any]] = run_ranks(two_steps, 1, FILES, timeout_s=1800)[0]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dataset", [*DATASETS, "other"])
def test_every_config_takes_two_real_steps(
    stepped: dict[str, dict[str, Any]], dataset: str
) -> None:
    families = {path: path.stem.split("_")[0] for path in FILES}
    files = [p for p, f in families.items() if (f if f in DATASETS else "other") == dataset]
    assert files
    assert_trained({path.stem: stepped[path.stem] for path in files}, files)
