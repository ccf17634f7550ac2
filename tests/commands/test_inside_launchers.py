"""Whole commands inside every other launcher at once: what they do is what they do outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.damage import place
from tests.support.launchers import HOSTILE
from tests.support.photos import tiny_dataset
from tests.support.refusals import refusal

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and a configuration whose run is one step."""
    folder = tmp_path_factory.mktemp("inside")
    text = {
        "trace": True,
        "method": {"name": "simsiam", "backbone": "resnet18_c16"},
        "data": {
            "train": str(tiny_dataset(folder, samples=32, shard_size=32)),
            "val": str(tiny_dataset(folder, samples=16, shard_size=16, split="val", first=1000)),
            "image_size": 32,
            "streams": 2,
            "window": 16,
            "threads": 1,
            "views": ["cifar", "cifar"],
        },
        "optim": {"base_lr": 0.05, "epochs": 1, "global_batch": 16, "max_steps": 1},
        "engine": {"autocast": "none"},
        "evaluations": [{"task": "knn", "k": [5], "temperature": [0.1], "batch": 8}],
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(text))
    return folder


def command(
    folder: Path, program: str, *words: str, **theirs: str
) -> subprocess.CompletedProcess[str]:
    outside = {name: value for name, value in os.environ.items() if name not in HOSTILE}
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / program), *words],
        cwd=folder, env={**outside, "CUDA_VISIBLE_DEVICES": "", **theirs},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def done(run: Path) -> tuple[object, object]:
    """The digests of a whole run, and what its evaluation found."""
    traces = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(run.glob("trace.rank*.jsonl"))
    ]
    (found,) = run.glob("export/knn-????????.json")
    return traces, json.loads(found.read_text())["results"]


def test_a_run_and_its_evaluation_are_the_same_inside_and_outside(folder: Path) -> None:
    """The one inside lies in a folder really called $x, and no path of it is expanded twice."""
    outcomes = []
    for out, theirs in (("outside", {}), ("$$x", {**HOSTILE, "x": "/elsewhere"})):
        trained = command(folder, "submit.py", "--local", "2", "tiny.yaml", f"out={out}", **theirs)
        assert trained.returncode == 0, trained.stderr
        run = folder / out.replace("$$", "$") / "tiny"
        assert f"run folder  {run}\n" in trained.stdout
        again = ("evaluate.py", f"{out}/tiny", "--ranks", "2", "--threads", "1", "--device", "cpu")
        evaluated = command(folder, *again, **theirs)
        assert evaluated.returncode == 0, evaluated.stderr
        outcomes.append(done(run))
    assert outcomes[0] == outcomes[1]
    assert not [path.name for path in folder.iterdir() if "$" in path.name and path.name != "$x"]


def test_a_refusal_is_one_line_and_exit_code_2_inside_too(folder: Path) -> None:
    for sample in range(16):
        tar, offset, size = place(folder / "train", sample)
        with tar.open("r+b") as file:
            file.seek(offset + size // 2)
            file.write(bytes(40))
    words = ("--local", "2", "tiny.yaml", "name=refused", "data.max_bad=0", "out=${HERE}/$$x")
    refused = command(folder, "submit.py", *words, **HOSTILE, HERE=str(folder))
    assert refused.returncode == 2, refused.stderr
    assert "data.max_bad allows 0" in refusal(refused.stderr)
    assert [p.name for p in (folder / "$x" / "refused" / "logs").glob("failure-*")]
