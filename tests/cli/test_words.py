"""The words of the commands: those of before, and what the parser knows without heavy imports."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from data_prep.images.examine import MAX_PIXELS
from data_prep.sharding.dataset import BuildOptions
from data_prep.sources import SOURCES
from tests.support.refusals import refusal
from vssl_dist.cli import commands, typos
from vssl_dist.cli.places import by_name, module_file, module_name
from vssl_dist.cli.program import arguments
from vssl_dist.commands.keys import CONFIG_BLOCKS
from vssl_dist.config import TASKS
from vssl_dist.exports.formats import EXPORT_FORMATS
from vssl_dist.methods import CONFIGS

ROOT = Path(__file__).parents[2]
A, B, C = Path("a"), Path("b"), Path("c")
OLD: list[tuple[str, str, dict[str, Any]]] = [
    ("submit", "--local a", {"local": 0, "config": A, "overrides": (), "nodes": None}),
    ("submit", "--local 2 a x=1 y=-1", {"local": 2, "config": A, "overrides": ("x=1", "y=-1")}),
    ("submit", "--local=3 a", {"local": 3}),
    ("submit", "a x=1 --local", {"local": 0, "config": A, "overrides": ("x=1",)}),
    ("submit", "a x=1 --nodes 8 y=2 --dry-run", {"nodes": 8, "overrides": ("x=1", "y=2"),
                                                 "dry_run": True}),
    ("submit", "--nodes=2 --profile b a", {"nodes": 2, "profile": B, "dry_run": False}),
    ("submit", "-- a x=1", {"config": A, "overrides": ("x=1",), "local": None, "profile": None}),
    ("evaluate", "a", {"target": A, "task": "knn", "data": (), "density": None, "device": None,
                       "threads": 2, "baselines": False, "ranks": 1}),
    ("evaluate", "--baselines a --task knn,ood --data b,c --data=x=a --density polar",
     {"task": "knn,ood", "data": ("b,c", "x=a"), "density": "polar", "baselines": True}),
    ("evaluate", "a --device cpu --threads 4 --ranks 2", {"device": "cpu", "threads": 4,
                                                          "ranks": 2}),
    ("one-class", "a --classes cat,dog --ranks 2 x=1 --baselines y=2",
     {"config": A, "classes": "cat,dog", "ranks": 2, "overrides": ("x=1", "y=2"),
      "baselines": True}),
    ("export", "a --format onnx,timm --out b", {"target": A, "format": "onnx,timm", "out": B}),
    ("track", "a b --to http://h:1", {"runs": (A, B), "to": "http://h:1"}),
    ("track", "a", {"runs": (A,), "to": None}),
    ("shard", "cifar10 --root a --out b", {"source": "cifar10", "root": A, "out": B, "split": None,
     "shard_size": BuildOptions.shard_size, "limit": None, "classes": None, "resize_short": None,
     "quality": None, "max_pixels": None, "on_bad": None, "image_field": None,
     "label_field": None, "dedup": False, "download": False, "workers": commands.cpus()}),
    ("shard", "webdataset --root a --out b --label-field json:x --on-bad skip --dedup --workers 3",
     {"label_field": "json:x", "on_bad": "skip", "dedup": True, "workers": 3}),
    ("shard", "photos --ou b --work=3 --shard 10", {"out": B, "workers": 3, "shard_size": 10}),
    ("verify", "a --workers 2", {"out": A, "workers": 2}),
    ("subset", "a --classes x,y --out b", {"folder": A, "classes": "x,y", "out": B}),
    ("preview", "a --out b x=1 --rows 3 y=2",
     {"config": A, "out": B, "rows": 3, "overrides": ("x=1", "y=2")}),
    ("keys", "optim vje", {"blocks": ("optim", "vje")}),
    ("keys", "", {"blocks": ()}),
]  # fmt: skip


@pytest.mark.parametrize(("command", "words", "meant"), OLD, ids=lambda value: str(value)[:60])
def test_every_command_line_of_before_means_what_it_meant(
    command: str, words: str, meant: dict[str, Any]
) -> None:
    read = vars(arguments(command, words.split()))
    assert {key: read[key] for key in meant} == meant


def test_what_options_take_is_written_down_as_the_code_has_it() -> None:
    assert tuple(TASKS) == commands.TASKS
    assert tuple(EXPORT_FORMATS) == commands.FORMATS
    assert list(commands.SOURCES) == sorted(SOURCES)
    assert (BuildOptions.shard_size, MAX_PIXELS) == (commands.SHARD_SIZE, commands.MAX_PIXELS)
    assert {"run", *CONFIGS, *TASKS, *typos.BLOCKS} == set(CONFIG_BLOCKS)
    for command in commands.COMMANDS.values():
        assert module_file(command.module).exists()
        assert module_name(command.module) == command.module


TYPOS = [
    ("submt", "No such command 'submt'. (Did you mean one of: 'submit', 'subset'?)"),
    ("submit --locl quickstart", "No such option '--locl'. Did you mean '--local'?"),
    ("submit --nodes two quickstart", "'two' is not a valid integer"),
    ("submit in1k_vj", "did you mean 'in1k_vje'?"),
    ("submit configs/nosuch.yaml", "configs/nosuch.yaml: cannot be read"),
    ("submit quickstart --profile loca", "did you mean 'local'?"),
    ("submit quickstart optim.epoch=3", "optim.epoch: no such key (did you mean 'epochs'?)"),
    ("submit quickstart optim.epochs=many", "optim.epochs"),
    ("submit quickstart method.bta=3", "method.bta: no such key (did you mean 'beta'?)"),
    ("submit quickstart method.form=chord", "method.form: Input should be 'ambient'"),
    ("one-class quickstart method.name=simsam", "method.name: 'simsam' is not one of"),
    ("submit quickstart method.backbone=resnet5", "(did you mean 'resnet50'?)"),
    ("submit quickstart method.backbone=vit_tny_patch16", "did you mean 'vit_tiny_patch16_"),
    ("submit quickstart data.views=[cifar]", "data.views has 1 entries, but vje compares 2 views"),
    ('submit quickstart method={"name":dino,"local_crops":1}', "dino compares 3 views"),
    ("submit quickstart optim.warmup_epochs=99", "is longer than optim.epochs=9"),
    ("submit quickstart optim.global_batch=100", "must be a multiple of data.streams"),
    ("preview quickstart --out s.png data.vews=[]", "data.vews: no such key"),
    ("evaluate runs/x --task kn", "'kn' is not one of"),
    ("evaluate runs/x --densty polar", "Did you mean '--density'?"),
    ("export runs/x --format tim", "did you mean 'timm'?"),
    ("shard cifar --out o", "'cifar' is not one of 'cifar10'"),
    ("verify data --wrkers 3", "Did you mean '--workers'?"),
    ("keys optm", "no block 'optm': did you mean 'optim'?"),
    ("doctor --need gpus", "did you mean 'gpu'?"),
    ("track --too x", "No such option '--too'. Did you mean '--to'?"),
]  # fmt: skip


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of modules that end the program that imports them."""
    folder = tmp_path_factory.mktemp("heavy")
    for name in ("torch", "numpy", "PIL", "mlflow", "deepspeed", "matplotlib"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name} is imported')")
    for name in ("torchvision", "timm"):  # whose sources may be read
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise SystemExit('{name} is imported')")
        (folder / name / "models").symlink_to(Path(spec.origin).parent / "models")
    return folder


