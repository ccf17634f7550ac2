"""The sharding program: the same bytes whatever happens on the way, and other readers."""

from __future__ import annotations

import filecmp
import hashlib
import io
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import webdataset

from data_prep import shard
from data_prep.sharding import survey
from tests.support.photos import tiny_dataset
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.errors import DataError

ROOT = Path(__file__).parents[2]
SHARD = (sys.executable, str(ROOT / "data_prep" / "shard.py"))
OPTIONS = ("photos", "--split", "train", "--limit", "1500", "--shard-size", "20")


def run(out: Path, *options: object) -> int:
    return shard.main([*OPTIONS, "--out", str(out), *(str(option) for option in options)])


def start(out: Path, *options: str) -> subprocess.Popen[str]:
    """The program as a user starts it, in a process group of its own."""
    return subprocess.Popen(
        [*SHARD, *OPTIONS, "--out", str(out), *options],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_shards(out: Path, process: subprocess.Popen[str], count: int) -> None:
    while len(list(out.glob("train/*.tar"))) < count:
        assert process.poll() is None, "finished before it could be stopped"
        time.sleep(0.01)


def offspring(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def same(left: Path, right: Path) -> bool:
    """Whether two folders hold the same files with the same bytes, hidden ones included."""
    names = sorted(path.relative_to(left) for path in left.rglob("*"))
    other_files = sorted(path.relative_to(right) for path in right.rglob("*"))
    files = [str(name) for name in names if (left / name).is_file()]
    return names == other_files and filecmp.cmpfiles(left, right, files, shallow=False)[0] == files


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one")
    assert run(out, "--workers", 1) == 0
    return out


def test_two_workers_write_the_bytes_of_one(undisturbed: Path, tmp_path: Path) -> None:
    assert run(tmp_path, "--workers", 2) == 0
    assert same(undisturbed, tmp_path)


def test_killed_and_started_again_it_writes_the_same_bytes(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for shards, workers in ((3, "2"), (12, "1"), (24, "2")):
        process = start(tmp_path, "--workers", workers)
        wait_for_shards(tmp_path, process, shards)
        workers_alive = offspring(process)
        process.kill()
        process.communicate()
        _, alive = psutil.wait_procs(workers_alive, timeout=10)
        assert alive == []
        with pytest.raises(DataError, match="sharding did not finish"):
            Dataset.open(tmp_path / "train")
        for path in (tmp_path / "train").glob("shard-*"):
            assert filecmp.cmp(path, undisturbed / "train" / path.name, shallow=False)
    assert run(tmp_path, "--workers", 2) == 0
    output = capsys.readouterr().out
    assert "(1500 written" not in output
    assert same(undisturbed, tmp_path)


def test_killed_while_it_looks_at_the_images_it_does_not_look_twice(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start(tmp_path, "--workers", "1")
    while not list(tmp_path.glob("train/.sharding/survey-*")):
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.communicate()
    note_names = {path.name for path in tmp_path.glob("train/.sharding/survey-*")}
    looked: list[str] = []
    genuine = survey._survey_chunk

    def counted(chunk: Any) -> Any:
        looked.append(chunk.note_path.name)
        return genuine(chunk)

    monkeypatch.setattr(survey, "_survey_chunk", counted)
    assert run(tmp_path, "--workers", 1) == 0
    assert not note_names & set(looked)
    assert len(note_names) + len(looked) == 6
    assert same(undisturbed, tmp_path)


@pytest.mark.slow
def test_ten_kills_at_random_moments_leave_no_trace(undisturbed: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    assert run_program(tmp_path / "timed", "1") == 0
    usual = time.monotonic() - began
    random = np.random.default_rng(0)
    for number, moment in enumerate(random.uniform(0.2, 1.0, 10)):
        out = tmp_path / str(number // 2)  # every folder meets two kills
        process = start(out, "--workers", str(1 + number % 2))
        time.sleep(moment * usual / (1 + number % 2))
        process.kill()
        process.communicate()
    for number in range(5):
        assert run_program(tmp_path / str(number), "2") == 0
        assert same(undisturbed, tmp_path / str(number))


def run_program(out: Path, workers: str) -> int:
    process = start(out, "--workers", workers)
    process.communicate()
    return process.returncode


@pytest.mark.parametrize("note", ["cut", "of another"])
def test_a_damaged_note_is_not_believed(undisturbed: Path, tmp_path: Path, note: str) -> None:
    process = start(tmp_path, "--workers", "1")
    wait_for_shards(tmp_path, process, 3)
    process.kill()
    process.communicate()
    notes = sorted(tmp_path.glob("train/.sharding/survey-*"))
    blob = notes[0].read_bytes()
    damaged = {"cut": blob[:-100], "of another": notes[1].read_bytes()}
    notes[0].write_bytes(damaged[note])
    assert run(tmp_path) == 0
    assert same(undisturbed, tmp_path)


def test_ctrl_c_leaves_finished_shards_no_process_and_no_traceback(tmp_path: Path) -> None:
    process = start(tmp_path, "--workers", "2")
    wait_for_shards(tmp_path, process, 3)
    workers = offspring(process)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert "interrupted: finished shards are kept" in error
    assert "Traceback" not in error
    assert psutil.wait_procs(workers, timeout=10)[1] == []
    assert not list(tmp_path.rglob("*.tmp-*"))


def test_a_second_call_says_that_all_is_there_and_touches_nothing(
    undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    assert run(undisturbed) == 0
    assert "1500 samples" in (output := capsys.readouterr().out)
    assert "complete already" in output
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")} == before


def test_a_lost_shard_of_a_finished_dataset_is_made_again(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path) == 0
    (tmp_path / "train" / "shard-000004.tar").unlink()
    (tmp_path / "train" / "shard-000009.idx.npy").write_bytes(b"")
    capsys.readouterr()
    assert run(tmp_path) == 0
    assert "(40 written" in capsys.readouterr().out
    assert same(undisturbed, tmp_path)


@pytest.mark.parametrize(
    ("finished", "option", "key"),
    [(True, ("--shard-size", 64), "shard_size"), (False, ("--limit", 300), "limit")],
)
def test_other_options_are_never_mixed_into_a_folder(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    finished: bool,
    option: tuple[str, int],
    key: str,
) -> None:
    assert run(tmp_path, "--limit", 100) == 0
    if not finished:
        recipe = (tmp_path / "train" / "manifest.json").read_text()
        (tmp_path / "train" / "manifest.json").unlink()
        (tmp_path / "train" / ".sharding").mkdir()
        source = recipe[recipe.index('"source": ') + len('"source": ') : recipe.rindex(",")]
        (tmp_path / "train" / ".sharding" / "recipe.json").write_text(source)
    names = sorted(path.name for path in (tmp_path / "train").iterdir())
    assert run(tmp_path, "--limit", 100, *option) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"was begun with another {key}" in error
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == names


def test_a_folder_with_other_files_in_it_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train" / "n01440764").mkdir(parents=True)
    assert run(tmp_path) == 2
    assert "holds files that are no dataset (such as n01440764)" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "train").iterdir()] == ["n01440764"]


def test_a_second_sharding_process_is_refused(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = start(tmp_path, "--workers", "1")
    wait_for_shards(tmp_path, first, 1)
    first.send_signal(signal.SIGSTOP)
    assert run(tmp_path, "--workers", 1) == 2
    assert "another process is sharding into it" in capsys.readouterr().err
    first.send_signal(signal.SIGCONT)
    first.communicate(timeout=60)
    assert first.returncode == 0
    assert same(undisturbed, tmp_path)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_is_one_line_and_space_lets_it_continue(
    undisturbed: Path, tmp_path: Path, workers: str
) -> None:
    sizes = sorted(path.stat().st_size for path in undisturbed.rglob("*.tar"))

    def small_files_only() -> None:
        """Writing fails in the larger shards as it does where there is no space."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[-1] - 1, resource.RLIM_INFINITY))

    done = subprocess.run(
        [*SHARD, *OPTIONS, "--out", str(tmp_path), "--workers", workers],
        preexec_fn=small_files_only,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert ".tar: cannot be written (File too large)" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.rglob("*.tmp-*"))
    assert run(tmp_path) == 0
    assert same(undisturbed, tmp_path)


def test_an_out_below_a_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file" / "o") == 2
    assert "cannot be made (Not a directory)" in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--shard-size", "0"), ("--workers", "x"), ("--limit", "-1")])
def test_a_bad_number_is_refused_by_the_command_line(
    tmp_path: Path, option: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, *option)
    assert caught.value.code == 2
    assert option[0] in capsys.readouterr().err


def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    folder = tiny_dataset(tmp_path, samples=40, shard_size=16, suffix="jpg", sides=(32, 64))
    dataset = Dataset.open(folder)
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=True))
    images = [image.tobytes() for image in dataset.read(np.arange(40))]
    assert [int(sample["__key__"]) for sample in samples] == list(range(40))
    assert [sample["jpg"] for sample in samples] == images
    assert [int(sample["cls"]) for sample in samples] == [i % 4 for i in range(40)]
    decoded = next(iter(webdataset.WebDataset(urls[:1], shardshuffle=False).decode("pil")))
    assert decoded["jpg"].size == tuple(
        int(dataset.rows(np.array([0]))[0][k]) for k in ("width", "height")
    )


def test_nothing_in_a_tar_tells_when_where_or_by_whom_it_was_made(tmp_path: Path) -> None:
    folder = tiny_dataset(tmp_path, samples=4)
    blob = (folder / "shard-000000.tar").read_bytes()
    assert len(blob) % tarfile.RECORDSIZE == 0
    with tarfile.open(fileobj=io.BytesIO(blob)) as tar:
        for member in tar:
            assert member.isreg()
            facts = (member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode)
            assert facts == (0, 0, 0, "", "", 0o644)


def test_the_manifest_states_the_files_that_are_there(undisturbed: Path) -> None:
    folder = undisturbed / "train"
    manifest = Dataset.open(folder).manifest
    assert len(manifest.shards) == 75
    for entry in manifest.shards:
        tar, index = (folder / name for name in (entry.name, entry.index_name))
        assert entry.bytes == tar.stat().st_size
        assert entry.sha256 == hashlib.sha256(tar.read_bytes()).hexdigest()
        assert entry.index_sha256 == hashlib.sha256(index.read_bytes()).hexdigest()
        assert len(np.load(index, allow_pickle=False)) == entry.samples
    assert manifest.source["order"] == "mixed"
