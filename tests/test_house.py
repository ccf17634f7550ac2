"""The house stands: imports only go down, each vendor has one door, nothing runs at import."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator
from pathlib import Path, PurePath

import pytest

from vssl_dist import run_folder

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vssl_dist"
FLOORS = [
    {"text", "confidential", "curves", "errors", "durable", "run_folder"},
    {"logs"},
    {
        "jsonfile",
        "config",
        "console",
        "schedule",
        "dist",
        "densities",
        "vision",
        "state",
        "installed",
        "environment",
    },
    {"models", "sealed", "locks"},
    {"methods", "data", "exports", "optim", "teacher", "checkpoint", "pickles", "tracker"},
    {"online_probe", "preview"},
    {"gradients"},
    {"engine", "evaluation", "trace", "linter"},
    {"resume"},
    {"train"},
    {"jobs"},
    {"cli"},
    {"commands"},
]
CONTRACTS = {"vssl_dist.methods.base", "vssl_dist.data.loader", "vssl_dist.data.store.dataset"}
TRAINING = {"train", "engine", "resume", "trace", "online_probe"}
DOORS = {
    "deepspeed": {"vssl_dist/engine.py"},
    "submitit": {"vssl_dist/jobs"},
    "mlflow": {"vssl_dist/tracker"},
    "nvidia": {
        f"vssl_dist/data/backends/{name}.py" for name in ("dali", "dali_decoder", "dali_graph")
    },
    "torchvision": {"vssl_dist/vision.py"},
    "webdataset": {"data_prep"},
}
WRITERS = {
    "write_text", "write_bytes", "savefig", "save_file", "save", "dump", "open_memmap",
    "tofile", "copy", "copy2", "copyfile", "copytree", "move", "touch", "hardlink_to", "symlink_to",
}  # fmt: skip
OWNERS = {
    "save": {"np", "torch"}, "dump": {"json", "pickle", "yaml"}, "copy": {"shutil"},
    "move": {"shutil"},
}  # fmt: skip
"""Writers that are called so only by these; others have methods of the same name."""
FRESH = "into a new folder of this call, of a name that nobody can know beforehand"
SEALED = "into the folder of a checkpoint, an export or a cache entry that is renamed when whole"
EXPLAINED = {
    ("vssl_dist/engine.py", "states_path.write_text(json.dumps(state.generator_states()))"): SEALED,
    ("vssl_dist/engine.py", "(folder / 'engine.json').write_text(json.dumps(facts))"): SEALED,
    ("vssl_dist/evaluation/features/cache.py", "(folder / 'features.npy').open('xb')"): SEALED,
    ("vssl_dist/evaluation/features/cache.py", "(folder / 'labels.npy').open('xb')"): SEALED,
    ("vssl_dist/evaluation/features/cache.py", "np.save(file, labels)"): SEALED,
    (
        "vssl_dist/evaluation/features/cache.py",
        "(partial_path / _SEAL_FILE_NAME).open('x')",
    ): SEALED,
    ("vssl_dist/evaluation/features/cache.py", "json.dump(seal_facts, file, indent=1)"): SEALED,
    (
        "vssl_dist/online_probe.py",
        "save_file({name: tensor.contiguous() for name, tensor in self._state.items()}, "
        "folder / _STATE_FILE_NAME)",
    ): SEALED,
    (
        "vssl_dist/exports/formats.py",
        "save_file(backbone.state_dict(), path / _WEIGHTS_FILE_NAME)",
    ): SEALED,
    (
        "vssl_dist/exports/formats.py",
        "(path / _CARD_FILE_NAME).write_text(json.dumps(card.as_json(), indent=1))",
    ): SEALED,
    ("vssl_dist/exports/formats.py", "(path / 'README.md').write_text(readme_text)"): SEALED,
    (
        "vssl_dist/exports/formats.py",
        "(path / 'config.json').write_text(json.dumps(timm_config, indent=1))",
    ): SEALED,
    (
        "vssl_dist/teacher.py",
        "safetensors.torch.save_file(state.cpu_state_dict(self.module), path)",
    ): SEALED,
    (
        "vssl_dist/jobs/training_job.py",
        "path.open('x', encoding='utf-8', errors='backslashreplace')",
    ): "the first rank that fails writes it, and no other",
    (
        "vssl_dist/tracker/artifacts.py",
        "link_path.symlink_to(f'/proc/self/fd/{descriptor}')",
    ): FRESH,
    ("vssl_dist/tracker/identity.py", "probe_path.touch()"): FRESH,
    ("vssl_dist/tracker/identity.py", "shutil.copy2(path, copied_path)"): FRESH,
    (
        "vssl_dist/tracker/remote.py",
        "database_path.hardlink_to(partial_path)",
    ): "a name that is taken stays what it is",
    ("data_prep/images/agreement.py", "os.open(os.devnull, os.O_WRONLY)"): "nothing is kept",
    (
        "data_prep/subset.py",
        "(folder / entry.name).symlink_to(os.path.relpath(target, folder))",
    ): FRESH,
    ("bench/certificate.py", "torch.save(result_by_method, f'{folder}/seen')"): FRESH,
    (
        "bench/knn.py",
        "np.lib.format.open_memmap(path, mode='w+', dtype=np.float16, "
        "shape=(size.bank_size, size.feature_width))",
    ): FRESH,
    (
        "bench/shard.py",
        "(folder / f'data_batch_{number + 1}').write_bytes(pickle.dumps(batch, protocol=2))",
    ): FRESH,
    (
        "bench/shard.py",
        "(folder / 'batches.meta').write_bytes(pickle.dumps(meta, protocol=2))",
    ): FRESH,
    ("bench/shard.py", "Image.fromarray(cut).save(path, 'JPEG', quality=95)"): FRESH,
}
"""By file and call, why it need not go through vssl_dist/durable.py."""
SPELLED_AGAIN = {
    (
        "vssl_dist/cli/commands.py",
        "slurm/default.yaml, or slurm/local.yaml",
    ): "shipped profiles, not a run's folder",
    (
        "vssl_dist/evaluation/run.py",
        ": no export/backbone-STEP.safetensors in this folder yet",
    ): "a sentence for people, with STEP in it",
    (
        "vssl_dist/exports/read.py",
        ": is no backbone; name the backbone-STEP file beside it",
    ): "a sentence for people, with STEP in it",
}
"""By file and text, why a name of a run's file stands outside of vssl_dist/run_folder.py."""
SPOKEN = (
    "launch", "data_prep", "vssl_dist/cli", "vssl_dist/commands", "vssl_dist/console",
    "vssl_dist/data", "vssl_dist/linter", "vssl_dist/preview",
)  # fmt: skip
"""Rooms that print what files and folders are called."""
FORBIDDEN = {"utils.py", "helpers.py", "common.py", "misc.py"}


