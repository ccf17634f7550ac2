"""A checkpoint's pickles are opened only if they name what DeepSpeed is known to write."""

from __future__ import annotations

import pickle
import pickletools
import shutil
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.poison import POISONS, in_state, reseal
from tests.support.ranks import run_ranks
from tests.test_engine import Trainee, refusal, run_config
from vssl_dist import checkpoint, dist, pickles
from vssl_dist.engine import TAG
from vssl_dist.errors import CheckpointError

MODEL = "mp_rank_00_model_states.pt"
SHARD = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
CASES = [
    (0, "none", "adamw"),
    (0, "bfloat16", "lars"),
    (1, "none", "lars"),
    (1, "bfloat16", "sgd"),
    (2, "none", "sgd"),
    (2, "bfloat16", "adamw"),
]
"""Stage, autocast and optimizer."""


pytestmark = pytest.mark.filterwarnings("ignore")
"""Of torch and zipfile, on what no checkpoint has."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What one rank of stage 0 has written."""
    place = tmp_path / TAG
    place.mkdir()
    torch.save({"module": {"weight": torch.zeros(3)}, "steps": 4}, place / MODEL)
    return place


def known() -> dict[str, frozenset[str]]:
    return pickles.allowed_globals_by_file(world_size=1, zero_stage=0)


def test_what_deepspeed_writes_is_opened(folder: Path) -> None:
    pickles.check_pickle_globals(folder, known())
    state = pickles.load_with_allowed_globals(known(), str(folder / MODEL), map_location="cpu")
    assert state["steps"] == 4
    assert torch.equal(state["module"]["weight"], torch.zeros(3))


