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
from vssl_dist.run_folder import ExportFolder, card_path_of
from vssl_dist.text import escape_markdown

MetricsByEvaluation = Mapping[str, Mapping[str, float]]
"""Figures by the name of the evaluation, then by their own."""
_HUB_LICENCE_PATTERN = re.compile(r"[a-z0-9][a-z0-9.-]*")


def read_evaluation_figures(export: Path, card: Card) -> dict[str, dict[str, float]]:
    """Read the figures of all evaluations of these very weights that lie beside the export.

    Args:
        export: The ``.safetensors`` file.
        card: Its card.

    Returns:
        The metrics of each result by its file's name without the step, such as ``knn``.

    Raises:
        ExportError: One line: a result is damaged.
    """
    figures_by_label: dict[str, dict[str, float]] = {}
    for path, result_name in ExportFolder.of(export).find_results(step=card.step).items():
        if path == card_path_of(export):  # an export may be called as a result
            continue
        try:
            result = read_result(path)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ExportError(f"{path}: {reason}; remove it, or evaluate again") from error
        if result.get("export_sha256") == card.sha256:
            figures_by_label[result_name.label] = result.get("metrics", {})
    return figures_by_label


def format_model_card(card: PortableCard, usage: str, library: str) -> str:
    """Write a model card: front matter for a hub, how to use the weights, how they came about.

    Args:
        card: The export's card, with the figures that `read_evaluation_figures` finds.
        usage: Python that opens the weights.
        library: What opens them, by the name that a hub knows.
    """
    fact_rows = {
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
    training_metrics = {current_figure(name): value for name, value in card.metrics.items()}
    metrics_by_evaluation: MetricsByEvaluation = {"training": training_metrics, **card.evaluations}
    figure_rows = [
        (evaluation_name, key.removeprefix(f"{evaluation_name}/"), value)
        for evaluation_name, task_figures in metrics_by_evaluation.items()
        for key, value in task_figures.items()
    ]
    run_config = card.config.as_json()
    config_yaml = yaml.safe_dump(run_config, sort_keys=False) if run_config else "unknown\n"
    # Longer than any in it, which would end it.
    code_fence = "`" * (1 + max([2, *map(len, re.findall("`+", config_yaml))]))
    sections = [
        f"---\n{yaml.safe_dump(_front_matter(card, library), sort_keys=False)}---",
        f"# {escape_markdown(card.run)}",
        f"A backbone that vssl-dist has trained by {escape_markdown(card.method)}.",
        f"```python\n{usage}\n```",
        _markdown_table(("", ""), fact_rows.items()),
        "## Figures",
        _markdown_table(("evaluation", "figure", "value"), figure_rows)
        if figure_rows
        else "None were at hand.",
        f"## Configuration\n\n{code_fence}yaml\n{config_yaml}{code_fence}",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(card: PortableCard, library: str) -> dict[str, Any]:
    licence_name = card.config.licence
    licence_keys = {}
    if licence_name is not None:
        is_hub_name = _HUB_LICENCE_PATTERN.fullmatch(licence_name)
        licence_keys = (
            {"license": licence_name}
            if is_hub_name
            else {"license": "other", "license_name": licence_name}
        )
    tags = ["vssl-dist", card.method]
    front_matter = {
        "library_name": library,
        "pipeline_tag": "image-feature-extraction",
        "tags": tags,
    }
    return front_matter | licence_keys


def _markdown_table(titles: tuple[str, ...], rows: Any) -> str:
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = (f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in row)
        lines.append(f"| {' | '.join(map(escape_markdown, cells))} |")
    return "\n".join(lines)
