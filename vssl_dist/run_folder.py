"""Every path of a run, spelled once: where a run keeps what, and what its files are called.

    python -m vssl_dist.run_folder      # the table of docs/run_folder.md

Nothing is looked at or made here: a `RunFolder` knows names alone.  Exports may also lie by
themselves, away from any run, so what lies beside them is told by an `ExportFolder`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

_WEIGHTS_SUFFIX, _BACKBONE_STEM, _SPOOL_SUFFIX = ".safetensors", "backbone", ".jsonl"
_BACKBONE_NAME_PATTERN = re.compile(rf"{_BACKBONE_STEM}-([0-9]{{1,12}})\{_WEIGHTS_SUFFIX}")
_RESULT_NAME_PATTERN = re.compile(r"([^.].*?)-([0-9]{8,})(.*)\.json")


@dataclass(frozen=True)
class ResultName:
    """The name of an evaluation's result, taken apart."""

    stem: str
    """Which evaluation, such as ``knn`` or ``ood-cartesian``."""
    step: int
    """Optimizer steps of the weights that were evaluated."""
    suffix: str = ""
    """``-on-DIGEST`` where the evaluation was on other folders than the run's."""

    def __str__(self) -> str:
        return f"{self.stem}-{self.step:08d}{self.suffix}.json"

    @property
    def label(self) -> str:
        """The name without the step, which says what was evaluated and on what."""
        return f"{self.stem}{self.suffix}"

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """Take a file's name apart, or return None if no result is called so.

        >>> ResultName.parse("ood-cartesian-00000600.json")
        ResultName(stem='ood-cartesian', step=600, suffix='')
        >>> ResultName.parse("knn-baselines.json") is ResultName.parse("notes.txt") is None
        True
        """
        match = _RESULT_NAME_PATTERN.fullmatch(name)
        return cls(match[1], int(match[2]), match[3]) if match else None


@dataclass(frozen=True)
class ExportFolder:
    """Names in a folder of exports: of a run, or of files that somebody took out of one."""

    path: Path

    @classmethod
    def of(cls, export: Path) -> Self:
        """Return the folder that an export lies in."""
        return cls(export.parent)

    def backbone_path(self, step: int) -> Path:
        """Weights of the evaluated backbone, written by training's rank 0."""
        return self.path / f"{_BACKBONE_STEM}-{step:08d}{_WEIGHTS_SUFFIX}"

    def part_path(self, part: str, step: int) -> Path:
        """Weights beside a backbone's (``head``, ``online``), written by training's rank 0."""
        return part_path_of(self.backbone_path(step), part)

    def card_path(self, step: int) -> Path:
        """What an export says of itself, written last by training's rank 0; see docs/card.md."""
        return card_path_of(self.backbone_path(step))

    def result_path(self, stem: str, step: int, suffix: str = "") -> Path:
        """Figures of one evaluation of one export, written by whoever evaluates."""
        return self.path / str(ResultName(stem, step, suffix))

    def baselines_path(self, task: str, suffix: str = "") -> Path:
        """Figures of raw pixels and of the untrained network, written by `vssl evaluate`."""
        return self.path / f"{task}-baselines{suffix}.json"

    def picture_path(self, result: Path, name: str) -> Path:
        """Plot that belongs to a result or to baselines, written by whoever evaluates."""
        return self.path / f"{result.stem}-{name}.png"

    def attempts_path(self, stem: str, step: int) -> Path:
        """Count of the attempts at an evaluation without result, written by the queue."""
        return self.path / f".{stem}-{step:08d}.attempts.json"

    @property
    def features_folder(self) -> Path:
        """Cache of the features that several tasks share, written by whoever evaluates."""
        return self.path / "features"

    @property
    def evaluating_lock_path(self) -> Path:
        """Lock of the one process that evaluates, or submits evaluations, held while it works."""
        return self.path / ".evaluating.lock"

    def list_backbones(self) -> list[Path]:
        """List the backbones that are there, by name: the latest step is the last."""
        return sorted(self.path.glob(f"{_BACKBONE_STEM}-*{_WEIGHTS_SUFFIX}"))

    def find_results(
        self, *, stem: str | None = None, step: int | None = None
    ) -> dict[Path, ResultName]:
        """Find the results that are there, in the order of their names.

        Args:
            stem: Only those of this evaluation, and on the run's own folders.
            step: Only those of this step.
        """
        names = {path: ResultName.parse(path.name) for path in sorted(self.path.glob("*.json"))}
        return {
            path: name
            for path, name in names.items()
            if name is not None
            and name.stem != _BACKBONE_STEM  # a card, which is called as a result would be
            and (stem is None or (name.stem, name.suffix) == (stem, ""))
            and step in (None, name.step)
        }

    def list_pictures(self, result: Path) -> list[Path]:
        """List the plots of a result that are there, in no order."""
        pattern = re.compile(rf"{re.escape(result.stem)}-.*\.png")
        return [path for path in self.path.iterdir() if pattern.fullmatch(path.name)]


