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
from vssl_dist.durable import followed, publish_inside, refuse_link_out_of_folder, sha256
from vssl_dist.errors import ConfigError
from vssl_dist.evaluation.features.cache import FeatureCache
from vssl_dist.evaluation.figures.plots import png
from vssl_dist.evaluation.scores.posterior import has_embedding_density
from vssl_dist.evaluation.subject import EvalSettings, FrozenFeatures, Images, Network
from vssl_dist.evaluation.tasks import TASKS, Plot
from vssl_dist.exports.read import read_card
from vssl_dist.exports.results import FORMAT, result_problem, with_current_names
from vssl_dist.jsonfile import read_json
from vssl_dist.run_folder import ExportFolder, RunFolder, is_export
from vssl_dist.text import printable

__all__ = ["EvalSettings", "baselines", "evaluate", "exports"]


class SubstitutionReport(TypedDict):
    """The damaged images of an evaluation, as its result file holds them."""

    substituted_images: int
    substitutions: dict[str, list[dict[str, object]]]


def exports(target: Path) -> list[Path]:
    """List the exports of a run, oldest first, or the one export that ``target`` is.

    Raises:
        ConfigError: There is none.
    """
    if is_export(target):
        return [target.absolute()]
    export_paths = RunFolder(target.absolute()).exports.backbones()
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
    folder = ExportFolder.of(export)
    density = has_embedding_density(card)
    task = task.asked_of(embedding_density=density)
    images = Images.open(card, task, settings)
    network = Network.exported(export)
    facts = images.facts(task) | {"export_sha256": sha256(export), "step": card.step}
    facts |= {f"{name}_sha256": digest for name, digest in card.parts.items()}
    if density and isinstance(task, OodConfig):
        facts["density"] = task.density
    result_path = folder.result(task.stem, card.step, images.suffix)

    def compute() -> dict[str, object]:
        cache = FeatureCache(folder.features)
        frozen = FrozenFeatures(card, network, images, cache, settings.ranks)
        outcome = TASKS[task.task].measure(frozen, task)
        # The pictures first: a result on disk promises that those it names are there.
        plot_names = _write_plots(result_path, outcome.plots)
        damaged = _report_substitutions(images)
        count = {f"{task.task}/substituted_images": float(damaged["substituted_images"])}
        return {
            "export": export.name,
            "results": outcome.results,
            "metrics": outcome.metrics | count,
            "plots": plot_names,
            **damaged,
        }

    return _stored_or_computed(result_path, facts | {"run": card.run}, compute)


def baselines(
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
    folder = ExportFolder.of(export)
    task = task.asked_of(embedding_density=False)
    images = Images.open(card, task, settings)
    facts = images.facts(task) | {"backbone": card.backbone}
    networks = {
        "raw_pixels": Network.pixels(),
        "random_network": Network.untrained(card.backbone, card.image_size),
    }
    result_path = folder.baselines(task.task, images.suffix)

    def compute() -> dict[str, object]:
        cache = FeatureCache(folder.features)
        results: dict[str, object] = {}
        plot_names: list[str] = []
        for name, network in networks.items():
            frozen = FrozenFeatures(card, network, images, cache, settings.ranks)
            outcome = TASKS[task.task].measure(frozen, task)
            results[name] = outcome.results
            plots = {f"{name}-{plot}": draw for plot, draw in outcome.plots.items()}
            plot_names += _write_plots(result_path, plots)
        return {"results": results, "plots": plot_names, **_report_substitutions(images)}

    return _stored_or_computed(result_path, facts | {"run": card.run}, compute)


def _report_substitutions(images: Images) -> SubstitutionReport:
    """List by split the images that others were shown for, with a one-line warning per split."""
    by_split: dict[str, list[dict[str, object]]] = {}
    for split, dataset in images.splits.items():
        if substitutions := images.reading.substitutes.substitutions_in_split(dataset):
            first = images.reading.substitutes.describe_first_substitution(dataset)
            warning = f"{dataset.folder}: damaged images: {len(substitutions)}; {first}"
            warnings.warn(printable(warning), stacklevel=2)
            by_split[split] = [
                # A position counts the samples of a training: an evaluation has none.
                {key: value for key, value in asdict(substitution).items() if key != "position"}
                for substitution in substitutions
            ]
    return {
        "substituted_images": sum(map(len, by_split.values())),
        "substitutions": by_split,
    }


def _can_keep(result_path: Path) -> bool:
    """Whether results can be kept beside an export.

    Raises:
        OSError: What stands in the way: a link of another user or out of the folder, or no file.
    """
    folder = ExportFolder.of(result_path)
    if not os.access(folder.path, os.W_OK | os.X_OK):
        return False
    # Asked before anything is computed: hours of work must not end at a link that stands there.
    followed(folder.features)
    for path in [result_path, *folder.pictures(result_path)]:
        refuse_link_out_of_folder(path)
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "is there already and no regular file", str(path))
    return True


def _write_plots(result_path: Path, plots: Mapping[str, Plot]) -> list[str]:
    """Write pictures beside where the result will be; returns the names of the files."""
    names = []
    for name, draw in plots.items() if _can_keep(result_path) else ():
        path = ExportFolder.of(result_path).picture(result_path, name)
        publish_inside(path, png(draw()))
        names.append(path.name)
    return names


def _stored_or_computed(
    result_path: Path, facts: Mapping[str, object], compute: Callable[[], dict[str, object]]
) -> dict[str, Any]:
    """Return the stored result if it rests on the same facts, else compute and store a new one.

    One with substitutes rests on more than its facts: on how damaged the data were.
    """
    facts = {**facts, "format": FORMAT}
    can_keep = _can_keep(result_path)
    # Unchecked input until `result_problem` has seen it: anybody may have written the file.
    stored: Any
    try:
        stored = read_json(result_path)
    except (OSError, ValueError):
        stored = None
    expected = {**facts, "substituted_images": 0}
    # Baselines are no point on a run's curves and have no metrics.
    required = {"results", "plots"} | ({"metrics"} if "export_sha256" in facts else set())
    is_complete = result_problem(stored) is None and stored.keys() >= required
    if is_complete and all(stored.get(key) == value for key, value in expected.items()):
        return with_current_names(stored)
    if not can_keep:
        folder = printable(str(result_path.parent))
        warnings.warn(f"{folder}: cannot be written to: figures are shown, not kept", stacklevel=2)
    start = time.monotonic()
    result = {**facts, **compute(), "seconds": round(time.monotonic() - start, 3)}
    if can_keep:
        publish_inside(result_path, json.dumps(result, indent=1).encode())
    return result
