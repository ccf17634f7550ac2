"""Evaluations as they are run: an export and a task in, a JSON file beside the export out.

An evaluation reads the export and the datasets that its card names, nothing of the run: it can
happen on any machine, at any time, and more than once.
"""

from __future__ import annotations

import errno
import json
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

from vssl_dist.config import OodConfig, TaskConfig
from vssl_dist.durable import (
    file_sha256,
    refuse_link_out_of_folder,
    resolve_trusted_links,
    write_inside_folder,
)
from vssl_dist.errors import ConfigError
from vssl_dist.evaluation.features.cache import FeatureCache
from vssl_dist.evaluation.figures.plots import render_png
from vssl_dist.evaluation.scores.posterior import has_embedding_density
from vssl_dist.evaluation.subject import EvalSettings, FrozenFeatures, Network, TaskImages
from vssl_dist.evaluation.tasks import TASKS, DrawPlot
from vssl_dist.exports.read import read_card
from vssl_dist.exports.results import RESULT_FORMAT, describe_result_problem, with_current_names
from vssl_dist.jsonfile import read_json
from vssl_dist.run_folder import ExportFolder, RunFolder, is_export_path
from vssl_dist.text import printable

__all__ = ["EvalSettings", "evaluate", "evaluate_baselines", "list_exports"]


class SubstitutionReport(TypedDict):
    """The damaged images of an evaluation, as its result file holds them."""

    substituted_images: int
    substitutions: dict[str, list[dict[str, object]]]


def list_exports(target: Path) -> list[Path]:
    """List the exports of a run, oldest first, or the one export that ``target`` is.

    Raises:
        ConfigError: There is none.
    """
    if is_export_path(target):
        return [target.absolute()]
    export_paths = RunFolder(target.absolute()).export_folder.list_backbones()
    if not export_paths:
        raise ConfigError(f"{target}: no export/backbone-STEP.safetensors in this folder yet")
    return export_paths


def evaluate(
    export: Path, task: TaskConfig, settings: EvalSettings | None = None
) -> dict[str, Any]:
    """Evaluate an export; the result is written to ``TASK-STEP.json`` beside it.

    Pictures of it are ``TASK-STEP-NAME.png``, written before.
    With VJE's likelihoods as cartesian densities it is ``ood-cartesian-STEP.json``.
    On other folders than the run's it is ``TASK-STEP-on-DIGEST.json``: the run's own result stays.
    An evaluation that was done before, of the same weights on the same data, is not done again,
    unless some of its images had to be replaced.
    Features are kept in the folder ``features`` beside the export and shared by all tasks.
    Where this user may not write, such as in a colleague's run, nothing is kept, with a warning.

    Args:
        export: The ``.safetensors`` file.
        task: Which task, and its bounds; see `vssl_dist.evaluation.tasks`.
        settings: Device, decoding threads, and other folders than those of the export's card.

    Returns:
        What was written: ``step``, ``run``, ``export``, ``export_sha256``, ``results``,
        ``metrics`` (the same by their names on the run's curves), ``task``, ``seconds`` and,
        for each split that was read, its folder, fingerprint and number of samples: ``bank``,
        ``queries`` and the names of ``ood``; ``plots`` names the pictures, and ``density`` says of
        what VJE's likelihoods are.
        ``substituted_images`` counts the damaged images that others were shown for, and
        ``substitutions`` lists them by split.

    Raises:
        ExportError: The export is missing, foreign or damaged.
        DataError: A dataset is, or they do not fit together.
        OSError: The result cannot be written, or a link out of the folder stands where it goes.
    """
    card = read_card(export)
    settings = settings or EvalSettings()
    export_folder = ExportFolder.of(export)
    has_density = has_embedding_density(card)
    task = task.asked_of(embedding_density=has_density)
    images = TaskImages.open(card, task, settings)
    network = Network.of_export(export)
    result_facts = images.result_facts(task) | {
        "export_sha256": file_sha256(export),
        "step": card.step,
    }
    result_facts |= {f"{name}_sha256": part_digest for name, part_digest in card.parts.items()}
    if has_density and isinstance(task, OodConfig):
        result_facts["density"] = task.density
    result_path = export_folder.result_path(task.stem, card.step, images.result_suffix)

    def compute_result() -> dict[str, object]:
        feature_cache = FeatureCache(export_folder.features_folder)
        frozen_features = FrozenFeatures(card, network, images, feature_cache, settings.ranks)
        task_outcome = TASKS[task.task].measure(frozen_features, task)
        # The pictures first: a result on disk promises that those it names are there.
        plot_names = _write_plots(result_path, task_outcome.plot_by_name)
        substitution_report = _report_substitutions(images)
        substitution_metric = {
            f"{task.task}/substituted_images": float(substitution_report["substituted_images"])
        }
        return {
            "export": export.name,
            "results": task_outcome.results,
            "metrics": task_outcome.metrics | substitution_metric,
            "plots": plot_names,
            **substitution_report,
        }

    return _stored_or_computed_result(result_path, result_facts | {"run": card.run}, compute_result)


