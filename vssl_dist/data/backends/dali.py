"""Views with NVIDIA DALI: decoded once, on the CPU or with nvJPEG on the GPU; see `dali_graph`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import pipeline_def
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor

from vssl_dist.data.backends.base import (
    BackendSpec,
    Placement,
    UndecodableError,
)
from vssl_dist.data.backends.dali_decoder import Node, decoder_node
from vssl_dist.data.backends.dali_graph import (
    decode_only_graph,
    frame_graph,
    view_graph,
)
from vssl_dist.data.backends.dali_inputs import Inputs, graph_inputs
from vssl_dist.data.backends.fault import (
    DeviceError,
    intact_jpeg,
    is_device_failure,
)
from vssl_dist.data.backends.memory import error_cause
from vssl_dist.data.store.dataset import Samples
from vssl_dist.data.store.header import pixel_count
from vssl_dist.data.views import Draws

Graph = Callable[[Node, BackendSpec], list[Node]]
# What DALI throws; torch's own errors are RuntimeErrors.
_ERRORS = (RuntimeError, ValueError, IndexError, MemoryError)


class DaliBackend:
    """A `Backend` of NVIDIA DALI, with one graph for views and one for frames."""

    def __init__(self, spec: BackendSpec) -> None:
        self._spec = spec
        self._placement = Placement(spec.device)
        self._views = Runner(spec, self._placement.device, view_graph)
        self._frames = Runner(spec, self._placement.device, frame_graph)

    def __call__(self, samples: Samples, draws: Sequence[Draws]) -> list[Tensor]:
        with self._placement.scope():
            return self._views.run(samples.data, graph_inputs(self._spec, draws))

    def frame(self, samples: Samples, boxes: NDArray[np.float32]) -> Tensor:
        start, end = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        with self._placement.scope():
            return self._frames.run(samples.data, {"start": start, "end": end})[0]


class Runner:
    """Runs one graph on batch after batch, synchronously: prefetching is done by `Prefetcher`.

    DALI declares a pipeline invalid after any error, and does not say which image caused it.
    So after an error the pipeline is thrown away and the images are decoded one by one.
    """

    def __init__(self, spec: BackendSpec, device: torch.device, graph: Graph) -> None:
        self._spec = spec
        self._device = device
        self._graph = graph
        self._pipeline: Any = None

    def run(self, data: Sequence[NDArray[np.uint8]], inputs: Inputs) -> list[Tensor]:
        """Run the graph on a batch.

        Args:
            data: B encoded images.
            inputs: All other inputs of the graph, by name.

        Raises:
            UndecodableError: Some of the files are no images.
            DeviceError: The device failed, or memory ran out.
        """
        try:
            if self._pipeline is None or self._pipeline.max_batch_size < len(data):
                self._pipeline = self._build(self._graph, len(data))
            return _run(self._pipeline, data, inputs, self._device)
        except _ERRORS as error:
            self._pipeline = None
            self._raise_if_failed(error)
            reasons = self._undecodable(data)
            if not reasons:
                raise
            raise UndecodableError(reasons) from None

    def define(self, batch_size: int) -> Any:
        """Return the pipeline for up to ``batch_size`` images without building it."""
        return self._define(self._graph, batch_size)

    def _define(self, graph: Graph, batch_size: int) -> Any:
        spec, on_gpu = self._spec, self._device.type == "cuda"

        @pipeline_def(  # type: ignore[untyped-decorator]
            batch_size=batch_size,
            num_threads=spec.threads,
            device_id=self._device.index if on_gpu else None,
            prefetch_queue_depth=1,
            enable_conditionals=True,
        )
        def assembled() -> tuple[Node, ...]:
            return tuple(graph(decoder_node(on_gpu), spec))

        return assembled()

    def _build(self, graph: Graph, batch_size: int) -> Any:
        pipeline = self._define(graph, batch_size)
        pipeline.build()
        return pipeline

    def _undecodable(self, data: Sequence[NDArray[np.uint8]]) -> dict[int, str]:
        """Decode the images one by one and return why some do not decode, by row.

        Raises:
            DeviceError: An intact image does not decode either.
        """
        reasons: dict[int, str] = {}
        pipeline = None
        for row, image in enumerate([*data, intact_jpeg()]):
            try:
                pipeline = pipeline or self._build(decode_only_graph, 1)
                pipeline.feed_input("bytes", [image])
                pipeline.run()
            except _ERRORS as error:
                self._raise_if_failed(error, pixel_count(image))
                if row == len(data):
                    raise DeviceError(self._device, error_cause(error)) from error
                pipeline = None  # invalid after the error
                reasons[row] = error_cause(error)
        return reasons

    def _raise_if_failed(self, error: Exception, pixels: int = 0) -> None:
        if is_device_failure(error, pixels):
            raise DeviceError(self._device, error_cause(error)) from error


def _run(
    pipeline: Any, data: Sequence[NDArray[np.uint8]], inputs: Inputs, device: torch.device
) -> list[Tensor]:
    pipeline.feed_input("bytes", list(data))
    for name, values in inputs.items():
        pipeline.feed_input(name, np.ascontiguousarray(values))
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
