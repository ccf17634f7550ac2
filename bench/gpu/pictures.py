"""JPEG decoding on a GPU: how fast, how near to the CPU's, and what damage does to a batch."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from bench.gpu.section import Results, Setting, as_error
from bench.parity import backend_difference
from bench.parity_cases import recipe_draws, standard_image_sets
from bench.shard import photograph_cuts
from vssl_dist.config import RECIPES

_SIZE = (375, 500)
Files = Sequence[NDArray[np.uint8]]


def _jpegs(count: int) -> list[NDArray[np.uint8]]:
    files = []
    for cut in photograph_cuts(count, _SIZE):
        stream = io.BytesIO()
        Image.fromarray(cut).save(stream, "JPEG", quality=95)
        files.append(np.frombuffer(stream.getvalue(), np.uint8))
    return files


def _decoder(files: Files, threads: int, device: str, **options: Any) -> Any:
    """A pipeline that decodes ``files`` again and again, and nothing else."""
    on_gpu = device == "cuda"

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=len(files), num_threads=threads, device_id=0 if on_gpu else None
    )
    def pipeline() -> Any:
        encoded = fn.external_source(source=lambda: files, batch=True)
        decoder_device = "mixed" if on_gpu else "cpu"
        return fn.decoders.image(encoded, device=decoder_device, output_type=types.RGB, **options)

    built = pipeline()
    built.build()
    return built


def _loads(device: str) -> list[dict[str, float]]:
    """Options of the decoder: shares of the JPEG engine, which only a GPU has."""
    return [{"hw_decoder_load": load} for load in (1.0, 0.0)] if device == "cuda" else [{}]


def time_decoding(setting: Setting) -> Results:
    """Images per second of the decoder alone, and the cores that it keeps busy."""
    batches, thread_counts = ((4,), (1,)) if setting.is_dry else ((256, 32), (8, 4, 16, 2))
    rounds = 2 if setting.is_dry else 20
    files = _jpegs(max(batches))
    for batch, threads, options in product(batches, thread_counts, _loads(setting.device)):
        if setting.is_over:
            return
        title = f"batch {batch}, {threads} threads, {options}"
        try:
            pipeline = _decoder(files[:batch], threads, setting.device, **options)
            for _ in range(3):
                pipeline.run()
            setting.synchronise()
            start, cpu_start = time.perf_counter(), time.process_time()
            for _ in range(rounds):
                pipeline.run()
            setting.synchronise()
            seconds = time.perf_counter() - start
            cores = (time.process_time() - cpu_start) / seconds
            yield title, {"images_per_s": batch * rounds / seconds, "cores": cores}
        except Exception as error:
            yield title, as_error(error)


def compare_pictures(setting: Setting) -> Results:
    """Decoded pixels: against Pillow's, by place in the batch, and beside a damaged image."""
    files = _jpegs(4 if setting.is_dry else 32)
    pillow = [np.asarray(Image.open(io.BytesIO(file.tobytes())).convert("RGB")) for file in files]
    for options, fancy in product(_loads(setting.device), (True, False)):
        every_option: dict[str, Any] = options | {"jpeg_fancy_upsampling": fancy}
        yield (
            f"levels from Pillow, {every_option}",
            _mean_levels(_decoded(files, setting.device, every_option), pillow),
        )
    for options in _loads(setting.device):
        straight = _decoded(files, setting.device, options)
        backwards = _decoded(files[::-1], setting.device, options)[::-1]
        alone = [_decoded([file], setting.device, options)[0] for file in files[:4]]
        yield (
            f"same pixels at every place, {options}",
            (
                all(map(np.array_equal, straight, backwards))
                and all(map(np.array_equal, straight, alone))
            ),
        )
        yield f"a batch with damage, {options}", _damaged_batch(files, straight, setting, options)
    case = standard_image_sets()[0]
    for name in ("moco_v2", "byol_2"):
        if setting.is_over:
            return
        draws = recipe_draws(case.samples, RECIPES[name])
        mean, greatest = backend_difference(case, RECIPES[name], draws, setting.device)
        yield f"views of {name} from the reference's", {"mean": mean, "greatest": greatest}


def _decoded(files: Files, device: str, options: dict[str, Any]) -> list[NDArray[np.uint8]]:
    pipeline = _decoder(files, len(os.sched_getaffinity(0)), device, **options)
    (images,) = pipeline.run()
    host = images.as_cpu() if device == "cuda" else images
    return [np.array(host.at(number)) for number in range(len(files))]


def _mean_levels(ours: Files, theirs: Files) -> float:
    return float(
        np.mean([np.abs(a.astype(np.int16) - b).mean() for a, b in zip(ours, theirs, strict=True)])
    )


def _damaged_batch(
    files: Files, whole: Files, setting: Setting, options: dict[str, Any]
) -> dict[str, Any]:
    """What a cut-off JPEG does: the error, or whether its neighbours are what they were."""
    damaged = [files[0][: len(files[0]) // 3], *files[1:]]
    try:
        images = _decoded(damaged, setting.device, options)
    except RuntimeError as error:
        after = _decoded(files, setting.device, options)
        text = " ".join(str(error).split())
        return {
            "refused": text[:300],
            "decodes afterwards": all(map(np.array_equal, after, whole)),
        }
    return {"neighbours unchanged": all(map(np.array_equal, images[1:], whole[1:]))}