def run(heavy: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`vssl` on these words, in a Python that cannot import what is heavy."""
    return subprocess.run(
        [sys.executable, "-m", "vssl_dist.cli", *words],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": f"{heavy}:{ROOT}"},
    )  # fmt: skip


@pytest.mark.parametrize(("words", "said"), TYPOS, ids=[words for words, _ in TYPOS])
def test_a_typo_is_said_in_one_line_with_the_nearest_word_before_torch_is_imported(
    words: str, said: str, heavy: Path
) -> None:
    done = run(heavy, *words.split())
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert said in lines[-1]
    assert len([line for line in lines if "error: " in line]) == 1


@pytest.mark.parametrize("command", ["", "submit", "evaluate", "one-class", "shard"])
def test_help_costs_no_import_of_torch(command: str, heavy: Path) -> None:
    done = run(heavy, *command.split(), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: vssl" in done.stdout
    assert not command or "python launch/" not in done.stdout


def test_a_config_is_its_file_or_its_name_in_this_folder_or_among_the_shipped_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert by_name("configs", Path("in1k_vje")) == ROOT / "configs" / "in1k_vje.yaml"
    assert by_name("slurm", Path("local")) == ROOT / "slurm" / "local.yaml"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "in1k_vje.yaml").touch()
    assert by_name("configs", Path("in1k_vje")) == Path("configs/in1k_vje.yaml")
    (tmp_path / "in1k_vje").touch()
    assert by_name("configs", Path("in1k_vje")) == Path("in1k_vje")
    for other in ("sub/in1k_vje", "nosuch", "in1k_vje.yml", "x" * 300):
        assert by_name("configs", Path(other)) == Path(other)


def complete(words: str, shell: str = "bash") -> list[str]:
    environ = {"_VSSL_COMPLETE": f"{shell}_complete", "COMP_WORDS": words,
               "COMP_CWORD": str(len(words.split()) - 1)}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "vssl_dist.cli"],
        cwd=ROOT, env=os.environ | environ, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


def test_a_shell_completes_commands_options_and_the_names_of_configs() -> None:
    assert complete("vssl su") == ["plain,submit", "plain,subset"]
    assert "plain,--dry-run" in complete("vssl submit --dr")
    assert "plain,in1k_vje" in complete("vssl submit in1k_vj")
    assert "plain,cifar10" in complete("vssl shard cif")


def test_a_door_says_the_same_as_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "launch/submit.py", "--local", "2", "quickstart", "optim.epoch=3"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "did you mean 'epochs'?" in refusal(done.stderr)
