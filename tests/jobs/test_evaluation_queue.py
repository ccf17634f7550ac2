from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cards import card_text
from tests.support.launchers import HOSTILE, INNOCENT, of_process
from tests.support.others import NOBODY, needs_root
from vssl_dist import config
from vssl_dist.config import RunConfig
from vssl_dist.errors import ConfigError, SubmissionError
from vssl_dist.jobs import evaluation_queue, slurm
from vssl_dist.jobs.evaluation_job import (
    Attempts,
    PendingEvaluation,
    pending_evaluations,
)
from vssl_dist.jobs.evaluation_queue import (
    EvaluationQueue,
    EvaluationSpawner,
    SlurmSubmitter,
)
from vssl_dist.jobs.resources import Resources, dump_launch, resolve_for_slurm
from vssl_dist.logs import entry_as_terminal_text
from vssl_dist.methods import CONFIGS

SAMPLES = 64
RUN = """
method: {name: simsiam}
data: {train: t, val: v, streams: 4, views: [cifar, cifar]}
optim: {base_lr: 0.1, global_batch: 16, epochs: 4}
evaluations: [{task: knn, every_epochs: 2}]
"""

DIGEST = "a" * 64


class Recorder:
    """A place that fails on the steps it is told to."""

    def __init__(self, fails: set[int]) -> None:
        self.fails, self.taken = fails, list[int]()

    def can_try(self, pending: PendingEvaluation) -> bool:
        return pending.read_attempts().count < 2

    def process(self, pending: PendingEvaluation) -> None:
        self.taken.append(pending.step)
        pending.record_attempt(Attempts(pending.read_attempts().count + 1))
        if pending.step in self.fails:
            raise RuntimeError("no luck")
        pending.result_path.write_text(json.dumps({"export_sha256": DIGEST}))


@pytest.fixture
def cfg(tmp_path: Path) -> RunConfig:
    """Steps 8 and 16 are milestones; an export at step 4 is not."""
    run = config.loads(RUN, [f"out={tmp_path}", "name=run"], methods=CONFIGS)
    (run.dir / "export").mkdir(parents=True)
    for step in (4, 8, 16):
        export = run.dir / "export" / f"backbone-{step:08d}.safetensors"
        export.touch()
        export.with_suffix(".json").write_text(card_text(DIGEST))
    return run


def clear(cfg: RunConfig, place: Recorder) -> None:
    """One process's work."""
    queue = EvaluationQueue(cfg, SAMPLES, place)  # type: ignore[arg-type]
    while (pending := queue.next_pending()) is not None:
        queue.try_evaluation(pending)


def test_every_milestone_is_evaluated_the_newest_first(cfg: RunConfig) -> None:
    place = Recorder(fails=set())
    clear(cfg, place)
    assert place.taken == [16, 8]
    assert list(pending_evaluations(cfg, SAMPLES)) == []


def test_a_failure_is_left_to_the_next_process_and_given_up_after_two(cfg: RunConfig) -> None:
    taken = []
    for _ in range(3):
        place = Recorder(fails={16})
        clear(cfg, place)
        taken.append(place.taken)
    assert taken == [[16, 8], [16], []]
    assert [pending.step for pending in pending_evaluations(cfg, SAMPLES)] == [16]


