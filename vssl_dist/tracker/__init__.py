"""Numbers on their way to MLflow: a spool that never blocks, and one flusher per run.

Every process appends to its own file in ``RUN/spool``, which is the source of truth.  A flusher
replays those files into one MLflow run; it is a small process beside the trainer, because
mlflow's imports, its database and a server that hangs belong neither in the training loop nor
behind its interpreter lock.  Nothing here imports mlflow except ``replay`` and ``system``, which
run in that process only.
"""

from vssl_dist.tracker.address import (
    EXPERIMENT_NAME,
    NO_TRACKING,
    check_tracking,
    default_tracking_uri,
    normalised_uri,
)
from vssl_dist.tracker.consent import why_not_sent_unasked
from vssl_dist.tracker.context import run_tags
from vssl_dist.tracker.cursor import is_flushed
from vssl_dist.tracker.files import why_no_locks
from vssl_dist.tracker.flusher import Flusher, flush_once, why_not_all_sent
from vssl_dist.tracker.identity import Identity, settle_identity, shell_word, stored_identity
from vssl_dist.tracker.look import probe_tracking
from vssl_dist.tracker.record import TrackingRecord, lease_holder
from vssl_dist.tracker.report import TrackingReport
from vssl_dist.tracker.spool import TRAINER_WRITERS, Spool, Status, flatten

__all__ = [
    "EXPERIMENT_NAME",
    "NO_TRACKING",
    "TRAINER_WRITERS",
    "Flusher",
    "Identity",
    "Spool",
    "Status",
    "TrackingRecord",
    "TrackingReport",
    "check_tracking",
    "default_tracking_uri",
    "flatten",
    "flush_once",
    "is_flushed",
    "lease_holder",
    "normalised_uri",
    "probe_tracking",
    "run_tags",
    "settle_identity",
    "shell_word",
    "stored_identity",
    "why_no_locks",
    "why_not_all_sent",
    "why_not_sent_unasked",
]