def sources(*rooms: str) -> list[Path]:
    return [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.parametrize("path", sources("vssl_dist"), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_go_down(path: Path) -> None:
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if room == "__init__":
        return
    for name in imports(path):
        parts = name.split(".")
        outside = {"launch", "tests"} | (set() if room == "commands" else {"data_prep"})
        assert parts[0] not in outside, f"{path}: imports {name}"
        if parts[0] != "vssl_dist" or len(parts) < 2 or parts[1] == "__version__":
            continue
        sideways_contract = any(name.startswith(c) for c in CONTRACTS) and floor(parts[1]) <= floor(
            room
        )
        down = floor(parts[1]) < floor(room)
        assert parts[1] == room or down or sideways_contract, f"{path}: climbs to {name}"


def test_training_imports_no_evaluation() -> None:
    for path in sources("vssl_dist"):
        if path.relative_to(PACKAGE).with_suffix("").parts[0] in TRAINING:
            assert not [name for name in imports(path) if name.startswith("vssl_dist.evaluation")]


def test_each_vendor_has_one_door() -> None:
    for path in sources("vssl_dist", "launch", "data_prep"):
        place = path.relative_to(ROOT).as_posix()
        for name in imports(path):
            doors = DOORS.get(name.split(".")[0])
            if doors is not None:
                assert any(place.startswith(door) for door in doors), f"{place} imports {name}"


@pytest.mark.parametrize(
    "path", sources("vssl_dist", "launch", "data_prep", "bench"), ids=lambda p: p.name
)
def test_every_file_says_what_it_is_for_and_no_function_takes_a_crowd(path: Path) -> None:
    assert path.name not in FORBIDDEN
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            given = node.args
            names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            parameters = len(names) - (names[:1] in (["self"], ["cls"], ["ctx"]))
            assert parameters <= 7, f"{path}:{node.lineno}: {node.name} takes {parameters}"


def test_nothing_runs_at_import() -> None:
    quiet = (
        ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef,
        ast.Assign, ast.AnnAssign, ast.Try,
    )  # fmt: skip
    for path in sources("vssl_dist", "launch", "data_prep"):
        for node in ast.parse(path.read_text()).body:
            text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            guard = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
            typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            assert isinstance(node, quiet) or text or guard or typing, f"{path}:{node.lineno}"


def test_the_top_level_is_the_agreed_one() -> None:
    agreed = {
        "pyproject.toml", "README.md", "launch", "vssl_dist", "data_prep", "configs", "tests",
        "slurm", "Makefile", "constraints.txt", "CHANGELOG.md", ".gitignore", ".ci", "bench",
        "docs", "LICENSE", "CITATION.cff", "CONTRIBUTING.md", ".pre-commit-config.yaml",
    }  # fmt: skip
    needed = agreed - {"bench", "docs"}
    present = {path.name for path in ROOT.iterdir()}
    assert needed <= present
    package_folders = {p.name for p in ROOT.iterdir() if p.is_dir() and any(p.glob("*.py"))}
    assert package_folders <= agreed


def test_no_test_assumes_that_a_path_of_the_machine_is_absent() -> None:
    """Somebody's machine has it: what must be absent is named below the test's own folder."""
    invented = re.compile(
        r"(?:^|[=: {])/(absent|does[-_]not[-_]exist|gone|missing|moved|no|no[-_]such|nonexistent"
        r"|not[-_]there|nowhere)\b"
    )
    for path in sources("tests"):
        tree = ast.parse(path.read_text())
        pieces = {id(v) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)
                  for v in node.values}  # fmt: skip
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) else None
            # A piece of an f-string goes on from a folder before it.
            if isinstance(text, str) and id(node) not in pieces and path.name != "test_house.py":
                assert not invented.search(text), f"{path}:{node.lineno}: {text}"


