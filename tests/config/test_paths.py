"""``~`` and ``$VAR`` in every path are expanded once, by whoever submits; nobody else does."""

from __future__ import annotations

import argparse
import ast
import os
import pwd
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import study_plan
from data_prep import preview, shard, subset, verify
from tests.config.test_reading import METHODS, TEXT
from vssl_dist import config
from vssl_dist.commands import (
    evaluate,
    export,
    one_class,
    submit,
)
from vssl_dist.config import RunConfig
from vssl_dist.config.paths import expanded, literal, path_argument
from vssl_dist.errors import ConfigError

ROOT = Path(__file__).parents[2]
ROOMS = ("launch", "data_prep", "vssl_dist/commands", "vssl_dist/cli")
ME = pwd.getpwuid(os.getuid())


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("TWICE", "$SCRATCH")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("LINES_END", "/scratch/me\r")  # from a file of Windows
    monkeypatch.delenv("UNSET", raising=False)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("~", "/home/me"),
        ("~/runs", "/home/me/runs"),
        (f"~{ME.pw_name}/runs", f"{ME.pw_dir}/runs"),
        ("$SCRATCH/runs", "/scratch/me/runs"),
        ("${SCRATCH}runs", "/scratch/meruns"),
        ("/data/$SCRATCH", "/data//scratch/me"),
        ("$HOME", "/home/me"),
        ("$TWICE/x", "$SCRATCH/x"),
        ("$$SCRATCH/x", "$SCRATCH/x"),
        ("a$$", "a$"),
        ("./~/x", "./~/x"),
        ("a/~/x~", "a/~/x~"),
        ("plain/path-1.tar", "plain/path-1.tar"),
    ],
)
def test_a_path_means_what_a_shell_would_make_of_it(typed: str, meant: str) -> None:
    assert expanded(typed) == meant


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        ("$UNSET/x", "UNSET is not set"),
        ("${UNSET}", "UNSET is not set"),
        ("$EMPTY/x", "EMPTY is not set, or empty"),
        ("~nobody123/x", "no home of ~nobody123"),
        ("~nobody123", "no home of ~nobody123"),
        ("a$", "written $$"),
        ("$(pwd)/x", "written $$"),
        ("${SCRATCH/x", "written $$"),
        ("$1", "written $$"),
        ("$UNSET/x", "written $$"),
        ("${UNSET:-x}/y", "${UNSET:-x} is neither $NAME nor ${NAME}"),
        ("${SCRATCH:?}/y", "${SCRATCH:?} is neither $NAME nor ${NAME}"),
        ("${!SCRATCH}", "${!SCRATCH} is neither"),
        ("$(pwd)/x", "$(pwd) is neither"),
        ("a/$-/x", "$- is neither"),
        ("~+/x", "no home of ~+"),
        ("$LINES_END/x", "control character '\\r'"),
        ("a\n", "control character '\\n'"),
        ("a\0b", "control character"),
    ],
)
def test_what_is_not_defined_is_refused_by_name(typed: str, named: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as refused:
        expanded(typed)
    assert named in str(refused.value)
    with pytest.raises(argparse.ArgumentTypeError):
        path_argument(typed)


@pytest.mark.parametrize("home", ["", "me", "./"])
def test_without_a_home_there_is_no_tilde(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", home)
    for typed in ("~", "~/runs"):
        with pytest.raises(ValueError, match="HOME is empty, or no absolute path"):
            expanded(typed)
    assert expanded("./~/runs") == "./~/runs"
    assert expanded(f"~{ME.pw_name}/x") == f"{ME.pw_dir}/x"
    monkeypatch.delenv("HOME")
    assert expanded("~/runs") == f"{ME.pw_dir}/runs"


@pytest.mark.parametrize("path", ["/a/$x", "~", "~me/$$", "$HOME", "a/b", "/~"])
def test_a_command_hands_a_path_to_another_as_it_is(path: str) -> None:
    assert Path(expanded(literal(Path(path)))) == Path(path)


def read(tmp_path: Path, *overrides: str, text: str = TEXT) -> RunConfig:
    path = tmp_path / "toy.yaml"
    path.write_text(text)
    return config.load(path, overrides, methods=METHODS)


def paths_in(schema: dict[str, Any], definitions: dict[str, Any], where: str) -> Iterator[str]:
    """The dotted keys whose type is a path, as the schema itself says."""
    if schema.get("format") == "path":
        yield where
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        yield from paths_in(definitions[name], definitions, where)
    for option in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from paths_in(option, definitions, where)
    if "items" in schema:
        yield from paths_in(schema["items"], definitions, f"{where}.0")
    for key, inner in schema.get("properties", {}).items():
        yield from paths_in(inner, definitions, f"{where}.{key}" if where else key)
    for inner in schema.get("patternProperties", {}).values():
        yield from paths_in(inner, definitions, f"{where}.far")


def path_keys() -> list[str]:
    schema = RunConfig.model_json_schema()
    return sorted({*paths_in(schema, schema["$defs"], "")})


def value_at(cfg: RunConfig, key: str) -> Any:
    value: Any = cfg.model_dump()
    for part in key.split("."):
        value = value[int(part)] if part.isdigit() else value[part]
    return value


@pytest.mark.parametrize("value", ["[a, b]", "[~/a]", "{a: b}", "", "''"])
def test_a_path_is_one_path(tmp_path: Path, value: str) -> None:
    for key in ("out", "data.train"):
        with pytest.raises(ConfigError, match=f"^{key}: .*: write one path$"):
            read(tmp_path, f"{key}={value}")


ODD = [
    "/d/é", "/d/😀", "/d/a b: c #d", "/d/a'b\"c", "@x", "%x", "&a b", "*x", "[x",
    "#x", "012", "yes", "null", "2024-05-01", "- x", "!x", "a\\b", "/d/$x", "~", "a: b", "|",
]  # fmt: skip


@pytest.mark.parametrize("text", ODD)
def test_a_value_is_handed_to_another_command_in_the_same_characters(
    tmp_path: Path, text: str
) -> None:
    words = [
        config.override("data.train", literal(Path(text))),
        config.override("licence", text),
        config.override("silence", [text, text]),
        config.override("evaluations", [{"task": "ood", "ood": {"x": literal(Path(text))}}]),
        config.override("data.bank", None),
        config.override("optim.base_lr", 1e-7),
    ]
    assert "\n" not in "".join(words)
    cfg = read(tmp_path, *words)
    assert (cfg.data.train, cfg.licence, cfg.silence) == (Path(text), text, (text, text))
    assert cfg.evaluations[0].model_dump()["ood"] == {"x": Path(text)}
    assert (cfg.data.bank, cfg.optim.base_lr) == (None, 1e-7)
    assert config.loads(config.dump(cfg), methods=METHODS) == cfg


def test_so_is_a_name_that_is_no_unicode(tmp_path: Path) -> None:
    name = Path(os.fsdecode(b"/d/caf\xe9"))
    cfg = read(tmp_path, config.override("data.train", literal(name)))
    assert cfg.data.train == config.loads(config.dump(cfg), methods=METHODS).data.train == name


OOD = "evaluations=[{task: ood, ood: {far: x}}]"


def test_these_are_the_paths_of_a_config() -> None:
    assert path_keys() == ["data.bank", "data.train", "data.val", "evaluations.0.ood.far", "out"]


@pytest.mark.parametrize("key", path_keys())
def test_every_path_of_a_config_is_expanded_and_refused_by_its_key(
    tmp_path: Path, key: str
) -> None:
    for typed, meant in (("~/a", "/home/me/a"), ("$SCRATCH/a", "/scratch/me/a"), ("$$a", "$a")):
        assert value_at(read(tmp_path, OOD, f"{key}={typed}"), key) == Path(meant)
        assert value_at(read(tmp_path, OOD, f"{key}='{typed}'"), key) == Path(meant), "quoted"
    for typed, named in (("$UNSET/a", "UNSET"), ("~nobody123/a", "~nobody123")):
        with pytest.raises(ConfigError, match=r"^[^\n]+$") as refused:
            read(tmp_path, OOD, f"{key}={typed}")
        assert str(refused.value).startswith(f"{key}: ")
        assert named in str(refused.value)


def test_the_file_is_expanded_like_the_command_line_and_no_text_is(tmp_path: Path) -> None:
    text = TEXT.replace("train: a", "train: ~/a").replace("val: b", "val: '${SCRATCH}/b'")
    cfg = read(tmp_path, "out=~", "licence=$UNSET ~ $$", text=text).absolute()
    assert (cfg.data.train, cfg.data.val) == (Path("/home/me/a"), Path("/scratch/me/b"))
    assert (cfg.out, cfg.licence) == (Path("/home/me"), "$UNSET ~ $$")


def test_a_worker_reads_what_was_resolved_and_expands_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = read(tmp_path, OOD, "out=$$x", "data.train=$$SCRATCH/~", "data.bank=./~").absolute()
    assert cfg.dir == tmp_path / "$x" / "toy"
    cfg.dir.mkdir(parents=True)
    (cfg.dir / "config.yaml").write_text(config.dump(cfg))
    monkeypatch.setenv("HOME", "/elsewhere")  # as on a node
    monkeypatch.setenv("x", "/elsewhere")
    assert config.load_run(cfg.dir, methods=METHODS) == cfg
    assert config.loads(config.dump(cfg), methods=METHODS) == cfg


COMMANDS: dict[str, Callable[[list[str]], object]] = {
    "submit": submit.arguments,
    "evaluate": evaluate.arguments,
    "export": export.arguments,
    "one_class": one_class.arguments,
    "verify": verify.arguments,
    "preview": preview.arguments,
    "shard": shard.arguments,
    "subset": subset.arguments,
}
TYPED = {
    "submit": [["{}"], ["a", "--profile", "{}"]],
    "evaluate": [["{}"]],
    "export": [["{}", "--format", "timm"], ["a", "--format", "timm", "--out", "{}"]],
    "one_class": [["{}"]],
    "verify": [["{}"]],
    "preview": [["{}", "--out", "a"], ["a", "--out", "{}"]],
    "shard": [
        ["photos", "--out", "{}"],
        ["imagefolder", "--root", "{}", "--out", "a"],
        ["imagenet", "--out", "a", "--classes", "{}"],
    ],
    "subset": [["{}", "--classes", "a", "--out", "b"], ["a", "--classes", "a", "--out", "{}"]],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_path_of_a_command_line_is_expanded(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in TYPED[command]:
        read = COMMANDS[command]([word.format("~/$SCRATCH") for word in words])
        assert Path("/home/me//scratch/me") in vars(read).values()
        with pytest.raises(SystemExit) as ended:
            COMMANDS[command]([word.format("$UNSET/a") for word in words])
        assert ended.value.code == 2
        assert "variable UNSET is not set" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_empty_path_is_not_this_folder(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Such as ``--out "$SCRATCH"`` where a shell knows no SCRATCH."""
    for words in TYPED[command]:
        with pytest.raises(SystemExit) as ended:
            COMMANDS[command]([word.format("") for word in words])
        assert ended.value.code == 2
        assert "an empty path" in capsys.readouterr().err.splitlines()[-1]


def test_no_command_takes_a_path_that_is_not_expanded() -> None:
    """Those that other processes of ours start get their paths as they are."""
    for path in (p for room in (*ROOMS, "bench") for p in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "type":
                assert ast.unparse(node.value) != "Path", f"{path}:{node.value.lineno}"


def test_folders_within_a_word_of_evaluate_are_expanded_too() -> None:
    args = evaluate.arguments(["run", "--data", "~/t,$SCRATCH/v", "--data", "far=$SCRATCH/f"])
    place = evaluate.evaluation_settings(args)
    assert (place.train, place.val) == (Path("/home/me/t"), Path("/scratch/me/v"))
    assert place.ood == {"far": Path("/scratch/me/f")}
    for data in ("far=$UNSET", "$UNSET/a,b", "a,~nobody123"):
        with pytest.raises(ConfigError, match=r"--data .*(UNSET|nobody123)"):
            evaluate.evaluation_settings(evaluate.arguments(["run", "--data", data]))


def test_a_class_list_is_a_path_only_where_it_names_no_classes(tmp_path: Path) -> None:
    assert subset.parse_class_names("$UNSET", ("$UNSET", "b")) == ("$UNSET",)
    with pytest.raises(subset.DataError, match="UNSET"):
        subset.parse_class_names("$UNSET/list.txt", ("a", "b"))


def test_a_study_hands_its_folder_on_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        "title: t\ndata: d\ncolumns: {top1: [knn, top1]}\n"
        f"points: {{a: {{config: '{ROOT}/configs/cifar10_byol.yaml'}}}}\n"
    )
    (trial,) = study_plan.plan_trials(study_plan.read_study(path), "s", tmp_path / "$x")
    assert trial.cfg.out == tmp_path / "$x"