@dataclass(frozen=True)
class RunFolder:
    """Every path of a run."""

    path: Path

    @classmethod
    def of_export(cls, export: Path) -> Self:
        """Return the run that an export lies in, if it lies in one."""
        return cls(export.parent.parent)

    @property
    def config_path(self) -> Path:
        """Configuration with every default, written by `vssl submit`."""
        return self.path / "config.yaml"

    @property
    def launch_path(self) -> Path:
        """Ranks, resources and tracking address, written by `vssl submit`."""
        return self.path / "launch.yaml"

    @property
    def owner_path(self) -> Path:
        """Job or process that writes in the run, written by `vssl submit`."""
        return self.path / "owner.json"

    @property
    def owner_lock_path(self) -> Path:
        """Lock held while `vssl submit` claims the run."""
        return self.path / ".owner.lock"

    @property
    def identity_path(self) -> Path:
        """Which run the folder is, written by whatever first writes in it or in a copy of it."""
        return self.path / "run.json"

    @property
    def identity_lock_path(self) -> Path:
        """Lock held while the folder's identity is settled."""
        return self.path / ".run.lock"

    @property
    def mlflow_record_path(self) -> Path:
        """Run ids at each MLflow address, written by the process that sends curves."""
        return self.path / "mlflow_run.json"

    @property
    def augmentations_path(self) -> Path:
        """Sheet of images and their views, drawn by rank 0 before the first step."""
        return self.path / "augmentations.png"

    def trace_path(self, rank: int | str) -> Path:
        """Losses, ids and pixel digests of a rank where ``trace`` is true, written by that rank."""
        return self.path / f"trace.rank{rank}.jsonl"

    def substitutions_path(self, rank: int | str) -> Path:
        """List of the images that were replaced in training, written by each rank."""
        return self.path / f"substitutions.rank{rank}.jsonl"

    @property
    def checkpoints_folder(self) -> Path:
        """Folder of ``step-STEP``, each whole and sealed, written by all ranks together."""
        return self.path / "checkpoints"

    @property
    def export_folder(self) -> ExportFolder:
        """Exports and all that is found out about them."""
        return ExportFolder(self.path / "export")

    @property
    def logs_folder(self) -> Path:
        """Folder of what processes on this machine print."""
        return self.path / "logs"

    def rank_log_path(self, rank: int) -> Path:
        """Output of a rank that runs on this machine, written by that rank."""
        return self.logs_folder / f"rank-{rank}.log"

    @property
    def evaluations_log_path(self) -> Path:
        """Output of the evaluation queue, written by its processes."""
        return self.logs_folder / "evaluations.log"

    def failure_path(self, attempt: str) -> Path:
        """Reason why an attempt ended, written by the first rank that failed."""
        return self.logs_folder / f"failure-{attempt}.txt"

    def list_failures(self) -> list[Path]:
        """List the reasons of failed attempts that are there, by name."""
        return sorted(self.logs_folder.glob(self.failure_path("*").name))

    @property
    def slurm_folder(self) -> Path:
        """Folder of scripts, pickled jobs and logs, written by submitit for `vssl submit`."""
        return self.path / "slurm"

    def slurm_log_path(self, job: str, rank: int = 0) -> Path:
        """Output of a rank of a SLURM job, written by that rank."""
        return self.slurm_folder / f"{job}_{rank}_log.out"

    @property
    def evaluation_jobs_folder(self) -> Path:
        """Folder of scripts, pickled jobs and logs of evaluations, written for the queue."""
        return self.slurm_folder / "evaluations"

    @property
    def spool_folder(self) -> Path:
        """Folder of the curves on their way to MLflow."""
        return self.path / "spool"

    def spool_file_path(self, writer: str) -> Path:
        """Curves, tags and artifacts of one process (``train``, ``eval-knn-STEP``), by itself."""
        return self.spool_folder / f"{writer}{_SPOOL_SUFFIX}"

    def list_spool_files(self) -> list[Path]:
        """List the spool's files that are there, by name."""
        return sorted(self.spool_folder.glob(f"*{_SPOOL_SUFFIX}"))

    @property
    def cursor_path(self) -> Path:
        """How much of the spool has reached MLflow, written by the process that sends it."""
        return self.spool_folder / "cursor.json"

    @property
    def sender_path(self) -> Path:
        """Process that sends the spool, or last did, written by that process."""
        return self.spool_folder / "flusher.json"

    @property
    def sender_log_path(self) -> Path:
        """Output of the processes that send the spool, written by them."""
        return self.spool_folder / "flusher.log"

    @property
    def sender_lock_path(self) -> Path:
        """Lock of the one process that sends the spool, held while it works."""
        return self.spool_folder / "flusher.lock"

    def list_appended_files(self) -> list[Path]:
        """List what is there that the run's processes append to, long after its start."""
        patterns = (
            f"{self.spool_folder.name}/*",
            f"{self.logs_folder.name}/*",
            self.trace_path("*").name,
        )
        return [path for pattern in patterns for path in sorted(self.path.glob(pattern))]


