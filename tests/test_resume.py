"""A run folder belongs to one experiment from its first curve on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.photos import tiny_dataset
from tests.support.shards import rewritten, stored
from vssl_dist import config
from vssl_dist.checkpoint import commit_checkpoint
from vssl_dist.config import RunConfig
from vssl_dist.config.differences import differences
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.errors import ConfigError
from vssl_dist.methods import CONFIGS
from vssl_dist.resume import check_resumable, check_same_experiment

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def read(tmp_path: Path, *overrides: str) -> RunConfig:
    here = [f"out={tmp_path}", f"data.train={tmp_path / 'photos' / 'train'}"]
    return config.load(QUICKSTART, [*here, *overrides], methods=CONFIGS)


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run that has drawn curves and saved no checkpoint."""
    tiny_dataset(tmp_path / "photos")
    cfg = read(tmp_path)
    (cfg.dir / "spool").mkdir(parents=True)
    (cfg.dir / "config.yaml").write_text(config.dump(cfg))
    return tmp_path


def photos(folder: Path) -> Dataset:
    return Dataset.open(folder / "photos" / "train")


def test_before_the_first_checkpoint_the_same_experiment_starts_again(begun: Path) -> None:
    assert check_resumable(read(begun, "log_every=1", "data.threads=2"), 2, photos(begun)) == 0


def test_before_the_first_checkpoint_another_experiment_is_refused(begun: Path) -> None:
    with pytest.raises(ConfigError, match=r"other optim\.base_lr \(0\.004 then, 0\.5 now\)"):
        check_resumable(read(begun, "optim.base_lr=0.5"), 2, photos(begun))


def test_a_checkpoint_from_before_a_key_existed_counts_as_its_default(tmp_path: Path) -> None:
    cfg = read(tmp_path)
    old = config.frozen_part(cfg)
    for key in ("beta_warmup_epochs", "variances", "learn_radial_scale"):
        del old["method"][key]
    facts = {"experiment": old, "fingerprint": "f", "world_size": 2}
    check_same_experiment(cfg, facts, 2, "f")
    with pytest.raises(ConfigError, match=r"variances \(shared then, separate now\)"):
        check_same_experiment(read(tmp_path, "method.variances=separate"), facts, 2, "f")
    old["method"]["no_longer_there"] = 3
    with pytest.raises(ConfigError, match=r"method\.no_longer_there \(3 then, None now\)"):
        check_same_experiment(cfg, facts, 2, "f")


def test_a_new_name_starts_a_new_run(begun: Path) -> None:
    assert check_resumable(read(begun, "name=other", "optim.base_lr=0.5"), 2, photos(begun)) == 0


def test_a_run_does_not_go_on_with_data_that_changed(tmp_path: Path) -> None:
    cfg = read(tmp_path)
    folder = tiny_dataset(tmp_path / "photos")
    fingerprint = Dataset.open(folder).fingerprint
    facts = {"experiment": config.frozen_part(cfg), "world_size": 1, "fingerprint": fingerprint}
    check_same_experiment(cfg, facts, 1, fingerprint)
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    elsewhere = read(tmp_path, f"data.train={moved}")
    check_same_experiment(elsewhere, facts, 1, Dataset.open(moved).fingerprint)
    changed = rewritten(folder, tmp_path / "changed", {3: stored(folder)[0][4].data})
    other = read(tmp_path, f"data.train={changed}")
    with pytest.raises(ConfigError, match="was started on other data"):
        check_same_experiment(other, facts, 1, Dataset.open(changed).fingerprint)
    with pytest.raises(ConfigError, match=r"seed \(0 then, 1 now\)"):
        check_same_experiment(read(tmp_path, "seed=1"), facts, 1, fingerprint)


def test_patience_and_budget_may_change_on_a_resume(tmp_path: Path) -> None:
    other = read(tmp_path, "data.timeout_s=1.0", "data.max_bad=0.5")
    assert config.frozen_part(other) == config.frozen_part(read(tmp_path))


