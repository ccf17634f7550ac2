"""A likelihood is never taken for one of another density: not on disk, on curves or in tables."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from tests.support.exports import by_hand, change, exported
from tests.support.heads import SMALL, exported_branch
from tests.support.photos import three_splits
from vssl_dist import config
from vssl_dist.commands.evaluate import main
from vssl_dist.config import CollapseConfig, OodConfig, read_task
from vssl_dist.evaluation.one_class_table import (
    OTHER_CLASSES_SPLIT,
    ClassResult,
    draw_auroc_bars,
    markdown_table,
)
from vssl_dist.evaluation.run import evaluate, evaluate_baselines
from vssl_dist.evaluation.scores.posterior import Posterior
from vssl_dist.evaluation.scores.table import LabelledFeatures
from vssl_dist.evaluation.scores.variational import VariationalSetup, make_variational_scores
from vssl_dist.evaluation.tasks import TASKS
from vssl_dist.exports.model_card import read_evaluation_figures
from vssl_dist.exports.read import load_export, read_card
from vssl_dist.exports.results import LIKELIHOOD_SCORES, read_result, results_named_by_density
from vssl_dist.jobs.evaluation_job import PendingEvaluation
from vssl_dist.methods import CONFIGS
from vssl_dist.models.heads import GaussianBranch

NAME, STEP = "ood-00000040.json", 40


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return three_splits(tmp_path_factory.mktemp("shards"), foreign=40)


@pytest.fixture(scope="module")
def vje(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose features are known."""
    run = tmp_path_factory.mktemp("run")
    path, _ = exported_branch(run / "export", data, SMALL["vje"])
    evaluate(path, asked(data))
    path.with_name(NAME).unlink()
    return run


@pytest.fixture
def path(vje: Path, tmp_path: Path) -> Path:
    """Its export, in a copy of that folder."""
    run = Path(shutil.copytree(vje, tmp_path / "run"))
    return run / "export" / f"backbone-{STEP:08d}.safetensors"


def asked(data: Path) -> OodConfig:
    return OodConfig(ood={"others": data / "foreign"}, k=3, bootstrap=0, batch=50, pairs=1)


@pytest.fixture
def task(data: Path) -> OodConfig:
    return asked(data)


def cartesian(task: OodConfig) -> OodConfig:
    return task.model_copy(update={"density": "cartesian"})


def aged(path: Path, density: str | None) -> dict[str, Any]:
    """Rewrite a result as the version before the density wrote it; returns what it says now."""
    result: dict[str, Any] = json.loads(path.read_text())
    result.pop("density", None)
    result["format"] = 4
    if density is None:
        result["task"].pop("density", None)
    else:
        result["task"]["density"] = density
    for suffix in ("_polar", "_cartesian"):
        metrics = result["metrics"].items()
        result["metrics"] = {key.removesuffix(suffix): value for key, value in metrics}
    path.write_text(json.dumps(result))
    return result


def test_polar_is_the_default_wherever_none_is_named(path: Path, data: Path) -> None:
    assert OodConfig().density == "polar"
    assert read_task({"task": "ood"}) == OodConfig(density="polar")
    cfg = CONFIGS["vje"].model_validate({"name": "vje"})
    branch = GaussianBranch(nn.Identity(), nn.Linear(4, 8))
    assert VariationalSetup(Posterior(branch, cfg)).density == "polar"
    own = {"task": "ood", "ood": {"others": str(data / "foreign")}, "bootstrap": 0, "pairs": 0}
    change(path, config=read_card(path).config.as_json() | {"evaluations": [own]})
    assert main([str(path), "--device", "cpu", "--task", "ood"]) == 0
    assert json.loads(path.with_name(NAME).read_text())["density"] == "polar"


