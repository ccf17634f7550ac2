"""The old path of `TrainJob`, which the pickles of queued jobs name."""

from vssl_dist.jobs.training_job import TrainJob

__all__ = ["TrainJob"]
