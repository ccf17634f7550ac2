"""An outer launcher's variables reach no process of ours; the machine's and the user's do."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest
import submitit

from tests.support.launchers import HOSTILE, INNOCENT, LAUNCHERS
from vssl_dist.environment import in_our_job, no_job_around, outside_jobs, slurm_job


@pytest.mark.parametrize("theirs", LAUNCHERS.values(), ids=LAUNCHERS)
def test_nothing_of_a_launcher_stays_and_all_else_does(theirs: Mapping[str, str]) -> None:
    assert outside_jobs({**INNOCENT, **theirs}) == INNOCENT


def test_whatever_torchrun_and_deepspeed_set_for_a_rank_is_known_here() -> None:
    """Read from the installed sources: settings of a library and of threads are no rank's."""
    sources = {
        "torch": ("distributed/elastic/agent/server/local_elastic_agent.py", r'^ +"([A-Z_]+)":'),
        "deepspeed": ("launcher/launch.py", r'^ +current_env\["([A-Z_]+)"\] ='),
    }
    for package, (path, pattern) in sources.items():
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        text = (Path(spec.origin).parent / path).read_text()
        names = set(re.findall(pattern, text, re.M)) - {"OMP_NUM_THREADS"}
        names = {name for name in names if not name.startswith("TORCH_NCCL_")}
        assert {"RANK", "MASTER_PORT"} <= names
        assert outside_jobs(dict.fromkeys(names, "1")) == {}


def test_what_submitit_hides_from_a_job_is_hidden_but_for_addresses_and_accounts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [*os.environ]:
        monkeypatch.delenv(name)
    for name, value in {**INNOCENT, **HOSTILE}.items():
        monkeypatch.setenv(name, value)
    with submitit.helpers.clean_env():
        theirs = {*INNOCENT, *HOSTILE} - {*os.environ}
    ours = {*INNOCENT, *HOSTILE} - {*outside_jobs(os.environ)}
    assert theirs - ours == {name for name in INNOCENT if name.startswith(("SLURM_", "SBATCH_"))}


def test_a_task_of_our_own_job_keeps_its_scheduler_and_nothing_of_others() -> None:
    job = {n: v for n, v in HOSTILE.items() if n.startswith(("SLURM_", "SUBMITIT_"))}
    assert in_our_job({**INNOCENT, **HOSTILE}) == INNOCENT | job


def test_variables_are_hidden_only_within_also_when_it_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {**INNOCENT, **HOSTILE}.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    within: dict[str, str] = {}

    def start() -> None:
        within.update(os.environ)
        raise OSError

    with pytest.raises(OSError), no_job_around("SBATCH_QOS"):  # noqa: PT011
        start()
    assert not within.keys() & {*HOSTILE, "SBATCH_QOS"}
    assert within["SBATCH_ACCOUNT"] == "us"
    assert dict(os.environ) == before


def test_a_slurm_session_is_no_job_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VSSL_SLURM_JOB", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "4242")
    assert slurm_job() is None