def is_export_path(path: Path) -> bool:
    """Whether a path is meant as one export and not as a run."""
    return path.suffix == _WEIGHTS_SUFFIX


def card_path_of(export: Path) -> Path:
    """Return where the card of an export lies, whatever the export is called.

    >>> card_path_of(Path("export/backbone-00000600.safetensors")).name
    'backbone-00000600.json'
    """
    return export.with_suffix(".json")


def part_path_of(export: Path, part: str) -> Path:
    """Return where another part of an export lies, whatever the export is called.

    >>> part_path_of(Path("export/backbone-00000600.safetensors"), "head").name
    'head-00000600.safetensors'
    """
    return export.with_name(f"{part}-{export.name.removeprefix(f'{_BACKBONE_STEM}-')}")


def step_of_backbone(export: Path) -> int | None:
    """Return the step that a backbone's name says, or None if somebody else named the file.

    >>> (
    ...     step_of_backbone(Path("backbone-00000600.safetensors")),
    ...     step_of_backbone(Path("backbone-best.safetensors")),
    ... )
    (600, None)
    """
    match = _BACKBONE_NAME_PATTERN.fullmatch(export.name)
    return int(match[1]) if match else None


class _RemovalRule(NamedTuple):
    """What its user may do with a path, and whether MLflow gets it."""

    removable: str
    sent: str = "no"


