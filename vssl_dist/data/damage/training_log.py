"""Damaged images of a run: listed in files, counted over all ranks and held to a budget."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict, cast

from vssl_dist import dist, durable
from vssl_dist.data.store.dataset import Substitution
from vssl_dist.errors import DataError
from vssl_dist.run_folder import RunFolder
from vssl_dist.text import printable

_log = logging.getLogger(__name__)
_LEAST_BAD_ALLOWED = 10  # in a small dataset a share would be less than one image


class _SubstitutionLine(TypedDict):
    """The keys of a line without which it is not counted; others stay as they are."""

    position: int
    planned: int


def max_bad_images(samples: int, max_bad: float) -> int:
    """Return how many images may turn out to be damaged before a run stops.

    Args:
        samples: Images in the dataset.
        max_bad: Greatest share of damaged ones, in [0, 1].

    >>> [max_bad_images(1_281_167, 1e-4), max_bad_images(50_000, 1e-4)]
    [128, 10]
    >>> max_bad_images(50_000, 0)
    0
    """
    return max(int(max_bad * samples), _LEAST_BAD_ALLOWED) if max_bad > 0 else 0


class SubstitutionLog:
    """The files ``substitutions.rank<r>.jsonl`` of all ranks, and the totals of their lines.

    A line is ``{"position", "planned", "used", "reason"}``; ``position`` says up to where the
    job had consumed samples with that micro-step.  Nothing here is state of the run: after a
    resume the lines of what will be done again are dropped, and the rest is counted.

    Args:
        folder: The run's folder.
        allowed: Distinct images that may be damaged.
    """

    def __init__(self, folder: Path, allowed: int) -> None:
        self._run = RunFolder(folder)
        self._max_bad_images = allowed
        self._own_log_path = self._run.substitutions_path(dist.rank())
        self._all_bad_ids: set[int] = set()
        self._num_substituted = 0
        self._ids_since_totals: list[int] = []
        """Planned ids recorded by this rank since the last totals."""

    def restore(self, position: int) -> None:
        """Drop the lines written after ``position``; called by all ranks together.

        Raises:
            DataError: On all ranks: one of the paths is no file, or a link of another user.
        """
        log_paths = self._find_log_paths()
        for path in log_paths[dist.rank() :: dist.world_size()]:
            kept_lines = [
                line for line in _read_substitution_lines(path) if line["position"] <= position
            ]
            kept_text = "".join(json.dumps(line) + "\n" for line in kept_lines)
            if kept_text != _read_log_text(path):
                durable.write_inside_folder(path, kept_text.encode())
        dist.barrier()
        # Read by one rank for all: the next line may be written as soon as one of them goes on.
        paths = log_paths if dist.rank() == 0 else []
        bad_ids_in_logs = dist.broadcast(
            [line["planned"] for path in paths for line in _read_substitution_lines(path)]
        )
        self._all_bad_ids = set(bad_ids_in_logs)
        self._num_substituted = len(bad_ids_in_logs)
        self._ids_since_totals = []

    def record(self, substitutions: Sequence[Substitution]) -> None:
        """Append what this rank had to replace to its file."""
        if not substitutions:
            return
        self._ids_since_totals += [substitution.planned for substitution in substitutions]
        try:
            new_lines = "".join(
                json.dumps(asdict(substitution)) + "\n" for substitution in substitutions
            )
            durable.append_to_file(self._own_log_path, new_lines.encode())
        except OSError as error:  # a full disk costs the list, not the run
            _log.warning("%d bad images are not listed: %s", len(substitutions), error)

    def totals(self) -> dict[str, float]:
        """Count over all ranks and the whole run; called by all ranks together.

        Returns:
            ``substituted_images``, how often a substitute was shown, and ``bad_images``, in
            place of how many different images.
        """
        for bad_ids_of_rank in dist.gather(self._ids_since_totals):
            self._num_substituted += len(bad_ids_of_rank)
            self._all_bad_ids.update(bad_ids_of_rank)
        self._ids_since_totals = []
        return {
            "substituted_images": float(self._num_substituted),
            "bad_images": float(len(self._all_bad_ids)),
        }

    def check(self) -> None:
        """Refuse to go on if the last `totals` exceed the budget.

        Raises:
            DataError: One line, the same on every rank: more images are bad than may be.
        """
        if len(self._all_bad_ids) > self._max_bad_images:
            raise DataError(
                f"{len(self._all_bad_ids)} training images are damaged and data.max_bad allows "
                f"{self._max_bad_images}: {self._run.substitutions_path('*')} lists them "
                "(data_prep/verify.py checks all, data_prep/shard.py makes shards anew)"
            )

    def _find_log_paths(self) -> list[Path]:
        log_paths = sorted(self._run.path.glob(self._run.substitutions_path("*").name))
        for path in log_paths:  # a pipe would be waited for
            try:
                if not durable.resolve_trusted_links(path).is_file():
                    raise DataError(f"{printable(str(path))} is no file: remove it")
            except OSError as error:
                raise DataError(f"{printable(str(path))}: {error.strerror}") from error
        return log_paths


def _read_substitution_lines(path: Path) -> Iterator[_SubstitutionLine]:
    """Yield the whole lines; a crash may have torn the last one, a failing disk any of them."""
    for line_text in _read_log_text(path).splitlines():
        try:
            line = json.loads(line_text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and all(
            type(line.get(key)) is int for key in _SubstitutionLine.__required_keys__
        ):
            yield cast("_SubstitutionLine", line)


def _read_log_text(path: Path) -> str:
    return path.read_text(errors="replace")
