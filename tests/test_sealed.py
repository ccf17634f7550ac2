"""A checkpoint that others had their hands in stops the run: it is neither read nor set aside."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.others import NOBODY, link_of_nobody, needs_root
from tests.support.poison import reseal
from tests.test_checkpoint import save, writer
from vssl_dist import sealed
from vssl_dist.checkpoint import delete_old_checkpoints, find_newest_checkpoint, read_manifests
from vssl_dist.errors import CheckpointError


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def refused(root: Path) -> str:
    """The line with which a run refuses, the same on a login node; nothing is renamed."""
    before = names(root)
    said = []
    for look in (find_newest_checkpoint, read_manifests):
        with pytest.raises(CheckpointError) as error:
            look(root)
        said.append(str(error.value))
    assert said[0] == said[1]
    assert said[0].isprintable()
    assert names(root) == before
    return said[0]


def linked(path: Path) -> None:
    """The same file by a link of this user's own: a copy of a folder would keep it."""
    moved = path.parents[2] / f"moved-{path.name}"
    path.rename(moved)
    path.symlink_to(moved)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def given_away(path: Path) -> None:
    os.lchown(path, NOBODY, NOBODY)


FILES = ["weights.bin", "deepspeed/shard.bin", "state.json", sealed.MANIFEST_NAME]
PLACES = [".", "deepspeed", *FILES]


@pytest.mark.parametrize("name", PLACES)
def test_a_link_is_refused_and_the_one_before_is_not_taken_instead(
    tmp_path: Path, name: str
) -> None:
    root = tmp_path / "checkpoints"
    save(root, 1)
    linked(save(root, 2) / name)
    assert "is a link" in refused(root)


@pytest.mark.parametrize("name", [*FILES, "deepspeed/more.bin"])
def test_a_pipe_is_refused_and_never_waited_for(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 2) / name
    path.touch()
    pipe(path)
    assert "neither a file nor a folder" in refused(tmp_path)


@needs_root
@pytest.mark.parametrize("name", ["..", *PLACES])
def test_what_belongs_to_another_user_is_refused_by_name(tmp_path: Path, name: str) -> None:
    root = tmp_path / "checkpoints"
    save(root, 1)
    path = save(root, 2) / name
    given_away(path)
    line = refused(root)
    assert "belongs to nobody" in line
    assert os.path.normpath(path) in line
    assert "chown" in line


@needs_root
def test_a_file_of_another_user_that_no_manifest_names_is_refused_too(tmp_path: Path) -> None:
    path = save(tmp_path, 2) / "deepspeed" / "mp_rank_01_model_states.pt"
    path.touch()
    given_away(path)
    assert path.name in refused(tmp_path)


def test_the_folder_of_all_checkpoints_may_be_the_users_own_link(tmp_path: Path) -> None:
    save(tmp_path / "scratch", 2)
    root = tmp_path / "checkpoints"
    root.symlink_to(tmp_path / "scratch")
    assert find_newest_checkpoint(root) is not None
    assert len(read_manifests(root)) == 1


@needs_root
def test_the_folder_of_all_checkpoints_may_not_be_the_link_of_others(tmp_path: Path) -> None:
    save(tmp_path / "scratch", 2)
    root = tmp_path / "checkpoints"
    link_of_nobody(root, tmp_path / "scratch")
    assert "a link that nobody made" in refused(root)


def of_files(change: Callable[[dict[str, Any]], object], folder: Path) -> None:
    files = json.loads((folder / sealed.MANIFEST_NAME).read_bytes())["files"]
    change(files)
    reseal(folder, files=files)


def renamed(name: str) -> Callable[[Path], None]:
    """The manifest names a file otherwise."""
    return partial(of_files, lambda files: files.update({name: files.pop("state.json")}))


def entry(value: Any) -> Callable[[Path], None]:
    return partial(of_files, lambda files: files.update({"state.json": value}))


