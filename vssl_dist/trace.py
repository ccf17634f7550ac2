"""What a run did, in a form in which two runs can be compared byte for byte.

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
    """One digest per image over the pixels of all its views.

    Args:
        views: ``V`` tensors ``(B, 3, H, W)``.

    Returns:
        ``B`` hexadecimal digests of 16 characters.
    """
    arrays = [view.detach().cpu().contiguous().numpy() for view in views]
    digests = []
    for row in zip(*arrays, strict=True):
        digest = hashlib.blake2b(digest_size=8)
        for pixels in row:
            digest.update(pixels.tobytes())
        digests.append(digest.hexdigest())
    return digests


class Trace:
    """Appends one JSON line per optimizer step of this rank to ``trace.rank<r>.jsonl``."""

    def __init__(self, folder: Path, restored_step: int) -> None:
        """Open the file, dropping the lines after ``restored_step``: they are done again."""
        self.path = RunFolder(folder).trace(dist.rank())
        folder.mkdir(parents=True, exist_ok=True)
        known = self.path.is_file()
        lines = self.path.read_text(errors="replace").splitlines() if known else []
        kept = [line for line in lines if _step(line) <= restored_step]
        durable.publish_inside(self.path, "".join(f"{line}\n" for line in kept).encode())

    def step(self, step: int, position: int, loss: Tensor, batches: Sequence[Batch]) -> None:
        """Record the optimizer step that made ``step`` steps and ``position`` images in all.

        All ranks call this: the loss, a scalar, is averaged over them.
        """
        mean = dist.mean_over_ranks({"loss": loss})["loss"]
        self._append(
            {
                "step": step,
                "position": position,
                "world_size": dist.world_size(),
                "loss": mean.hex(),
                "ids": [int(i) for batch in batches for i in batch.ids],
                "pixels": [d for batch in batches for d in pixel_digests(batch.views)],
            }
        )

    def final(self, digests: Mapping[str, str]) -> None:
        """Record the digests of the whole final state."""
        self._append({"final": dict(digests)})

    def _append(self, record: Mapping[str, object]) -> None:
        durable.append(self.path, (json.dumps(record) + "\n").encode())


def _step(line: str) -> float:
    """The step of a trace line; the final line and a torn one come after every step."""
    try:
        return float(json.loads(line).get("step", "inf"))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return float("inf")
