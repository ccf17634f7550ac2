"""A trace of what a run did, by which two runs can be compared byte for byte.

At the same world size two runs are the same run if and only if their traces are equal; across
world sizes the sets of (id, pixels) of each step are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from vssl_dist import dist, durable
from vssl_dist.data.loader import Batch
from vssl_dist.run_folder import RunFolder


def pixel_digests(views: Sequence[Tensor]) -> list[str]:
    """Digest the pixels of all views of each image.

    Args:
        views: ``V`` tensors ``(B, 3, H, W)``.

    Returns:
        ``B`` hexadecimal digests of 16 characters.
    """
    view_arrays = [view.detach().cpu().contiguous().numpy() for view in views]
    digests = []
    for views_of_image in zip(*view_arrays, strict=True):
        pixel_digest = hashlib.blake2b(digest_size=8)
        for pixels in views_of_image:
            pixel_digest.update(pixels.tobytes())
        digests.append(pixel_digest.hexdigest())
    return digests


class TraceWriter:
    """Appends one JSON line per optimizer step of this rank to ``trace.rank<r>.jsonl``."""

    def __init__(self, folder: Path, restored_step: int) -> None:
        """Open the file, dropping the lines after ``restored_step``: they are done again."""
        self.path = RunFolder(folder).trace_path(dist.rank())
        folder.mkdir(parents=True, exist_ok=True)
        exists = self.path.is_file()
        lines = self.path.read_text(errors="replace").splitlines() if exists else []
        kept_lines = [line for line in lines if _step_of_trace_line(line) <= restored_step]
        durable.write_inside_folder(self.path, "".join(f"{line}\n" for line in kept_lines).encode())

    def write_step(
        self, step: int, position: int, loss: Tensor, micro_batches: Sequence[Batch]
    ) -> None:
        """Record the optimizer step that made ``step`` steps and ``position`` images in all.

        All ranks call this: the loss, a scalar, is averaged over them.
        """
        mean_loss = dist.mean_over_ranks({"loss": loss})["loss"]
        self._append(
            {
                "step": step,
                "position": position,
                "world_size": dist.world_size(),
                "loss": mean_loss.hex(),
                "ids": [int(image_id) for batch in micro_batches for image_id in batch.ids],
                "pixels": [
                    pixel_digest
                    for batch in micro_batches
                    for pixel_digest in pixel_digests(batch.views)
                ],
            }
        )

    def write_final(self, digests: Mapping[str, str]) -> None:
        """Record the digests of the whole final state."""
        self._append({"final": dict(digests)})

    def _append(self, record: Mapping[str, object]) -> None:
        durable.append_to_file(self.path, (json.dumps(record) + "\n").encode())


def _step_of_trace_line(line: str) -> float:
    """Return the step of a trace line; the final line and a torn one come after every step."""
    try:
        return float(json.loads(line).get("step", "inf"))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return float("inf")
