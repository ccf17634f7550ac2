"""Stopping changes nothing: kill a run anywhere, and the run that resumes is the same run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from launch import submit
from tests.support.damage import flip, place
from tests.support.photos import tiny_dataset
from tests.support.ranks import run_ranks
from tests.support.refusals import refusal
from vssl_dist import config
from vssl_dist.errors import DataError
from vssl_dist.methods import CONFIGS
from vssl_dist.train import train

ROOT = Path(__file__).parents[1]
STEPS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("photos"), samples=96, classes=4)


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nobody disturbs, to its end; who shares it only reads it."""
    run = Run(data, tmp_path_factory.mktemp("out"), "straight")
    run.finish()
    return run


class Run:
    """One run folder, driven as a user drives it: through ``launch/submit.py --local``.

    Its curves stay in its folder unless a test says where else they go: MLflow takes each start
    seconds.
    """

    def __init__(self, data: Path, out: Path, name: str, *overrides: str) -> None:
        self.dir = out / name
        self.command = [
            sys.executable, "launch/submit.py", "--local", "2", "configs/quickstart.yaml",
            f"name={name}", f"out={out}", f"data.train={data}", f"data.val={data}",
            "trace=true", "optim.global_batch=32", "data.streams=4", "data.window=16",
            f"optim.max_steps={STEPS}", "optim.epochs=1000", "log_every=1", "vote_every=1",
            "checkpoint.every_steps=3", "evaluations=[]", *overrides,
        ]  # fmt: skip
        self.environment = os.environ | {
            "MLFLOW_TRACKING_URI": "none",
            "OMP_NUM_THREADS": "1",
        }

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command, cwd=ROOT, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def finish(self) -> str:
        process = self.start()
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        return output

    def answer(self, *overrides: str) -> int:
        """Exit code of the same command where no rank is started."""
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            patch.setenv("MLFLOW_TRACKING_URI", self.environment["MLFLOW_TRACKING_URI"])
            return submit.main([*self.command[2:], *overrides])

    def steps(self) -> int:
        """Steps in the trace of rank 0 so far."""
        path = self.dir / "trace.rank0.jsonl"
        return path.read_text().count('"position"') if path.exists() else 0

    def kill_at(self, step: int) -> None:
        """SIGKILL the launcher and all its ranks once ``step`` steps have been traced."""
        process = self.start()
        end = time.monotonic() + 240
        while self.steps() < step:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end, "the run made no progress"
            time.sleep(0.005)
        for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
            victim.kill()
        process.communicate()

    def traces(self) -> list[str]:
        return [path.read_text() for path in sorted(self.dir.glob("trace.rank*.jsonl"))]


def lines(run: Run) -> list[dict[str, object]]:
    return [json.loads(line) for text in run.traces() for line in text.splitlines()]


