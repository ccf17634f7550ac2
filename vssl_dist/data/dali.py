"""Views with NVIDIA DALI: decoded once, on the CPU or with nvJPEG on the GPU; see `graph`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import pipeline_def
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor

from vssl_dist.data.backend import BackendSpec, Placement, UndecodableError
from vssl_dist.data.decoder import Node, decoded
from vssl_dist.data.graph import framed, only_decoded, views
from vssl_dist.data.operands import inputs, source_name
from vssl_dist.data.shards import Samples
from vssl_dist.data.views import Draws

Graph = Callable[[Node, BackendSpec], list[Node]]
Feed = Mapping[str, Any]


class DaliBackend:
    """See `Backend`."""

    def __init__(self, spec: BackendSpec) -> None:
        self._spec = spec
        self._placement = Placement(spec.device)
        self._views = _Runner(spec, self._placement.device, views)
        self._frames = _Runner(spec, self._placement.device, framed)

    def __call__(self, samples: Samples, draws: Sequence[Draws]) -> list[Tensor]:
        feed: dict[str, Any] = {}
        on_gpu = self._placement.device.type == "cuda"
        for number, (recipe, draw) in enumerate(zip(self._spec.recipes, draws, strict=True)):
            given = inputs(recipe, draw, on_gpu)
            feed |= {source_name(number, key): value for key, value in given.items()}
        with self._placement.scope():
            return self._views.run(samples.data, feed)

    def frame(self, samples: Samples, boxes: NDArray[np.float32]) -> Tensor:
        start, end = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        with self._placement.scope():
            return self._frames.run(samples.data, {"start": start, "end": end})[0]


class _Runner:
    """Runs one graph on batch after batch, synchronously: prefetching is the loader's job.

    DALI declares a pipeline invalid after any error, and does not say which image caused it.
    So after one the pipeline is thrown away and the images are decoded one by one.
    """

    def __init__(self, spec: BackendSpec, device: torch.device, graph: Graph) -> None:
        self._spec = spec
        self._device = device
        self._graph = graph
        self._pipeline: Any = None

    def run(self, data: Sequence[NDArray[np.uint8]], feed: Feed) -> list[Tensor]:
        if self._pipeline is None or self._pipeline.max_batch_size < len(data):
            self._pipeline = self._build(self._graph, len(data))
        try:
            return _run(self._pipeline, {"bytes": list(data)} | dict(feed), self._device)
        except (RuntimeError, ValueError, IndexError):
            self._pipeline = None
            reasons = self._undecodable(data)
            if not reasons:
                raise
            raise UndecodableError(reasons) from None

    def _build(self, graph: Graph, batch_size: int) -> Any:
        spec, on_gpu = self._spec, self._device.type == "cuda"

        @pipeline_def(  # type: ignore[untyped-decorator]
            batch_size=batch_size,
            num_threads=spec.threads,
            device_id=self._device.index if on_gpu else None,
            prefetch_queue_depth=1,
            enable_conditionals=True,
        )
        def assembled() -> tuple[Node, ...]:
            return tuple(graph(decoded(on_gpu), spec))

        pipeline = assembled()
        pipeline.build()
        return pipeline

    def _undecodable(self, data: Sequence[NDArray[np.uint8]]) -> dict[int, str]:
        reasons: dict[int, str] = {}
        probe = None
        for row, image in enumerate(data):
            probe = probe or self._build(only_decoded, 1)
            try:
                probe.feed_input("bytes", [image])
                probe.run()
            except (RuntimeError, ValueError, IndexError) as error:
                probe = None
                reasons[row] = _brief(error)
        return reasons


def _brief(error: Exception) -> str:
    """The line of DALI's report that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = [i + 1 for i, line in enumerate(lines[:-1]) if line.startswith("encountered")]
    return lines[after[0]] if after else lines[0]


def _run(pipeline: Any, feed: Feed, device: torch.device) -> list[Tensor]:
    for name, values in feed.items():
        pipeline.feed_input(
            name, values if isinstance(values, list) else np.ascontiguousarray(values)
        )
    results = []
    for output in pipeline.run():
        dense = output.as_tensor()
        # DALI reuses its buffers: the views must be copies.
        if device.type == "cpu":
            results.append(torch.from_numpy(np.array(dense)))
            continue
        view = torch.empty(dense.shape(), dtype=torch.float32, device=device)
        feed_ndarray(dense, view, cuda_stream=torch.cuda.current_stream(device))
        results.append(view)
    return results
