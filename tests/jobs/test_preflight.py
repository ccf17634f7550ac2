from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.support.damage import stalled
from tests.support.photos import tiny_dataset
from vssl_dist import config
from vssl_dist.config import RunConfig
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.data.store.stall import StallWatch
from vssl_dist.errors import ConfigError
from vssl_dist.jobs.preflight import Preflight, check_backbone, with_installed_backend
from vssl_dist.jobs.resources import Resources, resolve_for_slurm, resolve_for_this_machine
from vssl_dist.linter import Facts
from vssl_dist.methods import CONFIGS
from vssl_dist.resume import check_resumable

TEXT = """
method: {name: vje, backbone: resnet10_c16}
data: {train: a, val: b, views: [cifar, cifar], streams: 4, image_size: 32}
optim: {base_lr: 1e-3, global_batch: 16, epochs: 2}
evaluations: [{task: knn}]
"""


def read(*overrides: str) -> RunConfig:
    return config.loads(TEXT, overrides, methods=CONFIGS, name="tiny")


def test_all_that_a_run_lacks_is_listed_by_its_key_in_one_line_each(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    folders = [f"data.{split}={tmp_path / split}" for split in ("train", "val", "bank")]
    cfg = read(*folders, f"evaluations=[{{task: ood, ood: {{svhn: {tmp_path / 'svhn'}}}}}]")
    found = list(
        Preflight(
            cfg, resolve_for_slurm(Resources(device="cpu"), 1, "http://me:hunter2@tracker:5000")
        ).problems()
    )
    starts = ["there is no SLURM", "data.train: ", "data.val: ", "data.bank: ",
              "evaluations: ood svhn: ", "MLFLOW_TRACKING_URI names a user"]  # fmt: skip
    assert [line[: len(start)] for line, start in zip(found, starts, strict=True)] == starts
    assert not any("\n" in line or "hunter2" in line for line in found)


def test_a_sound_run_lacks_nothing_and_a_split_without_its_manifest_is_named(
    tmp_path: Path,
) -> None:
    launch = resolve_for_this_machine(
        Resources(device="cpu"), 1, 0, f"sqlite:///{tmp_path}/mlflow.db"
    )
    train = tiny_dataset(tmp_path, samples=32)
    val = tiny_dataset(tmp_path, samples=8, split="val", first=500)
    assert list(Preflight(read(f"data.train={train}", f"data.val={val}"), launch).problems()) == []
    (tmp_path / "val" / "manifest.json").unlink()
    (line,) = Preflight(read(f"data.train={train}", f"data.val={val}"), launch).problems()
    assert line.startswith("data.val: ")


def test_a_network_is_checked_against_every_view_without_its_weights() -> None:
    check_backbone(read("method.backbone=vit_small_patch16_224", "data.image_size=224"))
    with pytest.raises(ConfigError, match=r"data\.views: .* 24 pixels"):
        check_backbone(
            read(
                "method.backbone=vit_tiny_patch16_224",
                "data.views=[cifar, {recipe: cifar, size: 24}]",
            )
        )
    with pytest.raises(ConfigError, match=r"method\.backbone: 'resnet5O'"):
        check_backbone(read("method.backbone=resnet5O"))


def test_storage_that_stalls_is_named_with_the_command_before_anything_else_waits(
    tmp_path: Path,
) -> None:
    launch = resolve_for_this_machine(
        Resources(device="cpu"), 1, 0, f"sqlite:///{tmp_path}/mlflow.db"
    )
    train = tiny_dataset(tmp_path, samples=32)
    cfg = read(f"data.train={train}", f"data.val={tmp_path / 'val'}", "data.timeout_s=0.4")
    checks = Preflight(cfg, launch)
    with stalled("shard-000000.tar", "read"):
        first = next(checks.problems())
        facts = checks.facts()
    assert first.startswith("data.train: submit.py waits for data: ")
    assert "shard-000000.tar: storage has not answered" in first
    assert facts == Facts(1)


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("splits")
    tiny_dataset(folder, samples=32)
    tiny_dataset(folder, samples=8, split="val", first=500)
    tiny_dataset(folder, samples=8, split="svhn", first=900)
    return folder


def refusals(splits: Path, *overrides: str) -> list[str]:
    here = [f"data.{split}={splits / split}" for split in ("train", "val")]
    launch = resolve_for_this_machine(
        Resources(device="cpu"), 1, 0, f"sqlite:///{splits}/mlflow.db"
    )
    return list(Preflight(read(*here, *overrides), launch).problems())


def test_what_an_evaluation_would_refuse_is_refused_before_submission(splits: Path) -> None:
    def ood(name: str, split: str) -> str:
        return f"evaluations=[{{task: ood, ood: {{{name}: {splits / split}}}}}]"

    assert refusals(splits) == refusals(splits, ood("svhn", "svhn")) == []
    for overrides, complaint in (
        ([f"data.val={splits / 'train'}"], "is bank and query: every image would find itself"),
        ([f"data.bank={splits / 'val'}"], "is bank and query: every image would find itself"),
        ([ood("x", "val")], "ood x is the queries itself"),
        ([ood("x", "train")], "ood x is the bank itself"),
        ([ood("bank", "svhn")], "a dataset cannot be called bank"),
    ):
        (line,) = refusals(splits, *overrides)
        assert line.startswith("evaluations: ")
        assert complaint in line


def test_a_copy_of_the_training_shards_is_no_held_out_split(splits: Path, tmp_path: Path) -> None:
    shutil.copytree(splits / "train", tmp_path / "val")
    (line,) = refusals(splits, f"data.val={tmp_path / 'val'}")
    assert "is bank and query" in line
    assert refusals(splits, f"data.val={splits / 'train'}", "evaluations=[{task: collapse}]") == []


def test_a_batch_larger_than_the_dataset_is_meant_only_with_max_steps(splits: Path) -> None:
    (line,) = refusals(splits, "optim.global_batch=64")
    assert line.startswith("optim.global_batch=64 is more than the 32 images of ")
    assert refusals(splits, "optim.global_batch=64", "optim.max_steps=3") == []
    assert refusals(splits, "optim.global_batch=32") == []


def test_a_folder_of_pictures_is_told_from_shards_with_the_command_that_makes_them(
    splits: Path, tmp_path: Path
) -> None:
    for name in ("flat/1.JPG", "classes/cat/1.png", "classes/notes.txt", "else/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("flat", "classes"):
        (line,) = refusals(splits, f"data.train={tmp_path / name}")
        assert "holds pictures such as " in line
        assert f"data_prep/shard.py imagefolder --root {tmp_path / name} --out" in line
    (line,) = refusals(splits, f"data.train={tmp_path / 'else'}")
    assert "holds pictures" not in line


def test_a_backbone_that_takes_no_images_at_all_or_leaves_out_a_part_is_refused() -> None:
    for backbone, size, complaint in (
        ("crossvit_9_240", 224, "cannot take images of 224 pixels"),
        ("halonet26t", 224, "AssertionError in its forward pass"),
        ("lambda_resnet26t", 100, "cannot take images of 100 pixels"),
        ("vit_small_patch16_224", 40, "patches of 16 and sees 64% of them: give a multiple of 16"),
        ("vit_tiny_patch16_224", 30, "sees 28% of them"),
        ("eva02_tiny_patch14_224", 32, "such as 42"),
    ):
        with pytest.raises(ConfigError) as refused:
            check_backbone(read(f"method.backbone={backbone}", f"data.image_size={size}"))
        assert complaint in str(refused.value)
        assert "\n" not in str(refused.value)
    local = ["data.views=[cifar, {recipe: cifar, size: 24}]", "data.image_size=32"]
    with pytest.raises(ConfigError, match=r"data\.views: .* 24 pixels"):
        check_backbone(read("method.backbone=deit_tiny_patch16_224", *local))


def test_each_dataset_is_opened_once(splits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    genuine = Dataset.open

    def opening(folder: Path, *watch: StallWatch) -> Dataset:
        opened.append(folder)
        return genuine(folder, *watch)

    monkeypatch.setattr(Dataset, "open", opening)
    cfg = read(*(f"data.{split}={splits / split}" for split in ("train", "val")),
               f"data.bank={splits / 'train'}")  # fmt: skip
    checks = Preflight(cfg, resolve_for_this_machine(Resources(device="cpu"), 1, 0, "none"))
    assert list(checks.problems()) == []
    assert checks.facts() == Facts(1, 32, "tiny", len(checks.train.classes), False)
    assert check_resumable(cfg, 1, checks.train) == 0
    assert sorted(opened) == [splits / "train", splits / "val"]


def test_without_dali_the_reference_decodes_in_its_place_unless_dali_was_asked_for(
    splits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert with_installed_backend(read()).data.backend == "reference"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("data.backend=reference: DALI is not installed")
    assert with_installed_backend(read("data.backend=dali")).data.backend == "dali"
    assert capsys.readouterr().err == ""
    (line,) = refusals(splits, "data.backend=dali")
    assert line.startswith("data.backend=dali: DALI is not installed: pip install '.[cuda13]'")
    assert refusals(splits, "data.backend=reference") == []
    monkeypatch.undo()
    assert with_installed_backend(read()).data.backend == "dali"