def writes(call: ast.Call, in_memory: Collection[str] = ()) -> bool:
    """Whether a call writes a file by itself, and not into a buffer of one of these names."""
    if call.args and ast.unparse(call.args[0]) in in_memory:
        return False
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else None
    if name == "open" and owner == "os":
        return any(flag in ast.unparse(call) for flag in ("O_WRONLY", "O_RDWR", "O_CREAT"))
    if name in ("open", "memmap"):
        first = owner in (None, "io", "np")  # which name the file before its mode
        modes = [*call.args[first:], *(k.value for k in call.keywords)]
        texts = [m.value for m in modes if isinstance(m, ast.Constant) and isinstance(m.value, str)]
        return any(re.fullmatch(r"[rwaxbt+]+", text) and set(text) & set("wax+") for text in texts)
    picture = name == "save" and re.search("[iI]mage|page", owner or "") is not None
    return name in WRITERS and (owner in OWNERS.get(name, {owner}) or picture)


def test_whatever_writes_a_file_goes_through_durable_or_says_why_not() -> None:
    """One place follows no link of others, takes no name that can be known, and leaves no half."""
    met = set()
    for path in sources("vssl_dist", "launch", "data_prep", "bench"):
        place = path.relative_to(ROOT).as_posix()
        nodes = list(ast.walk(ast.parse(path.read_text())))
        buffers = {
            ast.unparse(node.targets[0])
            for node in nodes
            if isinstance(node, ast.Assign) and ast.unparse(node.value) == "io.BytesIO()"
        }
        for node in nodes:
            if (
                isinstance(node, ast.Call)
                and writes(node, buffers)
                and place != "vssl_dist/durable.py"
            ):
                call = (place, ast.unparse(node))
                met.add(call)
                assert call in EXPLAINED, f"{place}:{node.lineno}: {call[1]}"
    gone = [call for call in EXPLAINED if call not in met]
    assert not gone


