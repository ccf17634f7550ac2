"""Numbers on their way to MLflow: a spool that never blocks, and one flusher per run.

Every process appends to its own file in ``RUN/spool``, which is the source of truth.  A flusher
replays those files into one MLflow run; it is a small process beside the trainer, because
mlflow's imports, its database and a server that hangs belong neither in the training loop nor
behind its interpreter lock.  Nothing here imports mlflow except ``replay`` and ``system``, which
run in that process only.
"""

from vssl_dist.tracker.address import (
    EXPERIMENT,
    NOWHERE,
    check_tracking,
    default_tracking_uri,
    normal,
)
from vssl_dist.tracker.consent import why_not_asked_for
from vssl_dist.tracker.context import run_tags
from vssl_dist.tracker.cursor import flushed
from vssl_dist.tracker.files import why_no_locks
from vssl_dist.tracker.flusher import Flusher, flush_once, shortfall
from vssl_dist.tracker.identity import Identity, in_shell, peek, settle
from vssl_dist.tracker.look import Answer, look
from vssl_dist.tracker.record import Record, holder
from vssl_dist.tracker.spool import TRAINER, Spool, Status, flatten

__all__ = [
    "EXPERIMENT",
    "NOWHERE",
    "TRAINER",
    "Answer",
    "Flusher",
    "Identity",
    "Record",
    "Spool",
    "Status",
    "check_tracking",
    "default_tracking_uri",
    "flatten",
    "flush_once",
    "flushed",
    "holder",
    "in_shell",
    "look",
    "normal",
    "peek",
    "run_tags",
    "settle",
    "shortfall",
    "why_no_locks",
    "why_not_asked_for",
]
