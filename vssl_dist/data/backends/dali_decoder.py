"""DALI's decoder alone, as trainings use it; importing it loads neither torch nor a graph."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types

from vssl_dist.data.backends.memory import is_out_of_memory

DaliNode = Any  # DALI is untyped; this is its DataNode, a symbolic tensor of the graph


def make_decoder_node(on_gpu: bool, jpeg_engine: str = "none") -> DaliNode:
    """Return the node that decodes the input ``bytes``, as it is stored, to RGB.

    Args:
        on_gpu: Whether nvJPEG decodes, or the CPU.
        jpeg_engine: Whether the GPU's JPEG engine takes ``all`` images that it can, or ``none``.
    """
    return fn.decoders.image(
        fn.external_source(name="bytes"),
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        # The GPU's JPEG engine and its kernels round differently.  All or none: of a share of each
        # batch, DALI's default, an image's pixels would depend on its place.
        hw_decoder_load=1.0 if jpeg_engine == "all" else 0.0,
        # As the CPU does it: else colours would differ between training and evaluation.
        jpeg_fancy_upsampling=True,
    )


class DaliDecoder:
    """Decodes single images on the CPU as a training's pipeline does."""

    def __init__(self) -> None:
        self._pipeline: Any = _build_decoding_pipeline()

    def __call__(self, data: bytes) -> NDArray[np.uint8]:
        """Return the image, ``(H, W, 3)`` uint8; it is overwritten by the next one.

        Raises:
            ValueError: DALI does not decode it.
            MemoryError: There is no memory left, or no thread.
        """
        try:
            self._pipeline = self._pipeline or _build_decoding_pipeline()
        except RuntimeError as error:  # it started before, so nothing but memory can be missing
            raise MemoryError("DALI does not start again") from error
        try:
            self._pipeline.feed_input("bytes", [np.frombuffer(data, np.uint8)])
            (image_batch,) = self._pipeline.run()
        except (RuntimeError, ValueError, IndexError) as error:
            self._pipeline = None  # DALI declares one invalid after any error
            if is_out_of_memory(error):
                raise MemoryError("DALI") from error
            raise ValueError("DALI does not decode it") from error
        image: NDArray[np.uint8] = image_batch.at(0)
        return image


def _build_decoding_pipeline() -> Any:
    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1
    )
    def assemble_outputs() -> DaliNode:
        return make_decoder_node(on_gpu=False)

    pipeline = assemble_outputs()
    pipeline.build()
    return pipeline
