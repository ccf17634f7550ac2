from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from vssl_dist.errors import ConfigError
from vssl_dist.jobs.resources import (
    Launch,
    Resources,
    dump_launch,
    load_launch,
    load_profile,
    resolve_for_slurm,
    resolve_for_this_machine,
)

PROFILES = sorted((Path(__file__).parents[2] / "slurm").glob("*.yaml"))
URI = "sqlite:////somewhere/mlflow.db"


def profile(tmp_path: Path, text: str) -> Resources:
    path = tmp_path / "profile.yaml"
    path.write_text(text)
    return load_profile(path)


@pytest.mark.parametrize("path", PROFILES, ids=lambda p: p.stem)
def test_every_profile_that_is_shipped_is_valid(path: Path) -> None:
    assert load_profile(path).model_fields_set == yaml.safe_load(path.read_text()).keys()


def test_the_default_profile_has_eight_ranks_and_eight_gpus_per_node() -> None:
    default = load_profile(Path(__file__).parents[2] / "slurm" / "default.yaml")
    assert (default.ranks_per_node, default.gpus, default.device) == (8, 8, "cuda")
    assert resolve_for_slurm(default, 8, URI).world_size == 64


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("ranks_per_nod: 4", "did you mean 'ranks_per_node'"),
        ("ranks_per_node: '8'", "ranks_per_node"),
        ("ranks_per_node: 0", "ranks_per_node"),
        ("device: tpu", "device"),
        ("minutes: 5", "signal_delay_s"),
        ("gpus_per_node: 4", "every rank has a GPU"),
        ("env: {WANDB_TOKEN: hunter2}", "secret"),
        ("env: {DB_PWD: hunter2}", "env.DB_PWD looks like a secret"),
        ("env: {PGPASS: [hunter2]}", "env.PGPASS looks like a secret"),
        ("env: {AWS_ACCESS_KEY_ID: hunter2}", "secret"),
        ("env: {A: Bearer hunter2}", "env.A looks like a secret"),
        ("env: {MLFLOW_TRACKING_URI: 'http://u:hun/ter2@h'}", "secret"),
        ("env: {http_proxy: 'u:hunter2@proxy:3128'}", "secret"),
        ("env: {DB_PWD: hunter2", "not YAML"),
        ("env: [DB_PWD=hunter2]", "env looks like a secret"),
        ("env: {'http://u:hunter2@h': x}", "env.http://***@h looks like a secret"),
        ("setup: [module load x, export DB_PWD=hunter2]", "setup looks like a secret"),
        ("setup: ['curl -u u:hunter2 http://h']", "setup looks like a secret"),
        ("evaluation: {account: 'http://u:hunter2@h'}", "evaluation.account looks like a secret"),
        ("env: {AWS_SECRET_ACCESS_KEY: abc}", "secret"),
        ("[a, b]", "mapping"),
        ("partition: [", "not YAML"),
    ],
)
def test_a_bad_profile_is_refused_in_one_line_that_names_it(
    tmp_path: Path, text: str, complaint: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        profile(tmp_path, text)
    assert complaint in str(refused.value)
    assert "hunter2" not in str(refused.value)
    assert "profile.yaml" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "attack",
    ["a\ntouch PWNED #", "x; touch PWNED", "$(touch PWNED)", "`touch PWNED`", "a b", "a'b", 'a"b',
     "a|b", "a&b", "a>b", "a\\b", "a\x00b", "a\u2028b", ""],
)  # fmt: skip
@pytest.mark.parametrize(
    "field", ["partition", "account", "qos", "constraint", "reservation", "nodelist", "exclude"]
)
def test_nothing_that_a_shell_would_act_on_passes(field: str, attack: str) -> None:
    with pytest.raises(ValueError, match=field):
        Resources.model_validate({field: attack})


@pytest.mark.parametrize(
    "attack", ["a\ntouch PWNED", "true; touch PWNED", "$(x)", "a > b", "a & b"]
)
def test_setup_lines_and_variables_hold_one_plain_command_or_value(attack: str) -> None:
    for field in ({"setup": [attack]}, {"env": {"A": attack}}, {"env": {attack: "a"}}):
        with pytest.raises(ValueError, match="pattern"):
            Resources.model_validate(field)


def test_variables_that_share_a_syllable_with_a_secret_are_taken(tmp_path: Path) -> None:
    env = {
        "KEYBOARD": "us", "TOKENIZERS_PARALLELISM": "false", "NCCL_SOCKET_IFNAME": "ib0",
        "MLFLOW_TRACKING_URI": "sqlite:////x@y.db", "NCCL_IB_PKEY": "1", "SSH_AUTH_SOCK": "/run/s",
        "PGPASSFILE": "/home/me/.pgpass", "http_proxy": "http://proxy:3128",
    }  # fmt: skip
    assert profile(tmp_path, yaml.safe_dump({"env": env})).env == env


def test_auto_takes_the_gpus_there_are_and_the_cpu_where_there_are_none() -> None:
    auto = Resources(device="auto")
    with_gpus = resolve_for_this_machine(auto, None, 4, URI)
    without = resolve_for_this_machine(auto, None, 0, URI)
    assert (with_gpus.device, with_gpus.world_size) == ("cuda", 4)
    assert (without.device, without.world_size) == ("cpu", 2)


def test_more_ranks_than_gpus_are_refused_and_never_run_on_the_cpu_instead() -> None:
    with pytest.raises(ConfigError, match="4 GPUs"):
        resolve_for_this_machine(Resources(device="auto"), 5, 4, URI)
    with pytest.raises(ConfigError, match="0 GPUs"):
        resolve_for_this_machine(Resources(device="cuda"), None, 0, URI)


def test_a_cluster_is_never_asked_for_whatever_device_there_is() -> None:
    with pytest.raises(ConfigError, match="auto"):
        resolve_for_slurm(Resources(device="auto"), 1, URI)


def test_a_launch_survives_the_way_through_its_file(tmp_path: Path) -> None:
    # As earlier versions took it; these run on.
    env = {"A": "b", "PGPASS": "c"}
    shared = Resources(device="cpu", ranks_per_node=2, env=env, setup=("module load x",))
    launch = resolve_for_slurm(shared, 3, URI)
    (tmp_path / "launch.yaml").write_text(dump_launch(launch))
    assert load_launch(tmp_path) == launch
    assert isinstance(launch, Launch)


def test_a_pipe_in_place_of_a_launch_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "launch.yaml")
    with pytest.raises(ConfigError, match=r"launch\.yaml: is no file: remove it"):
        load_launch(tmp_path)
