"""One pass over the images, shared out to several processes of this machine.

Each takes a contiguous range of the batches that one process would make, so that the features
are the same bits however many they are.  It writes them to a folder of its own, which gets its
name when it is whole; the parent hands the rows on in the order of the ids.  A process that
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
from vssl_dist.evaluation.features.cache import Source, read_rows, store
from vssl_dist.evaluation.features.extract import (
    Forward,
    Reading,
    Rows,
    stream,
    with_progress_bar,
)
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
    """Number of images."""
    variants: Variants | None = None
    """What is made of each image; None: it is seen as it is."""

    @property
    def rows(self) -> int:
        """Number of rows of features."""
        return self.count * (1 if self.variants is None else self.variants.count)

    @property
    def title(self) -> str:
        """What a progress bar calls the pass."""
        times = "" if self.variants is None else f"{self.variants.count} x "
        return f"features of {times}{self.dataset.folder.name}"

    def id_ranges(self, ranks: int) -> list[range]:
        """Cut the ids where a batch ends into ranges of about as many batches.

        Args:
            ranks: How many ranges; fewer where there are fewer batches.
        """
        batch = self.reading.batch if self.variants is None else self.variants.batch(self.reading)
        batches = math.ceil(self.count / batch)
        ranks = min(ranks, batches)
        # Batches are never divided: other batches would round differently.
        cuts = [min(batches * rank // ranks * batch, self.count) for rank in range(ranks + 1)]
        return [range(*ends) for ends in pairwise(cuts)]

    def stream(self, ids: range) -> Rows:
        """Compute features and labels of some of the images in this process."""
        network = self.load()
        id_array = np.arange(ids.start, ids.stop)
        if self.variants is None:
            return stream(network, self.dataset, self.reading, id_array)
        return stream_variants(network, self.dataset, self.reading, self.variants, id_array)

    def stream_all(self) -> Rows:
        """Compute features and labels of all images in this process, with a progress bar."""
        return with_progress_bar(self.stream(range(self.count)), self.title, self.rows)

    def source(self, ranks: int) -> Source:
        """Return what a cache asks for features: computed here, or by several processes."""

        def rows(scratch: Path) -> Rows:
            id_ranges = self.id_ranges(ranks)
            if len(id_ranges) == 1:
                return self.stream_all()
            return _stream_from_workers(self, id_ranges, scratch)

        return rows


@dataclass(frozen=True)
class _Share:
    """What one process is to compute."""

    image_pass: ImagePass
    ids: range
    rank: int
    folder: Path
    """Folder that its features are written to."""
    threads: int

    @property
    def rows(self) -> int:
        """Number of rows of features."""
        return self.image_pass.rows // self.image_pass.count * len(self.ids)


@dataclass
class _Worker:
    """One process, as its parent sees it."""

    share: _Share
    name: str
    process: BaseProcess = field(init=False)
    pipe: Connection = field(init=False)
    done: int = 0
    finished: bool = False

    def __post_init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        # They are forked from a process that has imported torch, so that only it takes seconds.
        context.set_forkserver_preload([__name__])
        self.pipe, child_end = context.Pipe(duplex=False)
        self.process = context.Process(target=_compute, args=(self.share, child_end), daemon=True)
        with no_job_around():
            self.process.start()
        child_end.close()  # only the process holds it now: its death reads as end of file

    def receive(self) -> None:
        """Take one message: rows done, an error, or at the end what it had to replace.

        Raises:
            DataError: It met damaged data, too much of it with the others, or died.
        """
        try:
            message: int | list[Substitution] | Exception = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise DataError(f"{self.name} {self._death()}") from None
        if isinstance(message, Exception):
            raise message
        if isinstance(message, int):
            self.done = message
            return
        # The budget of damaged images is one for the pass, so the parent counts those of all.
        image_pass = self.share.image_pass
        image_pass.reading.substitutes.record(image_pass.dataset, message)
        self.done = self.share.rows
        self.finished = True

    def _death(self) -> str:
        code = self.process.exitcode or 0
        if code < 0:
            return f"was killed (signal {-code}): if memory ran out, use fewer ranks"
        return f"failed with exit code {code}: what it said stands above"

    def end(self) -> None:
        """Kill the process and close its pipe."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _stream_from_workers(image_pass: ImagePass, id_ranges: list[range], scratch: Path) -> Rows:
    """Yield features ``(B, D)`` and labels ``(B,)`` as one process would compute them.

    Raises:
        DataError: A process met damaged data, or died.
    """
    scratch.mkdir()
    workers: list[_Worker] = []
    try:
        for rank, ids in enumerate(id_ranges):
            share = _Share(image_pass, ids, rank, scratch / str(rank), torch.get_num_threads())
            name = f"{image_pass.dataset.folder}: rank {rank} of {len(id_ranges)}"
            workers.append(_Worker(share, name))
        with progress_bar() as progress:
            bar = progress.add_task(image_pass.title, total=image_pass.rows)
            # In the order of the ranks, which is that of the ids; later ones may be done before.
            for worker in workers:
                while not worker.finished:
                    _receive_any(workers)
                    progress.update(bar, completed=sum(w.done for w in workers))
                yield from read_rows(worker.share.folder, CHUNK)
                # The rows are in the parent's file now: the disk need not hold them twice.
                shutil.rmtree(worker.share.folder)
    finally:
        for worker in workers:
            worker.end()
        shutil.rmtree(scratch, ignore_errors=True)


def _receive_any(workers: list[_Worker]) -> None:
    """Wait until a worker sends a message, or dies, and take it."""
    unfinished = {worker.pipe: worker for worker in workers if not worker.finished}
    for pipe in wait(list(unfinished)):
        unfinished[pipe].receive()  # type: ignore[index]


def _compute(share: _Share, pipe: Connection) -> None:
    """Be a worker: write a share's features into its folder, send how far it is into its pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's is for the parent
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(share.threads)
    partial = share.folder.with_name(f"{share.folder.name}.partial")
    reading = share.image_pass.reading
    try:
        if torch.device(reading.device).type == "cuda":
            torch.cuda.set_device(own_gpu(share.rank, torch.cuda.device_count()))
        partial.mkdir()
        store(partial, share.rows, _with_reports(share.image_pass.stream(share.ids), pipe))
        partial.rename(share.folder)
    except (ConfigError, DataError, OSError) as error:
        pipe.send(error)
    else:
        # Only now, after the renaming: the parent reads the folder when it has this message.
        pipe.send(reading.substitutes.substitutions_in_split(share.image_pass.dataset))


def own_gpu(rank: int, gpus: int) -> int:
    """Index of the GPU of a process; several share one where there are fewer.

    Raises:
        ConfigError: There is none.
    """
    if gpus == 0:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
        raise ConfigError(
            f"rank {rank}: torch sees no GPU (CUDA_VISIBLE_DEVICES: {visible!r}): evaluate with "
            "--device cpu, or where there is one"
        )
    return rank % gpus


def _with_reports(rows: Rows, pipe: Connection) -> Rows:
    """Pass rows on and send into the pipe how many they are so far."""
    done = 0
    for features, labels in rows:
        yield features, labels
        done += len(labels)
        pipe.send(done)


def _end_with_parent() -> None:
    """Wait for the parent's death and end this process, whatever its main thread is doing."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