def assert_the_same(broken: Run, straight: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Both are finished, and what was killed is the other bit by bit, asked once more too."""
    assert len(straight.traces()) == 2
    assert broken.traces() == straight.traces()
    assert sum("final" in line for line in lines(broken)) == 2
    capsys.readouterr()
    assert broken.answer() == 0
    assert "finished" in capsys.readouterr().out
    assert broken.traces() == straight.traces()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "overrides", "kill"),
    [(0, [], 5), (2, ["method.target=ema", "optim.accumulate=2"], 7)],
)
def test_a_killed_run_restarted_is_the_uninterrupted_run(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stage: int,
    overrides: list[str],
    kill: int,
) -> None:
    changes = (f"engine.zero_stage={stage}", *overrides)
    straight, broken = (Run(data, tmp_path, name, *changes) for name in ("straight", "broken"))
    straight.finish()
    broken.kill_at(kill)
    broken.finish()
    assert_the_same(broken, straight, capsys)


@pytest.mark.slow
def test_a_tracked_run_killed_three_times_is_the_uninterrupted_run(
    straight: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Run(data, tmp_path, "broken", "engine.zero_stage=1")
    broken.environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/mlflow.db"
    for step in (1, 8, 11):
        broken.kill_at(step)
    broken.finish()
    assert_the_same(broken, straight, capsys)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stage", [0, 2])
def test_on_gpus_in_bfloat16_a_killed_run_is_the_uninterrupted_run_too(
    data: Path, tmp_path: Path, stage: int
) -> None:
    changes = (f"engine.zero_stage={stage}", "engine.autocast=bfloat16", "method.target=ema")
    straight, broken = (Run(data, tmp_path, name, *changes) for name in ("straight", "broken"))
    for run in (straight, broken):
        run.command.remove("2")  # a rank on each GPU
    straight.finish()
    broken.kill_at(7)
    broken.finish()
    assert straight.traces()
    assert broken.traces() == straight.traces()


@pytest.mark.slow
def test_told_to_stop_it_saves_at_once_and_goes_on_where_it_was(
    straight: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = Run(data, tmp_path, "stopped")
    process = stopped.start()
    while stopped.steps() < 4:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    saved = sorted((stopped.dir / "checkpoints").glob("step-*"))[-1]
    assert int(saved.name.partition("-")[2]) == stopped.steps() < STEPS
    with all_damaged(stopped.dir / "checkpoints"):
        assert stopped.answer() == 2
    assert "every checkpoint in" in refusal(capsys.readouterr().err)
    stopped.finish()
    assert stopped.traces() == straight.traces()


@contextmanager
def all_damaged(checkpoints: Path) -> Iterator[None]:
    """One bit of each checkpoint is wrong, until the user brings back a copy."""
    copy = checkpoints.with_name("copy")
    shutil.copytree(checkpoints, copy)
    for path in checkpoints.glob("step-*/engine.json"):
        content = bytearray(path.read_bytes())
        content[5] ^= 1
        path.write_bytes(content)
    yield
    shutil.rmtree(checkpoints)
    copy.rename(checkpoints)


def too_many_bad(folder: Path, out: Path) -> tuple[list[Mapping[str, float]], str]:
    """What a run that starts on damaged images tells, and what it ends with."""
    changes = [
        f"out={out}", f"data.train={folder}", "data.val=null", "data.backend=reference",
        "data.max_bad=0", "data.streams=4", "optim.global_batch=32", "optim.max_steps=2",
        "log_every=1", "evaluations=[]",
    ]  # fmt: skip
    cfg = config.load(ROOT / "configs" / "quickstart.yaml", changes, methods=CONFIGS)
    told: list[Mapping[str, float]] = []
    with pytest.raises(DataError) as error:
        train(
            cfg,
            device="cpu",
            should_stop=lambda: False,
            on_export=lambda *_: None,
            log=lambda metrics, _: told.append(metrics),
        )
    return told, str(error.value)


def test_a_run_that_its_bad_images_stop_has_told_of_them_first(data: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data, tmp_path / "train"))
    for sample in range(0, 96, 2):
        tar, offset, _ = place(folder, sample)
        flip(tar, offset + 40)
    ((told, error),) = run_ranks(too_many_bad, 1, folder, tmp_path)
    (first,) = told
    assert 1 <= first["bad_images"] <= first["substituted_images"] <= 32
    assert error.startswith(f"{first['bad_images']:.0f} training images are damaged")


@pytest.mark.slow
def test_every_step_uses_the_same_pixels_on_one_rank_and_on_two(
    straight: Run, data: Path, tmp_path: Path
) -> None:
    one = Run(data, tmp_path, "one")
    one.command[one.command.index("--local") + 1] = "1"
    one.finish()

    def pixels(run: Run) -> dict[object, set[tuple[object, object]]]:
        found: dict[object, set[tuple[object, object]]] = {}
        for line in lines(run):
            if "step" in line:
                pairs = zip(line["ids"], line["pixels"], strict=True)  # type: ignore[call-overload]
                found.setdefault(line["step"], set()).update(pairs)
        return found

    assert len(pixels(one)) == STEPS
    assert pixels(one) == pixels(straight)
    losses = {
        run.dir.name: [float.fromhex(str(x["loss"])) for x in lines(run) if x.get("step") == 1]
        for run in (one, straight)
    }
    assert losses["one"][0] == pytest.approx(losses["straight"][0], rel=1e-5)


@pytest.mark.slow
def test_a_run_does_not_continue_as_another_experiment(
    straight: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    before = straight.traces()
    for override, named in [
        ("optim.base_lr=0.5", "optim.base_lr"),
        ("optim.accumulate=2", "optim.accumulate"),
        ("data.window=8", "data.window"),
    ]:
        capsys.readouterr()
        assert straight.answer(override) == 2
        assert named in refusal(capsys.readouterr().err)
    assert straight.traces() == before