def evaluate_baselines(
    export: Path, task: TaskConfig, settings: EvalSettings | None = None
) -> dict[str, Any]:
    """Evaluate what an export must be compared with: raw pixels, and the same backbone untrained.

    Takes what `evaluate` takes, of any export of the run.  Written to ``TASK-baselines.json``
    beside it and computed once.

    Returns:
        As `evaluate`, with ``results`` one level deeper under ``raw_pixels`` and
        ``random_network`` (seed 0, eval mode), and so begin the names of the pictures.
    """
    card = read_card(export)
    settings = settings or EvalSettings()
    export_folder = ExportFolder.of(export)
    task = task.asked_of(embedding_density=False)
    images = TaskImages.open(card, task, settings)
    result_facts = images.result_facts(task) | {"backbone": card.backbone}
    networks = {
        "raw_pixels": Network.of_raw_pixels(),
        "random_network": Network.of_untrained(card.backbone, card.image_size),
    }
    result_path = export_folder.baselines_path(task.task, images.result_suffix)

    def compute_result() -> dict[str, object]:
        feature_cache = FeatureCache(export_folder.features_folder)
        results_by_network: dict[str, object] = {}
        plot_names: list[str] = []
        for network_name, network in networks.items():
            frozen_features = FrozenFeatures(card, network, images, feature_cache, settings.ranks)
            task_outcome = TASKS[task.task].measure(frozen_features, task)
            results_by_network[network_name] = task_outcome.results
            plots_by_name = {
                f"{network_name}-{plot_name}": draw_plot
                for plot_name, draw_plot in task_outcome.plot_by_name.items()
            }
            plot_names += _write_plots(result_path, plots_by_name)
        return {"results": results_by_network, "plots": plot_names, **_report_substitutions(images)}

    return _stored_or_computed_result(result_path, result_facts | {"run": card.run}, compute_result)


def _report_substitutions(images: TaskImages) -> SubstitutionReport:
    """List by split the images that others were shown for, with a one-line warning per split."""
    substitutions_by_split: dict[str, list[dict[str, object]]] = {}
    for split_name, dataset in images.dataset_by_split.items():
        if substitutions := images.reading.substitution_tally.substitutions_in_split(dataset):
            first_substitution = images.reading.substitution_tally.describe_first_substitution(
                dataset
            )
            warning = (
                f"{dataset.folder}: damaged images: {len(substitutions)}; {first_substitution}"
            )
            warnings.warn(printable(warning), stacklevel=2)
            substitutions_by_split[split_name] = [
                # A position counts the samples of a training: an evaluation has none.
                {key: value for key, value in asdict(substitution).items() if key != "position"}
                for substitution in substitutions
            ]
    return {
        "substituted_images": sum(map(len, substitutions_by_split.values())),
        "substitutions": substitutions_by_split,
    }


def _can_keep_results(result_path: Path) -> bool:
    """Whether results can be kept beside an export.

    Raises:
        OSError: What stands in the way: a link of another user or out of the folder, or no file.
    """
    export_folder = ExportFolder.of(result_path)
    if not os.access(export_folder.path, os.W_OK | os.X_OK):
        return False
    # Asked before anything is computed: hours of work must not end at a link that stands there.
    resolve_trusted_links(export_folder.features_folder)
    for path in [result_path, *export_folder.list_pictures(result_path)]:
        refuse_link_out_of_folder(path)
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "is there already and no regular file", str(path))
    return True


def _write_plots(result_path: Path, plots_by_name: Mapping[str, DrawPlot]) -> list[str]:
    """Write pictures beside where the result will be; returns the names of the files."""
    file_names = []
    for plot_name, draw_plot in plots_by_name.items() if _can_keep_results(result_path) else ():
        path = ExportFolder.of(result_path).picture_path(result_path, plot_name)
        write_inside_folder(path, render_png(draw_plot()))
        file_names.append(path.name)
    return file_names


def _stored_or_computed_result(
    result_path: Path,
    result_facts: Mapping[str, object],
    compute_result: Callable[[], dict[str, object]],
) -> dict[str, Any]:
    """Return the stored result if it rests on the same facts, else compute and store a new one.

    One with substitutes rests on more than its facts: on how damaged the data were.
    """
    result_facts = {**result_facts, "format": RESULT_FORMAT}
    can_keep_result = _can_keep_results(result_path)
    # Unchecked until `describe_result_problem` has seen it: anybody may have written the file.
    stored_result: Any
    try:
        stored_result = read_json(result_path)
    except (OSError, ValueError):
        stored_result = None
    expected_facts = {**result_facts, "substituted_images": 0}
    # Baselines are no point on a run's curves and have no metrics.
    required_keys = {"results", "plots"} | (
        {"metrics"} if "export_sha256" in result_facts else set()
    )
    is_complete = (
        describe_result_problem(stored_result) is None and stored_result.keys() >= required_keys
    )
    if is_complete and all(
        stored_result.get(key) == value for key, value in expected_facts.items()
    ):
        return with_current_names(stored_result)
    if not can_keep_result:
        folder = printable(str(result_path.parent))
        warnings.warn(f"{folder}: cannot be written to: figures are shown, not kept", stacklevel=2)
    start_time = time.monotonic()
    result = {
        **result_facts,
        **compute_result(),
        "seconds": round(time.monotonic() - start_time, 3),
    }
    if can_keep_result:
        write_inside_folder(result_path, json.dumps(result, indent=1).encode())
    return result
