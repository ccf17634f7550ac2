"""Evaluations as they are run: an export and a task in, a JSON file beside the export out.

An evaluation reads the export and the datasets that its card names, nothing of the run: it can
happen on any machine, at any time, and more than once.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vssl_dist.config import KnnConfig, Normalisation
from vssl_dist.data.shards import DataError, Dataset
from vssl_dist.durable import publish, sha256
from vssl_dist.evaluation.features import (
    Reading,
    extract,
    load_export,
    random_network,
    raw_pixels,
    read_card,
)
from vssl_dist.evaluation.knn import knn_grid

_SCHEDULE = {"every_epochs"}


def evaluate(
    export: Path,
    task: KnnConfig,
    *,
    device: str = "cpu",
    threads: int = 2,
    train: Path | None = None,
    val: Path | None = None,
) -> dict[str, Any]:
    """k-NN accuracy of an export, written to ``knn-STEP.json`` beside it.

    On other folders than the card's it is ``knn-STEP-on-DIGEST.json``: the run's own result stays.

    An evaluation that was done before, of the same weights on the same data, is not done again.

    Args:
        export: The ``.safetensors`` file.
        task: The grid and its bounds.
        device: Where the network runs, ``"cpu"`` or ``"cuda"``.
        threads: Decoding threads.
        train: The bank's folder, if it is not where the export's card says.
        val: The queries' folder, likewise.

    Returns:
        What was written: ``step``, ``run``, ``export``, ``export_sha256``, ``results``
        (``"k20_t0.07"`` to ``top1`` and ``top5``), ``metrics`` (the same by their names on the
        run's curves; ``knn/top1`` is the first k with the first temperature), ``bank`` and
        ``queries`` (folder, fingerprint, samples), ``task`` and ``seconds``.

    Raises:
        ExportError: The export is missing, foreign or damaged.
        DataError: A dataset is, or the two do not fit together.
    """
    card = read_card(export)
    pair = _Pair.open(card, task, _Place(device, threads, train, val))
    facts = pair.facts(task) | {"export_sha256": sha256(export), "step": card["step"]}

    def compute() -> dict[str, Any]:
        results = pair.knn(load_export(export)[0], task)
        return {"export": export.name, "results": results, "metrics": _metrics(results)}

    path = export.with_name(f"knn-{card['step']:08d}{pair.suffix}.json")
    return _once(path, facts | {"run": card["run"]}, compute)


def baselines(
    export: Path,
    task: KnnConfig,
    *,
    device: str = "cpu",
    threads: int = 2,
    train: Path | None = None,
    val: Path | None = None,
) -> dict[str, Any]:
    """What the accuracy must be compared with: raw pixels, and the same backbone untrained.

    Takes what `evaluate` takes, of any export of the run.  Written to ``knn-baselines.json``
    beside it and computed once.

    Returns:
        As `evaluate`, with ``results`` one level deeper under ``raw_pixels`` and
        ``random_network`` (seed 0, eval mode).
    """
    card = read_card(export)
    pair = _Pair.open(card, task, _Place(device, threads, train, val))
    facts = pair.facts(task) | {"backbone": card["backbone"]}

    def compute() -> dict[str, Any]:
        network = random_network(card["backbone"], card["image_size"])
        raw = pair.knn(raw_pixels, task)
        return {"results": {"raw_pixels": raw, "random_network": pair.knn(network, task)}}

    path = export.with_name(f"knn-baselines{pair.suffix}.json")
    return _once(path, facts | {"run": card["run"]}, compute)


@dataclass(frozen=True)
class _Place:
    """Where an evaluation runs and what it reads; ``None`` means what the card says."""

    device: str
    threads: int
    train: Path | None
    val: Path | None


@dataclass(frozen=True)
class _Pair:
    """The bank and the queries, and how their images are read."""

    train: Dataset
    val: Dataset
    reading: Reading
    suffix: str
    """Of a result's file name: nothing for the run's own data."""

    @classmethod
    def open(cls, card: dict[str, Any], task: KnnConfig, place: _Place) -> _Pair:
        folders = {"train": place.train or card["train"], "val": place.val or card["val"]}
        if folders["val"] is None:
            raise DataError(
                f"run {card['run']} names no data.val: pass the folder of held-out shards"
            )
        train, val = (Dataset.open(Path(folder)) for folder in folders.values())
        for dataset in (train, val):
            if not dataset.samples:
                raise DataError(f"{dataset.folder}: holds no samples, k-NN needs some")
        if train.classes != val.classes:
            raise DataError(
                f"{train.folder} has {len(train.classes)} classes, {val.folder} "
                f"{len(val.classes)}, or others: shard both splits from one source"
            )
        if train.fingerprint == val.fingerprint:
            raise DataError(f"{train.folder} is bank and query: every image would find itself")
        config = card.get("config", {}).get("data", {})
        reading = Reading(
            image_size=card["image_size"],
            normalise=Normalisation.model_validate(card["normalise"]),
            batch=task.batch,
            backend=config.get("backend", "dali"),
            threads=place.threads,
            device=place.device,
        )
        fingerprints = f"{train.fingerprint}{val.fingerprint}".encode()
        own = place.train is None and place.val is None
        suffix = "" if own else f"-on-{hashlib.sha256(fingerprints).hexdigest()[:8]}"
        return cls(train, val, reading, suffix)

    def facts(self, task: KnnConfig) -> dict[str, Any]:
        """All that the result depends on, apart from the network."""
        limits = {"bank": (self.train, task.max_bank), "queries": (self.val, task.max_queries)}
        sides = {
            name: {
                "folder": str(dataset.folder),
                "fingerprint": dataset.fingerprint,
                "samples": min(dataset.samples, limit or dataset.samples),
            }
            for name, (dataset, limit) in limits.items()
        }
        return {"task": task.model_dump(mode="json", exclude=_SCHEDULE)} | sides

    def knn(
        self, network: nn.Module | Callable[[Tensor], Tensor], task: KnnConfig
    ) -> dict[str, dict[str, float]]:
        bank = extract(network, self.train, self.reading, limit=task.max_bank)
        queries = extract(network, self.val, self.reading, limit=task.max_queries)
        try:
            grid = knn_grid(
                bank, queries, task.k, task.temperature, device=torch.device(self.reading.device)
            )
        except ValueError as error:
            raise DataError(f"k-NN on {self.val.folder}: {error}") from error
        return {f"k{k}_t{t:g}": accuracy._asdict() for (k, t), accuracy in grid.items()}


def _metrics(results: dict[str, dict[str, float]]) -> dict[str, float]:
    first = next(iter(results.values()))
    metrics = {f"knn/{name}": value for name, value in first.items()}
    for point, accuracies in results.items():
        metrics |= {f"knn/{name}_{point}": value for name, value in accuracies.items()}
    return metrics


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
