"""Bad images: none stops a run, none is shown as if it were sound."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.damage import BACKENDS, SHARD, config, flip, joined, loader, place, take
from tests.support.photos import crop
from tests.support.shards import Stored, encoded, rewritten, stored
from vssl_dist.data.store.dataset import Dataset


def photograph(height: int, width: int) -> Image.Image:
    return Image.fromarray(crop(1, 4, (64, 64))).resize((width, height))


def jpeg(image: Image.Image) -> bytes:
    return encoded(image, "JPEG")


WHOLE = photograph(32, 32)
DEEP = Image.fromarray(np.asarray(WHOLE.convert("L")).astype(np.uint16) * 257)
NO_IMAGES = {
    "half a jpeg": jpeg(WHOLE)[: len(jpeg(WHOLE)) // 2],
    "jpeg without its end": jpeg(WHOLE)[:-2],
    "header of a jpeg": jpeg(WHOLE)[:30],
    "half a png": encoded(WHOLE, "PNG")[:500],
    "empty": b"",
    "web page": b"<html><body>404 Not Found</body></html>",
    "noise": np.random.default_rng(0).bytes(700),
    "noise that begins like a jpeg": b"\xff\xd8\xff\xe0" + np.random.default_rng(1).bytes(700),
    "16-bit png": encoded(DEEP, "PNG"),
    "webp": encoded(WHOLE, "WEBP"),
    "bomb": encoded(WHOLE, "PNG")[:16] + b"\x00\x00\xea\x60" * 2 + encoded(WHOLE, "PNG")[24:],
    "one pixel for 32 x 32": jpeg(photograph(1, 1)),
    "a line for 32 x 32": jpeg(photograph(1, 5000)),
    "larger than the index says": jpeg(photograph(64, 64)),
    "turned": jpeg(photograph(33, 31)),
}
ODD_IMAGES = {
    "cmyk": Stored(jpeg(WHOLE.convert("CMYK")), "jpg", 32, 32, 1),
    "grey": Stored(jpeg(WHOLE.convert("L")), "jpg", 32, 32, 1),
    "palette png": Stored(encoded(WHOLE.convert("P"), "PNG"), "png", 32, 32, 1),
    "png with alpha": Stored(encoded(WHOLE.convert("RGBA"), "PNG"), "png", 32, 32, 1),
    "png named jpg": Stored(encoded(WHOLE, "PNG"), "jpg", 32, 32, 1),
    "one pixel": Stored(jpeg(photograph(1, 1)), "jpg", 1, 1, 1),
    "1 x 5000": Stored(jpeg(photograph(1, 5000)), "jpg", 1, 5000, 1),
    "5000 x 1": Stored(jpeg(photograph(5000, 1)), "jpg", 5000, 1, 1),
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_whatever_lies_there_instead_of_an_image_is_replaced_and_no_batch_is_lost(
    sound: Path, tmp_path: Path, backend: str
) -> None:
    # Every second one, so that each has a sound neighbour.
    wrong = dict(zip(range(1, 60, 2), NO_IMAGES.values(), strict=False))
    bad = rewritten(sound, tmp_path / "bad", wrong)
    expected, actual = loader(config(sound, backend)), loader(config(bad, backend))
    ids, _, pixels = joined(take(expected, 4))
    bad_ids, bad_labels, bad_pixels = joined(take(actual, 4))
    assert bad_ids == ids
    assert {s.planned for s in actual.substitutions} == set(wrong) & set(ids)
    assert all(s.reason.startswith("does not decode: ") for s in actual.substitutions)
    used = {s.planned: s.used for s in actual.substitutions}
    for row, sample in enumerate(ids):
        assert bad_labels[row] == used.get(sample, sample) % 4
        assert torch.equal(bad_pixels[row], pixels[row]) == (sample not in wrong)
        if sample in wrong:
            first = sample - sample % SHARD
            ring = [first + (sample + step) % SHARD for step in range(1, SHARD)]
            assert used[sample] == next(other for other in ring if other not in wrong)


@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_images_that_somehow_came_this_far_cost_nobody_a_batch(
    sound: Path, tmp_path: Path, backend: str
) -> None:
    odd = dict(enumerate(ODD_IMAGES.values()))
    bad = rewritten(sound, tmp_path / "odd", odd)
    ids, _, pixels = joined(take(loader(config(sound, backend)), 4))
    actual = loader(config(bad, backend))
    odd_ids, _, odd_pixels = joined(take(actual, 4))
    assert odd_ids == ids
    assert bool(odd_pixels.isfinite().all())
    assert actual.substitutions == []  # they decode, so they are shown
    for row, sample in enumerate(ids):
        assert torch.equal(odd_pixels[row], pixels[row]) == (sample not in odd)


def test_a_substitute_is_the_same_on_every_topology_and_after_a_resume(
    sound: Path, tmp_path: Path
) -> None:
    names = ["half a jpeg", "web page", "a line for 32 x 32"]
    bad = rewritten(sound, tmp_path / "bad", {i: NO_IMAGES[n] for i, n in enumerate(names, 20)})
    tar, offset, size = place(bad, 23)
    flip(tar, offset + size // 2)  # the next three of 20 are no substitutes either
    alone = loader(config(bad, "reference"))
    batches = take(alone, 8)
    expected = sorted((s.position, s.planned, s.used) for s in alone.substitutions)
    assert {(planned, used) for _, planned, used in expected} == {(i, 24) for i in (20, 21, 22, 23)}
    for world_size in (2, 4):
        ranks = [loader(config(bad, "reference"), rank, world_size) for rank in range(world_size)]
        rank_batches = [take(source, 8) for source in ranks]
        for step, whole in enumerate(batches):
            assert torch.equal(
                joined([batches[step] for batches in rank_batches])[2], joined([whole])[2]
            ), f"step {step} on {world_size} ranks"
        substitutions = [s for source in ranks for s in source.substitutions]
        assert sorted((s.position, s.planned, s.used) for s in substitutions) == expected
    for start in (1, 3, 5):
        resumed = loader(config(bad, "reference"))
        resumed.position = start * 16
        assert torch.equal(joined(take(resumed, 8 - start))[2], joined(batches[start:])[2])
        later = [(s.position, s.planned, s.used) for s in resumed.substitutions]
        assert sorted(later) == [entry for entry in expected if entry[0] > start * 16]


def test_what_an_index_claims_is_bounded_before_memory_is_given_to_it(
    sound: Path, tmp_path: Path
) -> None:
    image = stored(sound)[0][0].data
    claims = {5: (60_000, 60_000), 7: (0, 32), 9: (2**32 - 1, 2**32 - 1)}
    bad = rewritten(
        sound, tmp_path / "bad", {i: Stored(image, "png", *size, 0) for i, size in claims.items()}
    )
    samples = Dataset.open(bad).read_checked(np.array([5, 6, 7, 9]))
    assert [(s.planned, s.used) for s in samples.substitutions] == [(5, 6), (7, 8), (9, 10)]
    assert "claims 60000 x 60000 pixels" in samples.substitutions[0].reason
