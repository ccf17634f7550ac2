"""Views with NVIDIA DALI: decoded once, on the CPU or with nvJPEG on the GPU; see `dali_graph`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor

from vssl_dist.data.backends.base import (
    BackendSpec,
    DevicePlacement,
    UndecodableError,
)
from vssl_dist.data.backends.dali_decoder import DaliNode, make_decoder_node
from vssl_dist.data.backends.dali_graph import (
    PackedRows,
    all_views_graph,
    decoding_graph,
    resized_box_graph,
)
from vssl_dist.data.backends.dali_inputs import (
    GraphInputs,
    inputs_of_all_views,
    pack_inputs,
    packed_layout,
)
from vssl_dist.data.backends.fault import (
    DeviceError,
    is_device_failure,
    make_intact_jpeg,
)
from vssl_dist.data.backends.memory import error_cause
from vssl_dist.data.store.dataset import Samples
from vssl_dist.data.store.header import header_pixel_count
from vssl_dist.data.views import Draws

GraphFunction = Callable[[DaliNode, PackedRows, BackendSpec], list[DaliNode]]
# What DALI throws; torch's own errors are RuntimeErrors.
_DALI_ERRORS = (RuntimeError, ValueError, IndexError, MemoryError)


class DaliBackend:
    """A `Backend` of NVIDIA DALI, with one graph for views and one for frames."""

    def __init__(self, spec: BackendSpec) -> None:
        self._spec = spec
        self._placement = DevicePlacement(spec.device)
        self._view_runner = GraphRunner(spec, self._placement.device, all_views_graph)
        self._box_runner = GraphRunner(spec, self._placement.device, resized_box_graph)

    def __call__(self, samples: Samples, draws: Sequence[Draws]) -> list[Tensor]:
        with self._placement.scope():
            return self._view_runner.run(samples.data, inputs_of_all_views(self._spec, draws))

    def frame(self, samples: Samples, boxes: NDArray[np.float32]) -> Tensor:
        box_starts, box_ends = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        with self._placement.scope():
            return self._box_runner.run(samples.data, {"start": box_starts, "end": box_ends})[0]


class GraphRunner:
    """Runs one graph on batch after batch, synchronously: prefetching is done by `Prefetcher`.

    DALI declares a pipeline invalid after any error, and does not say which image caused it.
    So after an error the pipeline is thrown away and the images are decoded one by one.
    """

    def __init__(self, spec: BackendSpec, device: torch.device, graph: GraphFunction) -> None:
        self._spec = spec
        self._device = device
        self._graph = graph
        self._pipeline: Any = None

    def run(self, data: Sequence[NDArray[np.uint8]], input_arrays: GraphInputs) -> list[Tensor]:
        """Run the graph on a batch.

        Args:
            data: B encoded images.
            input_arrays: All other inputs of the graph, by name; the same ones at each call.

        Raises:
            UndecodableError: Some of the files are no images.
            DeviceError: The device failed, or memory ran out.
        """
        try:
            if self._pipeline is None or self._pipeline.max_batch_size < len(data):
                self._pipeline = self._build_pipeline(self._graph, len(data), input_arrays)
            return _run_pipeline(self._pipeline, data, input_arrays, self._device)
        except _DALI_ERRORS as error:
            self._pipeline = None
            self._raise_if_device_failed(error)
            reason_by_row = self._find_undecodable(data)
            if not reason_by_row:
                raise
            raise UndecodableError(reason_by_row) from None

    def define(self, batch_size: int, input_arrays: GraphInputs) -> Any:
        """Return the pipeline for up to ``batch_size`` images without building it."""
        return self._define_graph_pipeline(self._graph, batch_size, input_arrays)

    def _define_graph_pipeline(
        self, graph: GraphFunction, batch_size: int, input_arrays: GraphInputs
    ) -> Any:
        spec, on_gpu = self._spec, self._device.type == "cuda"
        layout = packed_layout(input_arrays)

        @pipeline_def(  # type: ignore[untyped-decorator]
            batch_size=batch_size,
            num_threads=spec.threads,
            device_id=self._device.index if on_gpu else None,
            prefetch_queue_depth=1,
            enable_conditionals=True,
        )
        def assemble_outputs() -> tuple[DaliNode, ...]:
            rows = PackedRows(fn.external_source(name="inputs"), layout)
            return tuple(graph(make_decoder_node(on_gpu, spec.jpeg_engine), rows, spec))

        return assemble_outputs()

    def _build_pipeline(
        self, graph: GraphFunction, batch_size: int, input_arrays: GraphInputs
    ) -> Any:
        pipeline = self._define_graph_pipeline(graph, batch_size, input_arrays)
        pipeline.build()
        return pipeline

    def _find_undecodable(self, data: Sequence[NDArray[np.uint8]]) -> dict[int, str]:
        """Decode the images one by one and return why some do not decode, by row.

        Raises:
            DeviceError: An intact image does not decode either.
        """
        reason_by_row: dict[int, str] = {}
        pipeline = None
        for row, image in enumerate([*data, make_intact_jpeg()]):
            try:
                pipeline = pipeline or self._build_pipeline(decoding_graph, 1, {})
                pipeline.feed_input("bytes", [image])
                pipeline.run()
            except _DALI_ERRORS as error:
                self._raise_if_device_failed(error, header_pixel_count(image))
                if row == len(data):
                    raise DeviceError(self._device, error_cause(error)) from error
                pipeline = None  # invalid after the error
                reason_by_row[row] = error_cause(error)
        return reason_by_row

    def _raise_if_device_failed(self, error: Exception, num_pixels: int = 0) -> None:
        if is_device_failure(error, num_pixels):
            raise DeviceError(self._device, error_cause(error)) from error


def _run_pipeline(
    pipeline: Any,
    data: Sequence[NDArray[np.uint8]],
    input_arrays: GraphInputs,
    device: torch.device,
) -> list[Tensor]:
    pipeline.feed_input("bytes", list(data))
    pipeline.feed_input("inputs", pack_inputs(input_arrays))
    view_tensors = []
    for dali_output in pipeline.run():
        dense_output = dali_output.as_tensor()
        # DALI reuses its buffers: the views must be copies.
        if device.type == "cpu":
            view_tensors.append(torch.from_numpy(np.array(dense_output)))
            continue
        view = torch.empty(dense_output.shape(), dtype=torch.float32, device=device)
        feed_ndarray(dense_output, view, cuda_stream=torch.cuda.current_stream(device))
        view_tensors.append(view)
    return view_tensors
