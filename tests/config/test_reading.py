"""A config is read strictly: what is not meant is refused in one line that names the key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from vssl_dist import config
from vssl_dist.config import TASKS, MethodConfig, RunConfig
from vssl_dist.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
TEXT = """
method: {name: toy, dof: 3}
data: {train: a, val: b, views: [cifar, {recipe: cifar, solarize: 0.2}], streams: 8, image_size: 32}
optim: {base_lr: 1e-3, global_batch: 128, epochs: 2}
evaluations: [{task: knn, k: [1, 20]}]
"""


class ToyConfig(MethodConfig):
    dof: float


METHODS: dict[str, type[MethodConfig]] = {"toy": ToyConfig}


def read(*overrides: str, text: str = TEXT) -> RunConfig:
    return config.loads(text, overrides, methods=METHODS, name="toy")


def test_the_resolved_config_reads_back_to_itself() -> None:
    cfg = read("seed=7", "engine.ema_decay=[0.9, 1]", "checkpoint.every_steps=3")
    assert config.loads(config.dump(cfg), methods=METHODS) == cfg


def test_the_last_override_wins_over_the_file() -> None:
    assert read("optim.epochs=7", "optim.epochs=9").optim.epochs == 9


def test_a_number_without_a_dot_is_a_float_only_where_a_float_is_asked_for() -> None:
    assert read().optim.base_lr == 1e-3
    with pytest.raises(ConfigError, match="name"):
        read("name=1e-3.5 x")


def test_a_view_is_a_recipe_with_changes() -> None:
    plain, changed = read().data.views
    assert changed == plain.model_copy(update={"solarize": 0.2})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.epoch=3", "optim.epoch: no such key (did you mean 'epochs'?)"),
        ("metod.name=vje", "metod: no such key (did you mean 'method'?)"),
        ("method.dofs=3", "method.dofs: no such key (did you mean 'dof'?)"),
        ("method.name=vjee", "method.name: 'vjee' is not one of toy"),
        ("method.name=[toy]", "method.name: ['toy'] is not one of toy"),
        ("optim.epochs=three", "optim.epochs: Input should be a valid number"),
        ("optim.accumulate=2.5", "optim.accumulate: Input should be a valid integer"),
        ("trace=1", "trace: Input should be a valid boolean"),
        ("seed=yes", "seed: Input should be a valid integer"),
        ("seed=-1", "seed: Input should be greater than or equal to 0"),
        ("engine.ema_decay=[0.9]", "engine.ema_decay"),
        ("engine.zero_stage=3", "engine.zero_stage=3 is not built yet"),
        ("optim.name=sgdd", "optim.name: Input should be 'sgd', 'adamw' or 'lars'"),
        ("optim.global_batch=100", "optim.global_batch=100 must be a multiple of data.streams"),
        ("data.views=[cifr]", "data.views.0: 'cifr' is no recipe"),
        ("optim.epochs=inf", "optim.epochs: Input should be a finite number"),
        ("optim.betas=[0.9, 1.5]", "optim.betas.1"),
        ("engine.ema_decay=[0.9, 5]", "engine.ema_decay.1"),
        ("optim.warmup_epochs=3", "optim.warmup_epochs=3 is longer than optim.epochs=2"),
        ("evaluations=[{task: knn, k: []}]", "evaluations.0.k"),
        ("evaluations=[{task: knn, k: [0]}]", "evaluations.0.k.0"),
        ("evaluations=[{task: knn, temperature: [0]}]", "evaluations.0.temperature.0"),
        ("evaluations=[{task: knn, ks: [1]}]", "evaluations.0.ks: no such key (did you mean 'k'?)"),
        ("evaluations=[{task: knn_}]", "evaluations.0.task: must be one of knn, linear"),
        ("evaluations=[{k: [1]}]", "evaluations.0.task: must be one of knn, linear"),
        ("evaluations=[knn]", "evaluations.0: Input should be a valid dictionary"),
        ("evaluations=[{task: ood, ood: {../x: a}}]", "evaluations.0.ood.../x"),
        ("evaluations=[{task: linear, shares: [1.5]}]", "evaluations.0.shares.0"),
        ("data.normalise.std=[0, 1, 1]", "data.normalise.std: every standard deviation"),
        ("data.views=[cifar, {recipe: cifar, crop_scale: [1, 0.1]}]", "data.views.1.crop_scale"),
        ("data.views=[cifar, {recipe: cifar, crop_ratio: [0, 1]}]", "crop_ratio above 0"),
        ("data.views=[cifar, {recipe: cifar, blur_sigma: [-2, -1]}]", "data.views.1.blur_sigma"),
        ("seed=2024-13-45", "seed: Input should be a valid integer"),
        ("data.views=[]", "data.views"),
        (
            "data.views=[cifar, {recipe: cifar, blurr: 0.5}]",
            "data.views.1.blurr: no such key (did you mean 'blur'?)",
        ),
        ("data.views=[cifar, {recip: cifar}]", "no such key (did you mean 'recipe'?)"),
        ("data.normalise.sdt=[1, 1, 1]", "data.normalise.sdt: no such key (did you mean 'std'?)"),
        ("data.views=[cifar, {recipe: cifar, hue: 0.6}]", "data.views.1.hue"),
        ("evaluations=[{task: knn}, {task: knn}]", "evaluations name a task twice (knn, knn)"),
        ("data.views=[cifar]", "data.views has 1 entries, but toy compares 2 views"),
        ("data.val=null", "evaluations need data.val"),
        ("name=../../etc", "name: String should match pattern"),
        ("evaluations.0.k.5=3", "override evaluations.0.k.5: there is no such place"),
        ("seed", "is not of the form dotted.key=value"),
        ("data.train=[", "data.train: not YAML"),
    ],
)
def test_a_bad_value_is_refused_in_one_line_that_names_it(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(override)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "seed: 1\nseed: 2\n" + TEXT,
        TEXT + "\nx: &a [1]\ny: *a",
        TEXT + "\nname: !!python/object/apply:os.getcwd []",
        TEXT + "\n\tseed: 1",
        "- a\n- b",
        "",
        TEXT.replace("optim:", "optimiser:"),
        TEXT + "#" * 1_000_001,
    ],
    ids=["twice", "alias", "object", "tab", "list", "empty", "missing", "huge"],
)
def test_a_file_that_is_no_config_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(text=text)
    assert "\n" not in str(error.value)


def test_a_pipe_in_a_run_folder_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=r"config\.yaml: is no file: remove it"):
        config.load_run(tmp_path, methods=METHODS)


def test_a_whole_number_beyond_all_floats_is_one_line() -> None:
    with pytest.raises(ValidationError, match=r"every_epochs\n.*finite number"):
        config.read_task({"task": "knn", "every_epochs": 10**400})


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        config.load(tmp_path / "absent.yaml", methods=METHODS)


def test_a_run_is_the_same_whatever_folder_a_job_starts_in() -> None:
    told = ["evaluations=[{task: ood, ood: {x: c}}]", "out=/runs", "data.bank=d"]
    cfg = read(*told).absolute()
    here = Path.cwd()
    assert (cfg.out, cfg.data.train, cfg.data.val) == (Path("/runs"), here / "a", here / "b")
    assert cfg.data.bank == here / "d"
    assert config.loads(config.dump(cfg), methods=METHODS) == cfg
    assert str(here / "c") in config.dump(cfg)
    assert read().absolute().data.bank is None


def test_streams_must_divide_over_the_ranks() -> None:
    assert read().micro_batch(world_size=4) == 32
    with pytest.raises(ValueError, match=r"data\.streams=8"):
        read().micro_batch(world_size=3)


def test_steps_cover_the_epochs_and_max_steps_ends_them() -> None:
    assert read().total_steps(samples=1000) == 16  # ceil(2 * 1000 / 128)
    assert read("optim.max_steps=5").total_steps(samples=1000) == 5


def test_evaluations_fall_on_their_period_and_on_the_last_step() -> None:
    cfg = read("optim.epochs=3")
    due = [s for s in range(1, 25) if cfg.evaluations_at(s, samples=1000)]
    assert due == [8, 16, 24]  # the first step at or after each 1,000 images; 24 is also the last


def test_what_may_change_on_resume_does_not_count_as_another_experiment() -> None:
    free = ["name=other", "log_every=1", "data.train=elsewhere", "data.threads=1", "trace=true"]
    free += ["data.bank=labelled", "silence=[warm_up]", "licence=mit"]
    assert config.frozen_part(read()) == config.frozen_part(read(*free))
    assert config.frozen_part(read()) != config.frozen_part(read("seed=1"))


def dotted(model: type[BaseModel], prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for name, field in model.model_fields.items():
        kind: Any = field.annotation
        inner = [k for k in (kind, *getattr(kind, "__args__", ())) if isinstance(k, type)]
        nested = [k for k in inner if issubclass(k, BaseModel) and k is not MethodConfig]
        keys |= dotted(nested[0], f"{prefix}{name}.") if nested else {f"{prefix}{name}"}
    return keys


def test_the_surface_of_the_schema_is_this_one() -> None:
    tasks = {f"evaluations.{name}.{key}" for name, task in TASKS.items() for key in dotted(task)}
    found = dotted(RunConfig) - {"evaluations"} | tasks
    assert found == set((Path(__file__).parent / "surface.txt").read_text().split())


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_loads(path: Path) -> None:
    from vssl_dist.methods import CONFIGS as methods

    cfg = config.load(path, methods=methods)
    assert config.loads(config.dump(cfg), methods=methods) == cfg
    assert yaml.safe_load(config.dump(cfg))["method"]["name"] in methods


def test_keys_of_a_method_that_exclude_each_other_are_refused_by_its_name() -> None:
    from vssl_dist.methods import CONFIGS as methods

    changes = ["method.preset=null", "method.cosine=C2", "method.radius=sqrt_dim"]
    with pytest.raises(ConfigError, match=r"^method: radius=sqrt_dim is of cosine=C1"):
        config.load(CONFIGS / "cifar10_vssl.yaml", changes, methods=methods)


@pytest.mark.parametrize("name", ["in1k_vje", "in1k_vssl"])
def test_the_imagenet_configs_divide_over_64_ranks(name: str) -> None:
    from vssl_dist.methods import CONFIGS as methods

    assert config.load(CONFIGS / f"{name}.yaml", methods=methods).micro_batch(64) > 0


@pytest.mark.parametrize(
    "override",
    [
        "data.train=http://me:hunter2@host/x", "licence=Bearer hunter2", "http://me:hunter2@host",
        "licence='see https://hunter2@host'", "seed=http://me:hunter2@host",
    ],
)  # fmt: skip
def test_a_secret_in_a_config_is_refused_and_not_repeated(override: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(TEXT)
    with pytest.raises(ConfigError) as refused:
        config.load(path, [override], methods=METHODS)
    assert "hunter2" not in str(refused.value)
    assert "\n" not in str(refused.value)
    harmless = ["data.train=/data/me@site/key=1/x", "licence='see https://host/@me'"]
    assert config.load(path, harmless, methods=METHODS).data.train.parent.name == "key=1"
