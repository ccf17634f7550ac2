"""shard.py called as a user calls it, and the line that it refuses with."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep import shard
from data_prep.images.encode import EncodedImage
from data_prep.images.examine import (
    DEFAULT_RULES,
    ImageRules,
    encode_to_store,
    examine_image,
)


def sharded(source: str, root: Path | str, out: Path, *options: object) -> int:
    """Shard ``root`` with one worker; returns the exit code."""
    arguments = [source, "--root", root, "--out", out, "--workers", 1, *options]
    return shard.main([str(a) for a in arguments])


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The one error on stderr, beside the progress bars."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1
    return lines[0].removeprefix("error: ")


def stored(data: bytes, rules: ImageRules = DEFAULT_RULES) -> EncodedImage:
    """What a shard is given of an image file that is not rejected."""
    return encode_to_store(data, examine_image(data, rules), rules)
