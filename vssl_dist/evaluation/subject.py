"""What is evaluated and on what: a frozen network, the splits that a task sees, their features."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vssl_dist.config import TaskConfig
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.durable import file_sha256
from vssl_dist.errors import DataError
from vssl_dist.evaluation.features.cache import FeatureCache, cached_features
from vssl_dist.evaluation.features.extract import (
    FeatureFunction,
    ImageReading,
    build_random_network,
    collect_features,
    flatten_pixels,
)
from vssl_dist.evaluation.features.variants import ImageVariants
from vssl_dist.evaluation.features.workers import ImagePass
from vssl_dist.evaluation.scores.posterior import Posterior, load_posterior
from vssl_dist.evaluation.scores.table import LabelledFeatures
from vssl_dist.evaluation.splits import (
    check_bank_and_queries,
    open_nonempty_dataset,
    open_ood_datasets,
    require_posterior,
)
from vssl_dist.exports.card import Card
from vssl_dist.exports.read import load_export, load_online_probe
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
    """A frozen network, loaded only if its features are not in the cache."""

    load_network: Callable[[], FeatureFunction]
    """Loads the network; pickles, unless ``cache_identity`` is None."""
    cache_identity: Mapping[str, object] | None
    """What its features depend on, as JSON values; None: they are not cached."""
    load_posterior: Callable[[], Posterior | None] = lambda: None
    """Loads the posterior behind the backbone, in an export of a variational method."""
    load_online_probe: Callable[[], Probe | None] = lambda: None
    """Loads the classifier that learnt beside the method, in an export of a run that had one."""

    @classmethod
    def of_export(cls, export_path: Path) -> Network:
        """Describe the backbone of an export, with its posterior if it has one."""
        identity = {"export_sha256": file_sha256(export_path)}
        return cls(
            partial(_load_backbone, export_path),
            identity,
            load_posterior=lambda: load_posterior(export_path),
            load_online_probe=lambda: load_online_probe(export_path),
        )

    @classmethod
    def of_untrained(cls, backbone: str, image_size: int) -> Network:
        """Describe the same backbone before any training, seed 0."""
        # Another torch may draw other initial weights from the same seed.
        identity = {"untrained": backbone, "image_size": image_size, "torch": torch.__version__}
        return cls(partial(build_random_network, backbone, image_size), identity)

    @classmethod
    def of_raw_pixels(cls) -> Network:
        """Describe the identity: raw pixels as features, which are not cached."""
        return cls(lambda: flatten_pixels, None)


@dataclass(frozen=True)
class TaskImages:
    """The splits that a task sees, by the role they play, and how their images are read."""

    dataset_by_split: dict[str, Dataset]
    """``"bank"`` and ``"queries"`` where the task wants them, and each dataset of ``ood``."""
    max_images_by_split: dict[str, int | None]
    """The most images that are looked at of each split; None: all of them."""
    reading: ImageReading
    """How the images are read."""
    result_suffix: str
    """What a result's file name ends in: nothing for the run's own data."""

    @classmethod
    def open(cls, card: Card, task: TaskConfig, settings: EvalSettings) -> TaskImages:
        """Open and check the splits that ``task`` needs.

        Raises:
            DataError: A folder is missing, empty or damaged, its storage does not answer, or they
                do not fit together.
        """
        data_config = card.config.data
        require_posterior(card, task)
        queries = settings.val or card.val
        if queries is None:
            raise DataError(f"run {card.run} names no data.val: pass the folder of held-out shards")
        folder_by_role = {
            "bank": settings.train or data_config.bank or card.train,
            "queries": queries,
        }
        timeout_s = data_config.timeout_s
        splits = {
            role: open_nonempty_dataset(folder_by_role[role], task, timeout_s)
            for role in task.limits
        }
        check_bank_and_queries(splits, task, timeout_s)
        ood_splits = open_ood_datasets(task, settings.ood, splits, timeout_s)
        reading = ImageReading(
            image_size=card.image_size,
            normalise=card.normalise,
            batch_size=task.batch,
            backend=data_config.backend,
            threads=settings.threads,
            device=settings.device,
            timeout_s=timeout_s,
        )
        splits |= ood_splits
        fingerprints = "".join(dataset.fingerprint for dataset in splits.values()).encode()
        uses_other_data = settings.train or settings.val or (ood_splits and settings.ood)
        suffix = f"-on-{hashlib.sha256(fingerprints).hexdigest()[:8]}" if uses_other_data else ""
        limits = task.limits | dict.fromkeys(ood_splits, task.max_queries)
        return cls(splits, limits, reading, suffix)

    def result_facts(self, task: TaskConfig) -> dict[str, object]:
        """State as JSON values all that a result depends on, apart from the network."""
        facts_by_split: dict[str, object] = {
            name: {
                "folder": str(dataset.folder),
                "fingerprint": dataset.fingerprint,
                "samples": self.image_count(name),
            }
            for name, dataset in self.dataset_by_split.items()
        }
        ood_facts = {
            name: facts_by_split.pop(name)
            for name in list(facts_by_split)
            if name not in task.limits
        }
        facts_by_split |= {"ood": ood_facts} if ood_facts else {}
        # When it is evaluated changes no figure, and the folders of ood are stated with the splits.
        return {
            "task": task.model_dump(mode="json", exclude={"every_epochs", "ood"})
        } | facts_by_split

    def image_count(self, split: str) -> int:
        """How many images of a split are looked at."""
        samples = self.dataset_by_split[split].samples
        return min(samples, self.max_images_by_split[split] or samples)


@dataclass(frozen=True)
class FrozenFeatures:
    """What a task measures: features of each split, and the names of the classes."""

    card: Card
    """Card of the export, or of the one that this network is a baseline of."""
    network: Network
    task_images: TaskImages
    feature_cache: FeatureCache
    process_count: int = 1
    """Processes of this machine that share a pass over images."""

    @property
    def device(self) -> str:
        """Device to compute on."""
        return self.task_images.reading.device

    @property
    def num_classes(self) -> int:
        """How many classes the held-out images may have."""
        return len(self.task_images.dataset_by_split["queries"].classes)

    @property
    def ood_split_names(self) -> list[str]:
        """Names of the splits that are out of distribution."""
        return [
            split for split in self.task_images.dataset_by_split if split not in ("bank", "queries")
        ]

    def split_features(self, split: str) -> LabelledFeatures:
        """Features of a split's images, in the order of their ids; from the cache if possible.

        Raises:
            ExportError: The export is damaged or foreign.
            DataError: Data are damaged, or a feature is not finite.
        """
        return self._cached_or_computed(split, self.task_images.image_count(split), None)

    def variant_features(
        self, split: str, variants: ImageVariants, limit: int | None = None
    ) -> Tensor:
        """Features of K pictures of each of a split's first images, cached like `features`.

        Args:
            split: Name of one of the splits of `images`.
            variants: What is made of each image.
            limit: Look at no more than so many images.

        Returns:
            ``(M, K, D)``.

        Raises:
            ExportError: The export is damaged or foreign.
            DataError: Data are damaged, or a feature is not finite.
        """
        count = min(
            self.task_images.image_count(split), limit or self.task_images.image_count(split)
        )
        table = self._cached_or_computed(split, count, variants)
        return table.features.view(count, variants.pictures_per_image, -1)

    def _cached_or_computed(
        self, split: str, count: int, variants: ImageVariants | None
    ) -> LabelledFeatures:
        dataset = self.task_images.dataset_by_split[split]
        image_pass = ImagePass(
            self.network.load_network, dataset, self.task_images.reading, count, variants
        )
        features = self._from_cache(image_pass)
        if features is None:
            # In memory and by this process alone: other processes hand their rows over on disk.
            features = collect_features(image_pass.stream_all(), image_pass.row_count)
        return _require_finite_features(features, dataset)

    def _from_cache(self, image_pass: ImagePass) -> LabelledFeatures | None:
        """Return what the cache has, or makes of a pass; None where nothing can be cached."""
        if self.network.cache_identity is None:
            return None
        reading = image_pass.reading
        variants = image_pass.variants
        image_facts = {} if variants is None else variants.cache_facts
        image_facts |= {
            "samples": image_pass.row_count,
            "fingerprint": image_pass.dataset.fingerprint,
            "image_size": reading.image_size,
            "normalise": reading.normalise.model_dump(mode="json"),
            "backend": reading.backend,
            "autocast": str(reading.autocast),
        }

        def has_no_substitutes() -> bool:
            # Features with substitutes are not those of the dataset that its fingerprint names.
            return not reading.substitution_tally.substitutions_in_split(image_pass.dataset)

        source = image_pass.feature_source(self.process_count)
        return cached_features(
            self.feature_cache, self.network.cache_identity, image_facts, source, has_no_substitutes
        )


def _load_backbone(export_path: Path) -> FeatureFunction:
    return load_export(export_path)[0]


def _require_finite_features(features: LabelledFeatures, dataset: Dataset) -> LabelledFeatures:
    feature_blocks = torch.split(features.features, 8192)
    non_finite_count = sum(int((~block.isfinite().all(1)).sum()) for block in feature_blocks)
    if non_finite_count:
        raise DataError(
            f"{dataset.folder}: {non_finite_count} of {len(features.labels)} features are not "
            "finite: the network is damaged, evaluate an earlier export"
        )
    return features
