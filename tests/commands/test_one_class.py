"""One-class detection from the command line: killed, continued, and held against its own images."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from sklearn.metrics import roc_auc_score

from tests.support.exports import NORMALISE, by_hand
from tests.support.photos import tiny_dataset
from tests.support.shards import edit_manifest
from vssl_dist import config
from vssl_dist.commands import one_class
from vssl_dist.config import OodConfig
from vssl_dist.errors import ConfigError
from vssl_dist.exports.read import load_export
from vssl_dist.exports.results import RESULT_FORMAT
from vssl_dist.methods import CONFIGS

ROOT = Path(__file__).parents[2]
K = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two classes of photographs and a configuration of three steps."""
    place = tmp_path_factory.mktemp("one_class")
    tiny_dataset(place, samples=64, classes=2, shard_size=16)
    tiny_dataset(place, samples=48, classes=2, shard_size=48, split="val", first=1000)
    text = {
        "method": {"name": "vje", "backbone": "resnet10_c16"},
        "data": {
            "train": "train",
            "val": "val",
            "backend": "reference",
            "image_size": 32,
            "normalise": NORMALISE.model_dump(mode="json"),
            "streams": 1,
            "window": 16,
            "threads": 1,
            "views": ["cifar", "cifar"],
        },
        "optim": {"name": "adamw", "base_lr": 0.002, "max_steps": 3, "global_batch": 16},
        "engine": {"autocast": "none"},
        "evaluations": [{"task": "ood", "ood": {"x": "val"}, "k": K, "bootstrap": 10}],
    }
    (place / "tiny.yaml").write_text(yaml.safe_dump(text))
    return place


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tiny.yaml", "data.val=null", "evaluations=[]"], "data.val: one-class detection needs"),
        (["tiny.yaml", "data.val=none"], "none: no such folder of shards"),
        (["tiny.yaml", "--classes", "zebra"], "--classes zebra: zebra is none of "),
        (["tiny.yaml", "optim.epoch=3"], "optim.epoch: no such key"),
        (["none.yaml"], "none.yaml: cannot be read"),
    ],
)
def test_what_cannot_be_run_is_one_line_and_writes_nothing(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(folder)
    assert one_class.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}")
    assert error.count("\n") == 1
    assert not (folder / "runs").exists()


