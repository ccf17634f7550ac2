"""Start one run, on SLURM or on this machine.

    python launch/submit.py --nodes 8 configs/in1k_vje.yaml
    python launch/submit.py --local configs/quickstart.yaml optim.epochs=20

What can be known to be wrong is refused here, before anything is written or submitted.
The same command continues a run that was stopped.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

import torch

from vssl_dist import config
from vssl_dist.cli.places import shipped
from vssl_dist.cli.program import arguments as typed
from vssl_dist.config import RunConfig
from vssl_dist.console.endings import end_in_one_line
from vssl_dist.durable import write_inside_folder
from vssl_dist.errors import ConfigError
from vssl_dist.installed import command_line
from vssl_dist.jobs import (
    local,
    owner,
    preflight,
    private,
    slurm,
)
from vssl_dist.jobs.evaluation_job import pending_evaluations
from vssl_dist.jobs.evaluation_queue import EvaluationSpawner
from vssl_dist.jobs.resources import (
    Launch,
    dump_launch,
    load_profile,
    resolve_for_slurm,
    resolve_for_this_machine,
)
from vssl_dist.jobs.training_job import TrainJob
from vssl_dist.linter import lint
from vssl_dist.methods import CONFIGS
from vssl_dist.resume import check_resumable
from vssl_dist.run_folder import RunFolder
from vssl_dist.text import say
from vssl_dist.tracker import (
    NO_TRACKING,
    TRAINER_WRITERS,
    default_tracking_uri,
    shell_word,
    why_not_all_sent,
)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse what the user typed; what is wrong with it ends the program with exit code 2."""
    return typed("submit", argv)


def resolve_run(args: argparse.Namespace) -> tuple[RunConfig, Launch]:
    """Read config and profile, and resolve them to a run and its launch.

    Raises:
        ConfigError: One line that names the key and the remedy.
    """
    is_local = args.local is not None
    cfg = preflight.with_installed_backend(
        config.load(args.config, args.overrides, methods=CONFIGS)
    ).absolute()
    profile = load_profile(args.profile or shipped("slurm", "local" if is_local else "default"))
    uri = default_tracking_uri()
    if is_local:
        launch = resolve_for_this_machine(
            profile, args.local or None, _usable_gpu_count(cfg.data.streams), uri
        )
    else:
        launch = resolve_for_slurm(profile, args.nodes or 1, uri)
        slurm.check_script_path(cfg.dir)
    try:
        cfg.micro_batch(launch.world_size)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    preflight.check_backbone(cfg)
    return cfg, launch


def _usable_gpu_count(streams: int) -> int:
    """Return how many of this machine's GPUs can share the streams evenly."""
    num_gpus = torch.cuda.device_count()
    return next((count for count in range(num_gpus, 0, -1) if streams % count == 0), 0)


def print_dry_run(cfg: RunConfig, launch: Launch) -> None:
    """Print the config and the batch script, as a dry run does."""
    say(f"# {RunFolder(cfg.dir).config_path}", *config.dump(cfg).splitlines(), "")
    images = cfg.micro_batch(launch.world_size)
    say(f"# {images} image{'s' if images > 1 else ''} per rank at a time")
    if launch.cluster == "slurm":
        parameters = slurm.train_parameters(cfg.name, launch)
        say(*slurm.batch_script_text(RunFolder(cfg.dir).slurm_folder, parameters).splitlines())
    else:
        ranks = f"{launch.world_size} rank{'s' if launch.world_size > 1 else ''}"
        say(f"# would start {ranks} on this machine ({launch.device})")


def write_run_files(cfg: RunConfig, launch: Launch) -> None:
    """Write config and launch into the run folder, for ranks and evaluations to read."""
    write_inside_folder(RunFolder(cfg.dir).config_path, config.dump(cfg).encode())
    write_inside_folder(RunFolder(cfg.dir).launch_path, dump_launch(launch).encode())


def update_finished_run(cfg: RunConfig, launch: Launch) -> None:
    """Write the evaluations that are asked for now into the folder of a finished run."""
    owner.claim(cfg.dir, slurm.is_job_live)
    try:
        write_run_files(cfg, launch)
    finally:
        owner.release(cfg.dir)


