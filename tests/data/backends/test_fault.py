"""A device that fails is never taken for damaged images, nor damaged images for such a device."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline
from PIL import Image

from bench.parity_cases import LEVEL_NORMALISATION, samples_of_files
from tests.support.damage import config, loader, memory_left, take
from tests.support.encoders import vast_png
from vssl_dist.config import ViewRecipe
from vssl_dist.data.backends.base import BackendSpec, UndecodableError
from vssl_dist.data.backends.build import build_backend
from vssl_dist.data.backends.fault import DeviceError, is_device_failure
from vssl_dist.data.backends.memory import error_cause
from vssl_dist.data.render import centre_crop_boxes

REPORT = """Critical error in pipeline:
Error in MIXED operator `nvidia.dali.fn.decoders.image`,
which was used in the pipeline definition with the following traceback:

  File "/home/me/CUDA out of memory/vssl/data/dali.py", line 85, in assembled
    image = fn.decoders.image(

encountered:

{}
Current pipeline object is no longer valid."""
OF_THE_DEVICE = [
    "CUDA runtime API error cudaErrorIllegalAddress (700):\nan illegal access was encountered",
    "CUDA runtime API error cudaErrorInsufficientDriver (35)",
    "CUDA driver API error CUDA_ERROR_ECC_UNCORRECTABLE (214):\nuncorrectable ECC error",
    "CUDA allocation failed",
    "Can't allocate 1048576 bytes on device 0.",
    "Can't allocate 1048576 bytes on host.",
    "nvml error (999): An nvml internal driver error occurred",
    "Nvml insufficient memory",
    "nvImageCodec failure: '#5'",
    "nvImageCodec failure: '#21'",
    "CUDA Runtime failure: '#719'",
    "NVJPEG_STATUS_ALLOCATOR_FAILURE",
    "allocator failure",
    "std::bad_alloc",
    "OpenCV(4.12.0) error: (-4:Insufficient memory) Failed to allocate 9000 bytes",
]
OF_AN_IMAGE = [
    "nvImageCodec failure: '#2'",
    "nvImageCodec failure: '#3'",
    "nvImageCodec failure: '#4'",
    "nvImageCodec failure: '#17'",
    "Failed to decode sample #0 : ",
    "NVJPEG_STATUS_BAD_JPEG",
]
DAMAGED = np.frombuffer(b"<html>no image</html>", np.uint8)


@pytest.mark.parametrize("text", OF_THE_DEVICE)
def test_what_dali_says_of_a_device_is_of_the_device(text: str) -> None:
    error = RuntimeError(REPORT.format(text))
    assert is_device_failure(error)
    assert error_cause(error) == text.replace("\n", " ")


@pytest.mark.parametrize("text", OF_AN_IMAGE)
def test_what_dali_says_of_an_image_is_not(text: str) -> None:
    assert not is_device_failure(RuntimeError(REPORT.format(text)))


def test_what_torch_says_of_a_device_is_of_the_device() -> None:
    assert is_device_failure(torch.OutOfMemoryError("tried to reserve 2 GiB"))
    assert is_device_failure(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert is_device_failure(MemoryError())
    assert not is_device_failure(ValueError("broken data stream when reading image file"))


def picture(side: int, mode: str = "RGB") -> NDArray[np.uint8]:
    stream = io.BytesIO()
    Image.new(mode, (side, side), "gray").save(stream, "JPEG")
    return np.frombuffer(stream.getvalue(), np.uint8)


@pytest.mark.parametrize("text", [OF_THE_DEVICE[0], "Failed to decode sample #0 : "])
def test_a_device_that_fails_for_good_is_named_and_no_image_is_replaced(
    text: str, sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it says so, or only fails to decode whatever it is given."""

    def fail(self: Pipeline) -> None:
        raise RuntimeError(REPORT.format(text))

    monkeypatch.setattr(Pipeline, "run", fail)
    with pytest.raises(DeviceError) as caught:
        take(loader(config(sound, "dali")), 1)
    assert str(caught.value).startswith(f"cpu: {error_cause(RuntimeError(REPORT.format(text)))} (")
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, UndecodableError)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_batch_of_damaged_images_alone_is_damage(device: str) -> None:
    samples = samples_of_files([picture(32).tobytes()] * 3)
    backend = build_backend(
        "dali", BackendSpec((ViewRecipe(),), 32, LEVEL_NORMALISATION, device=device)
    )
    samples.data[:] = [DAMAGED, DAMAGED[:0], picture(32)[:200]]
    for rows in (3, 1):
        samples.data[rows:] = []
        with pytest.raises(UndecodableError) as caught:
            backend.frame(samples, centre_crop_boxes(samples, 32)[:rows])
        assert sorted(caught.value.reasons) == list(range(rows))


@pytest.fixture(scope="module")
def huge() -> bytes:
    """An image of 252 MiB of pixels, in few bytes."""
    return picture(9_400, "L").tobytes()


@pytest.mark.parametrize("name", ["dali", "reference"])
def test_an_image_for_which_memory_ran_out_is_not_damaged(name: str, huge: bytes) -> None:
    images = {huge: 16 << 20}
    if name == "dali":  # it says of this one that it failed to decode it, and no more
        images[vast_png(4000, 6000)] = 100 << 20
    for image, left in images.items():
        samples = samples_of_files([image])
        backend = build_backend(name, BackendSpec((), 32, LEVEL_NORMALISATION))
        boxes = centre_crop_boxes(samples, 32)
        with memory_left(left), pytest.raises(DeviceError, match="cpu: "):
            backend.frame(samples, boxes)
        assert backend.frame(samples, boxes).shape == (1, 3, 32, 32)
