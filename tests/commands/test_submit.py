"""What a user sees of `launch/submit.py` before anything runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.support.others import NOBODY, link_of_nobody, needs_root
from tests.support.photos import tiny_dataset
from vssl_dist import config
from vssl_dist.commands import submit
from vssl_dist.jobs import machine
from vssl_dist.jobs.machine import Driver, Wheel
from vssl_dist.methods import CONFIGS

ROOT = Path(__file__).parents[2]
PROFILE = str(ROOT / "slurm" / "devcluster.yaml")
SLURM = {
    "sbatch": 'cp "$1" submitted.sh; echo Submitted batch job 4711',
    "srun": "exit 1",
    "scontrol": "echo 'Slurmctld(primary) at ctl is UP'",
    "squeue": "echo PENDING",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tiny_dataset(folder)
    tiny_dataset(folder, split="val", first=500)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to start from, on a machine without SLURM."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", str(tmp_path / "no" / "programs"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


@pytest.fixture
def slurm(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose SLURM takes every job."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, body in SLURM.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    return here


@pytest.fixture
def yaml_file(tmp_path: Path, data: Path) -> str:
    text = {
        "method": {"name": "vje", "backbone": "resnet18_c16"},
        "data": {
            "train": str(data / "train"),
            "val": str(data / "val"),
            "image_size": 32,
            "streams": 4,
            "views": ["cifar", "cifar"],
        },
        "optim": {"base_lr": 0.1, "global_batch": 16, "epochs": 2},
        "evaluations": [{"task": "knn"}],
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(text))
    return str(path)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which a command is refused."""
    assert submit.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_without_slurm_and_without_local_one_line_says_so(
    here: Path, yaml_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    divisible = ("data.streams=64", "optim.global_batch=64")
    for nodes in ((), ("--nodes", "8")):
        line = refusal(capsys, *nodes, yaml_file, *divisible)
        assert "no SLURM on this machine" in line
        assert "--local" in line
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["optim.epoch=3"], "optim.epoch: no such key (did you mean 'epochs'?)"),
        (["optim.base_lr=fast"], "optim.base_lr"),
        (["optim.base_lr"], "not of the form"),
        (["method.name=vjee"], "vjee"),
        (["name='a\nb'"], "name"),
        (["--local=3"], "data.streams=4 is not a multiple of the 3 ranks"),
        (["data.train={here}/absent"], "data.train: {here}/absent"),
        (["data.val={here}/absent"], "data.val: {here}/absent"),
        (["--profile", "{here}/absent.yaml"], "{here}/absent.yaml"),
        (
            ["--dry-run", "method.name=simsiam", "evaluations=[{task: uncertainty}]"],
            "evaluations.0: task uncertainty needs a posterior, which method simsiam does not",
        ),
        (
            [
                "method={name: simsiam, backbone: vit_tiny_patch16_224}",
                "data.views=[cifar, {recipe: cifar, size: 24}]",
            ],
            "data.views: method.backbone cannot take views of 24 pixels",
        ),
        (
            [
                "method={name: byol, backbone: mixer_s32_224}",
                "data.views=[cifar, {recipe: cifar, size: 64}]",
            ],
            "give them another size (data.image_size=32 fits), or choose another backbone",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line_before_anything_is_written(
    here: Path,
    yaml_file: str,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    complaint: str,
) -> None:
    local = [] if "--local=3" in arguments else ["--local"]
    words = [word.replace("{here}", str(here)) for word in arguments]
    assert complaint.replace("{here}", str(here)) in refusal(capsys, *local, yaml_file, *words)
    assert list(here.iterdir()) == []


def test_a_config_that_is_not_there_or_no_yaml_is_named(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "nosuch.yaml" in refusal(capsys, "--local", "nosuch.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    assert "broken.yaml" in refusal(capsys, "--local", str(tmp_path / "broken.yaml"))


def test_gpus_whose_driver_is_too_old_are_refused_and_never_left_for_the_cpu(
    here: Path,
    yaml_file: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, wheel = Driver((12, 2), "535.129.03", num_gpus=2), Wheel("2.13.0", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # which asks no driver for CUDA
    monkeypatch.setattr(machine, "read_driver", lambda: old)
    monkeypatch.setattr(machine, "read_wheel", lambda: wheel)
    line = refusal(capsys, "--local", yaml_file)
    for needed in ("580 or newer", "535.129.03", "CUDA_VISIBLE_DEVICES="):
        assert needed in line
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["--nodes", "2", "--local", "2"], ["--nodes", "0"], ["--local=-1"], ["--node=2"]]
)
def test_contradictory_or_senseless_options_are_refused(
    here: Path, yaml_file: str, arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        submit.main([*arguments, yaml_file])
    assert stopped.value.code == 2


def test_a_dry_run_prints_config_and_script_and_writes_nothing(
    here: Path, yaml_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--nodes", "2", "--profile", PROFILE, "--dry-run", yaml_file]
    assert submit.main([*arguments, f"data.val={here / 'absent'}", "optim.epochs=7"]) == 0
    out, err = capsys.readouterr()
    text, shebang, script = out.partition("#!/bin/bash")
    cfg = config.loads(text, methods=CONFIGS)
    assert cfg.optim.epochs == 7
    assert cfg.dir == here / "runs" / "tiny"
    assert "#SBATCH --nodes=2\n" in shebang + script
    assert "#SBATCH --ntasks-per-node=2\n" in script
    warnings = err.splitlines()
    assert all(line.startswith("warning: ") for line in warnings)
    assert [key for key in ("no SLURM", "data.val", "sqlite") if key not in err] == []
    assert list(here.iterdir()) == []


def test_a_local_dry_run_says_what_it_would_start(
    here: Path, yaml_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu = ["--profile", PROFILE]
    assert submit.main(["--local", "4", *cpu, "--dry-run", yaml_file]) == 0
    out = capsys.readouterr().out
    images = config.loads(out, methods=CONFIGS).micro_batch(4)
    assert f"# {images} image{'s' if images > 1 else ''} per rank at a time\n" in out
    assert "would start 4 ranks on this machine (cpu)" in out
    assert list(here.iterdir()) == []


def test_a_submission_says_how_to_follow_and_leaves_what_the_ranks_read(
    slurm: Path, yaml_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--nodes", "2", "--profile", PROFILE, yaml_file]
    assert submit.main([*command, "--dry-run"]) == 0
    dry = capsys.readouterr().out.partition("#!/bin/bash")[2]
    assert submit.main(command) == 0
    out = capsys.readouterr().out
    run = slurm / "runs" / "tiny"
    for needed in ("4711 (2 nodes x 2 ranks)", str(run), "tail -F", "squeue -j 4711", "tracker"):
        assert needed in out
    assert (slurm / "submitted.sh").read_text().partition("#!/bin/bash")[2] == dry
    assert config.load(run / "config.yaml", methods=CONFIGS).dir == run
    assert "SLURM job 4711" in refusal(capsys, *command)
    assert (run / "slurm").stat().st_mode & 0o077 == 0


def test_secrets_of_the_environment_are_in_no_file_of_the_run(
    slurm: Path, yaml_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "hunter2")
    assert submit.main(["--profile", PROFILE, yaml_file]) == 0
    files = [path for path in slurm.rglob("*") if path.is_file()]
    assert len(files) > 4
    assert not any(b"hunter2" in path.read_bytes() for path in files)


@pytest.mark.parametrize(
    "attack",
    ["partition: \"a\\ntouch PWNED #\"", "account: 'x; touch PWNED'", "env: {A: $(touch PWNED)}"],
)  # fmt: skip
def test_no_profile_can_smuggle_a_command_into_the_script(
    slurm: Path, yaml_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], attack: str
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(f"device: cpu\nranks_per_node: 2\n{attack}\n")
    assert "pattern" in refusal(capsys, "--profile", str(path), yaml_file)
    assert list(slurm.iterdir()) == []


@pytest.mark.parametrize("name", ["a b", "a\nb", "$(x)", "%j"])
def test_no_folder_name_can_either(
    slurm: Path, yaml_file: str, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    arguments = ("--profile", PROFILE, yaml_file, f"out={yaml.safe_dump(name).strip()}")
    assert "out" in refusal(capsys, *arguments)
    assert list(slurm.iterdir()) == []


def test_sqlite_is_refused_when_jobs_run_on_several_hosts(
    slurm: Path,
    yaml_file: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    for nodes in ("1", "2"):  # with one node the evaluations are on a second
        line = refusal(capsys, "--nodes", nodes, "--profile", PROFILE, yaml_file)
        assert "MLFLOW_TRACKING_URI" in line
    assert list(slurm.iterdir()) == []


@pytest.mark.parametrize(
    ("address", "remedy"),
    [
        ("http://me:hunter2@tracker:5000", "MLFLOW_TRACKING_PASSWORD"),
        ("http://me:hunt/hunter2@tracker:5000", "MLFLOW_TRACKING_PASSWORD"),
        ("http://tracker/?Token=hunter2", "MLFLOW_TRACKING_PASSWORD"),
        ("postgresql://me:hunt/hunter2@db/mlflow", "PGUSER"),
    ],
)
def test_a_password_in_the_tracking_address_is_refused_and_not_repeated(
    slurm: Path,
    yaml_file: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    address: str,
    remedy: str,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    line = refusal(capsys, "--profile", PROFILE, yaml_file)
    assert remedy in line
    assert "hunter2" not in line
    assert list(slurm.iterdir()) == []


def test_a_password_in_a_profile_is_refused_and_not_repeated(
    slurm: Path, yaml_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    secrets = (
        "env: {PGPASS: hunter2}", "setup: [export http_proxy=http://u:hunter2@p:1]",
        "setup: [[export PGPASS=hunter2]]",
    )  # fmt: skip
    for secret in secrets:
        path.write_text(f"device: cpu\nranks_per_node: 2\n{secret}\n")
        line = refusal(capsys, "--profile", str(path), yaml_file)
        assert "looks like a secret" in line
        assert "hunter2" not in line
    assert list(slurm.iterdir()) == []


def test_what_mlflow_will_not_take_is_refused_before_anything_is_written(
    here: Path,
    yaml_file: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (here / "notes.db").write_text("no database, though it is called one\n" * 9)
    for uri, reason in (
        ("sqlite:///notes.db", "is no sqlite database"),
        ("sqlite:///notes.db/mlflow.db", "is no folder"),
        ("htp://tracker:5000", "did you mean http?"),
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert reason in refusal(capsys, "--local", "2", yaml_file)
        assert submit.main(["--local", "2", yaml_file, "--dry-run"]) == 0
        assert reason in capsys.readouterr().err
    assert [path.name for path in here.iterdir()] == ["notes.db"]


def test_a_server_that_is_away_is_a_warning_with_the_command_for_later(
    here: Path,
    yaml_file: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert submit.main(["--local", "2", yaml_file, "--dry-run"]) == 0
    err = capsys.readouterr().err
    assert "warning: MLflow at http://127.0.0.1:9 does not answer" in err
    assert f"python launch/track.py {here}/runs/tiny" in err


def test_on_many_nodes_a_run_needs_no_server_if_its_curves_may_wait(
    slurm: Path,
    yaml_file: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    assert submit.main(["--nodes", "2", "--profile", PROFILE, yaml_file]) == 0
    assert f"python launch/track.py {slurm}/runs/tiny --to URI" in capsys.readouterr().out


def test_a_login_node_needs_none_of_the_heavy_imports_and_sees_no_traceback(here: Path) -> None:
    program = (
        "import sys; from vssl_dist.commands import submit; code = submit.main(sys.argv[1:]);"
        "heavy = {'deepspeed', 'mlflow', 'nvidia.dali', 'sklearn'} & sys.modules.keys();"
        "print(code, sorted(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "nosuch.yaml"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "2 []\n"
    assert re.fullmatch(r"error: nosuch\.yaml: .*\n", done.stderr)


def test_what_is_out_of_distribution_is_looked_for_on_the_login_node(
    here: Path, yaml_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(
        capsys, "--local", "1", yaml_file, "evaluations=[{task: ood, ood: {svhn: nowhere}}]"
    )
    assert "evaluations: ood svhn" in line
    assert str(here / "nowhere") in line


def test_known_mistakes_are_warned_about_and_the_run_goes_on(
    slurm: Path, yaml_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--nodes", "2", "--profile", PROFILE, yaml_file, "method.beta=0.001"]
    assert submit.main([*command, "--dry-run"]) == 0
    dry = capsys.readouterr().err
    assert all(line.startswith("warning: ") for line in dry.splitlines())
    for name in ("vje_beta", "small_batch", "knn_vote"):
        assert f"warning: {name}: " in dry
    assert submit.main([*command, "silence=[vje_beta, knn_vote]"]) == 0
    real = capsys.readouterr().err
    assert "warning: small_batch: " in real
    assert "vje_beta" not in real
    assert "knn_vote" not in real
    written = config.load(slurm / "runs" / "tiny" / "config.yaml", methods=CONFIGS)
    assert written.silence == ("vje_beta", "knn_vote")


def test_the_shards_say_what_the_path_does_not(
    here: Path, yaml_file: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "other").symlink_to(data / "train")
    words = ["--local", "2", yaml_file, "data.val=other"]
    assert submit.main([*words, "--dry-run"]) == 0
    assert "is bank and query: every image would find itself" in capsys.readouterr().err
    assert "is bank and query: every image would find itself" in refusal(capsys, *words)
    assert not (here / "runs").exists()
    assert submit.main([*words, "--dry-run", "evaluations=[{task: collapse}]"]) == 0
    assert "warning: held_out: " in capsys.readouterr().err


def test_a_warning_that_does_not_exist_cannot_be_silenced(
    here: Path, yaml_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, "--local", "2", yaml_file, "silence=[vje_bet]")
    assert "(did you mean 'vje_beta'?)" in line
    assert list(here.iterdir()) == []


@needs_root
@pytest.mark.parametrize("where", [["--local", "2"], ["--nodes", "2", "--profile", PROFILE]])
def test_a_run_folder_of_another_user_is_refused_and_a_dry_run_says_so(
    slurm: Path,
    yaml_file: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    where: list[str],
) -> None:
    runs = slurm / "runs"
    (runs / "theirs").mkdir(parents=True)
    os.chown(runs / "theirs", NOBODY, NOBODY)
    (runs / "mine").mkdir()
    link_of_nobody(runs / "link", runs / "mine")
    link_of_nobody(runs / "mine" / "launch.yaml", slurm / "elsewhere")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    for name in ("theirs", "link", "mine"):
        line = refusal(capsys, *where, yaml_file, f"name={name}")
        assert f"{runs / name}" in line
        assert "nobody" in line
        assert submit.main([*where, yaml_file, f"name={name}", "--dry-run"]) == 0
        assert line.replace("error", "warning") in capsys.readouterr().err
    assert [path.name for path in (runs / "mine").iterdir()] == ["launch.yaml"]
    assert not list((runs / "theirs").iterdir())
    assert not (slurm / "submitted.sh").exists()


def test_a_submission_closes_its_folder_to_the_group_and_a_dry_run_says_that_it_will(
    slurm: Path, yaml_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = slurm / "runs" / "tiny"
    (run / "logs").mkdir(parents=True)
    run.chmod(0o2775)
    command = ["--nodes", "2", "--profile", PROFILE, yaml_file]
    said = f"warning: others could write in {run} (1 file or folder, first {run})"
    assert submit.main([*command, "--dry-run"]) == 0
    assert said in capsys.readouterr().err
    assert run.stat().st_mode & 0o7777 == 0o2775
    assert submit.main(command) == 0
    assert said in capsys.readouterr().err
    assert run.stat().st_mode & 0o7777 == 0o2755


def test_no_name_of_a_folder_is_a_command_to_the_terminal(
    here: Path,
    yaml_file: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = here / "\x1b]0;x\x07\u202e"
    bad.mkdir()
    monkeypatch.chdir(bad)
    absent = "data.train=absent"
    for words in (["--dry-run"], ["--dry-run", absent], [absent]):
        submit.main(["--local", "2", yaml_file, *words])
        out, err = capsys.readouterr()
        assert not {"\x1b", "\x07", "\u202e"} & {*out, *err}
        assert "\\x1b" in out + err
