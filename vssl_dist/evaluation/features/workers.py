"""One pass over the images, shared out to several processes of this machine.

Each takes a contiguous stretch of the batches that one process would make, so that the features
are the same bits however many they are.  It writes them to a folder of its own, which gets its
name when it is whole; the parent hands the stretches on in the order of the ids.  A process that
dies ends the pass, and processes whose parent dies end themselves.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread

import numpy as np
import torch

from vssl_dist.console.bars import progress_bar
from vssl_dist.data.store.dataset import Dataset, Substitution
from vssl_dist.environment import no_job_around
from vssl_dist.errors import ConfigError, DataError
from vssl_dist.evaluation.features.cache import (
    Source,
    read_rows,
    store,
)
from vssl_dist.evaluation.features.extract import Forward, Reading, Rows, shown, stream
from vssl_dist.evaluation.features.variants import Variants, stream_variants
from vssl_dist.evaluation.scores.probe import CHUNK


@dataclass(frozen=True)
class ImagePass:
    """One look at the first images of a split through a network, in the order of their ids.

    It pickles if ``load`` does.
    """

    load: Callable[[], Forward]
    dataset: Dataset
    reading: Reading
    count: int
    """Images."""
    variants: Variants | None = None
    """What is made of each; None: it is seen as it is."""

    @property
    def rows(self) -> int:
        """Rows of features."""
        return self.count * (1 if self.variants is None else self.variants.count)

    @property
    def title(self) -> str:
        """What a progress bar calls it."""
        times = "" if self.variants is None else f"{self.variants.count} x "
        return f"features of {times}{self.dataset.folder.name}"

    def stretches(self, ranks: int) -> list[range]:
        """The ids, cut where a batch ends into stretches of about as many batches.

        Args:
            ranks: How many stretches; fewer where there are fewer batches.
        """
        batch = self.reading.batch if self.variants is None else self.variants.batch(self.reading)
        batches = math.ceil(self.count / batch)
        ranks = min(ranks, batches)
        cuts = [min(batches * rank // ranks * batch, self.count) for rank in range(ranks + 1)]
        return [range(*ends) for ends in pairwise(cuts)]

    def stream(self, ids: range) -> Rows:
        """Features and labels of some of the images, computed here."""
        network, which = self.load(), np.arange(ids.start, ids.stop)
        if self.variants is None:
            return stream(network, self.dataset, self.reading, which)
        return stream_variants(network, self.dataset, self.reading, self.variants, which)

    def alone(self) -> Rows:
        """Features and labels of all images, computed here, with a progress bar."""
        return shown(self.stream(range(self.count)), self.title, self.rows)

    def source(self, ranks: int) -> Source:
        """What a cache asks for features: computed here, or by several processes."""

        def rows(scratch: Path) -> Rows:
            stretches = self.stretches(ranks)
            return self.alone() if len(stretches) == 1 else _shared(self, stretches, scratch)

        return rows


@dataclass(frozen=True)
class _Work:
    """What one process is to do."""

    whole: ImagePass
    ids: range
    rank: int
    place: Path
    """Where its features are to be."""
    threads: int

    @property
    def rows(self) -> int:
        return self.whole.rows // self.whole.count * len(self.ids)


@dataclass
class _Rank:
    """One process, as its parent sees it."""

    work: _Work
    name: str
    process: BaseProcess = field(init=False)
    pipe: Connection = field(init=False)
    done: int = 0
    finished: bool = False

    def __post_init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        # They are forked from a process that has imported torch, so that only it takes seconds.
        context.set_forkserver_preload([__name__])
        self.pipe, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_compute, args=(self.work, theirs), daemon=True)
        with no_job_around():
            self.process.start()
        theirs.close()  # only the process holds it now: its death reads as end of file

    def listen(self) -> None:
        """Take what it says.

        Raises:
            DataError: It met damaged data, too much of it with the others, or died.
        """
        try:
            said: int | list[Substitution] | Exception = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise DataError(f"{self.name} {self._end()}") from None
        if isinstance(said, Exception):
            raise said
        if isinstance(said, int):
            self.done = said
            return
        whole = self.work.whole
        whole.reading.substitutes.record(whole.dataset, said)
        self.done, self.finished = self.work.rows, True

    def _end(self) -> str:
        code = self.process.exitcode or 0
        if code < 0:
            return f"was killed (signal {-code}): if memory ran out, use fewer ranks"
        return f"failed with exit code {code}: what it said stands above"

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _shared(whole: ImagePass, stretches: list[range], scratch: Path) -> Rows:
    """Features ``(B, D)`` and labels ``(B,)`` as one process would find them.

    Raises:
        DataError: A process met damaged data, or died.
    """
    scratch.mkdir()
    ranks: list[_Rank] = []
    try:
        for number, ids in enumerate(stretches):
            place = scratch / str(number)
            work = _Work(whole, ids, number, place, torch.get_num_threads())
            name = f"{whole.dataset.folder}: rank {number} of {len(stretches)}"
            ranks.append(_Rank(work, name))
        with progress_bar() as progress:
            task = progress.add_task(whole.title, total=whole.rows)
            for rank in ranks:
                while not rank.finished:
                    _hear(ranks)
                    progress.update(task, completed=sum(each.done for each in ranks))
                yield from read_rows(rank.work.place, CHUNK)
                shutil.rmtree(rank.work.place)
    finally:
        for rank in ranks:
            rank.end()
        shutil.rmtree(scratch, ignore_errors=True)


def _hear(ranks: list[_Rank]) -> None:
    """Wait until one says something, or dies, and take note."""
    busy = {rank.pipe: rank for rank in ranks if not rank.finished}
    for pipe in wait(list(busy)):
        busy[pipe].listen()  # type: ignore[index]


def _compute(work: _Work, pipe: Connection) -> None:
    """A process: its stretch into its folder, how far it is into its pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's is for the parent
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(work.threads)
    partial = work.place.with_name(f"{work.place.name}.partial")
    try:
        if torch.device(work.whole.reading.device).type == "cuda":
            torch.cuda.set_device(own_gpu(work.rank, torch.cuda.device_count()))
        partial.mkdir()
        store(partial, work.rows, _telling(work.whole.stream(work.ids), pipe))
        partial.rename(work.place)
    except (ConfigError, DataError, OSError) as error:
        pipe.send(error)
    else:
        pipe.send(work.whole.reading.substitutes.in_split(work.whole.dataset))


def own_gpu(rank: int, gpus: int) -> int:
    """The GPU of a process; several share one where there are fewer.

    Raises:
        ConfigError: There is none.
    """
    if gpus == 0:
        shown = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
        raise ConfigError(
            f"rank {rank}: torch sees no GPU (CUDA_VISIBLE_DEVICES: {shown!r}): evaluate with "
            "--device cpu, or where there is one"
        )
    return rank % gpus


def _telling(rows: Rows, pipe: Connection) -> Rows:
    done = 0
    for found in rows:
        yield found
        done += len(found[1])
        pipe.send(done)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
