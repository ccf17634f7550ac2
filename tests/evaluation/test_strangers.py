"""A run that somebody else made, or could write to: nothing of this user's is lost by looking."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.exports import change, exported
from tests.support.others import (
    done_as_nobody,
    link_of_nobody,
    locked_by_nobody,
    needs_root,
    shared_folder,
)
from tests.support.photos import tiny_dataset
from vssl_dist.commands import export
from vssl_dist.commands.evaluate import main, titled_table_rows
from vssl_dist.config import KnnConfig
from vssl_dist.durable import file_sha256
from vssl_dist.errors import ConfigError
from vssl_dist.evaluation.features.cache import FeatureCache, cached_features
from vssl_dist.evaluation.features.extract import FeatureBatches
from vssl_dist.jobs import evaluation_queue
from vssl_dist.jobs.evaluation_job import Attempts, PendingEvaluation
from vssl_dist.run_folder import RunFolder

KNN = {"task": "knn", "k": [5], "temperature": [0.1], "batch": 50}
LINEAR = {"task": "linear", "epochs": 1, "lr": [0.1], "l2": [1.0], "shares": [], "seeds": 1}
CONFIG = {"data": {"backend": "reference"}, "evaluations": [KNN, LINEAR]}
RESULT = "knn-00000040.json"


@pytest.fixture(scope="module")
def data() -> Iterator[Path]:
    """Two splits where other users can read them."""
    with shared_folder() as folder:
        tiny_dataset(folder, samples=40, classes=4)
        tiny_dataset(folder / "v", samples=20, classes=4, split="val", first=900).rename(
            folder / "val"
        )
        yield folder


@pytest.fixture
def run(data: Path) -> Iterator[Path]:
    """A run's folder, likewise."""
    with shared_folder() as folder:
        path, _ = exported(folder / "run" / "export", data)
        path.chmod(0o644)
        change(path, config=CONFIG)
        yield folder / "run"


def never(scratch: Path) -> FeatureBatches:
    raise AssertionError
    yield


def asked(run: Path, *words: str) -> int:
    return main([str(run), "--device", "cpu", *words])


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def test_features_that_are_a_link_to_the_users_own_folder_cost_nothing_in_it(
    run: Path, tmp_path: Path
) -> None:
    for name in ("a-b", "code-base", "my-thesis", "old-data", "x-y", "[a-x]-z", "*"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "main.tex").write_text(name)
        os.utime(tmp_path / name, (0, 0))
    before = tree(tmp_path)
    (run / "export" / "features").symlink_to(tmp_path)
    assert asked(run) == 0
    assert before.items() <= tree(tmp_path).items()
    assert len(list(tmp_path.glob("*/seal.json"))) == 2, "and the features are there"


@pytest.mark.parametrize("name", [RESULT, "knn-00000040-grid.png"])
@pytest.mark.parametrize("there", [True, False])
def test_a_result_that_is_a_link_out_of_the_export_writes_nothing_there(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, there: bool
) -> None:
    """Also of the user's own making: whoever unpacks an archive makes its links."""
    target = tmp_path / ".bashrc"
    if there:
        target.write_text("mine")
    (run / "export" / name).symlink_to(target)
    assert asked(run) == 2
    said = capsys.readouterr().err
    link = run / "export" / name
    assert said == f"error: {link}: is a link that leads out of its folder: remove it\n"
    assert target.exists() == there
    assert not there or target.read_text() == "mine"
    assert not (run / "export" / "features").exists(), "before anything is computed"


