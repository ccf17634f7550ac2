"""STL-10 from its official files: pretraining on all images, k-NN on those that have labels."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep import shard
from tests.support.archives import STL10_COUNTS, write_stl10
from vssl_dist.commands import evaluate, submit

ROOT = Path(__file__).parents[2]
SMALL = [
    "method.backbone=resnet10_c16",
    "data.image_size=32",
    "data.streams=2",
    "data.window=16",
    "data.threads=1",
    "optim.global_batch=16",
    "optim.max_steps=4",
    "engine.autocast=none",
    "evaluations=[{task: knn, k: [5], temperature: [0.1]}]",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with STL-10 sharded as the config's head says."""
    place = tmp_path_factory.mktemp("stl10")
    root, out = str(write_stl10(place / "raw")), str(place / "data" / "stl10")
    for split in ([], ["--split", "train+unlabeled"]):
        assert shard.main(["stl10", "--root", root, "--out", out, "--workers", "1", *split]) == 0
    return place


def words(*overrides: str) -> list[str]:
    config = str(ROOT / "configs" / "stl10_vje.yaml")
    return ["--local", "2", config, *SMALL, *overrides]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.bank=null"], "data.train: .*: 50 of its 70 images have no label, but task knn"),
        (["data.val=data/stl10/unlabeled"], "data.val: .*: 50 of its 50 images have no label"),
        (["data.bank=data/stl10/unlabeled"], "data.bank: .*: 50 of its 50 images have no label"),
        (
            ["method={name: supervised, backbone: resnet10_c16, classes: 10}", "evaluations=[]",
             "data.views=[stl10]"],
            "data.train: .*: 50 of its 70 images have no label, but method supervised",
        ),
    ],
)  # fmt: skip
def test_what_needs_labels_is_refused_without_them_before_anything_is_written(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(folder)
    before = set(folder.iterdir())
    assert submit.main(words(*overrides)) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert re.match(f"error: {said}", line)
    assert set(folder.iterdir()) == before


@pytest.mark.slow
def test_all_images_train_and_the_labelled_ones_vote(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, str(ROOT / "launch" / "submit.py"), *words("name=all", "trace=true")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "MLFLOW_TRACKING_URI": "none"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    run = folder / "runs" / "all"
    ids = [
        sample
        for path in run.glob("trace.rank*.jsonl")
        for line in path.read_text().splitlines()
        for sample in json.loads(line).get("ids", [])
    ]
    assert len(ids) == 64
    assert len(set(ids)) == 64  # less than an epoch: no image twice
    assert evaluate.main([str(run), "--device", "cpu"]) == 0
    result = json.loads((run / "export" / "knn-00000004.json").read_text())
    assert result["bank"]["samples"] == STL10_COUNTS["train"]
    assert result["queries"]["samples"] == STL10_COUNTS["test"]
    assert 0 <= result["results"]["k5_t0.1"]["top1"] <= 1
    capsys.readouterr()
    stl10 = folder / "data" / "stl10"
    for bank in ("unlabeled", "train+unlabeled"):
        assert evaluate.main([str(run), "--data", f"{stl10 / bank},{stl10 / 'val'}"]) == 2
        error = capsys.readouterr().err
        assert "have no label, but task knn compares labels" in error
        assert error.count("\n") == 1
