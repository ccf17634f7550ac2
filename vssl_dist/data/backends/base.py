"""The interface of the backends, which turn encoded images and drawn parameters into tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vssl_dist.config import Normalisation, ViewRecipe
from vssl_dist.data.store.dataset import Samples, Substitution
from vssl_dist.data.views import Draws


@dataclass(frozen=True)
class Batch:
    """Images, labels and ids that belong together, such as one rank's rows of a micro-step."""

    ids: Tensor
    """``(B,)`` int64 on the CPU, where they are written down and nothing is computed from them.
    A planned id stays, also where a substitute is shown."""
    views: list[Tensor]
    """V x ``(B, 3, S, S)`` float32, normalised, on the device of the run; S may differ by view."""
    labels: Tensor
    """``(B,)`` int64 on the device of the run, of the images shown."""
    substitutions: Sequence[Substitution] = ()
    """What is shown in place of damaged images; empty in the batches of a `Loader`, which keeps a
    list of its own."""


@dataclass(frozen=True)
class BackendSpec:
    """The settings from which a backend is built."""

    recipes: tuple[ViewRecipe, ...]
    """One per view.  An operation that a recipe never draws is left out for that view."""
    image_size: int
    """Side of a frame, and of each view whose recipe names no size of its own."""
    normalise: Normalisation
    threads: int = 1
    device: str = "cpu"
    jpeg_engine: str = "none"
    """Whether a GPU's JPEG engine decodes ``all`` images that it can, or ``none``."""

    def side(self, recipe: ViewRecipe) -> int:
        """Return the height, which is the width, of a view in pixels."""
        return recipe.size or self.image_size


class Backend(Protocol):
    """Decodes each image once and makes all its views.

    A row of the result depends on that row's bytes and draws alone: not on the rest of the
    batch, and not on the number of threads.  Images are taken as they are stored: an EXIF
    orientation is not applied here, because the index states the stored height and width.
    """

    def __call__(self, samples: Samples, draws: Sequence[Draws]) -> list[Tensor]:
        """Decode each image and make its augmented views.

        Args:
            samples: B encoded images.
            draws: One `Draws` of length B per recipe.

        Returns:
            One ``(B, 3, S, S)`` float32 tensor per recipe, normalised, on the device; S is the
            recipe's size or that of the spec.

        Raises:
            UndecodableError: Some of the files are no images; never because a device failed or
                memory ran out.
        """

    def frame(self, samples: Samples, boxes: NDArray[np.float32]) -> Tensor:
        """Resize and normalise a given region of each image.

        Args:
            samples: B encoded images.
            boxes: ``(B, 4)``: top, left, height, width in pixels, fractions allowed.

        Returns:
            ``(B, 3, S, S)`` float32, normalised, on the device.

        Raises:
            UndecodableError: Some of the files are no images.
        """


class UndecodableError(ValueError):
    """Some images of a batch do not decode."""

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__(f"{len(reasons)} images do not decode: {next(iter(reasons.values()))}")
        self.reasons = reasons
        """What is wrong with each image, by row of the batch."""


class DevicePlacement:
    """Puts results on a device without waiting for, or holding up, the training stream."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._cuda_stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            # The current device belongs to a thread, and views are made in another one.
            device_index = self.device.index
            device_index = torch.cuda.current_device() if device_index is None else device_index
            self.device = torch.device("cuda", device_index)
            self._cuda_stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Enter the stream of this placement; what is enqueued inside is finished at the end."""
        if self._cuda_stream is None:
            yield
            return
        with torch.cuda.stream(self._cuda_stream):
            yield
        self._cuda_stream.synchronize()


def record_on_current_stream(batch: Batch) -> Batch:
    """Hand a batch that was made on a stream of its own to the caller's stream.

    The labels are copied to the device of the views here and not earlier: a copy enqueued by the
    thread that makes batches would wait for training.
    """
    device = batch.views[0].device
    if device.type != "cuda":
        return batch
    # Else the allocator would reuse a view's memory while kernels of this stream still read it.
    for view in batch.views:
        view.record_stream(torch.cuda.current_stream(device))
    labels = batch.labels.pin_memory().to(device, non_blocking=True)
    return replace(batch, labels=labels)
