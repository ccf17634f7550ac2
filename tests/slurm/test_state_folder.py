"""Root's scripts believe no state folder that another user could have made or could change."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.conftest import DEVCLUSTER
from tests.support.others import NOBODY, link_of_nobody, needs_root, shared_folder

pytestmark = needs_root

COMMANDS = {
    "down.sh": ["down.sh", "-d"],
    "up.sh": ["up.sh", "-n", "1", "-d"],
    "node.sh": ["node.sh", "exec", "n1", "true"],
    "configure.sh": ["configure.sh"],
}


@pytest.fixture
def place() -> Iterator[Path]:
    with shared_folder() as folder:
        yield folder


def call(name: str, state: Path | str) -> subprocess.CompletedProcess[str]:
    program, *words = COMMANDS[name]
    words += [str(state)] if "-d" in words else []
    named = {"VSSL_DEVCLUSTER": str(state), "DIR": str(state), "CONTROLLER": "10.77.0.254"}
    numbers = {"NODES": "1", "GPUS": "0", "PAPER": "0", "ACCOUNTING": "0"}
    return subprocess.run(
        [str(DEVCLUSTER / program), *words],
        env=os.environ | named | numbers,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def evil(state: Path) -> Path:
    """Files that would do harm if a script took them for its own; returns what shows that."""
    (state / "run").mkdir(parents=True)
    traces = state.parent / "executed"
    (state / "env.sh").write_text(f"touch {traces}\nVSSL_DEVCLUSTER_NODES='a[$(touch {traces})]'\n")
    (state / "nodes").write_text(f"a[$(touch {traces})]\n")
    for daemon in ("slurmctld", "munged", "node-n1"):
        (state / "run" / f"{daemon}.pid").write_text(f"$(touch {traces})\n")
    return traces


def owned_by_nobody(place: Path) -> Path:
    state = place / "state"
    evil(state)
    for path in (state, *state.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    return state


def below_a_folder_of_nobody(place: Path) -> Path:
    parent = place / "parent"
    evil(parent / "state")
    os.chown(parent, NOBODY, NOBODY)
    return parent / "state"


def link_to_a_folder(place: Path) -> Path:
    evil(place / "elsewhere")
    link_of_nobody(place / "state", place / "elsewhere")
    return place / "state"


def below_a_link(place: Path) -> Path:
    evil(place / "elsewhere" / "state")
    link_of_nobody(place / "parent", place / "elsewhere")
    return place / "parent" / "state"


def dangling_link(place: Path) -> Path:
    link_of_nobody(place / "state", place / "nothing")
    return place / "state"


def writable_by_all(place: Path) -> Path:
    evil(place / "state")
    (place / "state").chmod(0o777)
    return place / "state"


def sticky_and_writable_by_all(place: Path) -> Path:
    evil(place / "state")
    (place / "state").chmod(0o1777)
    return place / "state"


def writable_by_a_group(place: Path) -> Path:
    evil(place / "parent" / "state")
    (place / "parent").chmod(0o2775)
    return place / "parent" / "state"


def a_file(place: Path) -> Path:
    (place / "state").write_text("touch executed")
    return place / "state"


FOREIGN = [
    owned_by_nobody, below_a_folder_of_nobody, link_to_a_folder, below_a_link, dangling_link,
    writable_by_all, sticky_and_writable_by_all, writable_by_a_group, a_file,
]  # fmt: skip


@pytest.mark.parametrize("make", FOREIGN, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", COMMANDS)
def test_root_refuses_a_state_folder_that_others_made_or_could_change(
    name: str, make: Callable[[Path], Path], place: Path
) -> None:
    state = make(place)
    before = sorted(place.rglob("*"))
    done = call(name, state)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{name}: {place}")
    assert not done.stdout
    assert sorted(place.rglob("*")) == before, "something was executed, made or removed"


def test_what_lies_in_a_folder_of_roots_own_is_read_and_never_executed(place: Path) -> None:
    """Not even `nodes`, which a number is read from: what is none counts as no cluster."""
    state = place / "state"
    traces = evil(state)
    done = call("down.sh", state)
    assert (done.returncode, done.stdout) == (0, f"down.sh: no cluster in {state}\n"), done.stderr
    assert not traces.exists()


@pytest.mark.parametrize("odd", ["relative", "/tmp/../tmp/x", "/tmp/$(id)", "/tmp/a b", "/a\nb"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_state_folder_is_named_by_a_plain_absolute_path(name: str, odd: str) -> None:
    done = call(name, odd)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "an absolute path of letters, digits" in line


def test_up_takes_no_folder_whose_files_down_would_delete(place: Path) -> None:
    (place / "thesis.tex").write_text("years")
    done = call("up.sh", place)
    assert done.returncode == 2
    assert done.stderr == (
        f"up.sh: {place} holds files of something else: choose another folder with -d\n"
    )
    assert [path.name for path in place.iterdir()] == ["thesis.tex"]


def test_a_recorded_process_id_that_is_another_program_by_now_is_left_alone(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tool in ("ip", "scancel"):  # a real cluster may be up meanwhile
        (place / tool).write_text("#!/bin/sh\n")
        (place / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    state = place / "state"
    (state / "run").mkdir(parents=True)
    (state / "nodes").write_text("1\n")
    other = subprocess.Popen([shutil.which("sleep") or "sleep", "60"])
    try:
        for name in ("slurmctld", "node-n1", "munged"):
            (state / "run" / f"{name}.pid").write_text(f"{other.pid}\n")
        (state / "run" / "mariadbd.pid").write_text("-1\n")
        assert call("down.sh", state).returncode == 0
        assert other.poll() is None
        assert not state.exists()
    finally:
        other.kill()
        other.wait()