def test_a_cartesian_likelihood_ranks_by_the_norm_and_a_polar_one_does_not() -> None:
    """Of embeddings whose directions and norms have nothing to do with each other."""
    torch.manual_seed(0)
    width, count = 64, 200
    unit = nn.functional.normalize(torch.randn(count, width), dim=1)
    h = unit * (2.0 + 10 * torch.rand(count, 1))
    cfg = CONFIGS["vje"].model_validate({"name": "vje", "radial_weight": 0})

    class Directions(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.normalize(x, dim=1)
            return torch.cat([x, x @ noise], dim=1)

    noise = 0.3 * torch.randn(width, width)
    posterior = Posterior(GaussianBranch(nn.Identity(), Directions()), cfg)
    bank = LabelledFeatures(h[:50], torch.zeros(50, dtype=torch.int64))
    with_norm = {
        density: {
            name: float(spearmanr(score(h), h.norm(dim=1))[0])
            for name, score in make_variational_scores(
                VariationalSetup(posterior, density), bank
            ).items()
        }
        for density in ("polar", "cartesian")
    }
    for name in LIKELIHOOD_SCORES:
        if name in with_norm["cartesian"]:
            assert with_norm["cartesian"][name] > 0.9, name
            assert abs(with_norm["polar"][name]) < 0.2, name


def test_the_norm_is_a_baseline_and_a_short_embedding_counts_as_foreign(
    tmp_path: Path, data: Path, task: OodConfig
) -> None:
    path, network = exported(tmp_path / "export", data)
    result = evaluate(path, task)["results"]["others"]["norm"]
    with torch.no_grad():
        norms = [
            network(by_hand(data / part)[0]).double().norm(dim=1).numpy()
            for part in ("val", "foreign")
        ]
    truth = np.repeat([0, 1], [len(one) for one in norms])
    assert result["auroc"] == pytest.approx(roc_auc_score(truth, -np.concatenate(norms)), abs=1e-3)


def test_results_of_two_densities_lie_side_by_side_and_their_curves_apart(
    path: Path,
    data: Path,
    task: OodConfig,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    polar = evaluate(path, task)
    other = evaluate(path, cartesian(task))
    assert (polar["density"], other["density"]) == ("polar", "cartesian")
    assert read_result(path.with_name(NAME)) == polar
    assert read_result(path.with_name(f"ood-cartesian-{STEP:08d}.json")) == other
    assert evaluate(path, task) == polar, "neither is computed twice"
    assert evaluate(path, cartesian(task)) == other
    one, two = (
        {key for key in r["metrics"] if key.startswith("ood/auroc")} for r in (polar, other)
    )
    same = {f"ood/auroc_others_{s}" for s in ("knn", "mahalanobis", "max_softmax", "norm")}
    assert one & two == same | {"ood/auroc_others_s4_posterior_size"}
    assert all("_polar" in key for key in one - two)
    assert all("_cartesian" in key for key in two - one)
    assert len(one - two) == len(two - one) == len(LIKELIHOOD_SCORES)
    own = asked(data).model_dump(mode="json")
    change(path, config=read_card(path).config.as_json() | {"evaluations": [own]})
    for density, due in (("polar", task), ("cartesian", cartesian(task))):
        assert PendingEvaluation(path, STEP, due).is_final()
        figures = TASKS["ood"].table_columns(
            results_named_by_density(polar if density == "polar" else other)
        )
        for columns in ("20", "40", "80", "200"):
            monkeypatch.setenv("COLUMNS", columns)
            assert main([str(path), "--device", "cpu", "--task", "ood", "--density", density]) == 0
            said = capsys.readouterr().out
            assert "…" not in said
            assert [f for pair in figures.items() for f in pair if f not in said] == []
        assert f"others s1 self likelihood {density}" in figures
        assert "others s4 posterior size" in figures


def test_an_old_result_is_marked_and_never_taken_for_a_polar_one(
    path: Path, task: OodConfig
) -> None:
    figures = evaluate(path, cartesian(task))["results"]
    path.with_name(f"ood-cartesian-{STEP:08d}.json").rename(path.with_name(NAME))
    for density in ("cartesian", None):  # as it was dumped, and from before there was the key
        aged(path.with_name(NAME), density)
        old = read_result(path.with_name(NAME))
        assert old["density"] == "cartesian"
        assert "s1_self_likelihood_cartesian" in results_named_by_density(old)["others"]
        assert "s1_self_likelihood" not in results_named_by_density(old)["others"]
        assert results_named_by_density(old)["others"]["knn"] == figures["others"]["knn"]
        card = read_evaluation_figures(path, read_card(path))["ood"]
        assert "ood/auroc_others_s3_negative_elbo_cartesian" in card
        assert "ood/auroc_others_s3_negative_elbo" not in card
        assert not PendingEvaluation(path, STEP, task).is_done(), "a run that goes on asks again"
    again = evaluate(path, task)
    assert again["density"] == "polar"
    assert (
        again["results"]["others"]["s1_self_likelihood"]
        != (figures["others"]["s1_self_likelihood"])
    )
    assert PendingEvaluation(path, STEP, task).is_final()


@pytest.mark.parametrize("kind", ["vssl", "none"])
def test_where_no_embedding_has_a_likelihood_the_density_means_nothing(
    tmp_path: Path, data: Path, task: OodConfig, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "vssl":
        path, _ = exported_branch(tmp_path / "export", data, SMALL["vssl teacher"])
    else:
        path, _ = exported(tmp_path / "export", data)
    result = evaluate(path, cartesian(task))
    assert "density" not in result
    assert path.with_name(NAME).exists()
    assert not any("polar" in key or "cartesian" in key for key in result["metrics"])
    assert results_named_by_density(result) == result["results"]
    aged(path.with_name(NAME), "cartesian")
    old = read_result(path.with_name(NAME))
    assert "density" not in old
    assert PendingEvaluation(path, STEP, task).is_done(), "an old result holds as before"
    words = [str(tmp_path), "--device", "cpu", "--task", "ood", "--density", "polar"]
    assert main([*words, "--data", f"x={data / 'foreign'}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --density polar: is for task ood of an export of vje")
    assert said.count("\n") == 1


def test_a_run_asks_for_the_density_only_of_a_method_that_has_one() -> None:
    text = """
    method: {name: METHOD, backbone: resnet10_c16}
    data: {train: a, val: b, views: [cifar, cifar], image_size: 32}
    optim: {base_lr: 1e-3, global_batch: 64, epochs: 2}
    evaluations: [{task: ood, density: cartesian, ood: {x: c}}]
    """
    stems = {}
    for method in ("vje", "vssl", "byol"):
        cfg = config.loads(text.replace("METHOD", method), methods=CONFIGS, name="x")
        (asked,) = cfg.evaluations_at(cfg.total_steps(640), 640)
        stems[method] = asked.stem
    assert stems == {"vje": "ood-cartesian", "vssl": "ood", "byol": "ood"}


def test_one_class_tables_and_bars_name_the_density() -> None:
    scores = {name: {"auroc": 0.5} for name in ("knn", "norm", *LIKELIHOOD_SCORES)}
    for density in ("polar", "cartesian"):
        trained = [
            ClassResult("cat", {"results": {OTHER_CLASSES_SPLIT: scores}, "density": density})
        ]
        table = markdown_table("vje", trained, "")
        heads = [line for line in table.splitlines() if "self likelihood" in line]
        assert len(heads) == 2
        assert all(f"| norm | s1 self likelihood {density} |" in head for head in heads)
        legend = draw_auroc_bars("vje", trained).legends[0].get_texts()
        assert f"s5 bank likelihood {density}" in [text.get_text() for text in legend]


def test_a_collapse_table_has_every_digit_before_the_point() -> None:
    figures = {"rankme": 1234.56, "spread": 0.58449, "alignment": None, "width": 3072}
    shown_as = TASKS["collapse"].table_columns(figures)
    assert shown_as == {"rankme": "1235", "spread": "0.584", "width": "3072"}


def test_the_rank_of_centred_features_has_a_name_of_its_own_also_in_old_results(
    tmp_path: Path, data: Path
) -> None:
    path, _ = exported(tmp_path / "export", data)
    result = evaluate(path, CollapseConfig(batch=50, pairs=0))
    with torch.no_grad():
        x = load_export(path)[0](by_hand(data / "val")[0]).double().numpy()
    for name, rows in (("rankme", x), ("effective_rank_centred", x - x.mean(0))):
        values = np.linalg.svd(rows, compute_uv=False)
        share = values / values.sum()
        entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
        assert result["results"][name] == pytest.approx(np.exp(entropy), rel=1e-3)
    assert "effective_rank_centred" in result["results"]
    assert '"effective_rank"' not in json.dumps(result)
    result_path = path.with_name(f"collapse-{STEP:08d}.json")
    today = result_path.read_text()
    for name, number in (("effective_rank", 4), ("rankme_centred", 5)):
        text = today.replace("effective_rank_centred", name)
        result_path.write_text(json.dumps(json.loads(text) | {"format": number}))
        old = read_result(result_path)
        assert (old["results"], old["metrics"]) == (result["results"], result["metrics"])
        titles = TASKS["collapse"].table_columns(old["results"])
        assert "effective rank centred" in titles, "as tables show it"
    written = result_path.read_bytes()
    again = evaluate(path, CollapseConfig(batch=50, pairs=0))
    assert result_path.read_bytes() == written, "for a name alone nothing is computed"
    assert (again["results"], again["metrics"]) == (result["results"], result["metrics"])
    against = evaluate_baselines(path, CollapseConfig(batch=50, pairs=0))
    stored = path.with_name("collapse-baselines.json")
    stored.write_text(stored.read_text().replace("effective_rank_centred", "rankme_centred"))
    assert (
        evaluate_baselines(path, CollapseConfig(batch=50, pairs=0))["results"] == against["results"]
    )