@pytest.mark.parametrize("kind", ["torch_export", "timm"])
def test_a_format_that_is_a_link_out_of_the_folder_writes_nothing_there(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    (tmp_path / "mine").mkdir()
    suffix = ".pt2" if kind == "torch_export" else "-timm"
    link = run / "export" / f"backbone-00000040{suffix}"
    link.symlink_to(tmp_path / "mine")
    assert export.main([str(run), "--format", kind]) == 2
    assert f"error: {link}: is a link" in capsys.readouterr().err
    assert not list((tmp_path / "mine").iterdir())


@needs_root
@pytest.mark.parametrize("name", [RESULT, "features", "knn-00000040-grid.png"])
def test_a_link_of_another_user_is_named_and_not_followed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    link_of_nobody(run / "export" / name, tmp_path / "mine")
    assert asked(run) == 2
    said = capsys.readouterr().err
    assert f"{run / 'export' / name} is a link that " in said
    assert said.endswith(" made: remove it\n")
    assert said.count("\n") == 1
    assert not (tmp_path / "mine").exists()


def test_folders_by_the_users_own_links_go_on(run: Path, tmp_path: Path) -> None:
    (run / "export").rename(tmp_path / "export")
    (run / "export").symlink_to(tmp_path / "export")
    for _ in range(2):
        assert asked(run) == 0
    assert (tmp_path / "export" / RESULT).is_file()


def test_a_folder_that_holds_more_than_its_format_is_not_replaced(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = exported(tmp_path / "export", data)
    command = [str(path), "--format", "torch_export"]
    assert export.main(command) == 0
    made = path.with_suffix(".pt2")
    assert export.main(command) == 0, "over itself"
    made.unlink()
    (made / "chapter 1").mkdir(parents=True)
    (made / "chapter 1" / "thesis.tex").write_text("mine")
    capsys.readouterr()
    assert export.main(command) == 2
    said = f"error: {made}: holds chapter 1, which would be lost: move it away\n"
    assert capsys.readouterr().err == said
    (made / "chapter 1").rename(tmp_path / "chapter 1")
    assert export.main(command) == 2, "nor an empty one, which nothing says is ours"
    assert made.is_dir()


@needs_root
def test_a_run_on_a_file_system_that_is_mounted_for_reading_shows_its_figures(run: Path) -> None:
    mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    reading = ["unshare", "--mount", "sh", "-c", mount, str(run)]
    if subprocess.run([*reading, "true"], capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    (run / "mlflow_run.json").write_text('{"tracking_uri": "sqlite:////tmp/none/mlflow.db"}')
    before = tree(run)
    program = str(Path(__file__).parents[2] / "launch" / "evaluate.py")
    done = subprocess.run(
        [*reading, sys.executable, program, str(run), "--device", "cpu", "--task", "knn"],
        env={**os.environ, "MLFLOW_TRACKING_URI": "sqlite:////tmp/none/mlflow.db"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "step 40" in done.stdout
    assert tree(run) == before


@needs_root
@pytest.mark.parametrize("with_config", [True, False])
def test_figures_of_a_run_that_can_only_be_read_are_shown(run: Path, with_config: bool) -> None:
    if with_config:
        (run / "config.yaml").write_text("name: theirs")
    before = tree(run)

    def look() -> None:
        torch.set_num_threads(1)  # more do not outlive a fork
        with pytest.warns(UserWarning, match="cannot be written to: figures are shown") as caught:
            assert asked(run) == 0
        said = [str(one.message) for one in caught if one.category is UserWarning]
        assert said == [f"{run}/export: cannot be written to: figures are shown, not kept"]

    assert done_as_nobody(look)
    assert tree(run) == before


@needs_root
def test_features_in_a_run_that_can_only_be_read_are_not_computed_again(run: Path) -> None:
    assert asked(run) == 0
    (run / "export" / RESULT).unlink()
    kept = tree(run)
    path = run / "export" / "backbone-00000040.safetensors"
    network, source = (
        {"export_sha256": file_sha256(path)},
        FeatureCache(run / "export" / "features"),
    )
    (place, *_) = source.folder.glob("*/seal.json")
    images = json.loads(place.read_text())["images"]

    def look() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert cached_features(source, network, images, never) is not None

    assert done_as_nobody(look)
    assert tree(run) == kept


@needs_root
def test_results_in_a_run_that_can_only_be_read_are_not_computed_again(run: Path) -> None:
    assert asked(run) == 0
    stored = json.loads((run / "export" / RESULT).read_text())
    stored["results"]["k5_t0.1"]["top1"] = 0.123
    (run / "export" / RESULT).write_text(json.dumps(stored))
    kept = tree(run)

    def look() -> None:
        said = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(said):
            warnings.simplefilter("error")
            assert asked(run) == 0
        assert "12.3" in said.getvalue()

    assert done_as_nobody(look)
    assert tree(run) == kept


@needs_root
def test_evaluations_do_not_wait_for_a_stranger(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = RunFolder(run).export_folder.evaluating_lock_path
    lock.touch(mode=0o644)
    with locked_by_nobody(lock) as pid:
        assert asked(run) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {lock}: is held by process {pid} of ")
        assert said.count("\n") == 1
        evaluation_queue.try_all_pending(run)
        assert f"no evaluations: {lock} is held by process {pid} of " in capsys.readouterr().err
    assert asked(run) == 0
    assert lock.stat().st_mode & 0o077 == 0


@needs_root
def test_features_that_a_stranger_locks_are_computed_and_not_kept(run: Path) -> None:
    assert asked(run) == 0
    (run / "export" / RESULT).unlink()
    locks = sorted((run / "export" / "features").glob(".lock-*"))
    assert locks
    for lock in locks:
        lock.chmod(0o644)
    said = r"\.lock-..: is held by process .*: features are not kept"
    with locked_by_nobody(locks[0]), pytest.warns(UserWarning, match=said):
        assert asked(run) == 0
    assert (run / "export" / RESULT).exists()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"results": [1]}, 0),
        ({"metrics": {"a": "x"}}, 0),
        ({"metrics": None}, 0),
        ({"plots": ["../../../etc/passwd"]}, 0),
        ({"density": ["x"]}, 0),
        ({"format": "x"}, 0),
        ({"results": {"k5_t0.1": 5}}, 2),
        ({"results": {"k5": {"top1": "x"}}}, 2),
    ],
)
def test_a_stored_result_is_a_result_or_found_again_or_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], code: int
) -> None:
    assert asked(run) == 0
    place = run / "export" / RESULT
    right = json.loads(place.read_text())
    place.write_text(json.dumps(right | changes))
    assert asked(run) == code
    said = capsys.readouterr().err
    assert said.count("\n") == (1 if code else 0)
    assert bool(code) == ("remove knn-*.json" in said)
    if not code:
        assert json.loads(place.read_text())["results"] == right["results"]


