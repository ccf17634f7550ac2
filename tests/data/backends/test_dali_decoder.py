"""DALI's decoder alone shows what DALI's graph is given."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from tests.support.damage import alone
from tests.support.photos import crop
from tests.support.shards import encoded
from vssl_dist.data.backends.dali_decoder import DaliDecoder


def test_a_decoder_shows_one_picture_after_the_other() -> None:
    decode = DaliDecoder()
    for number in range(4):
        pixels = crop(number, 16, (20, 50))
        for kind in ("PNG", "JPEG"):
            data = encoded(Image.fromarray(pixels), kind)
            expected = np.asarray(Image.open(io.BytesIO(data))).astype(int)
            assert np.abs(decode(data).astype(int) - expected).mean() < 1
        with pytest.raises(ValueError, match="DALI does not decode it"):
            decode(data[: len(data) // 2])


def test_nobody_waits_for_torch_to_decode_a_picture() -> None:
    program = "import sys, vssl_dist.data.backends.dali_decoder; assert 'torch' not in sys.modules"
    assert alone(program).returncode == 0
