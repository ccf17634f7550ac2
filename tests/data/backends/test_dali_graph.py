"""The graph of a GPU, as far as a machine without one can prove it.

It is defined as production defines it and held against the operators that DALI has kernels for;
and its GPU branch, whose arithmetic is another than the CPU's, runs on DALI's CPU kernels.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali.backend as registry
import pytest
import torch
from nvidia.dali import Pipeline, fn, types

from bench.parity import MAX_MEAN_DIFFERENCE
from bench.parity_cases import (
    ALL_OPERATIONS_RECIPE,
    LEVEL_NORMALISATION,
    OPERATION_DRAWS,
    ImageSet,
    identity_draws,
    recipe_draws,
    standard_image_sets,
)
from vssl_dist import config
from vssl_dist.config import ViewRecipe
from vssl_dist.data.backends.base import BackendSpec
from vssl_dist.data.backends.build import build_backend
from vssl_dist.data.backends.dali import GraphFunction, GraphRunner
from vssl_dist.data.backends.dali_decoder import DaliNode
from vssl_dist.data.backends.dali_graph import (
    PackedRows,
    all_views_graph,
    decoding_graph,
    resized_box_graph,
)
from vssl_dist.data.backends.dali_inputs import inputs_of_all_views
from vssl_dist.data.views import Draws, blur_window
from vssl_dist.methods import CONFIGS

ROOT = Path(__file__).parents[3]
CASES = {case.name: replace(case, side=min(case.side, 96)) for case in standard_image_sets()}
KERNELS = {
    "cpu": set(registry.RegisteredCPUOps()),
    "gpu": set(registry.RegisteredGPUOps()),
    "mixed": set(registry.RegisteredMixedOps()),
}


def specs() -> dict[BackendSpec, str]:
    """What the configs ask of a GPU, each set of views once, by one config that asks it."""
    by_views: dict[tuple[ViewRecipe, ...], tuple[BackendSpec, str]] = {}
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        data = config.load(path, methods=CONFIGS).data
        spec = BackendSpec(data.views, data.image_size, data.normalise, data.threads, "cuda")
        by_views.setdefault(data.views, (spec, path.stem))
    return dict(by_views.values())


SPECS = specs()
SHIPPED = sorted({recipe for spec in SPECS for recipe in spec.recipes}, key=repr)


def defined(spec: BackendSpec, graph: GraphFunction) -> Any:
    """The pipeline of a GPU: what production builds, and builds no further without a driver."""
    boxes = {name: np.zeros((8, 2), np.float32) for name in ("start", "end")}
    draws = [identity_draws(CASES["extremes"].samples).take([0] * 8) for _ in spec.recipes]
    inputs = inputs_of_all_views(spec, draws)
    runner = GraphRunner(spec, torch.device("cuda", 0), graph)
    pipeline = runner.define(8, boxes if graph is resized_box_graph else inputs)
    pipeline._build_graph()
    return pipeline


def flaws(pipeline: Any) -> list[str]:
    """Operators without a kernel for their device, and parameters that would come from a GPU."""
    problems = []
    for op in pipeline._ops:
        name = getattr(op._op, "schema_name", type(op._op).__name__)
        device = op._op.device
        if name not in KERNELS[device]:
            problems.append(f"{name} has no kernel for {device}")
        parameters = range(op.spec.NumRegularInput(), op.spec.NumInput())
        if any(op.spec.InputDevice(number) != "cpu" for number in parameters):
            problems.append(f"{name} takes a parameter from the GPU")
    return problems


@pytest.mark.parametrize("spec", SPECS, ids=SPECS.values())
def test_dali_has_a_kernel_for_all_that_a_recipe_does_on_a_gpu(spec: BackendSpec) -> None:
    for graph in (all_views_graph, resized_box_graph, decoding_graph):
        pipeline = defined(spec, graph)
        assert flaws(pipeline) == []
        assert "mixed" in {op._op.device for op in pipeline._ops}
        assert {node.device for node in pipeline._graph_outputs} == {"gpu"}


@pytest.mark.parametrize("spec", SPECS, ids=SPECS.values())
def test_a_batch_takes_two_feeds_however_many_views_there_are(
    spec: BackendSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    feeds: list[str] = []

    def count(pipeline: Pipeline, name: str, *args: Any, **kwargs: Any) -> None:
        feeds.append(name)
        feed_input(pipeline, name, *args, **kwargs)

    feed_input = Pipeline.feed_input
    monkeypatch.setattr(Pipeline, "feed_input", count)
    case = CASES["photographs"]
    backend = build_backend("dali", replace(spec, device="cpu"))
    backend(case.samples, [recipe_draws(case.samples, recipe) for recipe in spec.recipes])
    assert feeds == ["bytes", "inputs"]


@pytest.mark.parametrize(("engine", "load"), [("none", 0.0), ("all", 1.0)])
def test_the_jpeg_engine_takes_all_or_none_and_colours_are_those_of_a_cpu(
    engine: str, load: float
) -> None:
    spec = BackendSpec((ALL_OPERATIONS_RECIPE,), 32, LEVEL_NORMALISATION, 1, "cuda", engine)
    (decoder,) = [op for op in defined(spec, all_views_graph)._ops if op._op.device == "mixed"]
    arguments = decoder._op._init_args
    assert (arguments["hw_decoder_load"], arguments["jpeg_fancy_upsampling"]) == (load, True)


def test_what_a_gpu_cannot_do_is_noticed() -> None:
    spec = BackendSpec((ALL_OPERATIONS_RECIPE,), 32, LEVEL_NORMALISATION, 1, "cuda")

    def without_kernel(image: DaliNode, rows: PackedRows, spec: BackendSpec) -> list[DaliNode]:
        return [fn.power_spectrum(fn.cast(image, dtype=types.FLOAT))]

    assert flaws(defined(spec, without_kernel)) == ["PowerSpectrum has no kernel for gpu"]
    with pytest.raises(ValueError, match="must be on CPU"):  # the CPU's branch, on a GPU
        defined(replace(spec, device="cpu"), all_views_graph)


def difference(case: ImageSet, recipe: ViewRecipe, draws: Draws) -> float:
    """Mean difference between the GPU's branch, on the CPU, and the reference, in levels."""
    spec = BackendSpec((recipe,), case.side, LEVEL_NORMALISATION, 2, "cuda")
    runner = GraphRunner(spec, torch.device("cpu"), all_views_graph)
    (actual,) = runner.run(case.samples.data, inputs_of_all_views(spec, [draws]))
    (expected,) = build_backend("reference", replace(spec, device="cpu"))(case.samples, [draws])
    assert actual.shape == expected.shape
    return (actual - expected).abs().mean().item()


