"""Where jobs that were queued by earlier versions look for what they run."""

from vssl_dist.jobs.training_job import TrainJob

__all__ = ["TrainJob"]
