"""What is evaluated and on what: a frozen network, the splits that a task sees, their features."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vssl_dist.config import TaskConfig
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.durable import sha256
from vssl_dist.errors import DataError
from vssl_dist.evaluation.features.cache import FeatureCache, features_of
from vssl_dist.evaluation.features.extract import (
    Forward,
    Reading,
    collect,
    random_network,
    raw_pixels,
)
from vssl_dist.evaluation.features.variants import Variants
from vssl_dist.evaluation.features.workers import ImagePass
from vssl_dist.evaluation.scores.posterior import Posterior, load_posterior
from vssl_dist.evaluation.scores.table import Features
from vssl_dist.evaluation.splits import check_pair, filled, need_posterior, ood_datasets
from vssl_dist.exports.card import Card
from vssl_dist.exports.read import load_export, load_online
from vssl_dist.models.linear_probe import Probe


@dataclass(frozen=True)
class EvalSettings:
    """Where an evaluation runs and what it reads; None means what the export's card says."""

    device: str = "cpu"
    """Where the network runs, ``"cpu"`` or ``"cuda"``."""
    threads: int = 2
    """Decoding threads."""
    train: Path | None = None
    """Folder of the bank."""
    val: Path | None = None
    """Folder of the queries."""
    ood: Mapping[str, Path] = field(default_factory=dict)
    """Folders of what is out of distribution, by name, instead of the task's."""
    ranks: int = 1
    """Processes that share a pass over images: each on a GPU of its own, or with as many threads
    as this one."""


@dataclass(frozen=True)
class Network:
    """A frozen network, loaded only if its features are not known yet."""

    load: Callable[[], Forward]
    """Pickles, unless its features are not kept."""
    identity: dict[str, Any] | None
    """What its features depend on; None: they are not kept."""
    posterior: Callable[[], Posterior | None] = lambda: None
    """Loads what stands behind it, in an export of a variational method."""
    online: Callable[[], Probe | None] = lambda: None
    """Loads the classifier that learnt beside it, in an export of a run that had one."""

    @classmethod
    def exported(cls, path: Path) -> Network:
        """The backbone of an export, with its posterior if it has one."""
        identity = {"export_sha256": sha256(path)}
        return cls(
            partial(_frozen, path),
            identity,
            posterior=lambda: load_posterior(path),
            online=lambda: load_online(path),
        )

    @classmethod
    def untrained(cls, backbone: str, image_size: int) -> Network:
        """The same backbone before any training, seed 0."""
        identity = {"untrained": backbone, "image_size": image_size, "torch": torch.__version__}
        return cls(partial(random_network, backbone, image_size), identity)

    @classmethod
    def pixels(cls) -> Network:
        """No network."""
        return cls(lambda: raw_pixels, None)


@dataclass(frozen=True)
class Images:
    """The splits that a task sees, by the part they play, and how their images are read."""

    parts: dict[str, Dataset]
    """``"bank"`` and ``"queries"`` where the task wants them, and each dataset of ``ood``."""
    limits: dict[str, int | None]
    reading: Reading
    suffix: str
    """Of a result's file name: nothing for the run's own data."""

    @classmethod
    def open(cls, card: Card, task: TaskConfig, place: EvalSettings) -> Images:
        """Open and check what ``task`` wants.

        Raises:
            DataError: A folder is missing, empty or damaged, its storage does not answer, or they
                do not fit together.
        """
        data = card.config.data
        need_posterior(card, task)
        queries = place.val or card.val
        if queries is None:
            raise DataError(f"run {card.run} names no data.val: pass the folder of held-out shards")
        folders = {"bank": place.train or data.bank or card.train, "queries": queries}
        timeout_s = data.timeout_s
        parts = {part: filled(folders[part], task, timeout_s) for part in task.limits}
        check_pair(parts, task, timeout_s)
        strange = ood_datasets(task, place.ood, parts, timeout_s)
        reading = Reading(
            image_size=card.image_size,
            normalise=card.normalise,
            batch=task.batch,
            backend=data.backend,
            threads=place.threads,
            device=place.device,
            timeout_s=timeout_s,
        )
        parts |= strange
        fingerprints = "".join(dataset.fingerprint for dataset in parts.values()).encode()
        elsewhere = place.train or place.val or (strange and place.ood)
        suffix = f"-on-{hashlib.sha256(fingerprints).hexdigest()[:8]}" if elsewhere else ""
        limits = task.limits | dict.fromkeys(strange, task.max_queries)
        return cls(parts, limits, reading, suffix)

    def facts(self, task: TaskConfig) -> dict[str, Any]:
        """All that a result depends on, apart from the network."""
        sides: dict[str, Any] = {
            name: {
                "folder": str(dataset.folder),
                "fingerprint": dataset.fingerprint,
                "samples": self.count(name),
            }
            for name, dataset in self.parts.items()
        }
        strange = {name: sides.pop(name) for name in list(sides) if name not in task.limits}
        sides |= {"ood": strange} if strange else {}
        return {"task": task.model_dump(mode="json", exclude={"every_epochs", "ood"})} | sides

    def count(self, part: str) -> int:
        """How many images of a part are looked at."""
        samples = self.parts[part].samples
        return min(samples, self.limits[part] or samples)


