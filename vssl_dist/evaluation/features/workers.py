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

from vssl_dist.console.bars import make_progress_bar
from vssl_dist.data.store.dataset import Dataset, Substitution
from vssl_dist.environment import no_job_around
from vssl_dist.errors import ConfigError, DataError
from vssl_dist.evaluation.features.cache import (
    FeatureSource,
    read_feature_files,
    write_feature_files,
)
from vssl_dist.evaluation.features.extract import (
    FeatureBatches,
    FeatureFunction,
    ImageReading,
    stream_features,
    with_progress_bar,
)
from vssl_dist.evaluation.features.variants import ImageVariants, stream_variant_features
from vssl_dist.evaluation.scores.probe import ROWS_PER_BLOCK


@dataclass(frozen=True)
class ImagePass:
    """One look at the first images of a split through a network, in the order of their ids.

    It pickles if ``load`` does.
    """

    load_network: Callable[[], FeatureFunction]
    dataset: Dataset
    reading: ImageReading
    image_count: int
    """Number of images."""
    variants: ImageVariants | None = None
    """What is made of each image; None: it is seen as it is."""

    @property
    def row_count(self) -> int:
        """Number of rows of features."""
        return self.image_count * (1 if self.variants is None else self.variants.pictures_per_image)

    @property
    def progress_title(self) -> str:
        """What a progress bar calls the pass."""
        variant_factor = "" if self.variants is None else f"{self.variants.pictures_per_image} x "
        return f"features of {variant_factor}{self.dataset.folder.name}"

    def id_ranges(self, range_count: int) -> list[range]:
        """Cut the ids where a batch ends into ranges of about as many batches.

        Args:
            range_count: How many ranges; fewer where there are fewer batches.
        """
        batch_images = (
            self.reading.batch_size
            if self.variants is None
            else self.variants.images_per_batch(self.reading)
        )
        batch_count = math.ceil(self.image_count / batch_images)
        range_count = min(range_count, batch_count)
        # Batches are never divided: other batches would round differently.
        range_bounds = [
            min(batch_count * rank // range_count * batch_images, self.image_count)
            for rank in range(range_count + 1)
        ]
        return [range(*bounds) for bounds in pairwise(range_bounds)]

    def stream_ids(self, ids: range) -> FeatureBatches:
        """Compute features and labels of some of the images in this process."""
        network = self.load_network()
        id_array = np.arange(ids.start, ids.stop)
        if self.variants is None:
            return stream_features(network, self.dataset, self.reading, id_array)
        return stream_variant_features(network, self.dataset, self.reading, self.variants, id_array)

    def stream_all(self) -> FeatureBatches:
        """Compute features and labels of all images in this process, with a progress bar."""
        return with_progress_bar(
            self.stream_ids(range(self.image_count)), self.progress_title, self.row_count
        )

    def feature_source(self, ranks: int) -> FeatureSource:
        """Return what a cache asks for features: computed here, or by several processes."""

        def compute_rows(scratch_folder: Path) -> FeatureBatches:
            id_ranges = self.id_ranges(ranks)
            if len(id_ranges) == 1:
                return self.stream_all()
            return _stream_worker_features(self, id_ranges, scratch_folder)

        return compute_rows


@dataclass(frozen=True)
class _WorkerShare:
    """What one process is to compute."""

    image_pass: ImagePass
    id_range: range
    rank: int
    folder: Path
    """Folder that its features are written to."""
    threads: int

    @property
    def row_count(self) -> int:
        """Number of rows of features."""
        return self.image_pass.row_count // self.image_pass.image_count * len(self.id_range)


@dataclass
class _Worker:
    """One process, as its parent sees it."""

    share: _WorkerShare
    name: str
    process: BaseProcess = field(init=False)
    pipe: Connection = field(init=False)
    rows_done: int = 0
    is_finished: bool = False

    def __post_init__(self) -> None:
        process_context = multiprocessing.get_context("forkserver")
        # They are forked from a process that has imported torch, so that only it takes seconds.
        process_context.set_forkserver_preload([__name__])
        self.pipe, child_pipe_end = process_context.Pipe(duplex=False)
        self.process = process_context.Process(
            target=_run_worker, args=(self.share, child_pipe_end), daemon=True
        )
        with no_job_around():
            self.process.start()
        child_pipe_end.close()  # only the process holds it now: its death reads as end of file

    def receive_message(self) -> None:
        """Take one message: rows done, an error, or at the end what it had to replace.

        Raises:
            DataError: It met damaged data, too much of it with the others, or died.
        """
        try:
            message: int | list[Substitution] | Exception = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise DataError(f"{self.name} {self._describe_death()}") from None
        if isinstance(message, Exception):
            raise message
        if isinstance(message, int):
            self.rows_done = message
            return
        # The budget of damaged images is one for the pass, so the parent counts those of all.
        image_pass = self.share.image_pass
        image_pass.reading.substitution_tally.record(image_pass.dataset, message)
        self.rows_done = self.share.row_count
        self.is_finished = True

    def _describe_death(self) -> str:
        exit_code = self.process.exitcode or 0
        if exit_code < 0:
            return f"was killed (signal {-exit_code}): if memory ran out, use fewer ranks"
        return f"failed with exit code {exit_code}: what it said stands above"

    def kill(self) -> None:
        """Kill the process and close its pipe."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _stream_worker_features(
    image_pass: ImagePass, id_ranges: list[range], scratch_folder: Path
) -> FeatureBatches:
    """Yield features ``(B, D)`` and labels ``(B,)`` as one process would compute them.

    Raises:
        DataError: A process met damaged data, or died.
    """
    scratch_folder.mkdir()
    workers: list[_Worker] = []
    try:
        for rank, ids in enumerate(id_ranges):
            share = _WorkerShare(
                image_pass, ids, rank, scratch_folder / str(rank), torch.get_num_threads()
            )
            name = f"{image_pass.dataset.folder}: rank {rank} of {len(id_ranges)}"
            workers.append(_Worker(share, name))
        with make_progress_bar() as progress:
            bar_id = progress.add_task(image_pass.progress_title, total=image_pass.row_count)
            # In the order of the ranks, which is that of the ids; later ones may be done before.
            for worker in workers:
                while not worker.is_finished:
                    _receive_next_messages(workers)
                    progress.update(
                        bar_id,
                        completed=sum(counted_worker.rows_done for counted_worker in workers),
                    )
                yield from read_feature_files(worker.share.folder, ROWS_PER_BLOCK)
                # The rows are in the parent's file now: the disk need not hold them twice.
                shutil.rmtree(worker.share.folder)
    finally:
        for worker in workers:
            worker.kill()
        shutil.rmtree(scratch_folder, ignore_errors=True)


def _receive_next_messages(workers: list[_Worker]) -> None:
    """Wait until a worker sends a message, or dies, and take it."""
    worker_by_pipe = {worker.pipe: worker for worker in workers if not worker.is_finished}
    for pipe in wait(list(worker_by_pipe)):
        worker_by_pipe[pipe].receive_message()  # type: ignore[index]


def _run_worker(share: _WorkerShare, pipe: Connection) -> None:
    """Be a worker: write a share's features into its folder, send how far it is into its pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's is for the parent
    Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(share.threads)
    partial_folder = share.folder.with_name(f"{share.folder.name}.partial")
    reading = share.image_pass.reading
    try:
        if torch.device(reading.device).type == "cuda":
            torch.cuda.set_device(choose_gpu_index(share.rank, torch.cuda.device_count()))
        partial_folder.mkdir()
        write_feature_files(
            partial_folder,
            share.row_count,
            _report_row_counts(share.image_pass.stream_ids(share.id_range), pipe),
        )
        partial_folder.rename(share.folder)
    except (ConfigError, DataError, OSError) as error:
        pipe.send(error)
    else:
        # Only now, after the renaming: the parent reads the folder when it has this message.
        pipe.send(reading.substitution_tally.substitutions_in_split(share.image_pass.dataset))


def choose_gpu_index(rank: int, gpu_count: int) -> int:
    """Index of the GPU of a process; several share one where there are fewer.

    Raises:
        ConfigError: There is none.
    """
    if gpu_count == 0:
        visible_devices = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
        raise ConfigError(
            f"rank {rank}: torch sees no GPU (CUDA_VISIBLE_DEVICES: {visible_devices!r}): "
            "evaluate with --device cpu, or where there is one"
        )
    return rank % gpu_count


def _report_row_counts(rows: FeatureBatches, pipe: Connection) -> FeatureBatches:
    """Pass rows on and send into the pipe how many they are so far."""
    rows_done = 0
    for features, labels in rows:
        yield features, labels
        rows_done += len(labels)
        pipe.send(rows_done)


def _exit_with_parent() -> None:
    """Wait for the parent's death and end this process, whatever its main thread is doing."""
    parent_process = multiprocessing.parent_process()
    assert parent_process is not None
    parent_process.join()
    os._exit(1)