def refusal(cfg: RunConfig, then: dict[str, Any]) -> str:
    """What is said of a run whose checkpoint has this experiment."""
    facts = {"experiment": then, "fingerprint": "f", "world_size": 2}
    with pytest.raises(ConfigError) as refused:
        check_same_experiment(cfg, facts, 2, "f")
    return str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["data.views=[{recipe: cifar, crop_scale: [0.3, 1]}, cifar]"],
            ["data.views[0].crop_scale ([0.2, 1.0] then, [0.3, 1.0] now)"],
        ),
        (
            ["data.views=[cifar, {recipe: cifar, blur: 0.25, size: 24}]"],
            ["data.views[1].blur (0.0 then, 0.25 now)", "data.views[1].size (None then, 24 now)"],
        ),
        (
            [
                "method={name: dino, backbone: resnet10_c16, local_crops: 1}",
                "data.views=[cifar, cifar, cifar]",
            ],
            ["data.views (2 entries then, 3 entries now)", "method.name (vje then, dino now)"],
        ),
        (["online={lr: 0.3}"], ["online.lr (None then, 0.3 now)"]),
        (["optim.max_steps=70", "seed=3"], ["optim.max_steps (None then, 70 now)", "seed (0 "]),
        (["engine.ema_decay=[0.9, 0.95]"], ["engine.ema_decay ("]),
    ],
)
def test_a_refusal_names_the_keys_that_differ_also_within_lists(
    tmp_path: Path, overrides: list[str], said: list[str]
) -> None:
    line = refusal(read(tmp_path, *overrides), config.frozen_part(read(tmp_path)))
    assert [words for words in said if words not in line] == []
    assert not set("{}\n") & set(line), "no dictionary, and one line"
    assert len(line) < 700
    assert line.endswith(": give this run another name, with name=...")
    assert "remove" not in line


def test_of_many_keys_some_are_named_and_the_others_counted(tmp_path: Path) -> None:
    views = "data.views=[imagenet_byol_1, imagenet_byol_2]".replace("imagenet_", "")
    old, new = read(tmp_path), read(tmp_path, views, "seed=9", "optim.base_lr=0.5")
    line = refusal(new, config.frozen_part(old))
    differing = differences(config.frozen_part(old), config.frozen_part(new))
    assert line.count(" then, ") == 8
    assert f" and {len(differing) - 8} more: give this run another name" in line
    assert len(line) < 700


def test_long_values_are_told_apart_where_they_part() -> None:
    folder = "/storage/projects/vision/people/datasets/natural_images/version_3/sharded/"
    (said,) = differences({"ood": {"x": f"{folder}val"}}, {"ood": {"x": f"{folder}validation"}})
    assert said == "ood.x (...ersion_3/sharded/val then, ...ersion_3/sharded/validation now)"
    (said,) = differences({"x": "a"}, {"x": "b" * 99})
    assert said == f"x (a then, {'b' * 60}... now)"


def test_a_recipe_that_an_older_schema_kept_by_name_is_told_by_its_names(tmp_path: Path) -> None:
    then = config.frozen_part(read(tmp_path))
    then["data"]["views"] = ["moco", "cifar"]
    then["data"]["gone"] = {"a": 1, "b": [1, 2]}
    line = refusal(read(tmp_path), then)
    assert "data.gone.a (1 then, None now)" in line
    assert "data.views[0] (moco then, a block of " in line
    assert "{" not in line


def test_no_refusal_of_a_run_advises_to_remove_it(begun: Path) -> None:
    facts = {"experiment": config.frozen_part(read(begun)), "fingerprint": "f", "world_size": 2}
    refusals = []
    for world_size, fingerprint, overrides in ((3, "f", []), (2, "g", []), (2, "f", ["seed=1"])):
        with pytest.raises(ConfigError) as refused:
            check_same_experiment(read(begun, *overrides), facts, world_size, fingerprint)
        refusals.append(str(refused.value))
    with pytest.raises(ConfigError) as refused:
        check_resumable(read(begun, "seed=1"), 2, photos(begun))
    refusals.append(str(refused.value))
    for line in refusals:
        assert "name=..." in line
        assert not any(word in line for word in ("remove", "delete", str(begun / "runs")))


def nested(depth: int) -> dict[str, Any]:
    block: dict[str, Any] = {}
    for _ in range(depth):
        block = {"data": block}
    return block


@pytest.mark.parametrize(
    "changes",
    [
        {"experiment": None},
        {"experiment": []},
        {"experiment": {}},
        {"experiment": {"data": "x"}},
        {"experiment": nested(900)},
        {"experiment": {"data": {"train": "x"}, "method": [[[]]], "optim": 3, "engine": {"x": {}}}},
        {"world_size": "2"},
        {"world_size": -1},
        {"fingerprint": ["\x1b"]},
        {"experiment": {"data": {}, "\x1b[31m\n": 3}},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_whatever_a_checkpoint_says_of_its_experiment_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    cfg = read(tmp_path)
    facts = {"experiment": config.frozen_part(cfg), "fingerprint": "f", "world_size": 2} | changes
    with pytest.raises(ConfigError) as error:
        check_same_experiment(cfg, facts, 2, "f")
    assert str(error.value).isprintable()


def test_checkpoints_of_others_are_refused_on_the_login_node(tmp_path: Path) -> None:
    cfg = read(tmp_path)
    path = commit_checkpoint(
        cfg.dir / "checkpoints", step=1, write_files=lambda folder: None, facts={}
    )
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    tiny_dataset(tmp_path / "photos")
    with pytest.raises(ConfigError, match="is a link"):
        check_resumable(cfg, 2, photos(tmp_path))
