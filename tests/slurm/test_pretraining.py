"""The whole path on a real SLURM: submitted by the command that users type."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from tests.slurm.conftest import ROOT, Cluster, wait_until
from tests.support.photos import tiny_dataset
from tests.support.refusals import refusal
from vssl_dist import config
from vssl_dist.environment import outside_jobs
from vssl_dist.jobs import slurm
from vssl_dist.jobs.resources import load_profile, resolve_for_slurm
from vssl_dist.jobs.training_job import TrainJob
from vssl_dist.logs import entry_as_terminal_text
from vssl_dist.methods import CONFIGS

pytestmark = pytest.mark.slurm

PROFILE = ROOT / "slurm" / "devcluster.yaml"
SAMPLES, BATCH, EPOCHS = 256, 32, 3
STEPS = SAMPLES * EPOCHS // BATCH
MILESTONES = [16, 24]


@pytest.fixture(scope="module")
def config_file(cluster: Cluster) -> Path:
    """SimSiam on 256 crops, evaluated after epoch 2 and at the end."""
    data = cluster.folder / "photos"
    train = tiny_dataset(data, samples=SAMPLES, shard_size=64)
    val = tiny_dataset(data, samples=64, shard_size=64, split="val", first=1000)
    text = {
        "trace": True,
        "log_every": 1,
        "vote_every": 1,
        "method": {"name": "simsiam", "backbone": "resnet18_c16"},
        "data": {
            "train": str(train),
            "val": str(val),
            "image_size": 32,
            "streams": 4,
            "window": 16,
            "threads": 1,
            "views": ["cifar", "cifar"],
        },
        "optim": {"base_lr": 0.05, "epochs": EPOCHS, "global_batch": BATCH},
        "engine": {"autocast": "none"},
        "evaluations": [{"task": "knn", "every_epochs": 2, "k": [5], "temperature": [0.1]}],
    }
    path = cluster.folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(text))
    return path


def test_a_run_on_two_nodes_is_preempted_requeued_finished_and_evaluated_beside(
    tracked: Cluster, config_file: Path
) -> None:
    submitted = tracked.submit("--nodes", "2", "--profile", str(PROFILE), str(config_file))
    assert submitted.returncode == 0, submitted.stderr
    job = re.findall(r"^job +(\d+) \(2 nodes x 2 ranks\)", submitted.stdout)[0]
    run = tracked.folder / "runs" / "tiny"
    assert str(run) in submitted.stdout
    log = run / "slurm" / f"{job}_0_log.out"

    wait_until(lambda: reached(log, 3), 120, f"three steps in {log}")
    again = tracked.submit("--nodes", "2", "--profile", str(PROFILE), str(config_file))
    assert again.returncode == 2
    assert f"SLURM job {job}" in again.stderr

    tracked.run("scancel", "--signal=USR2", job)
    wait_until(lambda: tracked.restarts(job) == 1, 60, "the requeue")
    wait_until(lambda: tracked.state(job) == "COMPLETED", 180, f"the end, see {log}")

    steps = [line.get("step") for line in trace(run, 0)]
    assert steps == [*range(1, STEPS + 1), None], "steps are lost or done twice"
    assert {len(trace(run, rank)) for rank in range(4)} == {STEPS + 1}
    assert len({trace(run, rank)[-1]["final"]["weights"] for rank in range(4)}) == 1

    results = [run / "export" / f"knn-{step:08d}.json" for step in MILESTONES]
    wait_until(lambda: all(path.exists() for path in results), 120, "the evaluations")
    in_mlflow(tracked, run)


def reached(log: Path, step: int) -> bool:
    return log.exists() and re.search(rf" INFO step +{step}/{STEPS} ", log.read_text()) is not None


def trace(run: Path, rank: int) -> list[dict[str, object]]:
    lines = (run / f"trace.rank{rank}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def in_mlflow(tracked: Cluster, run: Path) -> None:
    """One finished MLflow run with the whole curve, and k-NN at the steps of the exports."""
    client = MlflowClient(tracked.environment["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("vssl-dist")
    assert experiment is not None

    def steps(key: str) -> list[int]:
        return sorted(point.step for point in client.get_metric_history(run_id, key))

    found = client.search_runs([experiment.experiment_id])
    assert [r.info.run_name for r in found] == [run.name]
    run_id = found[0].info.run_id
    wait_until(lambda: steps("knn/top1") == MILESTONES, 60, "k-NN in MLflow")
    assert steps("train/loss") == list(range(1, STEPS + 1))
    assert found[0].info.status == "FINISHED"


def test_the_exact_command_for_eight_nodes_would_be_scheduled(cluster: Cluster) -> None:
    command = ("--nodes", "8", str(ROOT / "configs" / "in1k_vje.yaml"), "--dry-run")
    shown = cluster.submit(*command)
    assert shown.returncode == 0, shown.stderr
    _, shebang, script = shown.stdout.partition("#!/bin/bash")
    path = cluster.folder / "in1k.sh"
    path.write_text(shebang + script)
    tested = cluster.run("sbatch", "--test-only", str(path))
    assert tested.returncode == 0, tested.stderr
    assert "512 processors" in tested.stderr
    assert not (cluster.folder / "runs" / "in1k_vje").exists()


def test_what_slurm_refuses_is_one_line_and_leaves_the_run_free(
    tracked: Cluster, config_file: Path
) -> None:
    profile = tracked.folder / "bad.yaml"
    profile.write_text("partition: nosuch\ndevice: cpu\nranks_per_node: 2\n")
    arguments = ("--profile", str(profile), str(config_file), "name=refused")
    refused = tracked.submit(*arguments)
    assert refused.returncode == 2
    assert "partition" in refusal(refused.stderr)
    assert not (tracked.folder / "runs" / "refused" / "owner.json").exists()


def failed(cluster: Cluster, config_file: Path, name: str, *overrides: str) -> str:
    """The log that people follow, of a job that was submitted behind the launcher's checks."""
    run = cluster.folder / "runs" / name
    cfg = config.load(
        config_file, [f"out={run.parent}", f"name={name}", *overrides], methods=CONFIGS
    )
    launch = resolve_for_slurm(load_profile(PROFILE), 1, f"sqlite:///{cluster.folder}/{name}.db")
    parameters = slurm.train_parameters(cfg.name, launch)
    job = slurm.submit(run / "slurm", parameters, TrainJob(config.dump(cfg), launch))
    wait_until(lambda: cluster.state(job) == "FAILED", 90, "the failure")
    lines = (run / "slurm" / f"{job}_0_log.out").read_text().splitlines()
    return "\n".join(map(entry_as_terminal_text, lines))


