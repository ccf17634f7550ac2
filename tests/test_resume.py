"""A run folder belongs to one experiment from its first curve on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.photos import tiny_dataset
from tests.support.shards import rewritten, stored
from vssl_dist import config
from vssl_dist.config import ConfigError, RunConfig
from vssl_dist.data.shards import Dataset
from vssl_dist.methods import CONFIGS
from vssl_dist.resume import check_resume, same_experiment

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


def test_before_the_first_checkpoint_the_same_experiment_starts_again(begun: Path) -> None:
    assert check_resume(read(begun, "log_every=1", "data.threads=2"), world_size=2) == 0


def test_before_the_first_checkpoint_another_experiment_is_refused(begun: Path) -> None:
    with pytest.raises(ConfigError, match=r"other optim\.base_lr \(0\.004 then, 0\.5 now\)"):
        check_resume(read(begun, "optim.base_lr=0.5"), world_size=2)


def test_a_checkpoint_from_before_a_key_existed_counts_as_its_default(tmp_path: Path) -> None:
    cfg = read(tmp_path)
    old = config.frozen_part(cfg)
    for key in ("beta_warmup_epochs", "variances", "learn_radial_scale"):
        del old["method"][key]
    facts = {"experiment": old, "fingerprint": "f", "world_size": 2}
    same_experiment(cfg, facts, 2, "f")
    with pytest.raises(ConfigError, match=r"variances \(shared then, separate now\)"):
        same_experiment(read(tmp_path, "method.variances=separate"), facts, 2, "f")
    old["method"]["no_longer_there"] = 3
    with pytest.raises(ConfigError, match=r"method\.no_longer_there \(3 then, None now\)"):
        same_experiment(cfg, facts, 2, "f")


def test_a_new_name_starts_a_new_run(begun: Path) -> None:
    assert check_resume(read(begun, "name=other", "optim.base_lr=0.5"), world_size=2) == 0


def test_a_run_does_not_go_on_with_data_that_changed(tmp_path: Path) -> None:
    cfg = read(tmp_path)
    folder = tiny_dataset(tmp_path / "photos")
    fingerprint = Dataset.open(folder).fingerprint
    facts = {"experiment": config.frozen_part(cfg), "world_size": 1, "fingerprint": fingerprint}
    same_experiment(cfg, facts, 1, fingerprint)
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    elsewhere = read(tmp_path, f"data.train={moved}")
    same_experiment(elsewhere, facts, 1, Dataset.open(moved).fingerprint)
    changed = rewritten(folder, tmp_path / "changed", {3: stored(folder)[0][4].data})
    other = read(tmp_path, f"data.train={changed}")
    with pytest.raises(ConfigError, match="was started on other data"):
        same_experiment(other, facts, 1, Dataset.open(changed).fingerprint)
    with pytest.raises(ConfigError, match=r"seed \(0 then, 1 now\)"):
        same_experiment(read(tmp_path, "seed=1"), facts, 1, fingerprint)


def test_patience_and_budget_may_change_on_a_resume(tmp_path: Path) -> None:
    other = read(tmp_path, "data.timeout_s=1.0", "data.max_bad=0.5")
    assert config.frozen_part(other) == config.frozen_part(read(tmp_path))
