from __future__ import annotations

import stat
import subprocess
from pathlib import Path

import pytest

from tests.support.launchers import HOSTILE, INNOCENT
from vssl_dist.errors import ConfigError, SubmissionError
from vssl_dist.jobs import slurm
from vssl_dist.jobs.resources import Launch, Resources, load_profile, resolve_for_slurm

DEFAULT = Path(__file__).parents[2] / "slurm" / "default.yaml"
URI = "http://127.0.0.1:5000"


def sbatch(launch: Launch) -> dict[str, str]:
    """The options of the script for ``launch``, as SLURM reads them."""
    text = slurm.batch_script_text(Path("/runs/a/slurm"), slurm.train_parameters("a", launch))
    lines = (line for line in text.splitlines() if line.startswith("#SBATCH --"))
    pairs = (line.removeprefix("#SBATCH --").partition("=") for line in lines)
    return {key: value for key, _, value in pairs}


@pytest.fixture
def script(tmp_path: Path) -> str:
    parameters = slurm.train_parameters("a", resolve_for_slurm(load_profile(DEFAULT), 8, URI))
    return slurm.batch_script_text(tmp_path / "slurm", parameters)


def test_eight_nodes_of_the_default_profile_are_sixty_four_ranks_with_a_gpu_each() -> None:
    options = sbatch(resolve_for_slurm(load_profile(DEFAULT), 8, URI))
    assert (options["nodes"], options["ntasks-per-node"], options["gpus-per-node"]) == (
        "8",
        "8",
        "8",
    )
    assert options["job-name"] == "a"
    assert options["signal"] == "USR2@300"
    assert options["open-mode"] == "append"
    assert "requeue" in options


def test_srun_ends_the_job_with_its_first_dead_rank_and_knows_the_cores(script: str) -> None:
    srun = next(line for line in script.splitlines() if line.startswith("srun "))
    assert "--kill-on-bad-exit=1" in srun
    assert "--cpus-per-task=8" in srun
    assert "--error" not in srun


def test_a_script_has_no_accounting_key_that_the_profile_did_not_ask_for(script: str) -> None:
    for option in ("wckey", "account", "qos", "partition", "mem", "exclusive"):
        assert f"#SBATCH --{option}" not in script


def test_threads_and_variables_are_exported_before_the_ranks_start() -> None:
    profile = Resources(device="cpu", cpus_per_rank=3, env={"A": "b"}, setup=("module load x",))
    launch = resolve_for_slurm(profile, 1, URI)
    text = slurm.batch_script_text(Path("/runs/a/slurm"), slurm.train_parameters("a", launch))
    before, _, after = text.partition("srun ")
    for line in ("module load x", "export A=b", "export OMP_NUM_THREADS=3"):
        assert f"\n{line}\n" in before
    assert "export A" not in after


def test_ranks_import_this_code_wherever_the_job_is_submitted(script: str) -> None:
    """Where submitit is started, all that the current folder holds would come first."""
    before, _, _ = script.partition("\nsrun ")
    assert "\nexport PYTHONSAFEPATH=1\n" in before
    path = [line for line in before.split("\n") if "PYTHONPATH" in line]

    def seen(modules: str) -> str:
        """What ranks find where modules, or the user's lines, have left this."""
        command = ["bash", "-ec", "\n".join([*path, "printenv PYTHONPATH"])]
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": modules}
        return subprocess.check_output(command, env=environment, text=True).strip()

    code = str(DEFAULT.parents[1])
    assert {seen(modules) for modules in ("", ":", "::")} == {code}
    assert {seen(modules) for modules in ("/a b:/c", ":/a b::/c:")} == {f"{code}:/a b:/c"}


def test_ranks_use_the_interface_that_a_profile_names_unless_it_says_otherwise() -> None:
    def exports(**keys: object) -> set[str]:
        profile = Resources.model_validate({"device": "cpu", **keys})
        wanted = slurm.train_parameters("a", resolve_for_slurm(profile, 2, URI))
        return {line for line in wanted["setup"] if "SOCKET" in line}

    assert exports() == set()
    both = {"export GLOO_SOCKET_IFNAME=ib0", "export NCCL_SOCKET_IFNAME==ib0"}
    assert exports(interface="ib0") == both
    assert "export NCCL_SOCKET_IFNAME=ib" in exports(
        interface="ib0", env={"NCCL_SOCKET_IFNAME": "ib"}
    )


def test_an_evaluation_asks_for_one_process_and_inherits_what_it_does_not_say() -> None:
    profile = Resources.model_validate(
        {"partition": "big", "account": "us", "evaluation": {"partition": "small", "cpus": 3}}
    )
    wanted = slurm.evaluation_parameters("a-knn", resolve_for_slurm(profile, 8, URI))
    assert (wanted["nodes"], wanted["ntasks_per_node"], wanted["cpus_per_task"]) == (1, 1, 3)
    assert (wanted["partition"], wanted["account"], wanted["gpus_per_node"]) == ("small", "us", 1)


