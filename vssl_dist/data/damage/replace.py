"""Bad images never stop a run and never pass silently: they are replaced, and listed."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from vssl_dist.data.backends.base import UndecodableError
from vssl_dist.data.bare import bare
from vssl_dist.data.store.dataset import (
    Dataset,
    Samples,
    Substitution,
)
from vssl_dist.data.store.header import header_problem

T = TypeVar("T")


def read_decodable(
    dataset: Dataset, ids: NDArray[np.int64], render: Callable[[Samples], T]
) -> tuple[Samples, T]:
    """Read samples and render them, with substitutes for what is damaged or does not decode.

    A substitute is the next sample, in the order of `Dataset.next_intact`, that is intact and
    decodes: the same one whichever rank meets the bad one, in whatever batch.

    Args:
        dataset: Where the samples are.
        ids: ``(B,)`` planned ids.
        render: Called with the samples, again after each replacement.

    Returns:
        The samples that were rendered (with the list of substitutions) and the rendering.

    Raises:
        DataError: There is no usable sample near one.
    """
    samples = dataset.read_checked(ids)
    damaged = {found.planned: found for found in samples.substitutions}
    shown = {row: damaged[i] for row, i in enumerate(ids.tolist()) if i in damaged}
    while True:
        try:
            rendering = _rendered(samples, render)
        except UndecodableError as error:
            for row, reason in error.reasons.items():
                last = shown.get(row, Substitution(int(ids[row]), int(ids[row]), ""))
                known = last.reason or f"does not decode: {reason}"
                shown[row] = _show_next(dataset, samples, row, replace(last, reason=known))
        else:
            samples.substitutions = [shown[row] for row in sorted(shown)]
            return samples, rendering


def _rendered(samples: Samples, render: Callable[[Samples], T]) -> T:
    """The rendering.

    Raises:
        UndecodableError: Some images are none, or others than the index says.
    """
    stated = zip(samples.data, samples.height.tolist(), samples.width.tolist(), strict=True)
    # Before anything is decoded: a crop drawn for another size would be of the wrong place, or
    # outside of the image, and a header can ask for all memory there is.
    found = {row: wrong for row, each in enumerate(stated) if (wrong := header_problem(*each))}
    if found:
        raise UndecodableError(found)
    try:
        return render(samples)
    except UndecodableError as error:
        reasons = {row: _plain(samples.data[row], told) for row, told in error.reasons.items()}
        raise UndecodableError(reasons) from error


def _plain(data: NDArray[np.uint8], told: str) -> str:
    """What Pillow says of an image that a backend refused, or what the backend said of it.

    DALI has a number for it, and where not, lines of its own source.
    """
    try:
        with Image.open(io.BytesIO(bare(data.tobytes()))) as image:
            image.load()
    except UnidentifiedImageError:
        return "no format that Pillow knows"
    except MemoryError:
        return told
    except Exception as error:  # Pillow promises no common class
        return " ".join(f"{type(error).__name__}: {error}".split())
    return told


def _show_next(dataset: Dataset, samples: Samples, row: int, last: Substitution) -> Substitution:
    """Put the next intact sample after ``last.used`` into ``row``."""
    used, samples.data[row], facts = dataset.next_intact(last.planned, last.used, last.reason)
    for name in ("height", "width", "label"):
        getattr(samples, name)[row] = facts[name]
    return replace(last, used=used)
