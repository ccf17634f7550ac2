"""Names of a run's files are made and taken apart by one pair of functions."""

from __future__ import annotations

from pathlib import Path

import pytest

from vssl_dist.run_folder import (
    ExportFolder,
    ResultName,
    RunFolder,
    card_path_of,
    part_path_of,
    step_of_backbone,
)


@pytest.mark.parametrize("stem", ["knn", "ood-cartesian"])
@pytest.mark.parametrize("step", [0, 600, 123_456_789])
@pytest.mark.parametrize("suffix", ["", "-on-0123abcd"])
def test_the_name_of_a_result_is_taken_apart_into_what_it_was_made_of(
    stem: str, step: int, suffix: str
) -> None:
    path = ExportFolder(Path("export")).result_path(stem, step, suffix)
    assert ResultName.parse(path.name) == ResultName(stem, step, suffix)


def test_results_are_told_from_cards_baselines_attempts_and_features(tmp_path: Path) -> None:
    exports = RunFolder(tmp_path).export_folder
    result, elsewhere = (
        exports.result_path("knn", 600),
        exports.result_path("knn", 600, "-on-0123abcd"),
    )
    later, cartesian = exports.result_path("knn", 1200), exports.result_path("ood-cartesian", 600)
    others = [
        exports.card_path(600), exports.backbone_path(600), exports.baselines_path("knn"),
        exports.attempts_path("knn", 600), exports.picture_path(result, "curve"),
        exports.evaluating_lock_path,
    ]  # fmt: skip
    exports.features_folder.mkdir(parents=True)
    for path in (result, elsewhere, later, cartesian, *others):
        path.touch()
    assert set(exports.find_results()) == {result, elsewhere, later, cartesian}
    assert list(exports.find_results(stem="knn")) == [result, later]
    assert [name.label for name in exports.find_results(step=600).values()] == [
        "knn-on-0123abcd", "knn", "ood-cartesian",
    ]  # fmt: skip
    assert exports.list_pictures(result) == [exports.picture_path(result, "curve")]


def test_what_lies_beside_an_export_is_found_whatever_the_export_is_called(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    export = run.export_folder.backbone_path(600)
    assert (card_path_of(export), part_path_of(export, "head"), step_of_backbone(export)) == (
        run.export_folder.card_path(600), run.export_folder.part_path("head", 600), 600,
    )  # fmt: skip
    assert RunFolder.of_export(export) == run
    renamed = tmp_path / "best.safetensors"
    beside_renamed = (card_path_of(renamed).name, part_path_of(renamed, "head").name)
    assert (*beside_renamed, step_of_backbone(renamed)) == (
        "best.json", "head-best.safetensors", None,
    )  # fmt: skip
