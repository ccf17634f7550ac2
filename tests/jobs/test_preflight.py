from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.damage import stalled
from tests.support.photos import tiny_dataset
from vssl_dist import config
from vssl_dist.config import ConfigError, RunConfig
from vssl_dist.jobs.preflight import check_network, problems
from vssl_dist.jobs.resources import Resources, on_slurm, on_this_machine
from vssl_dist.linter import Facts, known
from vssl_dist.methods import CONFIGS

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
        problems(cfg, on_slurm(Resources(device="cpu"), 1, "http://me:hunter2@tracker:5000"))
    )
    starts = ["there is no SLURM", "data.train: ", "data.val: ", "data.bank: ",
              "evaluations: ood svhn: ", "MLFLOW_TRACKING_URI names a user"]  # fmt: skip
    assert [line[: len(start)] for line, start in zip(found, starts, strict=True)] == starts
    assert not any("\n" in line or "hunter2" in line for line in found)


def test_a_sound_run_lacks_nothing_and_a_split_without_its_manifest_is_named(
    tmp_path: Path,
) -> None:
    launch = on_this_machine(Resources(device="cpu"), 1, 0, f"sqlite:///{tmp_path}/mlflow.db")
    train = tiny_dataset(tmp_path, samples=32)
    val = tiny_dataset(tmp_path, samples=8, split="val", first=500)
    assert list(problems(read(f"data.train={train}", f"data.val={val}"), launch)) == []
    (tmp_path / "val" / "manifest.json").unlink()
    (line,) = problems(read(f"data.train={train}", f"data.val={val}"), launch)
    assert line.startswith("data.val: ")


def test_a_network_is_checked_against_every_view_without_its_weights() -> None:
    check_network(read("method.backbone=vit_small_patch16_224", "data.image_size=224"))
    with pytest.raises(ConfigError, match=r"data\.views: .* 24 pixels"):
        check_network(
            read(
                "method.backbone=vit_tiny_patch16_224",
                "data.views=[cifar, {recipe: cifar, size: 24}]",
            )
        )
    with pytest.raises(ConfigError, match=r"method\.backbone: 'resnet5O'"):
        check_network(read("method.backbone=resnet5O"))


def test_storage_that_stalls_is_named_with_the_command_before_anything_else_waits(
    tmp_path: Path,
) -> None:
    launch = on_this_machine(Resources(device="cpu"), 1, 0, f"sqlite:///{tmp_path}/mlflow.db")
    train = tiny_dataset(tmp_path, samples=32)
    cfg = read(f"data.train={train}", f"data.val={tmp_path / 'val'}", "data.timeout_s=0.4")
    with stalled("shard-000000.tar", "read"):
        first = next(problems(cfg, launch))
    with stalled("shard-000000.tar"):
        facts = known(cfg, ranks=1)
    assert first.startswith("data.train: submit.py waits for data: ")
    assert "shard-000000.tar: storage has not answered" in first
    assert facts == Facts(1)
