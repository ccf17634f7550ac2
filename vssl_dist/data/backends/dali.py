"""Views with NVIDIA DALI: decoded once, on the CPU or with nvJPEG on the GPU; see `graph`."""

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
from vssl_dist.data.backends.dali_decoder import Node, decoded
from vssl_dist.data.backends.dali_graph import (
    framed,
    only_decoded,
    views,
)
from vssl_dist.data.backends.dali_inputs import Feed, feed_of
from vssl_dist.data.backends.fault import (
    DeviceError,
    device_failed,
    sound_image,
)
from vssl_dist.data.backends.memory import brief
from vssl_dist.data.store.dataset import Samples
from vssl_dist.data.store.header import pixels
from vssl_dist.data.views import Draws

Graph = Callable[[Node, BackendSpec], list[Node]]
# What DALI throws; torch's own errors are RuntimeErrors.
_ERRORS = (RuntimeError, ValueError, IndexError, MemoryError)


class DaliBackend:
    """See `Backend`."""

    def __init__(self, spec: BackendSpec) -> None:
        self._spec = spec
        self._placement = Placement(spec.device)
        self._views = Runner(spec, self._placement.device, views)
        self._frames = Runner(spec, self._placement.device, framed)

    def __call__(self, samples: Samples, draws: Sequence[Draws]) -> list[Tensor]:
        with self._placement.scope():
            return self._views.run(samples.data, feed_of(self._spec, draws))

    def frame(self, samples: Samples, boxes: NDArray[np.float32]) -> Tensor:
        start, end = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        with self._placement.scope():
            return self._frames.run(samples.data, {"start": start, "end": end})[0]


class Runner:
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
        """What the graph makes of a batch.

        Args:
            data: B encoded images.
            feed: What else the graph takes, by name.

        Raises:
            UndecodableError: Some of the images are no images.
            DeviceError: The device failed, or memory ran out.
        """
        try:
            if self._pipeline is None or self._pipeline.max_batch_size < len(data):
                self._pipeline = self._build(self._graph, len(data))
            return _run(self._pipeline, {"bytes": list(data)} | dict(feed), self._device)
        except _ERRORS as error:
            self._pipeline = None
            self._raise_if_failed(error)
            reasons = self._undecodable(data)
            if not reasons:
                raise
            raise UndecodableError(reasons) from None

    def define(self, batch_size: int) -> Any:
        """The pipeline for up to ``batch_size`` images, of which nothing is built yet."""
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
            return tuple(graph(decoded(on_gpu), spec))

        return assembled()

    def _build(self, graph: Graph, batch_size: int) -> Any:
        pipeline = self._define(graph, batch_size)
        pipeline.build()
        return pipeline

    def _undecodable(self, data: Sequence[NDArray[np.uint8]]) -> dict[int, str]:
        """What is wrong with each image that does not decode, by row.

        Raises:
            DeviceError: A sound image does not decode either.
        """
        reasons: dict[int, str] = {}
        probe = None
        for row, image in enumerate([*data, sound_image()]):
            try:
                probe = probe or self._build(only_decoded, 1)
                probe.feed_input("bytes", [image])
                probe.run()
            except _ERRORS as error:
                self._raise_if_failed(error, pixels(image))
                if row == len(data):
                    raise DeviceError(self._device, brief(error)) from error
                probe = None
                reasons[row] = brief(error)
        return reasons

    def _raise_if_failed(self, error: Exception, pixels: int = 0) -> None:
        if device_failed(error, pixels):
            raise DeviceError(self._device, brief(error)) from error


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
