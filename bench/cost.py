"""What each recipe costs by its arithmetic: operations of a step, of the run, and GPU-hours.

Counted, not measured: PyTorch counts the multiplications and additions of convolutions and matrix
products in one real loss and its gradient.  Hours follow from one published rate: ResNet-50 takes
2,470 images/s on an A100 in NVIDIA's DeepLearningExamples (mixed precision).  A recipe that waits
for its data, or whose images are too small to fill a GPU, takes longer.

    python -m bench.cost                       # docs/cost.md's table: minutes on a CPU
    python -m bench.cost configs/in1k_vje.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # before what a bare Python cannot import
    from vssl_dist.installed import require_packages

    require_packages()

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from torch.utils.flop_counter import FlopCounterMode

from vssl_dist import config
from vssl_dist.config import RunConfig
from vssl_dist.config.paths import expanded
from vssl_dist.console.bars import WholeProgress, make_console
from vssl_dist.methods import CONFIGS, GlobalNoise, MicroStep, build_method
from vssl_dist.text import say

NUM_IMAGES = {
    "cifar10": 50_000,
    "cifar100": 50_000,
    "stl10": 105_000,
    "in100": 126_689,
    "in1k": 1_281_167,
}
"""Of the training split, by the first word of a recipe's name."""
NUM_LABELLED_IMAGES = {"stl10": 5_000}
"""Of those with labels, where there are others."""
RESNET50_IMAGES_PER_S = 2470.0
"""Images per second of ResNet-50 on an A100."""
_COUNTED_IMAGES = 2
"""Images whose loss is counted: the fewest that batch norm takes."""


@dataclass(frozen=True)
class RecipeCost:
    """Floating-point operations of a recipe; a multiplication and an addition are two."""

    name: str
    operations_per_image: float
    num_images: float
    """That the run looks at, over all epochs."""

    @property
    def total_operations(self) -> float:
        """Of the whole run."""
        return self.operations_per_image * self.num_images

    def gpu_hours(self, operations_per_s: float) -> float:
        """GPU-hours at a rate in operations per second."""
        return self.total_operations / operations_per_s / 3600


def operations_per_image(cfg: RunConfig) -> float:
    """Operations per image of loss and gradient, all views and the teacher included."""
    method = build_method(cfg.method, cfg.data.image_size, cfg.data.sides)
    method.student.train()
    views = [torch.randn(_COUNTED_IMAGES, 3, side, side) for side in cfg.data.sides]
    now = MicroStep(GlobalNoise(0, 0, 0), 0.0, torch.zeros(_COUNTED_IMAGES, dtype=torch.int64))
    counter = FlopCounterMode(display=False)
    with counter:
        method.loss(views, now).loss.backward()  # type: ignore[no-untyped-call]
    return counter.get_total_flops() / _COUNTED_IMAGES


def recipe_cost(cfg: RunConfig) -> RecipeCost:
    """What a recipe for one of the datasets costs."""
    dataset = cfg.name.partition("_")[0]
    images = NUM_IMAGES[dataset]
    if cfg.method.classes_wanted is not None:
        images = NUM_LABELLED_IMAGES.get(dataset, images)
    return RecipeCost(cfg.name, operations_per_image(cfg), images * cfg.optim.epochs)


def a100_operations_per_s(folder: Path) -> float:
    """Operations per second of an A100 that trains ResNet-50 at its published rate."""
    control = config.load(folder / "in1k_supervised.yaml", methods=CONFIGS)
    return operations_per_image(control) * RESNET50_IMAGES_PER_S


def two_digits(hours: float) -> str:
    """Hours as two significant digits.

    >>> [two_digits(x) for x in (0.0349, 1.46, 28.7, 1234.0)]
    ['0.035', '1.5', '29', '1,200']
    """
    rounded = float(f"{hours:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"


def markdown_rows(costs: Sequence[RecipeCost], operations_per_s: float) -> Iterator[str]:
    """Markdown, a row per recipe."""
    yield "| recipe | GFLOP per image | images seen | EFLOP in all | A100-hours |"
    yield "|---|--:|--:|--:|--:|"
    for cost in costs:
        yield (
            f"| `{cost.name}` | {cost.operations_per_image / 1e9:.1f} "
            f"| {cost.num_images / 1e6:,.1f} million | {cost.total_operations / 1e18:.3g} "
            f"| {two_digits(cost.gpu_hours(operations_per_s))} |"
        )


def main(argv: Sequence[str]) -> None:
    """Print the table of some recipes, or of all that name a dataset."""
    folder = Path(__file__).parents[1] / "configs"
    all_recipes = [
        path for path in sorted(folder.glob("*.yaml")) if path.name.split("_")[0] in NUM_IMAGES
    ]
    try:
        recipe_paths = [Path(expanded(path_text)) for path_text in argv] or all_recipes
    except ValueError as error:
        say(f"error: {error}", to_stderr=True)
        sys.exit(2)
    if unknown_recipes := [
        path.name for path in recipe_paths if path.name.split("_")[0] not in NUM_IMAGES
    ]:
        say(
            f"error: {unknown_recipes[0]}: not named after one of {', '.join(NUM_IMAGES)}",
            to_stderr=True,
        )
        sys.exit(2)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
    console = make_console(stderr=True)
    with WholeProgress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        tracked_paths = progress.track(recipe_paths, description="counting")
        costs = [recipe_cost(config.load(path, methods=CONFIGS)) for path in tracked_paths]
    operations_per_s = a100_operations_per_s(folder)
    print(
        f"{operations_per_s / 1e12:.1f} TFLOP/s: "
        f"{RESNET50_IMAGES_PER_S:,.0f} images/s of ResNet-50\n"
    )
    print("\n".join(markdown_rows(costs, operations_per_s)))


if __name__ == "__main__":
    main(sys.argv[1:])
