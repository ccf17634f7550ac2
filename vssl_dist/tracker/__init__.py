"""Numbers on their way to MLflow: a spool that never blocks, and one flusher per run.

Every process appends to its own file in ``RUN/spool``, which is the source of truth.  A flusher
replays those files into one MLflow run; it is a small process beside the trainer, because
mlflow's imports, its database and a server that hangs belong neither in the training loop nor
behind its interpreter lock.  Nothing here imports mlflow except ``replay`` and ``system``, which
run in that process only.
"""

from vssl_dist.tracker.context import check_tracking, default_tracking_uri, run_tags
from vssl_dist.tracker.flusher import Flusher, flush_once
from vssl_dist.tracker.spool import Spool, Status, flatten

__all__ = [
    "Flusher",
    "Spool",
    "Status",
    "check_tracking",
    "default_tracking_uri",
    "flatten",
    "flush_once",
    "run_tags",
]