def test_an_evaluation_of_several_ranks_has_their_cores_and_gpus_on_one_node() -> None:
    small = {"ranks": 4, "cpus": 3}
    profile = Resources.model_validate({"ranks_per_node": 8, "evaluation": small})
    wanted = slurm.evaluation_parameters("a-knn", resolve_for_slurm(profile, 2, URI))
    assert (wanted["nodes"], wanted["ntasks_per_node"]) == (1, 1), "which starts the others"
    assert (wanted["cpus_per_task"], wanted["gpus_per_node"]) == (12, 4)
    assert wanted["srun_args"] == ["--cpus-per-task=12"]
    assert any("OMP_NUM_THREADS=3" in line for line in wanted["setup"]), "of each"
    profile = Resources.model_validate({"evaluation": small | {"device": "cpu"}})
    assert "gpus_per_node" not in slurm.evaluation_parameters(
        "a", resolve_for_slurm(profile, 2, URI)
    )


def test_a_script_is_made_without_writing_anything(tmp_path: Path, script: str) -> None:
    assert script.startswith("#!/bin/bash")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a b", "a'b", "a\nb", "100%j", "$(x)", 'a"b'])
def test_a_run_folder_that_a_batch_script_would_misread_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="batch script"):
        slurm.check_script_path(Path("/runs") / name)


def test_a_refusal_of_sbatch_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, "srun", "exit 0")
    tool(tmp_path, "sbatch", "echo 'sbatch: error: invalid partition' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    parameters = slurm.train_parameters("a", resolve_for_slurm(Resources(device="cpu"), 1, URI))
    with pytest.raises(SubmissionError, match="invalid partition") as refused:
        slurm.submit(tmp_path / "slurm", parameters, print)
    assert "\n" not in str(refused.value)
    assert stat.S_IMODE((tmp_path / "slurm").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("answer", "live"),
    [
        ("echo RUNNING", True),
        ("echo PENDING", True),
        ("echo COMPLETED", False),
        ("echo FAILED", False),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", False),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", True),
    ],
)
def test_a_job_is_taken_for_dead_only_when_slurm_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, live: bool
) -> None:
    tool(tmp_path, "squeue", answer)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert slurm.is_job_live("7") is live


@pytest.mark.parametrize(
    ("answer", "up"),
    [
        ("echo 'Slurmctld(primary) at ctl is UP'", True),
        ("echo 'Slurmctld(primary) at ctl is DOWN'; exit 1", False),
        ("echo 'scontrol: error: s_p_parse_file:\n unable to status' >&2; exit 1", False),
        ("exit 0", False),
    ],
)
def test_a_controller_that_does_not_answer_is_said_in_our_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, up: bool
) -> None:
    for name in ("sbatch", "srun", "squeue"):
        tool(tmp_path, name, "exit 0")
    tool(tmp_path, "scontrol", answer)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    reason = "SLURM's controller does not answer (`scontrol ping` says more)"
    assert slurm.why_no_slurm() == (None if up else reason)


def test_without_slurm_the_reason_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    reason = slurm.why_no_slurm()
    assert reason is not None
    assert "sbatch" in reason
    assert slurm.is_job_live("7")


def tool(folder: Path, name: str, body: str) -> None:
    """Put a program in ``folder`` that answers as SLURM's would."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def submitted(tmp_path: Path, profile: Resources) -> dict[str, str]:
    """The environment that sbatch would have handed to the job."""
    parameters = slurm.train_parameters("a", resolve_for_slurm(profile, 1, URI))
    assert slurm.submit(tmp_path / "slurm", parameters, print) == "4711"
    words = (tmp_path / "environment").read_text().split("\0")
    return dict(word.split("=", 1) for word in words if word)


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session inside every launcher at once, and an sbatch that writes down what it gets."""
    for name, value in {**INNOCENT, **HOSTILE}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "tools").mkdir()
    for tool in ("sbatch", "srun", "squeue"):
        path = tmp_path / "tools" / tool
        path.write_text(
            f"#!/bin/sh\n/usr/bin/env -0 > {tmp_path}/environment\necho Submitted batch job 4711\n"
        )
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/tools:/usr/bin:/bin")


@pytest.mark.usefixtures("inside")
def test_a_job_inherits_nothing_of_the_session_it_is_submitted_in(tmp_path: Path) -> None:
    seen = submitted(tmp_path, Resources(device="cpu"))
    assert not seen.keys() & HOSTILE.keys()
    stays = INNOCENT.keys() - {"PATH"}
    assert {name: seen[name] for name in stays} == {name: INNOCENT[name] for name in stays}


@pytest.mark.usefixtures("inside")
def test_a_users_own_defaults_hold_unless_the_profile_says_otherwise(tmp_path: Path) -> None:
    """sbatch prefers its variables to what the script says."""
    seen = submitted(tmp_path, Resources(device="cpu", account="them"))
    assert ("SBATCH_ACCOUNT" in seen, seen["SBATCH_QOS"]) == (False, "long")


@pytest.mark.usefixtures("inside")
def test_whether_a_job_lives_is_asked_without_the_filters_of_its_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQUEUE_PARTITION", "another")
    assert slurm.is_job_live("4711")
    words = (tmp_path / "environment").read_text().split("\0")
    names = {word.partition("=")[0] for word in words}
    assert not names & {"SQUEUE_PARTITION", *HOSTILE}
    assert "SLURM_CONF" in names
