"""The bad images of a run: written down, counted over all ranks, and held against a budget."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vssl_dist import dist, durable
from vssl_dist.data.store.dataset import Substitution
from vssl_dist.errors import DataError
from vssl_dist.run_folder import RunFolder
from vssl_dist.text import printable

_log = logging.getLogger(__name__)
_ALWAYS = 10  # in a small dataset a share would be less than one image
_NUMBERS = ("position", "planned")


def bad_images_allowed(samples: int, max_bad: float) -> int:
    """How many images may turn out to be damaged before a run stops.

    Args:
        samples: Images in the dataset.
        max_bad: Share of them, in [0, 1].

    >>> [bad_images_allowed(1_281_167, 1e-4), bad_images_allowed(50_000, 1e-4)]
    [128, 10]
    >>> bad_images_allowed(50_000, 0)
    0
    """
    return max(int(max_bad * samples), _ALWAYS) if max_bad > 0 else 0


class Ledger:
    """``substitutions.rank<r>.jsonl`` of every rank, and what they amount to.

    A line is ``{"position", "planned", "used", "reason"}``; ``position`` says up to where the
    job had consumed samples with that micro-step.  Nothing here is state of the run: after a
    resume the lines of what will be done again are dropped, and the rest is counted.

    Args:
        folder: The run's folder.
        allowed: Distinct images that may be damaged.
    """

    def __init__(self, folder: Path, allowed: int) -> None:
        self._run, self._allowed = RunFolder(folder), allowed
        self._path = self._run.substitutions(dist.rank())
        self._bad: set[int] = set()
        self._shown = 0
        self._new: list[int] = []

    def restore(self, position: int) -> None:
        """Forget what was written down after ``position``; called by all ranks together.

        Raises:
            DataError: On all ranks: one of the lists is no file, or a link of another user.
        """
        files = self._files()
        for path in files[dist.rank() :: dist.world_size()]:
            kept = [line for line in _entries(path) if line["position"] <= position]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            if text != _text(path):
                durable.publish_inside(path, text.encode())
        dist.barrier()
        # Read by one rank for all: the next line may be written as soon as one of them goes on.
        mine = files if dist.rank() == 0 else []
        planned = dist.broadcast([line["planned"] for path in mine for line in _entries(path)])
        self._bad, self._shown, self._new = set(planned), len(planned), []

    def note(self, substitutions: Sequence[Substitution]) -> None:
        """Write down what this rank had to replace."""
        if not substitutions:
            return
        self._new += [s.planned for s in substitutions]
        try:
            lines = "".join(json.dumps(asdict(s)) + "\n" for s in substitutions)
            durable.append(self._path, lines.encode())
        except OSError as error:  # a full disk costs the list, not the run
            _log.warning("%d bad images are not listed: %s", len(substitutions), error)

    def totals(self) -> dict[str, float]:
        """Over all ranks and the whole run; called by all ranks together.

        Returns:
            ``substituted_images``, how often a substitute was shown, and ``bad_images``, in
            place of how many different images.
        """
        for new in dist.gather(self._new):
            self._shown += len(new)
            self._bad.update(new)
        self._new = []
        return {"substituted_images": float(self._shown), "bad_images": float(len(self._bad))}

    def check(self) -> None:
        """Hold the last `totals` against the budget.

        Raises:
            DataError: One line, the same on every rank: more images are bad than may be.
        """
        if len(self._bad) > self._allowed:
            raise DataError(
                f"{len(self._bad)} training images are damaged and data.max_bad allows "
                f"{self._allowed}: {self._run.substitutions('*')} lists them "
                "(data_prep/verify.py checks all, data_prep/shard.py makes shards anew)"
            )

    def _files(self) -> list[Path]:
        files = sorted(self._run.path.glob(self._run.substitutions("*").name))
        for path in files:  # a pipe would be waited for
            try:
                if not durable.followed(path).is_file():
                    raise DataError(f"{printable(str(path))} is no file: remove it")
            except OSError as error:
                raise DataError(f"{printable(str(path))}: {error.strerror}") from error
        return files


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file; a crash may have torn the last one, a disk any of them."""
    for text in _text(path).splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and all(type(line.get(k)) is int for k in _NUMBERS):
            yield line


def _text(path: Path) -> str:
    return path.read_text(errors="replace")
