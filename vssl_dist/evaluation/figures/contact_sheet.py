"""A contact sheet of some of a dataset's images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from vssl_dist.data.backends.base import UndecodableError
from vssl_dist.data.backends.reference import decode
from vssl_dist.data.damage.replace import read_with_substitutes
from vssl_dist.data.store.dataset import Dataset, Samples
from vssl_dist.evaluation.figures.plots import literal

_SIDE = 160
_INCHES = 1.1


def draw_sheet(
    dataset: Dataset, rows: Mapping[str, Sequence[int]], caption: Callable[[int], str]
) -> Figure:
    """Draw images with their classes and captions, one row for each name.

    Args:
        dataset: Where they are; a damaged one is shown as training would replace it.
        rows: Ids of the images by the names of their rows.
        caption: A second line for each id.
    """
    columns = max(len(ids) for ids in rows.values())
    figure = Figure(figsize=(_INCHES * columns + 0.8, 1.6 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes_row, (name, ids) in zip(grid, rows.items(), strict=True):
        axes_row[0].set_ylabel(literal(name))
        samples, images = read_with_substitutes(dataset, np.array(ids), _thumbnails)
        # Not strict: a shorter row leaves the rest of its axes empty.
        for axes, image_id, image, label in zip(axes_row, ids, images, samples.label, strict=False):
            axes.imshow(np.asarray(image), interpolation="nearest")
            is_labelled = 0 <= label < len(dataset.classes)
            class_name = dataset.classes[label] if is_labelled else "unlabelled"
            title = f"{literal(class_name[:16])}\n{literal(caption(image_id))}"
            axes.set_title(title, fontsize=6)
    dataset.close()
    return figure


def _thumbnails(samples: Samples) -> list[Image.Image]:
    images = []
    reasons = {}
    for row, data in enumerate(samples.data):
        try:
            images.append(decode(data))
        except ValueError as error:
            reasons[row] = str(error)
    if reasons:
        raise UndecodableError(reasons)
    for image in images:
        image.thumbnail((_SIDE, _SIDE))
    return images