def test_a_class_gets_the_config_with_its_own_data_and_the_settings_of_task_ood(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for extra, k, pairs in (([], K, 4), (["evaluations=[]"], 50, 1)):
        cfg = config.load(Path("tiny.yaml"), extra, methods=CONFIGS)
        for trial in one_class.plan_trials(cfg, None):
            words = [*extra, *one_class.overrides(trial, cfg)]
            own = config.load(Path("tiny.yaml"), words, methods=CONFIGS)
            assert own.dir == trial.run_dir
            assert own.data.train == trial.data / "train"
            (task,) = own.evaluations
            assert isinstance(task, OodConfig)
            assert (task.k, task.pairs) == (k, pairs)
            assert task.ood == {"others": trial.data / "others"}
            assert own.method == cfg.method
            assert own.optim == cfg.optim


def test_other_data_under_the_same_name_are_refused_and_nobody_is_sent_to_delete(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(folder)
    before, now = (
        config.load(Path("tiny.yaml"), [f"out={tmp_path}", *changed], methods=CONFIGS)
        for changed in ([], ["data.val=train"])
    )
    (trial, _) = one_class.plan_trials(before, None)
    one_class.write_class_splits(trial, before)
    one_class.write_class_splits(trial, before)
    with pytest.raises(ConfigError, match=r"is of other data .*: give this run another name"):
        one_class.write_class_splits(trial, now)


def test_figures_of_a_class_are_those_of_the_density_that_is_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(folder)
    own = "evaluations=[{task: ood, density: cartesian, ood: {x: val}}]"
    vssl = "method={name: vssl, backbone: resnet10_c16}"
    scores = {"others": {name: {"auroc": 0.5} for name in ("norm", "s1_self_likelihood")}}
    words: list[list[str]] = []
    monkeypatch.setattr(one_class, "run_command", lambda *said: words.append([*said]) or 0)
    for method, extra, stem, density in (
        (None, [], "ood", "polar"),
        (None, [own], "ood-cartesian", "cartesian"),
        (vssl, [own], "ood", None),
    ):
        changed = [*extra, f"out={tmp_path / stem}{density}", *([method] if method else [])]
        cfg = config.load(Path("tiny.yaml"), changed, methods=CONFIGS)
        trial = one_class.plan_trials(cfg, None)[0]
        (trial.run_dir / "export").mkdir(parents=True)
        for name in ("ood", "ood-cartesian"):
            said = {"format": RESULT_FORMAT, "results": scores, "name": name}
            said |= {"density": density} if density and name == stem else {}
            (trial.run_dir / "export" / f"{name}-00000003.json").write_text(json.dumps(said))
        trained = one_class.read_class_result(trial, cfg, with_baselines=False)
        assert trained.ood_result["name"] == stem
        ending = f"_{density}" if density else ""
        assert list(trained.auroc_by_score()) == ["norm", f"s1_self_likelihood{ending}"]
        one_class.finish_trial(trial, cfg, one_class.arguments(["tiny.yaml"]))
        asked = words[-1][words[-1].index("--density") + 1 :] if density else []
        assert asked == ([density] if density else [])
        assert ("--density" in words[-1]) == bool(density)


def test_classes_of_any_name_have_run_folders_of_their_own(tmp_path: Path) -> None:
    names = ["a b", "a/b", "a\nb", "größe", "..", "x" * 200, "x" * 201]
    for first, split in ((0, "train"), (1400, "val")):
        folder = tiny_dataset(tmp_path, samples=14, classes=7, split=split, first=first)
        edit_manifest(folder, classes=names)
    overrides = [f"name={'n' * 100}", f"data.train={tmp_path}/train", f"data.val={tmp_path}/val"]
    preset = ROOT / "configs" / "one_class_cifar10_vje.yaml"
    cfg = config.load(preset, overrides, methods=CONFIGS)
    planned = one_class.plan_trials(cfg, None)
    assert [trial.name for trial in planned] == names
    assert len({trial.run_dir for trial in planned}) == len({trial.data for trial in planned}) == 7
    for trial in planned:
        config.load(preset, one_class.overrides(trial, cfg), methods=CONFIGS)


def aurocs(folder: Path, label: int, run: Path) -> float:
    """Of the distance to the K-th nearest training image, from pixels and weights alone."""
    network = load_export(max((run / "export").glob("backbone-*.safetensors")))[0]
    parts = {}
    for split in ("train", "val"):
        pixels, labels = by_hand(folder / split)
        with torch.no_grad():
            parts[split] = F.normalize(network(pixels).double(), dim=1), torch.from_numpy(labels)
    bank = parts["train"][0][parts["train"][1] == label]
    queries, truth = parts["val"]
    distance = 1 - (queries @ bank.T).sort(dim=1, descending=True).values[:, K - 1]
    return float(roc_auc_score((truth != label).numpy(), distance.numpy()))


@pytest.mark.slow
def test_a_killed_call_goes_on_and_its_figures_are_those_of_the_images(folder: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "MLFLOW_TRACKING_URI": "none"}
    command = [sys.executable, str(ROOT / "launch" / "one_class.py"), "--ranks", "1", "tiny.yaml"]
    call = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True)
    partial = folder / "runs" / "tiny" / "one_class.json"
    end = time.monotonic() + 600
    try:
        while not partial.exists():
            assert time.monotonic() < end
            assert call.poll() is None
            time.sleep(0.1)
    finally:
        os.killpg(call.pid, signal.SIGKILL)
        call.wait()
    first = json.loads(partial.read_text())
    assert not first["complete"]
    assert len(first["classes"]) == 1

    done = subprocess.run(command, cwd=folder, env=environment, timeout=600, check=False)
    assert done.returncode == 0
    result = json.loads(partial.read_text())
    assert result["complete"]
    (name,) = first["classes"]
    assert result["classes"][name] == first["classes"][name]
    mean = 0.0
    for label, one in enumerate(result["classes"].values()):
        (run,) = (folder / "runs").glob(f"tiny-{label:02d}-*")
        want = aurocs(folder, label, run)
        got = one["results"]["others"]["knn"]["auroc"]
        assert got == pytest.approx(want, abs=2e-3)
        mean += want / 2
    assert result["mean_auroc"]["vje"]["knn"] == pytest.approx(mean, abs=2e-3)
    assert Image.open(partial.with_suffix(".png")).format == "PNG"
    assert "| mean |" in partial.with_suffix(".md").read_text()


@pytest.mark.parametrize("text", ["1" + "0" * 400, "[1]", '"soon"', "[" * 200_000])
def test_seconds_that_are_none_are_one_line(tmp_path: Path, text: str) -> None:
    trial = one_class.ClassTrial("a", tmp_path / "run", tmp_path)
    trial.seconds_file.write_text(text)
    with pytest.raises(ConfigError, match=r"seconds\.json: holds no seconds .*: remove it"):
        trial.seconds()
