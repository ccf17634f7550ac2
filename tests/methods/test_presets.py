"""Readings of the two papers by name: what a name stands for, and that it is always true."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest

from vssl_dist import config
from vssl_dist.config import MethodConfig
from vssl_dist.errors import ConfigError
from vssl_dist.methods import CONFIGS
from vssl_dist.methods.vje import VJEConfig
from vssl_dist.methods.vssl import VSSLConfig

FILES = Path(__file__).parents[2] / "configs"
MEANING = {
    "vje_derived_v3": {"form": "tangent_chord", "variances": "shared", "target": "stop_gradient"},
    "vje_derived_v1": {"form": "ambient", "variances": "shared", "target": "stop_gradient"},
    "vssl_derived_gauss": {"denoising": "A", "cosine": "none", "radius": "one"},
    "vssl_derived_cos": {"denoising": "A", "cosine": "C1", "radius": "sqrt_dim"},
}
CONTRADICTIONS = [
    (preset, key, other)
    for preset, keys in MEANING.items()
    for key, other in {
        "form": "tangent_log",
        "variances": "separate",
        "target": "ema",
        "denoising": "B",
        "cosine": "C2",
        "radius": {"one": "sqrt_dim", "sqrt_dim": "one"}.get(keys.get("radius", "")),
    }.items()
    if key in keys
]


def read(method: str, *changes: str) -> Any:
    return config.load(FILES / f"cifar10_{method}.yaml", changes, methods=CONFIGS)


@pytest.mark.parametrize("preset", MEANING)
def test_a_preset_fills_its_keys_and_the_resolved_config_shows_them(preset: str) -> None:
    cfg = read(preset.split("_")[0], f"method.preset={preset}")
    shown = cfg.method.model_dump()
    assert shown["preset"] == preset
    assert shown | MEANING[preset] == shown
    assert config.loads(config.dump(cfg), methods=CONFIGS) == cfg


@pytest.mark.parametrize(("preset", "key", "other"), CONTRADICTIONS)
def test_a_key_that_contradicts_the_preset_is_refused_with_the_way_out(
    preset: str, key: str, other: str
) -> None:
    want = rf"^method: {key}={other} contradicts preset={preset}, which is {key}=.*preset=null"
    method = preset.split("_")[0]
    with pytest.raises(ConfigError, match=want):
        read(method, f"method.preset={preset}", f"method.{key}={other}")


def test_keys_that_no_preset_settles_are_free_and_its_own_may_be_repeated() -> None:
    cfg = read("vje", "method.dof=inf", "method.form=tangent_chord", "method.beta=0.1")
    assert cfg.method.preset == "vje_derived_v3"
    assert (cfg.method.dof, cfg.method.beta) == (math.inf, 0.1)
    chosen = read("vje", "method.preset=null", "method.form=factorised").method
    assert (chosen.preset, chosen.form) == (None, "factorised")


@pytest.mark.parametrize("wrong", ["vje_paper", "vssl_derived_cos", "[v3]", "3"])
def test_a_preset_that_the_method_does_not_have_is_refused_with_those_it_has(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"^method\.preset: .*vje_derived_v3.*vje_derived_v1"):
        read("vje", f"method.preset={wrong}")


def test_a_method_with_one_reading_has_no_presets() -> None:
    with pytest.raises(ConfigError, match=r"^method\.preset: no such key"):
        read("byol", "method.preset=byol_derived")


@pytest.mark.parametrize("preset", MEANING)
def test_a_run_goes_on_under_the_name_of_the_values_that_it_began_with(preset: str) -> None:
    method = preset.split("_")[0]
    named = read(method, f"method.preset={preset}")
    written = [f"method.{key}={value}" for key, value in MEANING[preset].items()]
    plain = read(method, "method.preset=null", *written)
    assert config.frozen_part(named) == config.frozen_part(plain)
    other = next(name for name in MEANING if name.startswith(method) and name != preset)
    assert config.frozen_part(named) != config.frozen_part(read(method, f"method.preset={other}"))


@pytest.mark.parametrize("model", [VJEConfig, VSSLConfig])
def test_no_preset_claims_to_be_the_papers(model: type[MethodConfig]) -> None:
    (names, _) = get_args(model.model_fields["preset"].annotation)
    assert set(get_args(names)) == set(model.presets)
    assert all("derived" in name and "paper" not in name for name in model.presets)


@pytest.mark.parametrize("model", [VJEConfig, VSSLConfig])
def test_every_key_of_the_two_methods_says_how_much_is_known_of_it(
    model: type[MethodConfig],
) -> None:
    own = set(model.model_fields) - set(MethodConfig.model_fields)
    assert {"preset", "zero_init_residual", "beta", "logvar_range", "hidden"} <= own
    for key in own:
        said = model.model_fields[key].description or ""
        assert said.startswith(("FOUND.", "DERIVED.", "UNKNOWN.")), key


def test_every_recipe_of_the_two_methods_is_a_preset() -> None:
    for path in [*FILES.glob("*_vje.yaml"), *FILES.glob("*_vssl.yaml")]:
        cfg: Any = config.load(path, methods=CONFIGS)
        want = {"vje": "vje_derived_v3", "vssl": "vssl_derived_cos"}[cfg.method.name]
        assert cfg.method.preset == want, path.name