def test_names_in_a_stored_result_never_reach_the_terminal_raw(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(run) == 0
    place = run / "export" / RESULT
    stored = json.loads(place.read_text())
    place.write_text(json.dumps(stored | {"results": {"a\x1b[2J\n": {"top1": 0.5}}}))
    capsys.readouterr()
    assert asked(run) == 0
    assert "\x1b[2J" not in capsys.readouterr().out
    assert export.main([str(run), "--format", "torch_export"]) == 0


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"weight": torch.zeros(7, 4), "bias": torch.zeros(4)}, "is of 7 features"),
        ({"evil": torch.zeros(7, 4)}, "holds no probe but evil (7, 4)"),
        ({"weight": torch.zeros(128), "bias": torch.zeros(4)}, "holds no probe but "),
        ({"weight": torch.zeros(128, 4), "bias": torch.zeros(5)}, "holds no probe but "),
        ({"weight": torch.zeros(128, 4).int(), "bias": torch.zeros(4)}, "holds no probe but "),
    ],
)
def test_a_probe_that_is_none_is_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], tensors: dict[str, torch.Tensor], words: str
) -> None:
    path = run / "export" / "backbone-00000040.safetensors"
    probe = path.with_name("online-00000040.safetensors")
    save_file(tensors, probe)
    change(path, online_sha256=hashlib.sha256(probe.read_bytes()).hexdigest())
    assert asked(run, "--task", "linear") == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "raw",
    ["[1]", "[" * 200_000, '{"count": "x"}', '{"count": -1}', '{"count": 1, "job": "; x"}',
     '{"count": 1, "job": ["1"]}', '{"count": 1, "job": "--all"}', '{"other": 1}'],
)  # fmt: skip
def test_a_record_of_attempts_that_is_none_counts_for_nothing(tmp_path: Path, raw: str) -> None:
    one = PendingEvaluation(tmp_path / "backbone-00000040.safetensors", 40, KnnConfig())
    one.attempts_path.write_text(raw)
    assert one.read_attempts() == Attempts()
    one.record_attempt(Attempts(1, "123_4"))
    assert one.read_attempts() == Attempts(1, "123_4")


def test_attempts_are_not_noted_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    one = PendingEvaluation(tmp_path / "export" / "backbone-00000040.safetensors", 40, KnnConfig())
    one.attempts_path.symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="leads out of its folder: remove it"):
        one.record_attempt(Attempts(1))
    assert not (tmp_path / "mine").exists()


def test_a_figure_beyond_all_numbers_is_one_line() -> None:
    results = {"k5_t0.1": {"top1": 10**400, "top5": 1.0}}
    with pytest.raises(ConfigError, match=r"results of task knn are not such .*: remove knn-\*"):
        titled_table_rows("knn", [("step 1", results)])
