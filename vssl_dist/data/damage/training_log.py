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
_LEAST_ALLOWED = 10  # in a small dataset a share would be less than one image


class _Line(TypedDict):
    """The keys of a line without which it is not counted; others stay as they are."""

    position: int
    planned: int


def bad_images_allowed(samples: int, max_bad: float) -> int:
    """Return how many images may turn out to be damaged before a run stops.

    Args:
        samples: Images in the dataset.
        max_bad: Greatest share of damaged ones, in [0, 1].

    >>> [bad_images_allowed(1_281_167, 1e-4), bad_images_allowed(50_000, 1e-4)]
    [128, 10]
    >>> bad_images_allowed(50_000, 0)
    0
    """
    return max(int(max_bad * samples), _LEAST_ALLOWED) if max_bad > 0 else 0


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
        self._allowed = allowed
        self._path = self._run.substitutions_path(dist.rank())
        self._bad_ids: set[int] = set()
        self._substituted = 0
        self._new_ids: list[int] = []
        """Planned ids recorded by this rank since the last totals."""

    def restore(self, position: int) -> None:
        """Drop the lines written after ``position``; called by all ranks together.

        Raises:
            DataError: On all ranks: one of the paths is no file, or a link of another user.
        """
        files = self._files()
        for path in files[dist.rank() :: dist.world_size()]:
            lines = [line for line in _read_lines(path) if line["position"] <= position]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            if text != _text(path):
                durable.write_inside_folder(path, text.encode())
        dist.barrier()
        # Read by one rank for all: the next line may be written as soon as one of them goes on.
        paths = files if dist.rank() == 0 else []
        planned = dist.broadcast([line["planned"] for path in paths for line in _read_lines(path)])
        self._bad_ids = set(planned)
        self._substituted = len(planned)
        self._new_ids = []

    def record(self, substitutions: Sequence[Substitution]) -> None:
        """Append what this rank had to replace to its file."""
        if not substitutions:
            return
        self._new_ids += [substitution.planned for substitution in substitutions]
        try:
            lines = "".join(json.dumps(asdict(entry)) + "\n" for entry in substitutions)
            durable.append_to_file(self._path, lines.encode())
        except OSError as error:  # a full disk costs the list, not the run
            _log.warning("%d bad images are not listed: %s", len(substitutions), error)

    def totals(self) -> dict[str, float]:
        """Count over all ranks and the whole run; called by all ranks together.

        Returns:
            ``substituted_images``, how often a substitute was shown, and ``bad_images``, in
            place of how many different images.
        """
        for rank_ids in dist.gather(self._new_ids):
            self._substituted += len(rank_ids)
            self._bad_ids.update(rank_ids)
        self._new_ids = []
        return {
            "substituted_images": float(self._substituted),
            "bad_images": float(len(self._bad_ids)),
        }

    def check(self) -> None:
        """Refuse to go on if the last `totals` exceed the budget.

        Raises:
            DataError: One line, the same on every rank: more images are bad than may be.
        """
        if len(self._bad_ids) > self._allowed:
            raise DataError(
                f"{len(self._bad_ids)} training images are damaged and data.max_bad allows "
                f"{self._allowed}: {self._run.substitutions_path('*')} lists them "
                "(data_prep/verify.py checks all, data_prep/shard.py makes shards anew)"
            )

    def _files(self) -> list[Path]:
        files = sorted(self._run.path.glob(self._run.substitutions_path("*").name))
        for path in files:  # a pipe would be waited for
            try:
                if not durable.resolve_trusted_links(path).is_file():
                    raise DataError(f"{printable(str(path))} is no file: remove it")
            except OSError as error:
                raise DataError(f"{printable(str(path))}: {error.strerror}") from error
        return files


def _read_lines(path: Path) -> Iterator[_Line]:
    """Yield the whole lines; a crash may have torn the last one, a failing disk any of them."""
    for text in _text(path).splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and all(
            type(line.get(key)) is int for key in _Line.__required_keys__
        ):
            yield cast("_Line", line)


def _text(path: Path) -> str:
    return path.read_text(errors="replace")
