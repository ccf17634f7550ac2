"""What is said of weights that leave the house: Markdown that people and model hubs read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vssl_dist.curves import current_figure
from vssl_dist.errors import ExportError
from vssl_dist.exports.card import Card, PortableCard
from vssl_dist.exports.results import read_result
from vssl_dist.run_folder import ExportFolder, card_of
from vssl_dist.text import markdown

Metrics = Mapping[str, Mapping[str, float]]
"""Figures by the name of the evaluation, then by their own."""
_HUB_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")


def evaluations(export: Path, card: Card) -> dict[str, dict[str, float]]:
    """The figures of all evaluations of these very weights that lie beside the export.

    Args:
        export: The ``.safetensors`` file.
        card: Its card.

    Returns:
        The metrics of each result by its file's name without the step, such as ``knn``.

    Raises:
        ExportError: One line: a result is damaged.
    """
    found: dict[str, dict[str, float]] = {}
    for path, name in ExportFolder.of(export).results(step=card.step).items():
        if path == card_of(export):  # an export may be called as a result
            continue
        try:
            result = read_result(path)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ExportError(f"{path}: {reason}; remove it, or evaluate again") from error
        if result.get("export_sha256") == card.sha256:
            found[name.label] = result.get("metrics", {})
    return found


def model_card(card: PortableCard, usage: str, library: str) -> str:
    """A model card: front matter for a hub, then how to use the weights and how they came about.

    Args:
        card: Of the export, with the figures that `evaluations` finds.
        usage: Python that opens the weights.
        library: What opens them, by the name that a hub knows.
    """
    facts = {
        "method": card.method,
        "backbone": f"{card.backbone}, features of width {card.width}",
        "weights of": f"the {card.branch} after {card.step} optimizer steps",
        "images": f"{card.image_size} pixels on a side, in [0, 1], less the mean "
        f"{list(card.normalise.mean)}, over {list(card.normalise.std)}",
        "training data": f"fingerprint {card.fingerprint}",
        "code": ", ".join(f"{name} {value}" for name, value in card.versions.items()) or "unknown",
        "licence": card.licence,
        "sha256 of the export": card.sha256,
    }
    training = {current_figure(name): value for name, value in card.metrics.items()}
    metrics: Metrics = {"training": training, **card.evaluations}
    figures = [
        (task, key.removeprefix(f"{task}/"), value)
        for task, told in metrics.items()
        for key, value in told.items()
    ]
    known = card.config.as_json()
    config = yaml.safe_dump(known, sort_keys=False) if known else "unknown\n"
    # Longer than any in it, which would end it.
    fence = "`" * (1 + max([2, *map(len, re.findall("`+", config))]))
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(card, library), sort_keys=False)}---",
        f"# {markdown(card.run)}",
        f"A backbone that vssl-dist has trained by {markdown(card.method)}.",
        f"```python\n{usage}\n```",
        _table(("", ""), facts.items()),
        "## Figures",
        _table(("evaluation", "figure", "value"), figures) if figures else "None were at hand.",
        f"## Configuration\n\n{fence}yaml\n{config}{fence}",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(card: PortableCard, library: str) -> dict[str, Any]:
    said = card.config.licence
    licence = {}
    if said is not None:
        known = _HUB_NAME.fullmatch(said)
        licence = {"license": said} if known else {"license": "other", "license_name": said}
    tags = ["vssl-dist", card.method]
    kind = {"library_name": library, "pipeline_tag": "image-feature-extraction", "tags": tags}
    return kind | licence


def _table(titles: tuple[str, ...], rows: Any) -> str:
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = (f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in row)
        lines.append(f"| {' | '.join(map(markdown, cells))} |")
    return "\n".join(lines)
