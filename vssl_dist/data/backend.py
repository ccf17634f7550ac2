"""What turns encoded bytes and drawn parameters into tensors, whichever library does it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vssl_dist.config import ConfigError, Normalisation, ViewRecipe
from vssl_dist.data.shards import Samples
from vssl_dist.data.views import Draws, blur_window


@dataclass(frozen=True)
class Batch:
    """What a loader yields: one rank's rows of one micro-step."""

    ids: Tensor
    """``(B,)`` int64 on the CPU: the ids as planned, also where a substitute was shown."""
    views: list[Tensor]
    """V x ``(B, 3, S, S)`` float32, normalised, on the device of the run."""
    labels: Tensor
    """``(B,)`` int64 on the CPU, of the images shown."""


@dataclass(frozen=True)
class BackendSpec:
    """What a backend needs to know before the first image."""

    recipes: tuple[ViewRecipe, ...]
    """One per view.  An operation that a recipe never draws is left out for that view."""
    image_size: int
    normalise: Normalisation
    threads: int = 1
    device: str = "cpu"


class Backend(Protocol):
    """Decodes each image once and makes all its views.

    A row of the result depends on that row's bytes and draws alone: not on the rest of the
    batch, and not on the number of threads.  Images are taken as they are stored: an EXIF
    orientation is not applied here, because the index states the stored height and width.
    """

    def __call__(self, samples: Samples, draws: Sequence[Draws]) -> list[Tensor]:
        """Augmented views.

        Args:
            samples: B encoded images.
            draws: One `Draws` of length B per recipe.

        Returns:
            One ``(B, 3, S, S)`` float32 tensor per recipe, normalised, on the device.

        Raises:
            UndecodableError: Some of the images are no images.
        """

    def frame(self, samples: Samples, boxes: NDArray[np.float32]) -> Tensor:
        """A fixed part of each image, resized and normalised.

        Args:
            samples: B encoded images.
            boxes: ``(B, 4)``: top, left, height, width in pixels, fractions allowed.

        Returns:
            ``(B, 3, S, S)`` float32, normalised, on the device.

        Raises:
            UndecodableError: Some of the images are no images.
        """


class UndecodableError(ValueError):
    """Some images of a batch do not decode."""

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__(f"{len(reasons)} images do not decode: {next(iter(reasons.values()))}")
        self.reasons = reasons
        """What was wrong, by row of the batch."""


class Placement:
    """Puts results on a device without waiting for, or holding up, the training stream."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            # The current device belongs to a thread, and views are made in another one.
            index = self.device.index
            index = torch.cuda.current_device() if index is None else index
            self.device = torch.device("cuda", index)
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Everything enqueued inside is finished at the end."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()


def hand_over(views: Sequence[Tensor]) -> None:
    """Tell the allocator that the caller's stream uses what a backend made on its own one."""
    for view in views:
        if view.is_cuda:
            view.record_stream(torch.cuda.current_stream(view.device))


def build_backend(name: str, spec: BackendSpec) -> Backend:
    """The backend called ``dali`` or ``reference``.

    Raises:
        ConfigError: The backend is not installed, or the images are too small for the blur.
    """
    for recipe in spec.recipes:
        radius = int(blur_window(recipe.blur_sigma[1])) // 2 if recipe.blur else 0
        if radius >= spec.image_size:
            raise ConfigError(
                f"data.views: a blur of sigma {recipe.blur_sigma[1]:g} reaches {radius} pixels, "
                f"beyond images of data.image_size={spec.image_size} (smaller sigma, or blur: 0)"
            )
    # Each backend's libraries are loaded only where it is chosen.
    if name != "dali":
        reference: Backend = import_module("vssl_dist.data.reference").ReferenceBackend(spec)
        return reference
    try:
        dali: Backend = import_module("vssl_dist.data.dali").DaliBackend(spec)
    except ImportError as error:
        raise ConfigError(
            f"data.backend=dali: DALI cannot be loaded ({error}); use data.backend=reference"
        ) from error
    return dali
