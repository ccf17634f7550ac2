"""Jobs that earlier versions submitted and that start under this one.

The files in queued_by_e7b1e18/ were written by submitit with the code of that commit: a training of
configs/quickstart.yaml on two nodes of slurm/default.yaml, and an evaluation of its export.
"""

from __future__ import annotations

from pathlib import Path

from submitit.core.utils import DelayedSubmission

from vssl_dist import config
from vssl_dist.config import KnnConfig, read_task
from vssl_dist.jobs.evaluation_job import EvalJob
from vssl_dist.jobs.resources import Resources, resolve_for_slurm
from vssl_dist.jobs.training_job import TrainJob
from vssl_dist.methods import CONFIGS

QUEUED = Path(__file__).parent / "queued_by_e7b1e18"


def test_a_queued_training_is_the_run_and_the_launch_that_were_submitted() -> None:
    job = DelayedSubmission.load(QUEUED / "train.pkl").function
    assert type(job) is TrainJob
    profile = Resources(cpus_per_rank=8)
    submitted = resolve_for_slurm(profile, 2, "http://tracker:5000")
    assert job.launch.model_dump() == submitted.model_dump()
    cfg = config.loads(job.config_yaml, methods=CONFIGS)
    assert (cfg.name, cfg.optim.epochs, cfg.dir) == ("quickstart", 9, Path("/runs/quickstart"))
    assert job.checkpoint().function == job


def test_a_queued_evaluation_is_the_task_that_was_submitted() -> None:
    job = DelayedSubmission.load(QUEUED / "evaluation.pkl").function
    run = Path("/runs/quickstart")
    assert type(job) is EvalJob
    assert (job.run_dir, job.step, job.export.parent) == (run, 600, run / "export")
    task = read_task(job.task_json)
    assert isinstance(task, KnnConfig)
    assert task.k == (20,)
