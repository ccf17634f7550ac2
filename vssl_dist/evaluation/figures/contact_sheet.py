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
from vssl_dist.evaluation.figures.plots import escape_mathtext

_MAX_THUMBNAIL_PIXELS = 160
_COLUMN_WIDTH_INCHES = 1.1


def draw_contact_sheet(
    dataset: Dataset,
    ids_by_row_name: Mapping[str, Sequence[int]],
    caption_of_id: Callable[[int], str],
) -> Figure:
    """Draw images with their classes and captions, one row for each name.

    Args:
        dataset: Where they are; a damaged one is shown as training would replace it.
        ids_by_row_name: Ids of the images by the names of their rows.
        caption_of_id: A second line for each id.
    """
    column_count = max(len(ids) for ids in ids_by_row_name.values())
    figure = Figure(
        figsize=(_COLUMN_WIDTH_INCHES * column_count + 0.8, 1.6 * len(ids_by_row_name)),
        layout="constrained",
    )
    axes_grid = figure.subplots(len(ids_by_row_name), column_count, squeeze=False)
    for axes in axes_grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes_row, (row_name, ids) in zip(axes_grid, ids_by_row_name.items(), strict=True):
        axes_row[0].set_ylabel(escape_mathtext(row_name))
        samples, images = read_with_substitutes(dataset, np.array(ids), _decode_thumbnails)
        # Not strict: a shorter row leaves the rest of its axes empty.
        for axes, image_id, image, label in zip(axes_row, ids, images, samples.label, strict=False):
            axes.imshow(np.asarray(image), interpolation="nearest")
            is_labelled = 0 <= label < len(dataset.classes)
            class_name = dataset.classes[label] if is_labelled else "unlabelled"
            title = (
                f"{escape_mathtext(class_name[:16])}\n{escape_mathtext(caption_of_id(image_id))}"
            )
            axes.set_title(title, fontsize=6)
    dataset.close()
    return figure


def _decode_thumbnails(samples: Samples) -> list[Image.Image]:
    images = []
    failure_by_row = {}
    for row, image_bytes in enumerate(samples.data):
        try:
            images.append(decode(image_bytes))
        except ValueError as error:
            failure_by_row[row] = str(error)
    if failure_by_row:
        raise UndecodableError(failure_by_row)
    for image in images:
        image.thumbnail((_MAX_THUMBNAIL_PIXELS, _MAX_THUMBNAIL_PIXELS))
    return images