def test_a_refusal_is_one_line_of_the_log(cfg: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    class Refuses(Recorder):
        def process(self, pending: PendingEvaluation) -> None:
            super().process(pending)
            raise ConfigError("the driver is too old")

    clear(cfg, Refuses(fails=set()))
    assert caplog.messages == [
        f"evaluation of backbone-{step:08d}.safetensors (knn) refused: the driver is too old"
        for step in (16, 8)
    ]
    assert not any(record.exc_info for record in caplog.records)


def test_a_second_process_leaves_at_once_while_one_is_at_work(cfg: RunConfig) -> None:
    with evaluation_queue.evaluation_lock(cfg.dir):
        before = time.monotonic()
        evaluation_queue.try_all_pending(
            cfg.dir
        )  # the folder has no config.yaml: reading it would raise
        assert time.monotonic() - before < 1


def test_an_export_is_due_once_its_card_is_there(cfg: RunConfig) -> None:
    (cfg.dir / "export" / "backbone-00000016.json").unlink()
    assert [pending.step for pending in pending_evaluations(cfg, SAMPLES)] == [8]


def test_other_weights_at_the_same_step_are_evaluated_again(cfg: RunConfig) -> None:
    clear(cfg, Recorder(fails=set()))
    (cfg.dir / "export" / "backbone-00000008.json").write_text(card_text("b" * 64))
    assert [pending.step for pending in pending_evaluations(cfg, SAMPLES)] == [8]


def test_an_export_that_comes_while_the_last_one_leaves_is_not_lost(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = cfg.dir / "export" / "backbone-00000016.safetensors"
    late.unlink()
    place = Recorder(fails=set())

    class Late(EvaluationQueue):
        """The export appears after the last look under the lock."""

        def next_pending(self) -> PendingEvaluation | None:
            pending = super().next_pending()
            if pending is None:
                late.touch()
            return pending

    queue = Late(cfg, SAMPLES, place)  # type: ignore[arg-type]
    monkeypatch.setattr(evaluation_queue, "open_queue", lambda run_dir: queue)
    evaluation_queue.try_all_pending(cfg.dir)
    assert place.taken == [8, 16]


def test_evaluations_that_are_asked_for_while_others_are_at_work_are_not_lost(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, asked = Recorder(fails=set()), []

    def open_queue(run_dir: Path) -> EvaluationQueue:
        config_file = run_dir / "config.yaml"
        asked.append(config_file.read_text() if config_file.exists() else "")
        config_file.write_text("more")  # by a submission that finds this process at work
        return EvaluationQueue(cfg, SAMPLES, place)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluation_queue, "open_queue", open_queue)
    evaluation_queue.try_all_pending(cfg.dir)
    assert asked == ["", "more"]


def test_a_trainer_does_not_notice_that_no_evaluation_can_be_started(
    cfg: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(evaluation_queue.sys, "executable", str(tmp_path / "absent" / "python"))
    EvaluationSpawner(cfg.dir, "local").start()
    assert "no evaluation was started" in caplog.text


@pytest.fixture
def signals() -> Iterator[None]:
    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    kept = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
def test_a_refusal_of_slurm_is_tried_again_by_the_next_process_and_a_live_job_is_not_doubled(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = SlurmSubmitter(cfg.dir, resolve_for_slurm(Resources(device="cpu"), 1, ""))
    asked = []

    def submit(folder: Path, parameters: dict[str, object], job: object) -> str:
        asked.append(parameters["job_name"])
        if len(asked) == 1:
            raise SubmissionError("QOSMaxSubmitJobPerUserLimit")
        return str(len(asked))

    monkeypatch.setattr(slurm, "submit", submit)
    monkeypatch.setattr(slurm, "is_job_live", lambda job: True)
    for expected in (["run-knn-00000016", "run-knn-00000008"], ["run-knn-00000016"], []):
        asked_before = len(asked)
        queue = EvaluationQueue(cfg, SAMPLES, place)
        while (pending := queue.next_pending()) is not None:
            queue.try_evaluation(pending)
        assert asked[asked_before:] == expected


@pytest.mark.parametrize("job", [None, "77"])
def test_an_evaluator_belongs_to_no_job_and_knows_whether_it_is_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str | None
) -> None:
    for name, value in HOSTILE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", INNOCENT["NCCL_SOCKET_IFNAME"])
    monkeypatch.delenv("VSSL_SLURM_JOB")
    if job:
        monkeypatch.setenv("VSSL_SLURM_JOB", job)
    evaluator = EvaluationSpawner(tmp_path, "local")
    evaluator.start()
    (process,) = evaluator.processes
    try:
        environment = of_process(process.pid)
        assert isinstance(process.args, list)
        assert process.args[4:] == [str(tmp_path), *(["--in-a-job"] if job else [])]
    finally:
        process.kill()
        process.wait()
    assert not environment.keys() & HOSTILE.keys()
    assert environment["NCCL_SOCKET_IFNAME"] == "ib0"


@needs_root
@pytest.mark.parametrize("name", ["launch.yaml", "config.yaml"])
def test_what_another_user_put_into_a_run_reaches_no_batch_script(
    cfg: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    (cfg.dir / "config.yaml").write_text(config.dump(cfg))
    profile = Resources(device="cpu", setup=("source /shared/evil.sh",))
    (cfg.dir / "launch.yaml").write_text(dump_launch(resolve_for_slurm(profile, 1, "")))
    os.chown(cfg.dir / name, NOBODY, NOBODY)
    monkeypatch.setattr("sys.argv", ["dispatch", str(cfg.dir)])
    assert evaluation_queue.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert entry_as_terminal_text(line).startswith(f"error: {cfg.dir / name} belongs to nobody")


@pytest.mark.parametrize(
    "text", ["[" * 20_000, '{"count": "x"}', '{"count": -1}', '{"job": "; rm"}', "[]", "\xff"]
)
def test_attempts_of_any_content_are_none(cfg: RunConfig, text: str) -> None:
    pending = next(pending_evaluations(cfg, SAMPLES))
    pending.attempts_path.write_text(text, encoding="latin-1")
    assert pending.read_attempts() == Attempts()
    pending.card_path.write_text(text, encoding="latin-1")
    assert not pending.is_done()


def test_a_file_of_the_user_s_own_among_the_exports_is_none(cfg: RunConfig) -> None:
    for name in ("backbone-best.safetensors", "backbone-\u00b2.safetensors"):
        (cfg.dir / "export" / name).touch()
    assert [pending.step for pending in pending_evaluations(cfg, SAMPLES)] == [16, 8]
