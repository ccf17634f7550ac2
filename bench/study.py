"""A study: many runs, one factor at a time from a base point, and one page of what came of them.

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
from bench.study_log import Log, claimed, commit, place
from bench.study_picture import picture
from bench.study_plan import Study, Trial, read_study, trials
from bench.study_report import Key, Outcome
from vssl_dist import config
from vssl_dist.commands import evaluate, submit
from vssl_dist.config import RunConfig
from vssl_dist.config.differences import differences, named
from vssl_dist.config.paths import literal, path_argument
from vssl_dist.durable import publish
from vssl_dist.errors import ConfigError, DataError
from vssl_dist.evaluation.figures.plots import png
from vssl_dist.methods import CONFIGS
from vssl_dist.run_folder import RunFolder
from vssl_dist.text import say

DIVERGED = "diverged"


class Refused(Exception):
    """A run could not be started or failed; the argument is its exit code."""


def outcome(study: Study, trial: Trial) -> Outcome:
    """What came of a run so far.

    Raises:
        ConfigError: Its folder holds another experiment than the study file now says.
    """
    if not RunFolder(trial.cfg.dir).config.exists():
        return Outcome(None)
    _same(trial)
    log = Log(trial).read()
    whole = not (log.get("interrupted", False) or log.get("running", False))
    cost = {"seconds": log.get("seconds", 0.0), "whole": whole}
    about = cost | {"commit": log.get("commit", ""), "place": log.get("place", "")}
    if log.get("trouble"):
        return Outcome(None, log["trouble"], **about)
    results = trial.results()
    return Outcome(None if results is None else study_report.figures(study, results), **about)


def _same(trial: Trial) -> None:
    then = config.load_run(trial.cfg.dir, methods=CONFIGS)
    if changed := differences(_asked(then), _asked(trial.cfg)):
        raise ConfigError(
            f"{trial.label}: {trial.cfg.dir} was begun with another configuration, "
            f"{named(changed)}: rename the study file, which gives its runs other names"
        )


def _asked(cfg: RunConfig) -> dict[str, Any]:
    """What a study file says of a run."""
    # Results are kept by density: another one is asked of the same exports.
    tasks = (task.absolute() for task in cfg.evaluations)
    evaluations = [task.model_dump(mode="json", exclude={"density"}) for task in tasks]
    return config.frozen_part(cfg) | {"evaluations": evaluations}


def run(study: Study, trial: Trial) -> None:
    """Train and evaluate, or what is missing of it.

    Raises:
        Refused: It cannot go on; the line that says why was printed.
    """
    log = Log(trial)
    before = log.read()
    spent = float(before.get("seconds", 0.0))
    interrupted = before.get("interrupted", False) or before.get("running", False)
    log.write(running=True, interrupted=interrupted, commit=commit(), place=place(study))
    start = time.monotonic()
    given = [literal(trial.config), *trial.overrides]
    code = submit.main(["--local", str(study.ranks), *given])
    trouble = DIVERGED if code == 1 and _diverged(trial) else ""
    if code == 0:
        words = ["--task", ",".join(study.tasks)]
        if trial.density and "ood" in study.tasks:
            words += ["--density", trial.density]
        code = evaluate.main([literal(trial.cfg.dir), *words])
    log.write(running=False, seconds=spent + time.monotonic() - start, trouble=trouble)
    if code and not trouble:
        raise Refused(code)


def _diverged(trial: Trial) -> bool:
    """Whether the last failure was that of the numbers, which would be the same again."""
    found = sorted(RunFolder(trial.cfg.dir).failures(), key=lambda p: p.stat().st_mtime)
    return bool(found) and "Diverged" in found[-1].read_text(errors="replace")


def report(study: Study, planned: Sequence[Trial], command: str, page: Path) -> None:
    """Write the page of what there is so far."""
    outcomes: dict[Key, list[Outcome]] = {}
    for trial in planned:
        key = (trial.point, trial.factor, trial.value)
        outcomes.setdefault(key, []).append(outcome(study, trial))
    drawing = page.with_suffix(".png")
    densities = ", ".join(sorted({trial.density for trial in planned if trial.density}))
    facts = {"command": command, "place": place(study), "picture": drawing.name}
    facts |= {"densities": densities} if densities else {}
    others = study_report.others(study, planned[0].export.parent)
    text = study_report.document(study, outcomes, others, facts)
    publish(drawing, png(picture(study, outcomes, others)))
    publish(page, text.encode())


def carry_out(study: Study, planned: Sequence[Trial], command: str, page: Path) -> None:
    """All runs that are not finished and that no other process is at, one after the other."""
    elsewhere = 0
    for number, trial in enumerate(planned):
        with claimed(Log(trial).path.with_suffix(".lock")) as mine:
            if mine:
                begin(study, trial, number, len(planned))
        elsewhere += not mine
        compare(study, planned[0])
        report(study, planned, command, page)
    others = f", {elsewhere} of them with another process of this study" * bool(elsewhere)
    say(f"{page}: {len(planned)} runs{others}")


def begin(study: Study, trial: Trial, number: int, among: int) -> None:
    """Do what is missing of a run.

    Raises:
        DataError: The evaluations left no whole result.
        Refused: It cannot go on.
    """
    seen = outcome(study, trial)
    if seen.figures is not None or seen.trouble:
        return
    say(f"== run {number + 1} of {among}: {trial.label}")
    run(study, trial)
    if outcome(study, trial).figures is None and not Log(trial).read().get("trouble"):
        raise DataError(
            f"{RunFolder(trial.cfg.dir).exports.path}: no whole result after the evaluation"
        )


def compare(study: Study, first: Trial) -> None:
    """Evaluate raw pixels and the random network, if the first run is there and they are not.

    They lie beside its exports and are no part of its cost.

    Raises:
        Refused: They cannot be evaluated; the line that says why was printed.
    """
    found = [study_report.baselines(first.export.parent, task) for task in study.tasks]
    if outcome(study, first).figures is None or None not in found:
        return
    with claimed(Log(first).path.with_name("baselines.lock")) as mine:
        words = ["--task", ",".join(study.tasks), "--baselines"]
        if mine and (code := evaluate.main([literal(first.cfg.dir), *words])):
            raise Refused(code)


def main(argv: Sequence[str]) -> int:
    """Exit code 0, 1 (a run failed), 2 (refused), 130 (stopped by Ctrl-C)."""
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
        study, name = read_study(args.study), args.study.stem
        if args.ranks:
            study = study.model_copy(update={"ranks": args.ranks})
        planned = trials(study, name, args.out.absolute() / f"study_{name}")
        if args.dry_run:
            for trial in planned:
                words = ["--local", str(study.ranks), literal(trial.config), *trial.overrides]
                say(f"# {trial.label}", f"python launch/submit.py {shlex.join(words)}")
            return 0
        command = f"python -m bench.study {shlex.join(argv)}"
        carry_out(study, planned, command, args.docs / f"study_{name}.md")
    except (ConfigError, DataError) as error:
        say(f"error: {error}", error=True)
        return 2
    except Refused as error:
        say("the same command goes on", error=True)
        return int(error.args[0])
    except KeyboardInterrupt:
        say("stopped: the same command goes on", error=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