def start_run(cfg: RunConfig, launch: Launch, num_samples: int) -> int:
    """Claim the run folder and start the run; see `jobs.local.run_local` for the exit codes.

    Args:
        cfg: The run.
        launch: Machines and ranks.
        num_samples: Number of training images.
    """
    owner.claim(cfg.dir, slurm.is_job_live)
    try:
        write_run_files(cfg, launch)
        if launch.cluster == "local":
            say(f"run folder  {cfg.dir}", f"logs        {RunFolder(cfg.dir).logs_folder}")
            code = local.run_local(cfg.dir, launch)
            if code == 0:
                say_finished(cfg, launch, num_samples)
            elif line := why_not_all_sent(cfg.dir, launch.tracking_uri, TRAINER_WRITERS):
                print_warnings([line])
            return code
        job = slurm.submit(
            RunFolder(cfg.dir).slurm_folder,
            slurm.train_parameters(cfg.name, launch),
            TrainJob(config.dump(cfg), launch),
        )
        owner.transfer_to_job(cfg.dir, job)
    finally:
        owner.release(cfg.dir)
    say(
        f"job         {job} ({launch.nodes} nodes x {launch.ranks_per_node} ranks)",
        f"run folder  {cfg.dir}",
        f"follow      tail -F {RunFolder(cfg.dir).slurm_log_path(job)}",
        f"            squeue -j {job}",
        f"curves      {_curves_hint(cfg, launch)}",
    )
    return 0


def _curves_hint(cfg: RunConfig, launch: Launch) -> str:
    uri = launch.tracking_uri
    if uri == NO_TRACKING:
        return f"{command_line('launch/track.py')} {shell_word(cfg.dir)} --to URI, then mlflow ui"
    return uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {shlex.quote(uri)}"


def say_finished(cfg: RunConfig, launch: Launch, num_samples: int) -> None:
    """Say where everything of a finished run is; starts evaluations that are still missing."""
    missing_evaluations = list(pending_evaluations(cfg, num_samples))
    say(f"{cfg.name} is finished; another name=... starts a new run")
    say(f"exports     {RunFolder(cfg.dir).export_folder.path}")
    if missing_evaluations:
        EvaluationSpawner(cfg.dir, launch.cluster).start()
        log = RunFolder(cfg.dir).evaluations_log_path
        say(f"evaluations {len(missing_evaluations)} still to come, see {log}")
    say(f"results     {command_line('launch/evaluate.py')} {shell_word(cfg.dir)}")
    say(f"curves      {_curves_hint(cfg, launch)}")
    if launch.tracking_uri != NO_TRACKING and (
        line := why_not_all_sent(cfg.dir, launch.tracking_uri, TRAINER_WRITERS)
    ):
        say(f"warning: {line}")


def print_warnings(lines: Sequence[str]) -> None:
    """Print warnings on stderr: what may be wrong and is no reason to refuse."""
    for line in lines:
        say(f"warning: {line}", to_stderr=True)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns 0, 1 (a rank failed), 2 (refused) or 130 (stopped by Ctrl-C)."""
    args = arguments(argv)
    with end_in_one_line() as ending:
        ending.exit_code = submit(args)
    return ending.exit_code


def submit(args: argparse.Namespace) -> int:
    """Check everything, then show the run, start it here or submit it; returns the exit code.

    Raises:
        Refusal: What is wrong, before anything is written or submitted.
    """
    cfg, launch = resolve_run(args)
    preflight_checks = preflight.Preflight(cfg, launch)
    remaining_problems = preflight_checks.problems()
    # A dry run lists all problems, a real one ends with the first that is found.
    if not args.dry_run and (problem := next(remaining_problems, "")):
        raise ConfigError(problem)
    found_problems = list(remaining_problems)
    tracking_report = preflight.probe_run_tracking(cfg, launch)
    if tracking_report.problem and not args.dry_run:
        raise ConfigError(tracking_report.problem)
    findings = lint(cfg, preflight_checks.facts())
    num_done_steps = (
        0 if found_problems else check_resumable(cfg, launch.world_size, preflight_checks.train)
    )
    warnings = [
        *found_problems,
        *filter(
            None, (tracking_report.problem, tracking_report.passing_problem, tracking_report.note)
        ),
    ]
    warnings += [finding.line() for finding in findings]
    if args.dry_run:
        if not found_problems:
            warnings += private.survey_permissions(cfg.dir).warning_lines(cfg.dir)
        print_warnings(warnings)
        print_dry_run(cfg, launch)
        return 0
    owner.check_free(cfg.dir, slurm.is_job_live)
    num_samples = preflight_checks.train.samples
    if num_done_steps and num_done_steps >= cfg.total_steps(num_samples):
        if any(pending_evaluations(cfg, num_samples)):
            update_finished_run(cfg, launch)
        say_finished(cfg, launch, num_samples)
        return 0
    print_warnings(warnings)
    return start_run(cfg, launch, num_samples)