@dataclass(frozen=True)
class FrozenFeatures:
    """What a task is given: features of each part, and the names of the classes."""

    card: Card
    """Of the export, or of the one that this is a baseline of."""
    network: Network
    images: Images
    cache: FeatureCache
    ranks: int = 1
    """Processes that share a pass over images, of this machine."""

    @property
    def device(self) -> str:
        """Where to compute."""
        return self.images.reading.device

    @property
    def classes(self) -> int:
        """How many classes the held-out images may have."""
        return len(self.images.parts["queries"].classes)

    @property
    def ood_datasets(self) -> list[str]:
        """The parts that are out of distribution."""
        return [part for part in self.images.parts if part not in ("bank", "queries")]

    def features(self, part: str) -> Features:
        """Features of a part's images, in the order of their ids; from the cache if they are there.

        Raises:
            ExportError: The export is damaged or foreign.
            DataError: Data are damaged, or a feature is not finite.
        """
        return self._look(part, self.images.count(part), None)

    def variants(self, part: str, variants: Variants, limit: int | None = None) -> Tensor:
        """Features of K pictures of each of a part's first images, kept like `features`.

        Args:
            part: Of `images`.
            variants: What is made of each image.
            limit: Look at no more than so many images.

        Returns:
            ``(M, K, D)``.

        Raises:
            ExportError: The export is damaged or foreign.
            DataError: Data are damaged, or a feature is not finite.
        """
        count = min(self.images.count(part), limit or self.images.count(part))
        found = self._look(part, count, variants)
        return found.features.view(count, variants.count, -1)

    def _look(self, part: str, count: int, variants: Variants | None) -> Features:
        dataset, reading = self.images.parts[part], self.images.reading
        whole = ImagePass(self.network.load, dataset, reading, count, variants)
        found = self._kept(whole)
        return _finite(found or collect(whole.alone(), whole.rows), dataset)

    def _kept(self, whole: ImagePass) -> Features | None:
        """What the cache has, or makes of a pass; None where nothing is kept."""
        if self.network.identity is None:
            return None
        reading = whole.reading
        facts = {} if whole.variants is None else whole.variants.facts
        facts |= {
            "samples": whole.rows,
            "fingerprint": whole.dataset.fingerprint,
            "image_size": reading.image_size,
            "normalise": reading.normalise.model_dump(mode="json"),
            "backend": reading.backend,
            "autocast": str(reading.autocast),
        }
        noted, source = reading.substitutes, whole.source(self.ranks)
        return features_of(
            self.cache,
            self.network.identity,
            facts,
            source,
            lambda: not noted.in_split(whole.dataset),
        )


def _frozen(path: Path) -> Forward:
    return load_export(path)[0]


def _finite(found: Features, dataset: Dataset) -> Features:
    bad = sum(int((~r.isfinite().all(1)).sum()) for r in torch.split(found.features, 8192))
    if bad:
        raise DataError(
            f"{dataset.folder}: {bad} of {len(found.labels)} features are not finite: "
            "the network is damaged, evaluate an earlier export"
        )
    return found