def fact(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: reseal(folder, **changes)


WRONG: dict[str, Callable[[Path], None]] = {
    "above": renamed("../step-00000001/state.json"),
    "above later": renamed("deepspeed/../../state.json"),
    "absolute": renamed("/etc/passwd"),
    "itself": renamed("."),
    "empty": renamed(""),
    "zero byte": renamed("state\0.json"),
    "for a terminal": renamed("state\x1b[2J.json"),
    "no character": renamed("state\ud800.json"),
    "files a list": fact(files=[]),
    "files nothing": fact(files=None),
    "facts a list": fact(facts=[1]),
    "facts a text": fact(facts="x"),
    "entry a text": entry("x"),
    "entry empty": entry({}),
    "size a text": entry({"size": "1", "sha256": "0" * 64}),
    "size a fraction": entry({"size": 1.5, "sha256": "0" * 64}),
    "size negative": entry({"size": -1, "sha256": "0" * 64}),
    "sha256 a number": entry({"size": 1, "sha256": 7}),
    "sha256 short": entry({"size": 1, "sha256": "0"}),
    "step a fraction": fact(step=2.0),
    "format a list": fact(format=["x"]),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_manifest_that_agrees_with_itself_and_is_none_of_ours_stops_the_run(
    tmp_path: Path, kind: str
) -> None:
    save(tmp_path, 1)
    WRONG[kind](save(tmp_path, 2))
    assert "step-00000002" in refused(tmp_path)


TEXTS = {
    "nested": "[" * 100_000,
    "nested blocks": '{"a":' * 100_000,
    "long number": f'{{"step": {"9" * 100_000}}}',
    "infinite": '{"checksum": "x", "step": 1e999}',
    "a list": "[]",
    "null": "null",
    "no text": "\udcff",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_manifest_that_is_no_json_of_ours_is_damage(tmp_path: Path, kind: str) -> None:
    save(tmp_path, 1)
    place = save(tmp_path, 2) / sealed.MANIFEST_NAME
    place.write_text(TEXTS[kind], errors="surrogateescape")
    found = find_newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert names(tmp_path) == ["step-00000001", "step-00000002.corrupt"]


FOREIGN = [
    ".tmp-mine",
    ".tmp-00000004-abc",
    ".tmp-00000004-0123456789ab-mine",
    ".tmp-00000004-0123456789AB",
    ".trash-bin",
    ".trash-0123456789ab-my-thesis",
    ".trash-0123456789ab-step-4",
    ".tmp-\u0664\u0664\u0664\u0664\u0664\u0664\u0664\u0664-0123456789ab",
    "step-\u0664\u0664\u0664\u0664\u0664\u0664\u0664\u0664",
    "step-0000000012",
]


def test_only_what_was_left_by_a_commit_or_a_removal_is_swept(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    for name in FOREIGN:
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").touch()
    (tmp_path / ".tmp-00000005-0123456789ab").touch()
    (tmp_path / ".tmp-00000006-0123456789ab").symlink_to(tmp_path / ".tmp-mine")
    shutil.copytree(path, tmp_path / ".tmp-00000007-0123456789ab")
    before = names(tmp_path)
    find_newest_checkpoint(tmp_path)
    delete_old_checkpoints(tmp_path, keep_last=1, keep_every=None)
    assert names(tmp_path) == [name for name in before if "0007" not in name]
    assert all((tmp_path / name / "thesis.tex").exists() for name in FOREIGN)


def test_retention_leaves_links_and_what_they_point_to_alone(tmp_path: Path) -> None:
    root, mine = tmp_path / "checkpoints", tmp_path / "mine"
    mine.mkdir()
    for step in (2, 3, 4):
        save(root, step)
    (root / "step-00000001").symlink_to(mine)
    delete_old_checkpoints(root, keep_last=1, keep_every=None)
    assert names(root) == ["step-00000001", "step-00000004"]
    assert mine.is_dir()


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o755), (0o022, 0o755), (0o027, 0o750)])
def test_no_group_may_write_into_a_checkpoint_whatever_the_umask(
    tmp_path: Path, umask: int, mode: int
) -> None:
    root = tmp_path / "checkpoints"
    seen = []

    def write(folder: Path) -> None:
        writer(1)(folder)
        seen.append(stat.S_IMODE(folder.stat().st_mode))

    before = os.umask(umask)
    try:
        path = save(root, 1, write)
    finally:
        os.umask(before)
    assert seen == [0o700]  # nobody looks in while it is written
    modes = {p: stat.S_IMODE(p.stat().st_mode) for p in [root, path, *path.rglob("*")]}
    assert {found for p, found in modes.items() if p.is_dir()} == {mode}
    assert {found for p, found in modes.items() if p.is_file()} == {mode & 0o644}
