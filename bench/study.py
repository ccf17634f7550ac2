"""A study: many runs, one factor at a time from a base point, and one page of their results.

    python -m bench.study bench/studies/photographs.yaml --dry-run
    python -m bench.study bench/studies/photographs.yaml

Every run is `launch/submit.py --local` and `launch/evaluate.py`, as a user would start them.  The
page (docs/study_NAME.md and .png) is written anew after each.  The same command goes on after a
kill: what is finished is not done again, a result that is torn is, and a run that was begun
continues from its checkpoint.  A run that diverges is a finding and not an end.

Started more than once (each on cores or GPUs of its own, by `taskset` or CUDA_VISIBLE_DEVICES),
the processes share the runs between them:

    taskset -c 0 python -m bench.study bench/studies/photographs.yaml --ranks 1 &
    taskset -c 1 python -m bench.study bench/studies/photographs.yaml --ranks 1
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before what a bare Python cannot import
    from vssl_dist.installed import require_packages

    require_packages()

from bench import study_report
from bench.study_log import RunLog, claimed_run, commit_name, describe_machine
from bench.study_picture import draw_picture
from bench.study_plan import Study, Trial, plan_trials, read_study
from bench.study_report import RunOutcome, SettingKey
from vssl_dist import config
from vssl_dist.commands import evaluate, submit
from vssl_dist.config import RunConfig
from vssl_dist.config.differences import differences, named
from vssl_dist.config.paths import literal, path_argument
from vssl_dist.durable import write_durably
from vssl_dist.errors import ConfigError, DataError
from vssl_dist.evaluation.figures.plots import render_png
from vssl_dist.methods import CONFIGS
from vssl_dist.run_folder import RunFolder
from vssl_dist.text import say

DIVERGED_TROUBLE = "diverged"


class RunRefused(Exception):
    """A run could not be started or failed; the argument is its exit code."""


def read_outcome(study: Study, trial: Trial) -> RunOutcome:
    """Read how far a run has come.

    Raises:
        ConfigError: Its folder holds another experiment than the study file now says.
    """
    if not RunFolder(trial.cfg.dir).config_path.exists():
        return RunOutcome(None)
    _check_unchanged(trial)
    notes = RunLog(trial).read()
    trouble = notes.get("trouble", "")
    results = None if trouble else trial.results()
    return RunOutcome(
        None if results is None else study_report.read_figures(study, results),
        trouble,
        seconds=notes.get("seconds", 0.0),
        # A run that notes itself as running while nobody is at it was killed.
        whole=not (notes.get("interrupted", False) or notes.get("running", False)),
        commit=notes.get("commit", ""),
        place=notes.get("place", ""),
    )


def _check_unchanged(trial: Trial) -> None:
    stored_cfg = config.load_run(trial.cfg.dir, methods=CONFIGS)
    if changed_keys := differences(_comparable_values(stored_cfg), _comparable_values(trial.cfg)):
        raise ConfigError(
            f"{trial.label}: {trial.cfg.dir} was begun with another configuration, "
            f"{named(changed_keys)}: rename the study file, which gives its runs other names"
        )


def _comparable_values(cfg: RunConfig) -> dict[str, Any]:
    """Reduce a configuration to what must stay for a run to be that of the study file."""
    # Results are kept by density: another one is asked of the same exports.
    tasks = (task.absolute() for task in cfg.evaluations)
    evaluations = [task.model_dump(mode="json", exclude={"density"}) for task in tasks]
    return config.frozen_part(cfg) | {"evaluations": evaluations}


def run_trial(study: Study, trial: Trial) -> None:
    """Train and evaluate a run, or do what is missing of it.

    Raises:
        Refused: It cannot go on; the line that says why was printed.
    """
    log = RunLog(trial)
    notes = log.read()
    seconds_before = float(notes.get("seconds", 0.0))
    interrupted = notes.get("interrupted", False) or notes.get("running", False)
    machine = describe_machine(study)
    # Before the training: after a kill the note tells that time is missing.
    log.write(running=True, interrupted=interrupted, commit=commit_name(), place=machine)
    start = time.monotonic()
    code = submit.main(["--local", str(study.ranks), literal(trial.config), *trial.overrides])
    trouble = DIVERGED_TROUBLE if code == 1 and _diverged(trial) else ""
    if code == 0:
        words = ["--task", ",".join(study.tasks)]
        if trial.density and "ood" in study.tasks:
            words += ["--density", trial.density]
        code = evaluate.main([literal(trial.cfg.dir), *words])
    log.write(running=False, seconds=seconds_before + time.monotonic() - start, trouble=trouble)
    if code and not trouble:
        raise RunRefused(code)


def _diverged(trial: Trial) -> bool:
    """Whether the last failure was that of the numbers, which would be the same again."""
    failures = sorted(
        RunFolder(trial.cfg.dir).list_failures(), key=lambda path: path.stat().st_mtime
    )
    return bool(failures) and "Diverged" in failures[-1].read_text(errors="replace")


def write_page(study: Study, planned: Sequence[Trial], command: str, page: Path) -> None:
    """Write the page of the results that there are so far."""
    outcomes: dict[SettingKey, list[RunOutcome]] = {}
    for trial in planned:
        key = (trial.point, trial.factor, trial.value)
        outcomes.setdefault(key, []).append(read_outcome(study, trial))
    picture = page.with_suffix(".png")
    densities = ", ".join(sorted({trial.density for trial in planned if trial.density}))
    facts = {"command": command, "place": describe_machine(study), "picture": picture.name}
    facts |= {"densities": densities} if densities else {}
    reference_rows = study_report.read_reference_rows(study, planned[0].export.parent)
    text = study_report.markdown_page(study, outcomes, reference_rows, facts)
    # The picture first: the page names it.
    write_durably(picture, render_png(draw_picture(study, outcomes, reference_rows)))
    write_durably(page, text.encode())


def run_all_trials(study: Study, planned: Sequence[Trial], command: str, page: Path) -> None:
    """Do all runs that are not finished and that no other process is at, one after the other."""
    claimed_by_others = 0
    for index, trial in enumerate(planned):
        with claimed_run(RunLog(trial).path.with_suffix(".lock")) as is_claimed:
            if is_claimed:
                finish_run(study, trial, f"run {index + 1} of {len(planned)}")
        claimed_by_others += not is_claimed
        evaluate_baselines(study, planned[0])
        write_page(study, planned, command, page)
    note = f", {claimed_by_others} of them with another process of this study"
    say(f"{page}: {len(planned)} runs{note if claimed_by_others else ''}")


def finish_run(study: Study, trial: Trial, heading: str) -> None:
    """Do what is missing of a run.

    Raises:
        DataError: The evaluations left no whole result.
        Refused: It cannot go on.
    """
    outcome = read_outcome(study, trial)
    if outcome.figures is not None or outcome.trouble:
        return
    say(f"== {heading}: {trial.label}")
    run_trial(study, trial)
    outcome = read_outcome(study, trial)
    if outcome.figures is None and not outcome.trouble:
        exports = RunFolder(trial.cfg.dir).export_folder
        raise DataError(f"{exports.path}: no whole result after the evaluation")


def evaluate_baselines(study: Study, first: Trial) -> None:
    """Evaluate raw pixels and the random network, if the first run is there and they are not.

    They lie beside its exports and are no part of its cost.

    Raises:
        Refused: They cannot be evaluated; the line that says why was printed.
    """
    by_task = [study_report.read_baselines(first.export.parent, task) for task in study.tasks]
    if read_outcome(study, first).figures is None or None not in by_task:
        return
    with claimed_run(RunLog(first).path.with_name("baselines.lock")) as is_claimed:
        words = ["--task", ",".join(study.tasks), "--baselines"]
        if is_claimed and (code := evaluate.main([literal(first.cfg.dir), *words])):
            raise RunRefused(code)


def main(argv: Sequence[str]) -> int:
    """Run a study; exit code 0, 1 (a run failed), 2 (refused), 130 (stopped by Ctrl-C)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=path_argument)
    parser.add_argument(
        "--out", type=path_argument, default=Path("runs"), help="folder of runs (runs)"
    )
    parser.add_argument(
        "--docs", type=path_argument, default=Path("docs"), help="of the page (docs)"
    )
    parser.add_argument("--ranks", type=int, help="of each run, instead of the study's number")
    parser.add_argument("--dry-run", action="store_true", help="check all runs and list them")
    args = parser.parse_args(argv)
    try:
        study = read_study(args.study)
        name = args.study.stem
        if args.ranks:
            study = study.model_copy(update={"ranks": args.ranks})
        planned = plan_trials(study, name, args.out.absolute() / f"study_{name}")
        if args.dry_run:
            for trial in planned:
                words = ["--local", str(study.ranks), literal(trial.config), *trial.overrides]
                say(f"# {trial.label}", f"python launch/submit.py {shlex.join(words)}")
            return 0
        command = f"python -m bench.study {shlex.join(argv)}"
        run_all_trials(study, planned, command, args.docs / f"study_{name}.md")
    except (ConfigError, DataError) as error:
        say(f"error: {error}", to_stderr=True)
        return 2
    except RunRefused as error:
        say("the same command goes on", to_stderr=True)
        return int(error.args[0])
    except KeyboardInterrupt:
        say("stopped: the same command goes on", to_stderr=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