_COMPUTED_AGAIN = "yes, it is computed again"
_WHEN_RUN_IS_IDLE = "when nothing works on the run"
_AFTER_PROCESS_ENDED = "yes, once the process has ended"
_REMOVAL_RULES = {
    "config_path": _RemovalRule("no, ranks and evaluations read it", "yes"),
    "launch_path": _RemovalRule("no, ranks and evaluations read it"),
    "owner_path": _RemovalRule("only if what it names is gone"),
    "owner_lock_path": _RemovalRule(_WHEN_RUN_IS_IDLE),
    "identity_path": _RemovalRule("no, it tells a run from its copy"),
    "identity_lock_path": _RemovalRule(_WHEN_RUN_IS_IDLE),
    "mlflow_record_path": _RemovalRule("no, it tells which MLflow run is this one's"),
    "augmentations_path": _RemovalRule("yes, it is drawn again", "yes"),
    "trace_path": _RemovalRule("yes, once the run is finished"),
    "substitutions_path": _RemovalRule("once the run is finished: `data.max_bad` counts its lines"),
    "checkpoints_folder": _RemovalRule("all but the newest; that too if the run is not to go on"),
    "logs_folder": _RemovalRule(_AFTER_PROCESS_ENDED),
    "rank_log_path": _RemovalRule(_AFTER_PROCESS_ENDED),
    "evaluations_log_path": _RemovalRule(_AFTER_PROCESS_ENDED),
    "failure_path": _RemovalRule(_AFTER_PROCESS_ENDED),
    "slurm_folder": _RemovalRule("when no job of the run waits or runs"),
    "slurm_log_path": _RemovalRule(_AFTER_PROCESS_ENDED),
    "evaluation_jobs_folder": _RemovalRule("when no evaluation of the run waits or runs"),
    "spool_folder": _RemovalRule("no, it is the source of all curves", "what is in its files"),
    "spool_file_path": _RemovalRule("no, it is the source of these curves", "yes, line by line"),
    "cursor_path": _RemovalRule("yes, all is sent once more and nothing arrives twice"),
    "sender_path": _RemovalRule("when nothing is sent"),
    "sender_log_path": _RemovalRule(_AFTER_PROCESS_ENDED),
    "sender_lock_path": _RemovalRule("when nothing is sent"),
    "backbone_path": _RemovalRule(
        "if it is not to be evaluated again; with its card and its parts"
    ),
    "part_path": _RemovalRule("only with its backbone: the card names it"),
    "card_path": _RemovalRule("only with its backbone"),
    "result_path": _RemovalRule(_COMPUTED_AGAIN, "its figures, as curves"),
    "baselines_path": _RemovalRule(_COMPUTED_AGAIN),
    "picture_path": _RemovalRule("yes, with its result", "those of results"),
    "attempts_path": _RemovalRule("yes, the evaluation is then tried again"),
    "features_folder": _RemovalRule(_COMPUTED_AGAIN),
    "evaluating_lock_path": _RemovalRule(_WHEN_RUN_IS_IDLE),
}
"""By the name of the property or method that makes the path."""


class _PlaceholderNumber(int):
    """A number that is shown as a word, for paths with a number in them."""

    def __new__(cls, shown_word: str) -> Self:
        number = super().__new__(cls)
        number.word = shown_word
        return number

    word: str

    def __format__(self, spec: str) -> str:
        return self.word


_PLACEHOLDER_BY_PARAMETER = {
    "rank": _PlaceholderNumber("RANK"),
    "step": _PlaceholderNumber("STEP"),
    "attempt": "ATTEMPT",
    "job": "JOB",
    "writer": "WRITER",
    "part": "PART",
    "stem": "TASK",
    "task": "TASK",
    "result": Path("TASK-STEP.json"),
    "name": "NAME",
}
"""What stands for a parameter of a path in the table."""


def _table_rows(folder: RunFolder | ExportFolder) -> Iterator[tuple[str, str, str, str]]:
    """Yield path, docstring, whether it may be removed and whether it is sent, of each path."""
    for name, member in vars(type(folder)).items():
        if name not in _REMOVAL_RULES:
            continue
        about = inspect.cleandoc(member.__doc__)
        if isinstance(member, property):
            path = getattr(folder, name)
        else:
            parameters = inspect.signature(member).parameters
            path = member(
                folder,
                **{
                    key: _PLACEHOLDER_BY_PARAMETER[key]
                    for key in parameters
                    if key in _PLACEHOLDER_BY_PARAMETER
                },
            )
        yield str(path), about, *_REMOVAL_RULES[name]


def markdown() -> str:
    """Describe every path of a run as a table in Markdown."""
    run = RunFolder(Path())
    lines = [
        "| path | what it is, and who writes it | may be removed | sent to MLflow |",
        "|---|---|---|---|",
    ]
    for path, about, removable_when, sent_to_mlflow in sorted(
        [*_table_rows(run), *_table_rows(run.export_folder)]
    ):
        lines.append(
            f"| `{path}` | {about.replace('``', '`')} | {removable_when} | {sent_to_mlflow} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
