"""A run that an earlier version began: its curves stand whole under the names of today."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from vssl_dist.curves import current_curve, training_curves
from vssl_dist.tracker import Spool, TrackingRecord, is_flushed, settle_identity, why_not_all_sent
from vssl_dist.tracker.address import sqlite_uri
from vssl_dist.tracker.replay import Replayer

WRITTEN = Path(__file__).with_name("spool_of_7dc44c1")
"""Lines of a run that the program of commit 7dc44c1 wrote: steps 5 and 10, then it was stopped."""
Curve = list[tuple[int, float]]


@pytest.fixture
def uri(database: Path, tmp_path: Path) -> str:
    """An empty database of MLflow's."""
    return sqlite_uri(Path(shutil.copy(database, tmp_path / "mlflow.db")))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The run's folder, of which nothing has been sent."""
    folder = tmp_path / "run"
    shutil.copytree(WRITTEN, folder / "spool")
    (folder / "augmentations.png").write_bytes(b"a picture")
    return folder


def replayer(run: Path, uri: str) -> Replayer:
    identity = settle_identity(run)
    record = TrackingRecord.load(run, identity)
    record.tracking_uri = uri
    record.save(run)
    return Replayer(run, identity, record)


def curves(run: Path, uri: str) -> dict[str, Curve]:
    """Every curve of the MLflow run, as lists of step and value."""
    client = MlflowClient(tracking_uri=uri)
    run_id = TrackingRecord.load(run, settle_identity(run)).runs[uri]
    names = client.get_run(run_id).data.metrics
    points = {name: client.get_metric_history(run_id, name) for name in names}
    return {name: [(point.step, point.value) for point in points[name]] for name in names}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def points_of(writer: str) -> dict[str, Curve]:
    """What the earlier version wrote, by its own names."""
    written: dict[str, Curve] = {}
    for record in lines(WRITTEN / f"{writer}.jsonl"):
        if record["kind"] == "metrics":
            for name, value in record["values"].items():
                written.setdefault(name, []).append((record["step"], value))
    return written


def sent_by_the_earlier_version(run: Path, uri: str) -> dict[str, Curve]:
    """Leave MLflow and ``cursor.json`` as that version does when all of it has been sent."""
    spool = run / "spool"
    run_id = replayer(run, uri).run_id
    client = MlflowClient(tracking_uri=uri)
    sent: dict[str, Curve] = {}
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(spool.glob("*.jsonl")):
        points = points_of(path.stem)
        metrics = [Metric(name, v, 1, step) for name in points for step, v in points[name]]
        client.log_batch(run_id, metrics)
        last = {name: points[name][-1][0] for name in points}
        files[path.name] = {"offset": path.stat().st_size, "last": last}
        sent |= points
    cursor = {
        "tracking_uri": uri, "run_id": run_id, "files": files,
        "artifacts": [], "refused": {}, "others": {},
    }  # fmt: skip
    (spool / "cursor.json").write_text(json.dumps(cursor))
    return sent


def go_on(run: Path) -> dict[str, float]:
    """Write what today's trainer writes; step 10 is done once more, as after a resume."""
    spool = Spool(run, "train")
    for step in (10, 15):
        figures = {"loss": float(step), "alignment_cos": 0.5, "epoch": step / 8}
        spool.metrics(training_curves(figures), step)
    spool.status("FINISHED")
    spool.close()
    return {"train/loss": 15.0, "train/alignment_cos": 0.5}


def whole(earlier: dict[str, Curve], later: dict[str, float]) -> dict[str, Curve]:
    """The curves of the training as they are to be."""
    renamed = {current_curve(name, of_training=True): points for name, points in earlier.items()}
    return {
        name: [*points, *[(15, value) for key, value in later.items() if key == name]]
        for name, points in renamed.items()
    }


def test_an_address_that_has_not_seen_the_run_gets_names_of_today_only(run: Path, uri: str) -> None:
    wanted = whole(points_of("train"), go_on(run)) | points_of("system")
    replayer(run, uri).flush()
    seen = curves(run, uri)
    assert seen["train/alignment_cos"][0] == points_of("train")["alignment"][0]
    assert seen["train/online_top1"] == points_of("train")["online/top1"]
    assert {name: seen[name] for name in wanted} == wanted
    centred = points_of("eval-collapse-00000040")["collapse/rankme_centred"]
    assert seen["collapse/effective_rank_centred"] == centred
    others = {name for name in seen if name not in wanted and not name.startswith("collapse/")}
    assert others == {"epoch"}
    assert "collapse/rankme_centred" not in seen


def test_where_the_run_stands_under_earlier_names_the_whole_curve_comes_under_those_of_today(
    run: Path, uri: str
) -> None:
    before = sent_by_the_earlier_version(run, uri)
    assert curves(run, uri) == before
    (run / "augmentations.png").unlink()  # it is there: nobody asks for it again
    assert not is_flushed(run, uri)
    assert "not all curves" in str(why_not_all_sent(run, uri))
    wanted = whole(points_of("train"), go_on(run))
    sent: Counter[tuple[str, int]] = Counter()

    def count(client: Any, run_id: str, metrics: Sequence[Metric], *rest: Any) -> None:
        sent.update((metric.key, metric.step) for metric in metrics)
        original(client, run_id, metrics, *rest)

    original = MlflowClient.log_batch
    with mock.patch.object(MlflowClient, "log_batch", count):
        for _ in range(2):
            replayer(run, uri).flush()
    assert set(sent.values()) == {1}, "each point goes once"
    assert not any(name in before and not name.startswith("train/") for name, _ in sent)
    seen = curves(run, uri)
    assert {name: seen[name] for name in wanted} == wanted
    assert {name: seen[name] for name in before} == before, "what was there stays"
    assert seen["epoch"] == [(10, 1.25), (15, 1.875)]
    assert is_flushed(run, uri)
    assert why_not_all_sent(run, uri) is None
    there = MlflowClient(tracking_uri=uri).get_run(
        TrackingRecord.load(run, settle_identity(run)).runs[uri]
    )
    assert there.info.status == "FINISHED"


def test_an_outage_while_earlier_points_are_sent_costs_none(run: Path, uri: str) -> None:
    sent_by_the_earlier_version(run, uri)
    wanted = whole(points_of("train"), go_on(run))
    sender = replayer(run, uri)
    with (
        mock.patch.object(MlflowClient, "log_batch", side_effect=ConnectionError("away")),
        pytest.raises(ConnectionError),
    ):
        sender.flush()
    assert not is_flushed(run, uri)
    replayer(run, uri).flush()
    seen = curves(run, uri)
    assert {name: seen[name] for name in wanted} == wanted


def test_what_today_s_program_writes_keeps_its_name(run: Path, uri: str) -> None:
    spool = Spool(run, "train")
    spool.metrics({"loss": 1.0, "alignment": 2.0, "train/loss": 3.0}, 20)
    spool.close()
    replayer(run, uri).flush()
    seen = curves(run, uri)
    assert (seen["loss"], seen["alignment"]) == ([(20, 1.0)], [(20, 2.0)])
    assert seen["train/loss"][-1] == (20, 3.0)


def test_no_name_is_changed_twice() -> None:
    for writer in ("train", "system", "eval-collapse-00000040"):
        for name in points_of(writer):
            once = current_curve(name, of_training=writer == "train")
            assert current_curve(once, of_training=writer == "train") == once
            assert (once == name) == (writer != "train" and name != "collapse/rankme_centred")
