"""What a rank reads and imports from its start to its end, and how it keeps its memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.photos import tiny_dataset
from vssl_dist.commands import submit
from vssl_dist.jobs import local
from vssl_dist.jobs.resources import Resources, resolve_for_this_machine

ROOT = Path(__file__).parents[2]
NOT_FOR_RANKS = {"mlflow", "pandas", "fastapi", "matplotlib", "sklearn", "sqlalchemy", "pyarrow"}
RANK = """
import json, os, resource, sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
from vssl_dist.jobs import rank
exit_code = rank.main()
report = {
    "opens": len(opened),
    "modules": sorted({name.partition(".")[0] for name, m in sys.modules.items() if m}),
    "manifests": sum(path.endswith("/train/manifest.json") for path in opened),
    "allocator": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")},
}
with open(sys.argv[2] + os.environ["RANK"], "w") as file:
    json.dump(report, file)
sys.exit(exit_code)
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of each rank of a run of two, which starts as `launch/submit.py` starts it."""
    folder = tmp_path_factory.mktemp("start")
    data = tiny_dataset(folder / "train", samples=96, classes=4)

    class Reporting(local.RankProcesses):
        def __init__(self, command: list[str], *rest: Any) -> None:
            super().__init__([sys.executable, "-P", "-c", RANK, command[-1], f"{folder}/"], *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("MLFLOW_TRACKING_URI", "none")
        patch.delenv("MALLOC_MMAP_MAX_", raising=False)
        patch.setattr(local, "RankProcesses", Reporting)
        command = ["--local", "2", "configs/quickstart.yaml", "name=start", f"out={folder}"]
        sizes = ["optim.global_batch=32", "data.streams=4", "optim.max_steps=2", "log_every=1"]
        paths = [f"data.train={data}", f"data.val={data}", "evaluations=[]"]
        assert submit.main([*command, *sizes, *paths]) == 0
    return [json.loads((folder / str(rank)).read_text()) for rank in range(2)]


def test_no_rank_imports_what_tracking_and_pictures_are_made_with(
    reports: list[dict[str, Any]],
) -> None:
    assert [sorted(NOT_FOR_RANKS & set(report["modules"])) for report in reports] == [[], []]


def test_the_first_rank_reads_the_manifest_and_the_others_do_not(
    reports: list[dict[str, Any]],
) -> None:
    assert [report["manifests"] for report in reports] == [2, 0], "its number of steps, its loader"


def test_a_rank_opens_less_than_it_did_with_mlflow(reports: list[dict[str, Any]]) -> None:
    assert max(report["opens"] for report in reports) < 5000


def test_ranks_on_cpus_keep_their_memory_unless_told_otherwise(
    reports: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184"}
    assert [report["allocator"] for report in reports] == [settings] * 2
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "7")
    launch = resolve_for_this_machine(Resources(device="cpu"), 1, 0, "")
    assert local.rank_environment(launch)["MALLOC_MMAP_MAX_"] == "7"