@pytest.mark.parametrize("kind", POISONS)
def test_what_would_run_code_is_refused_in_one_line_and_runs_nothing(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    POISONS[kind](folder / MODEL, tmp_path / "touched")
    with pytest.raises(CheckpointError) as error:
        pickles.check_pickle_globals(folder, known())
    assert MODEL in str(error.value)
    assert "restore" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("kind", POISONS)
def test_the_reader_refuses_it_too_whatever_was_looked_at_before(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    POISONS[kind](folder / MODEL, tmp_path / "touched")
    with pytest.raises(Exception, match=r"."):
        pickles.load_with_allowed_globals(known(), str(folder / MODEL))
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "value", [eval, print, Path("x"), torch.nn.Linear(1, 1), range(3)], ids=str
)
def test_any_other_name_than_the_known_ones_is_refused_by_it(folder: Path, value: Any) -> None:
    torch.save({"module": value}, folder / MODEL)
    with pytest.raises(CheckpointError, match=r"would run \S+"):
        pickles.check_pickle_globals(folder, known())


def test_the_model_may_not_name_what_the_shards_may() -> None:
    files = pickles.allowed_globals_by_file(world_size=2, zero_stage=2)
    assert files.keys() == {MODEL, SHARD, SHARD.replace("1", "0", 1)}
    assert not files[MODEL]
    assert len(files[SHARD]) == 3


@pytest.mark.parametrize("name", ["mp_rank_01_model_states.pt", "x\n.pt", SHARD])
def test_a_file_more_or_less_is_refused(folder: Path, name: str) -> None:
    shutil.copy(folder / MODEL, folder / name)
    with pytest.raises(CheckpointError, match="odd") as error:
        pickles.check_pickle_globals(folder, known())
    assert "\n" not in str(error.value)
    (folder / name).unlink()
    (folder / MODEL).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        pickles.check_pickle_globals(folder, known())


# With DeepSpeed, on two ranks.


def named_by(path: Path) -> set[str]:
    """All that a file names, read without torch."""
    with zipfile.ZipFile(path) as archive:
        (place,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        codes = list(pickletools.genops(archive.read(place)))
    assert not {code.name for code, _, _ in codes} & {"STACK_GLOBAL", "INST", "EXT1"}
    return {str(name).replace(" ", ".") for code, name, _ in codes if code.name == "GLOBAL"}


def two_ranks(folder: Path) -> dict[str, Any]:
    names = {}
    for case in CASES:
        stage, cast, optim = case
        trainee = Trainee(run_config(stage, "vje_ema", optim, 0.3, autocast=cast))
        trainee.train(1)
        root = folder / "-".join(map(str, case))
        path = checkpoint.commit_checkpoint(root, step=1, write_files=trainee.engine.save, facts={})
        names[case] = {p.name: named_by(p) for p in (path / TAG).iterdir()}
        assert not list(path.rglob("*.py"))
        trainee.engine.load(path)
    return {"names": names, "hostile": hostile(folder / "hostile")}


def hostile(root: Path) -> dict[str, str]:
    """How both ranks refuse what is whole and not ours, and that the original is still taken."""
    trainee = Trainee(run_config(1, "vje_ema"))
    trainee.train(1)
    path = checkpoint.commit_checkpoint(root, step=1, write_files=trainee.engine.save, facts={})
    trainee.train(1)
    before = trainee.engine.digests()
    refusals = {}
    for name, change in HOSTILE.items():
        other = path.with_name(f"changed-{name}")
        if dist.rank() == 0:
            shutil.copytree(path, other)
            change(other)
            reseal(other)
        dist.barrier()
        refusals[name] = refusal(partial(trainee.engine.load, other))
        if name.startswith("poisoned"):
            assert trainee.engine.digests() == before
    for name in ("poisoned model", "poisoned shard"):  # DeepSpeed alone, without a look before
        with pytest.raises(pickle.UnpicklingError) if reads(name) else nullcontext():
            trainee.engine.ds.load_checkpoint(str(path.with_name(f"changed-{name}")), tag=TAG)
    trainee.engine.load(path)
    assert trainee.engine.step == 1
    return refusals


def reads(name: str) -> bool:
    """Whether this rank reads the poisoned file: all read the model, one the shard."""
    return name == "poisoned model" or dist.rank() == 1


def poison(name: str, folder: Path) -> None:
    in_state(folder / TAG / name, folder.parent / "touched")


def text(name: str, content: str, folder: Path) -> None:
    (folder / name).write_text(content)


def other_tensors(name: str, folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x\x1b": torch.zeros(1)}, folder / name)


def emptied(name: str, folder: Path) -> None:
    torch.save({}, folder / TAG / name)


COUNTS = '{"step": %s, "skipped": 0, "world_size": 2, "zero_stage": 1}'
HOSTILE: dict[str, Callable[[Path], None]] = {
    "poisoned model": partial(poison, MODEL),
    "poisoned shard": partial(poison, SHARD),
    "counts nested": partial(text, "engine.json", "[" * 100_000),
    "counts a list": partial(text, "engine.json", "[]"),
    "counts missing": partial(text, "engine.json", "{}"),
    "step a text": partial(text, "engine.json", COUNTS % '"x"'),
    "step negative": partial(text, "engine.json", COUNTS % "-1"),
    "step a fraction": partial(text, "engine.json", COUNTS % "1.5"),
    "generators nested": partial(text, "generators-00001.json", "[" * 100_000),
    "generators a number": partial(text, "generators-00001.json", "7"),
    "generators empty": partial(text, "generators-00001.json", "{}"),
    "teacher of others": partial(other_tensors, "teacher.safetensors"),
    "teacher no tensors": partial(text, "teacher.safetensors", "x"),
    "model empty": partial(emptied, MODEL),
    "shard empty": partial(emptied, SHARD),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pickles")


@pytest.fixture(scope="module")
def seen(place: Path) -> list[dict[str, Any]]:
    return run_ranks(two_ranks, 2, place, timeout_s=300)


TENSORS = {
    "collections.OrderedDict",
    "torch.FloatStorage",
    "torch.LongStorage",
    "torch.Size",
    "torch._utils._rebuild_tensor_v2",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_real_checkpoints_name_exactly_what_the_table_says(
    seen: list[dict[str, Any]], case: tuple[int, str, str]
) -> None:
    table = pickles.allowed_globals_by_file(world_size=2, zero_stage=case[0])
    names = seen[0]["names"][case]
    assert {name: found - TENSORS for name, found in names.items()} == table


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOSTILE)
def test_all_ranks_refuse_what_is_whole_and_not_ours_in_the_same_line(
    seen: list[dict[str, Any]], place: Path, kind: str
) -> None:
    said = {rank["hostile"][kind] for rank in seen}
    assert len(said) == 1
    (line,) = said
    assert str(place / "hostile" / f"changed-{kind}") in line
    assert "restore this checkpoint" in line
    assert line.isprintable()
    if kind.startswith("poisoned"):
        assert "would run posix.system" in line
    assert not (place / "hostile" / "touched").exists()
