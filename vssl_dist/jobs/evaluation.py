"""The old path of `EvalJob`, which the pickles of queued evaluations name."""

from vssl_dist.jobs.evaluation_job import EvalJob

__all__ = ["EvalJob"]