def test_what_a_rank_refuses_fails_the_job_with_one_line(
    cluster: Cluster, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    absent = cluster.folder / "absent"
    said = failed(cluster, config_file, "refused_late", f"data.train={absent}")
    assert f"error: {absent}: no such folder of shards" in said
    assert "Traceback" not in said
    assert "exit code 2" in said


def test_a_crash_fails_the_job_and_its_traceback_is_in_the_log_that_people_follow(
    cluster: Cluster, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    in_the_way = cluster.folder / "runs" / "crashed" / "spool"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()
    said = failed(cluster, config_file, "crashed")
    assert "FileExistsError" in said
    assert "Traceback" in said


def test_a_session_on_a_node_runs_and_submits_like_a_login_node(
    tracked: Cluster, config_file: Path
) -> None:
    """In a terminal of ``srun --pty`` inside ``salloc``: neither is a job of ours."""
    submit = f"{sys.executable} {ROOT}/launch/submit.py {config_file} optim.max_steps=2"
    commands = (
        f"{submit} --local 1 name=in_session && "
        f"{submit} --nodes 1 --profile {PROFILE} name=from_session && env > variables"
    )
    session = f"salloc -N1 -n2 srun -n1 --pty bash -c '{commands}'"
    typed = tracked.run("script", "-qec", session, "/dev/null", timeout_s=240)
    assert typed.returncode == 0, typed.stdout
    job = re.findall(r"^job +(\d+) \(1 nodes x 2 ranks\)", typed.stdout, re.M)[0]
    wait_until(lambda: tracked.state(job) == "COMPLETED", 120, f"the end of {job}")
    runs = tracked.folder / "runs"
    for name in ("in_session", "from_session"):
        result = runs / name / "export" / "knn-00000002.json"
        wait_until(result.exists, 120, f"the evaluation of {name}")
    assert len(trace(runs / "from_session", 1)) == len(trace(runs / "in_session", 0)) == 3

    lines = (tracked.folder / "variables").read_text().splitlines()
    inside = {name: value for name, equals, value in (line.partition("=") for line in lines)}
    # TMPDIR is the node's, whoever works there.
    added = inside.keys() - tracked.environment.keys() - {"_", "TMPDIR", "OLDPWD"}
    assert {"SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_STEP_ID"} <= added
    assert not outside_jobs(inside).keys() & added
