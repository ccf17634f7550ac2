"""C12: a checkpoint that somebody changed, with a manifest to match, is never executed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.others import NOBODY, needs_root
from tests.support.photos import tiny_dataset
from tests.support.poison import as_program, in_state, reseal
from tests.support.refusals import refusal
from tests.test_train import ROOT, Run
from vssl_dist.engine import TAG

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:`torch.jit.script`")]
MODEL = f"{TAG}/mp_rank_00_model_states.pt"
SHARD = f"{TAG}/zero_pp_rank_1_mp_rank_00_optim_states.pt"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[str]]:
    """A run of 6 steps whose last checkpoint is gone, so that it goes on from its third."""
    out = tmp_path_factory.mktemp("out")
    data = tiny_dataset(tmp_path_factory.mktemp("photos"), samples=96, classes=4)
    run = Run(data, out, "run", "optim.max_steps=6", "online={lr: 0.1}", "method.target=ema")
    run.finish()
    shutil.rmtree(run.dir / "checkpoints" / "step-00000006")
    return run, run.traces()


@contextmanager
def changed(folder: Path) -> Iterator[None]:
    """Whatever is done to a folder within is undone after it."""
    original = folder.parents[1] / "original"
    shutil.copytree(folder, original)
    yield
    shutil.rmtree(folder)
    original.rename(folder)


def start(run: Run) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        run.command, cwd=ROOT, env=run.environment, capture_output=True, text=True, timeout=120
    )


def refused(run: Run) -> str:
    """The one line with which the same command refuses; no checkpoint is renamed or removed."""
    before = sorted(path.name for path in (run.dir / "checkpoints").iterdir())
    ended = start(run)
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert sorted(path.name for path in (run.dir / "checkpoints").iterdir()) == before
    return refusal(ended.stderr)


def given_away(path: Path, touched: Path) -> None:
    del touched
    os.chown(path, NOBODY, NOBODY)


def linked(path: Path, touched: Path) -> None:
    shutil.copy(path, touched.with_name("copy"))
    path.unlink()
    path.symlink_to(touched.with_name("copy"))


CASES: list[Any] = [
    ("poisoned shard", SHARD, in_state, "would run posix.system"),
    ("TorchScript", MODEL, as_program, "is not what DeepSpeed writes"),
    ("link", MODEL, linked, "is a link"),
    pytest.param("of another", SHARD, given_away, "belongs to nobody", marks=needs_root),
]


@pytest.mark.parametrize(("kind", "name", "change", "said"), CASES)
def test_c12_what_a_changed_checkpoint_holds_is_never_executed(
    finished: tuple[Run, list[str]],
    tmp_path: Path,
    kind: str,
    name: str,
    change: Callable[[Path, Path], None],
    said: str,
) -> None:
    del kind
    run, _ = finished
    folder = run.dir / "checkpoints" / "step-00000003"
    touched = tmp_path / "touched"
    with changed(folder):
        change(folder / name, touched)
        reseal(folder)
        line = refused(run)
    assert said in line
    assert folder.name in line
    assert not touched.exists()


def test_c12_a_poisoned_model_is_refused_and_the_original_comes_to_the_same_end(
    finished: tuple[Run, list[str]], tmp_path: Path
) -> None:
    run, straight = finished
    folder = run.dir / "checkpoints" / "step-00000003"
    with changed(folder):
        in_state(folder / MODEL, tmp_path / "touched")
        reseal(folder)
        line = refused(run)
    assert f"{MODEL} would run posix.system, which no checkpoint of this program does" in line
    run.finish()
    assert run.traces() == straight
    assert not list(run.dir.rglob("zero_to_*.py"))
    assert not (tmp_path / "touched").exists()
