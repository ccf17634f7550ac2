"""Evaluations as they are run: an export and a task in, a JSON file beside the export out.

An evaluation reads the export and the datasets that its card names, nothing of the run: it can
happen on any machine, at any time, and more than once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vssl_dist.config import TaskConfig
from vssl_dist.durable import publish, sha256
from vssl_dist.evaluation.cache import FeatureCache
from vssl_dist.evaluation.features import read_card
from vssl_dist.evaluation.subject import Images, Network, Place, Subject
from vssl_dist.evaluation.tasks import TASKS

__all__ = ["Place", "baselines", "evaluate"]

_CACHE = "features"


def evaluate(export: Path, settings: TaskConfig, place: Place | None = None) -> dict[str, Any]:
    """Evaluate an export; the result is written to ``TASK-STEP.json`` beside it.

    On other folders than the run's it is ``TASK-STEP-on-DIGEST.json``: the run's own result stays.
    An evaluation that was done before, of the same weights on the same data, is not done again.
    Features are kept in the folder ``features`` beside the export and shared by all tasks.

    Args:
        export: The ``.safetensors`` file.
        settings: Which task, and its bounds; see `vssl_dist.evaluation.tasks`.
        place: Device, decoding threads, and other folders than those of the export's card.

    Returns:
        What was written: ``step``, ``run``, ``export``, ``export_sha256``, ``results``,
        ``metrics`` (the same by their names on the run's curves), ``task``, ``seconds`` and,
        for each split that was read, its folder, fingerprint and number of samples: ``bank``,
        ``queries`` and the names of ``ood``.

    Raises:
        ExportError: The export is missing, foreign or damaged.
        DataError: A dataset is, or they do not fit together.
    """
    card = read_card(export)
    images = Images.open(card, settings, place or Place())
    network = Network.exported(export)
    facts = images.facts(settings) | {"export_sha256": sha256(export), "step": card["step"]}

    def compute() -> dict[str, Any]:
        subject = Subject(network, images, FeatureCache(export.parent / _CACHE))
        found = TASKS[settings.task].measure(subject, settings)
        return {"export": export.name, "results": found.results, "metrics": found.metrics}

    path = export.with_name(f"{settings.task}-{card['step']:08d}{images.suffix}.json")
    return _once(path, facts | {"run": card["run"]}, compute)


def baselines(export: Path, settings: TaskConfig, place: Place | None = None) -> dict[str, Any]:
    """What an export must be compared with: raw pixels, and the same backbone untrained.

    Takes what `evaluate` takes, of any export of the run.  Written to ``TASK-baselines.json``
    beside it and computed once.

    Returns:
        As `evaluate`, with ``results`` one level deeper under ``raw_pixels`` and
        ``random_network`` (seed 0, eval mode).
    """
    card = read_card(export)
    images = Images.open(card, settings, place or Place())
    facts = images.facts(settings) | {"backbone": card["backbone"]}
    networks = {
        "raw_pixels": Network.pixels(),
        "random_network": Network.untrained(card["backbone"], card["image_size"]),
    }

    def compute() -> dict[str, Any]:
        cache = FeatureCache(export.parent / _CACHE)
        measure = TASKS[settings.task].measure
        results = {
            name: measure(Subject(network, images, cache), settings).results
            for name, network in networks.items()
        }
        return {"results": results}

    path = export.with_name(f"{settings.task}-baselines{images.suffix}.json")
    return _once(path, facts | {"run": card["run"]}, compute)


def _once(
    path: Path, facts: dict[str, Any], compute: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The result at ``path`` if it rests on the same facts, else a new one, put there."""
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError):
        stored = None
    if isinstance(stored, dict) and all(stored.get(k) == v for k, v in facts.items()):
        return stored
    start = time.monotonic()
    result = facts | compute() | {"seconds": round(time.monotonic() - start, 3)}
    publish(path, json.dumps(result, indent=1).encode())
    return result
