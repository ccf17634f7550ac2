"""Where evaluations that were queued by earlier versions look for what they run."""

from vssl_dist.jobs.evaluation_job import EvalJob

__all__ = ["EvalJob"]
