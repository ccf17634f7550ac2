"""Damaged images do not stop a run and do not pass silently: they are replaced, and listed."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from vssl_dist.data.backends.base import UndecodableError
from vssl_dist.data.bare import strip_metadata
from vssl_dist.data.store.dataset import (
    Dataset,
    Samples,
    Substitution,
)
from vssl_dist.data.store.header import find_header_problem

T = TypeVar("T")


def read_with_substitutes(
    dataset: Dataset, ids: NDArray[np.int64], render_samples: Callable[[Samples], T]
) -> tuple[Samples, T]:
    """Read samples and render them, with substitutes for what is damaged or does not decode.

    A substitute is the next sample, in the order of `Dataset.find_intact_substitute`, that
    is intact and decodes: the same one whichever rank meets the bad one, in whatever batch.

    Args:
        dataset: Where the samples are.
        ids: ``(B,)`` planned ids.
        render_samples: Called with the samples, again after each replacement.

    Returns:
        The samples that were rendered (with the list of substitutions) and the rendering.

    Raises:
        DataError: There is no usable sample near a damaged one.
    """
    samples = dataset.read_checked(ids)
    substitution_by_planned_id = {
        substitution.planned: substitution for substitution in samples.substitutions
    }
    substitutions = {
        row: substitution_by_planned_id[planned_id]
        for row, planned_id in enumerate(ids.tolist())
        if planned_id in substitution_by_planned_id
    }
    # A substitute may not decode either, so this ends only when all rows do, or none is left near.
    while True:
        try:
            render_result = _check_and_render(samples, render_samples)
        except UndecodableError as error:
            for row, reason in error.reasons.items():
                last_substitution = substitutions.get(
                    row, Substitution(int(ids[row]), int(ids[row]), "")
                )
                # The list says what is wrong with the planned image, not with its substitutes.
                planned_reason = last_substitution.reason or f"does not decode: {reason}"
                substitutions[row] = _substitute_row(
                    dataset, samples, row, replace(last_substitution, reason=planned_reason)
                )
        else:
            samples.substitutions = [substitutions[row] for row in sorted(substitutions)]
            return samples, render_result


def _check_and_render(samples: Samples, render_samples: Callable[[Samples], T]) -> T:
    """Check all headers, then render.

    Raises:
        UndecodableError: Some files are no images, or of other sizes than the index says.
    """
    images = zip(samples.data, samples.height.tolist(), samples.width.tolist(), strict=True)
    # Before anything is decoded: a crop drawn for another size would be of the wrong place, or
    # outside of the image, and a header can ask for all memory there is.
    problem_by_row = {
        row: problem
        for row, bytes_and_size in enumerate(images)
        if (problem := find_header_problem(*bytes_and_size))
    }
    if problem_by_row:
        raise UndecodableError(problem_by_row)
    try:
        return render_samples(samples)
    except UndecodableError as error:
        reason_by_row = {
            row: _explain_undecodable(samples.data[row], backend_reason)
            for row, backend_reason in error.reasons.items()
        }
        raise UndecodableError(reason_by_row) from error


def _explain_undecodable(data: NDArray[np.uint8], backend_reason: str) -> str:
    """Return why Pillow refuses an image, or the backend's reason if Pillow decodes it.

    Pillow is asked because DALI's reason is a number, or lines of its own source.
    """
    try:
        with Image.open(io.BytesIO(strip_metadata(data.tobytes()))) as image:
            image.load()
    except UnidentifiedImageError:
        return "no format that Pillow knows"
    except MemoryError:
        return backend_reason
    except Exception as error:  # Pillow promises no common class
        return " ".join(f"{type(error).__name__}: {error}".split())
    return backend_reason


def _substitute_row(
    dataset: Dataset, samples: Samples, row: int, last_substitution: Substitution
) -> Substitution:
    """Put the next intact sample after ``last_substitution.used`` into ``row``."""
    used_id, samples.data[row], index_row = dataset.find_intact_substitute(
        last_substitution.planned, last_substitution.used, last_substitution.reason
    )
    samples.height[row] = index_row["height"]
    samples.width[row] = index_row["width"]
    samples.label[row] = index_row["label"]
    return replace(last_substitution, used=used_id)
