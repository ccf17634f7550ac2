"""A number is what every reader takes for that number; text keeps its characters."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import yaml

from tests.config.test_reading import METHODS, TEXT, read
from vssl_dist import config
from vssl_dist.config import RunConfig
from vssl_dist.errors import ConfigError
from vssl_dist.jobs.resources import Resources, load_profile
from vssl_dist.methods import CONFIGS

ROOT = Path(__file__).parents[2]
SEVERAL_READINGS = [
    "012", "010", "00", "-012", "1_0", "1_000_000", "1:30", "1:30:00", "12:00:00", "190:20:30",
    "0x10", "0X1F", "0b101", "0o17", "0_1",
]  # fmt: skip
FLOATS = [*SEVERAL_READINGS, "00.5", "1_0.5", "0.1_5", "1:30.5", "01e3", "1e0_1"]
TRUTHS = ["yes", "no", "on", "off", "Yes", "NO", "On", "OFF", "y", "n"]
AS_TYPED = [
    *SEVERAL_READINGS, "2024_05_01", "007", "1e3", "1.0", "1.50", "on", "yes", "no", "null", "true",
    "False", "2024-05-01", "1.2.3", "3", ".5", "0", "=",
]  # fmt: skip


def refused(*overrides: str, text: str = TEXT) -> str:
    with pytest.raises(ConfigError, match=r"^[^\n]+$") as error:
        read(*overrides, text=text)
    return str(error.value)


@pytest.mark.parametrize("number", SEVERAL_READINGS)
def test_a_whole_number_of_several_readings_is_refused_by_its_key(number: str) -> None:
    places = {
        "seed": f"seed={number}",
        "data.window": f"data={{train: a, val: b, views: [cifar, cifar], window: {number}}}",
        "optim.max_steps": f"optim.max_steps={number}",
        "evaluations.0.k.1": f"evaluations.0.k=[20, {number}]",
        "data.views.1.count": f"data.views=[cifar, {{recipe: cifar, count: {number}}}]",
        "data.views.0.size": f"data.views=[{{recipe: cifar, size: {number}}}, cifar]",
    }
    for key, override in places.items():
        assert refused(override).startswith(f"{key}: {number} is different numbers")
    assert refused(text=f"{TEXT}\nseed: {number}").startswith(f"seed: {number} ")


@pytest.mark.parametrize("number", FLOATS)
def test_so_is_a_number_with_a_fraction(number: str) -> None:
    for key, override in {
        "optim.epochs": f"optim.epochs={number}",
        "method.dof": f"method.dof={number}",
        "engine.ema_decay.1": f"engine.ema_decay=[0.9, {number}]",
        "evaluations.0.temperature.0": f"evaluations.0.temperature=[{number}]",
        "checkpoint.every_minutes": f"checkpoint.every_minutes={number}",
        "data.views.1.blur_sigma.0": f"data.views=[cifar, {{blur_sigma: [{number}, 2]}}]",
    }.items():
        assert refused(override).startswith(f"{key}: {number} is different numbers")


@pytest.mark.parametrize("truth", [*TRUTHS, "1", "0", "'true'"])
def test_only_true_and_false_are_truths(truth: str) -> None:
    for key in ("trace", "engine.compile"):
        assert refused(f"{key}={truth}").startswith(f"{key}: ")
    for key in ("seed", "optim.epochs"):
        assert truth in {"0", "1"} or refused(f"{key}={truth}").startswith(f"{key}: ")


@pytest.mark.parametrize(
    "text",
    [
        *TRUTHS, "true", "1,5", "1 000", "1'000", "\uff11\uff12", "½", "∞", "50%", "1k", "nan",
        ".nan", "1e", "0x", "--3", "e5", "None", "2024-01-01", "'012'", "'yes'", "[5]", "{a: 1}",
        "1e400", "t",
    ],
)  # fmt: skip
def test_what_is_no_number_or_truth_is_refused_with_the_remedy(text: str, tmp_path: Path) -> None:
    number, truth = "in plain decimal digits", "write true or false"
    for key in ("seed", "optim.max_steps", "optim.epochs", "method.dof", "evaluations.0.k.0"):
        line = refused(f"{key}={text}")
        assert line.startswith(f"{key}: ")
        assert number in line
    if text != "true":
        line = refused(f"engine.compile={text}")
        assert line.startswith("engine.compile: ")
        assert truth in line
    path = tmp_path / "profile.yaml"
    for key, remedy in (("minutes", number), ("evaluation.cpus", number), ("exclusive", truth)):
        block, _, leaf = key.rpartition(".")
        path.write_text(f"{block}: {{{leaf}: {text}}}" if block else f"{leaf}: {text}")
        if text not in {"true", "1,5"}:  # which in a flow mapping is two entries
            with pytest.raises(ConfigError) as error:
                load_profile(path)
            assert str(error.value).startswith(f"{path}: {key}: ")
            assert remedy in str(error.value)


@pytest.mark.parametrize(
    "text", ["MIT # 2024", "a #b", "#b", "&a b", "&a", "a\nb", "!!str a", "@x", "`x`", "%x", "*x"]
)
def test_an_override_is_not_read_without_a_part_of_its_text(text: str) -> None:
    for key in ("licence", "out", "name", "data.train", "optim.name", "silence"):
        line = refused(f"{key}={text}")
        assert line.startswith(f"{key}: ")
        assert f"'{key}=\"...\"'" in line, "the remedy"
    assert read('licence="MIT # 2024"').licence == "MIT # 2024"
    assert read("licence= MIT ").licence == "MIT"


def test_a_place_in_a_list_is_a_number_like_any() -> None:
    assert read("evaluations.0.k.1=7").evaluations[0].model_dump()["k"] == (1, 7)
    for place in ("00", "0_0", "+0", "\uff10", "0x0", "first", ""):
        assert "no such place" in refused(f"evaluations.{place}.k=[7]")
        assert "no such place" in refused(f"evaluations.0.k.{place}=7")


def test_brackets_in_brackets_are_refused_in_one_line() -> None:
    for brackets in ("[" * 1500 + "]" * 1500, "{a: " * 1500 + "}" * 1500):
        assert refused(f"seed={brackets}").startswith("seed: ")
        assert "not YAML" in refused(text=brackets)
    for dotted in (f"{'a.' * 20_000}b=1", f"method.{'a.' * 400}b=1"):
        assert "no such place" in refused(dotted)


def test_what_everybody_reads_alike_is_read() -> None:
    assert [read(f"trace={word}").trace for word in ("true", "false", "True", "FALSE")] == [
        True, False, True, False,
    ]  # fmt: skip
    whole = {"0": 0, "12": 12, "+7": 7, "1e5": 100_000, "2.5e3": 2500, "1E3": 1000}
    assert {text: read(f"seed={text}").seed for text in whole} == whole
    for text in ("2.5", "1e-3", "4.0", "1e30", "9" * 5000, "'12'", "1e"):
        assert refused(f"seed={text}").startswith("seed: ")
    numbers = {"1e-3": 1e-3, "1e5": 1e5, ".5": 0.5, "3.": 3.0, "+0.10": 0.1, "7": 7.0, "0": 0.0}
    assert {text: read(f"optim.weight_decay={text}").optim.weight_decay for text in numbers} == (
        numbers
    )
    assert (
        read("evaluations.0.temperature=[inf, .inf]").evaluations[0].model_dump()["temperature"]
        == (float("inf"),) * 2
    )
    for text in ("1e999", ".nan", "nan", "٣", "1,5"):
        assert refused(f"optim.weight_decay={text}").startswith("optim.weight_decay: ")


def test_numbers_are_those_of_json() -> None:
    """Whatever JSON calls a number is the same number here."""
    draw = random.Random(0)
    for _ in range(200):
        number = draw.choice([draw.random(), draw.uniform(0, 1e6), 10 ** draw.uniform(-12, 12)])
        text = draw.choice([repr, "{:e}".format, "{:.3f}".format, "{:.0f}".format])(number)
        assert read(f"optim.weight_decay={text}").optim.weight_decay == float(json.loads(text))


@pytest.mark.parametrize("text", AS_TYPED)
def test_text_keeps_the_characters_that_were_typed(text: str, tmp_path: Path) -> None:
    if text[0] not in ".-=" and ":" not in text:  # which no run may begin with, or be called
        for cfg in (read(f"name={text}"), read(text=f"name: {text}\n{TEXT}")):
            assert cfg.name == text
            assert config.loads(config.dump(cfg), methods=METHODS) == cfg
            assert yaml.safe_load(config.dump(cfg))["name"] == text, "for other programs, too"
    if text != "null":  # which a key that may be null is
        assert read(f"licence={text}").licence == text
    assert read(f"silence=[{text}]").silence == (text,)
    path = tmp_path / "profile.yaml"
    path.write_text(f"env: {{A: {text}, ON: {text}}}\naccount: {text if text != 'null' else 'a'}\n")
    if text != "=":
        profile = load_profile(path)
        assert profile.env == {"A": text, "ON": text}
        assert text in {profile.account, "null"}


def test_a_name_in_a_mapping_keeps_its_characters_too() -> None:
    task = read("evaluations=[{task: ood, ood: {2024_05: x, on: y, 007: z}}]").evaluations[0]
    assert list(task.model_dump()["ood"]) == ["2024_05", "on", "007"]


@pytest.mark.parametrize("word", ["null", "~", "Null", ""])
def test_null_is_null_where_there_may_be_nothing(word: str) -> None:
    cfg = read("licence=x", f"licence={word}", f"data.bank={word}", f"optim.max_steps={word}")
    assert (cfg.licence, cfg.data.bank, cfg.optim.max_steps) == (None, None, None)
    for key in ("seed", "trace", "optim.epochs"):
        assert refused(f"{key}={word}").startswith(f"{key}: ")
    if word != "~":  # which is a folder
        assert refused(f"out={word}").startswith("out: ")


@pytest.mark.parametrize("text", ["minutes: 12:00:00", "exclusive: yes", "mem_gb: 0128"])
def test_a_profile_is_read_as_strictly(text: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_profile(path)
    key, _, value = text.partition(": ")
    assert str(error.value).startswith(f"{path}: {key}: {value} is ")


@pytest.mark.parametrize("tag", ["!!int 012", "!!bool yes", "!!float 1_0.5", "!!int '0x1F'"])
def test_a_tag_changes_no_characters(tag: str) -> None:
    for key in ("seed", "trace", "optim.epochs"):
        assert refused(f"{key}={tag}").startswith(f"{key}: ")


def by_yaml_1_1(text: str) -> RunConfig:
    """A config as every version so far has read it."""
    raw = yaml.safe_load(text)
    raw["method"] = CONFIGS[raw["method"]["name"]].model_validate(raw["method"])
    return RunConfig.model_validate(raw)


def test_files_without_such_words_and_the_files_of_old_runs_mean_what_they_meant() -> None:
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        cfg = config.load(path, ["seed=1"], methods=CONFIGS)
        written = config.dump(cfg)
        assert config.loads(written, methods=CONFIGS) == cfg == by_yaml_1_1(written)
        assert cfg == by_yaml_1_1(f"{path.read_text()}\nname: {path.stem}\nseed: 1\n")
    for path in sorted((ROOT / "slurm").glob("*.yaml")):
        assert load_profile(path) == Resources.model_validate(yaml.safe_load(path.read_text()))


def test_a_key_that_stands_twice_is_refused_however_it_is_written() -> None:
    for text in ("seed: 1\n'seed': 2", "seed: 1\nseed: 1"):
        assert "'seed' stands twice" in refused(text=f"{text}\n{TEXT}")
    assert "not YAML" in refused(text=f"{TEXT}\n<<: {{seed: 1}}")
    assert "aliases" in refused(text=f"{TEXT}\nseed: &a 1\nlog_every: *a")
