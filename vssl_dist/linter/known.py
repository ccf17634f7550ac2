"""What the data says of itself, for the rules that ask."""

from __future__ import annotations

from vssl_dist.config import RunConfig
from vssl_dist.data.shards import DataError, Dataset
from vssl_dist.linter.rule import Facts


def known(cfg: RunConfig, ranks: int) -> Facts:
    """What can be known of a run besides its configuration; less where the data is not here."""
    try:
        train = Dataset.open(cfg.data.train)
        held_out = Dataset.open(cfg.data.val) if cfg.data.val else None
    except DataError:
        return Facts(ranks)
    same = held_out is not None and held_out.fingerprint == train.fingerprint
    return Facts(ranks, train.samples, train.manifest.name, same)
