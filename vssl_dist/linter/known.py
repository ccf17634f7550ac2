"""What the data says of itself, for the rules that ask."""

from __future__ import annotations

from functools import partial

from vssl_dist.config import RunConfig
from vssl_dist.data.opening import open_watched
from vssl_dist.data.shards import DataError
from vssl_dist.linter.rule import Facts


def known(cfg: RunConfig, ranks: int) -> Facts:
    """What can be known of a run besides its configuration; less where the data is not here."""
    opened = partial(open_watched, timeout_s=cfg.data.timeout_s, who="submit.py")
    try:
        train = opened(cfg.data.train)
        held_out = opened(cfg.data.val) if cfg.data.val else None
    except DataError:
        return Facts(ranks)
    same = held_out is not None and held_out.fingerprint == train.fingerprint
    return Facts(ranks, train.samples, train.manifest.name, same)