def test_the_law_on_writing_knows_a_writer_when_it_sees_one() -> None:
    guilty = [
        "open(p, 'w')", "open(p, mode='ab')", "p.open('wb')", "p.open('r+')", "io.open(p, 'x')",
        "p.write_text(t)", "json.dump(x, f)", "torch.save(x, p)", "np.save(p, x)",
        "shutil.copy(a, b)", "shutil.move(a, b)", "figure.savefig(p)", "save_file(x, p)",
        "safetensors.torch.save_file(x, p)", "os.open(p, os.O_RDWR | os.O_CREAT)",
        "image.save(p)", "Image.fromarray(x).save(p)",
    ]  # fmt: skip
    innocent = [
        "open(p)", "p.open('rb')", "p.open(errors='replace')", "json.dumps(x)", "cfg.copy()",
        "os.open(p, os.O_RDONLY)", "engine.save(folder)", "config.dump(cfg)", "Dataset.open(p)",
        "safetensors.torch.save(tensors)",
    ]  # fmt: skip
    for text, guilt in [*((t, True) for t in guilty), *((t, False) for t in innocent)]:
        call = ast.parse(text, mode="eval").body
        assert isinstance(call, ast.Call)
        assert writes(call) == guilt, text


def names_of_a_run() -> tuple[set[str], set[str]]:
    """Names of a run's folders, and the pieces of its files' names that are always the same."""
    paths = [PurePath(line.split("`")[1]) for line in run_folder.markdown().splitlines()[2:]]
    words = "|".join(re.findall(r"[A-Z]{4,}|JOB", " ".join(map(str, paths))))
    pieces = {piece for path in paths for piece in re.split(words, path.name)}
    suffix = re.compile(r"\.[a-z]+|[^a-z]*")
    folders = {parent.name for path in paths for parent in path.parents} - {""}
    folders |= {path.name for path in paths if path.name.isalpha()}
    return folders, {p for p in pieces if not suffix.fullmatch(p) and p not in folders}


def spelled(tree: ast.AST) -> Iterator[ast.Constant]:
    """Texts in which code spells the name of a run's file, or of its folder as part of a path."""
    folders, pieces = names_of_a_run()
    # Behind a letter it is another name: `crank-`, `prerun.json`.
    file = re.compile("|".join(rf"(?<![a-z]){re.escape(piece)}" for piece in pieces))
    folder = re.compile(rf"(?:^|/)(?:{'|'.join(folders)})/|/(?:{'|'.join(folders)})$")
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            if isinstance(node.right, ast.Constant) and node.right.value in folders:
                yield node.right
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and (file.search(node.value) or folder.search(node.value))
        ):
            yield node


def test_paths_of_a_run_are_spelled_in_one_module() -> None:
    met = set()
    for path in sources("vssl_dist", "launch", "data_prep", "bench"):
        place = path.relative_to(ROOT).as_posix()
        tree = ast.parse(path.read_text())
        texts = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        for node in spelled(tree) if place != "vssl_dist/run_folder.py" else ():
            if id(node) not in texts:  # of a docstring
                text = (place, str(node.value))
                met.add(text)
                assert text in SPELLED_AGAIN, f"{place}:{node.lineno}: {text[1]}"
    assert [text for text in SPELLED_AGAIN if text not in met] == []


def test_the_law_on_spelling_knows_a_path_of_a_run_when_it_sees_one() -> None:
    guilty = [
        "run / 'config.yaml'", "run / 'export'", "f'{run}/logs'", "f'rank-{rank}.log'",
        "folder.glob('backbone-*.safetensors')", "'spool/cursor.json'", "f'{task}-baselines.json'",
        "f'failure-{attempt}.txt'", "f'{job}_0_log.out'", "f'.{stem}-{step}.attempts.json'",
    ]  # fmt: skip
    innocent = ["typed('export', argv)", "cluster == 'slurm'", "f'{name}.json'", "x / 'parts'"]
    for text, guilt in [*((t, True) for t in guilty), *((t, False) for t in innocent)]:
        assert any(spelled(ast.parse(text, mode="eval"))) == guilt, text


def test_what_names_files_prints_through_one_door() -> None:
    """`vssl_dist.text.say` passes no command of a file's name to a terminal."""
    for path in sources(*SPOKEN):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                raw = name.endswith(("ArgumentParser", "stdout.write", "stderr.write"))
                assert name != "print", f"{path}:{node.lineno}"
                assert not raw, f"{path}:{node.lineno}"