def fits(recipe: ViewRecipe, side: int) -> bool:
    reach = int(blur_window(recipe.blur_sigma[1])) // 2 if recipe.blur else 0
    return reach < (recipe.size or side)


@pytest.mark.parametrize("operation", OPERATION_DRAWS)
@pytest.mark.parametrize(
    "case",
    [
        "patches of 32",
        pytest.param("photographs", marks=pytest.mark.slow),
        pytest.param("extremes", marks=pytest.mark.slow),
    ],
)
def test_each_operation_of_the_gpu_branch_agrees_with_the_reference(
    case: str, operation: str
) -> None:
    draws = OPERATION_DRAWS[operation](identity_draws(CASES[case].samples))
    assert difference(CASES[case], ALL_OPERATIONS_RECIPE, draws) < MAX_MEAN_DIFFERENCE / 2


@pytest.mark.parametrize("recipe", SHIPPED, ids=range(len(SHIPPED)))
@pytest.mark.parametrize(
    "case",
    [
        "photographs",
        pytest.param("patches of 32", marks=pytest.mark.slow),
        pytest.param("extremes", marks=pytest.mark.slow),
    ],
)
def test_each_recipe_of_the_configs_agrees_with_the_reference(
    case: str, recipe: ViewRecipe
) -> None:
    images = CASES[case]
    if not fits(recipe, images.side):
        pytest.skip("no view of this size can be blurred this far")
    assert (
        difference(images, recipe, recipe_draws(images.samples, recipe)) < MAX_MEAN_DIFFERENCE / 2
    )


def test_the_two_branches_are_two() -> None:
    case = CASES["patches of 32"]
    draws = recipe_draws(case.samples, ALL_OPERATIONS_RECIPE)
    views = []
    for device in ("cpu", "cuda"):
        spec = BackendSpec((ALL_OPERATIONS_RECIPE,), case.side, LEVEL_NORMALISATION, 2, device)
        feed = inputs_of_all_views(spec, [draws])
        views.append(
            GraphRunner(spec, torch.device("cpu"), all_views_graph).run(case.samples.data, feed)[0]
        )
    assert not torch.equal(*views)
