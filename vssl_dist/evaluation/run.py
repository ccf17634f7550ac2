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
from typing import Any

from vssl_dist.config import OodConfig, TaskConfig
from vssl_dist.durable import followed, publish_inside, refuse_way_out, sha256
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


def exports(target: Path) -> list[Path]:
    """The export, or the exports of a run, oldest first.

    Raises:
        ConfigError: There is none.
    """
    if is_export(target):
        return [target.absolute()]
    found = RunFolder(target.absolute()).exports.backbones()
    if not found:
        raise ConfigError(f"{target}: no export/backbone-STEP.safetensors in this folder yet")
    return found


def evaluate(
    export: Path, settings: TaskConfig, place: EvalSettings | None = None
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
        settings: Which task, and its bounds; see `vssl_dist.evaluation.tasks`.
        place: Device, decoding threads, and other folders than those of the export's card.

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
    card, place = read_card(export), place or EvalSettings()
    folder = ExportFolder.of(export)
    density = has_embedding_density(card)
    settings = settings.asked_of(embedding_density=density)
    images = Images.open(card, settings, place)
    network = Network.exported(export)
    facts = images.facts(settings) | {"export_sha256": sha256(export), "step": card.step}
    facts |= {f"{part}_sha256": digest for part, digest in card.parts.items()}
    if density and isinstance(settings, OodConfig):
        facts["density"] = settings.density
    path = folder.result(settings.stem, card.step, images.suffix)

    def compute() -> dict[str, Any]:
        subject = FrozenFeatures(card, network, images, FeatureCache(folder.features), place.ranks)
        found = TASKS[settings.task].measure(subject, settings)
        told = {"plots": _draw(path, found.plots)} | _substitutions(images)
        count = {f"{settings.task}/substituted_images": float(told["substituted_images"])}
        metrics = found.metrics | count
        return {"export": export.name, "results": found.results, "metrics": metrics} | told

    return _once(path, facts | {"run": card.run}, compute)


def baselines(
    export: Path, settings: TaskConfig, place: EvalSettings | None = None
) -> dict[str, Any]:
    """What an export must be compared with: raw pixels, and the same backbone untrained.

    Takes what `evaluate` takes, of any export of the run.  Written to ``TASK-baselines.json``
    beside it and computed once.

    Returns:
        As `evaluate`, with ``results`` one level deeper under ``raw_pixels`` and
        ``random_network`` (seed 0, eval mode), and so begin the names of the pictures.
    """
    card, place = read_card(export), place or EvalSettings()
    folder = ExportFolder.of(export)
    settings = settings.asked_of(embedding_density=False)
    images = Images.open(card, settings, place)
    facts = images.facts(settings) | {"backbone": card.backbone}
    networks = {
        "raw_pixels": Network.pixels(),
        "random_network": Network.untrained(card.backbone, card.image_size),
    }

    path = folder.baselines(settings.task, images.suffix)

    def compute() -> dict[str, Any]:
        cache = FeatureCache(folder.features)
        measure = TASKS[settings.task].measure
        results: dict[str, Any] = {}
        drawn: list[str] = []
        for name, network in networks.items():
            subject = FrozenFeatures(card, network, images, cache, place.ranks)
            found = measure(subject, settings)
            results[name] = found.results
            drawn += _draw(path, {f"{name}-{plot}": draw for plot, draw in found.plots.items()})
        return {"results": results, "plots": drawn} | _substitutions(images)

    return _once(path, facts | {"run": card.run}, compute)


def _substitutions(images: Images) -> dict[str, Any]:
    """How many images of each split others were shown for, and which; told in one line each."""
    listed: dict[str, list[dict[str, Any]]] = {}
    for part, dataset in images.parts.items():
        if found := images.reading.substitutes.of(dataset):
            first = images.reading.substitutes.first(dataset)
            said = f"{dataset.folder}: damaged images: {len(found)}; {first}"
            warnings.warn(printable(said), stacklevel=2)
            listed[part] = [
                {key: told for key, told in asdict(one).items() if key != "position"}
                for one in found
            ]
    return {"substituted_images": sum(map(len, listed.values())), "substitutions": listed}


def _kept(path: Path) -> bool:
    """Whether results can be kept beside an export.

    Raises:
        OSError: What stands in the way: a link of another user or out of the folder, or no file.
    """
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return False
    folder = ExportFolder.of(path)
    followed(folder.features)
    for file in [path, *folder.pictures(path)]:
        refuse_way_out(file)
        if file.exists() and not file.is_file():
            raise OSError(errno.EINVAL, "is there already and no regular file", str(file))
    return True


def _draw(result: Path, plots: Mapping[str, Plot]) -> list[str]:
    """Write pictures beside where the result will be; returns the names of the files."""
    names = []
    for name, draw in plots.items() if _kept(result) else ():
        path = ExportFolder.of(result).picture(result, name)
        publish_inside(path, png(draw()))
        names.append(path.name)
    return names


def _once(
    path: Path, facts: dict[str, Any], compute: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The result at ``path`` if it rests on the same facts, else a new one, put there.

    One with substitutes rests on more than its facts: on how damaged the data were.
    """
    facts = facts | {"format": FORMAT}
    kept = _kept(path)
    stored: Any
    try:
        stored = read_json(path)
    except (OSError, ValueError):
        stored = None
    wanted = facts | {"substituted_images": 0}
    needed = {"results", "plots"} | ({"metrics"} if "export_sha256" in facts else set())
    whole = result_problem(stored) is None and stored.keys() >= needed
    if whole and all(stored.get(k) == v for k, v in wanted.items()):
        return with_current_names(stored)
    if not kept:
        folder = printable(str(path.parent))
        warnings.warn(f"{folder}: cannot be written to: figures are shown, not kept", stacklevel=2)
    start = time.monotonic()
    result = facts | compute() | {"seconds": round(time.monotonic() - start, 3)}
    if kept:
        publish_inside(path, json.dumps(result, indent=1).encode())
    return result
