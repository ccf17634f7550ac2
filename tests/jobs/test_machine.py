"""What a rank finds under it, from the facts of machines that are not here, and of this one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vssl_dist import config
from vssl_dist.commands import evaluate
from vssl_dist.config import RunConfig
from vssl_dist.errors import ConfigError
from vssl_dist.jobs import machine
from vssl_dist.jobs.evaluation_job import EvalJob
from vssl_dist.jobs.machine import (
    Driver,
    Gpu,
    Wheel,
    describe_hardware,
    prepare_device,
    why_no_cuda,
)
from vssl_dist.jobs.preflight import Preflight
from vssl_dist.jobs.resources import Resources, resolve_for_slurm, resolve_for_this_machine
from vssl_dist.jobs.stop import REFUSED_EXIT_CODE, StopFlag
from vssl_dist.jobs.training_job import (
    TrainJob,
    run_rank,
)
from vssl_dist.logs import configure_log_output, entry_as_terminal_text
from vssl_dist.methods import CONFIGS
from vssl_dist.run_folder import RunFolder

PYPI = Wheel("2.13.0", "13.0", "2.28.9")
NEW = Driver((13, 0), "580.65.06", num_gpus=8)
OLD = Driver((12, 2), "535.129.03", num_gpus=8)
CUDA = Resources(device="cuda", ranks_per_node=2)
TEXT = """
method: {name: simsiam}
data: {streams: 4, views: [cifar, cifar]}
optim: {base_lr: 0.1, global_batch: 16, epochs: 2}
"""

Machine = Callable[[Wheel, Driver | None], None]


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Let what is read be another machine's."""

    def be(wheel: Wheel, driver: Driver | None) -> None:
        monkeypatch.setattr(machine, "read_wheel", lambda: wheel)
        monkeypatch.setattr(machine, "read_driver", lambda: driver)

    return be


@pytest.fixture
def stop() -> Iterator[StopFlag]:
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    yield StopFlag()
    for number, handler in before.items():
        signal.signal(number, handler)


def run_in(folder: Path) -> RunConfig:
    return config.loads(
        TEXT, [f"out={folder}", f"data.train={folder}/none", "name=run"], methods=CONFIGS
    )


@pytest.mark.parametrize(
    ("wheel", "driver", "words"),
    [
        (PYPI, OLD, "needs an NVIDIA driver of 580 or newer, and the one here is 535.129.03, "),
        (PYPI, replace(OLD, newest_cuda=(12, 9)), "for CUDA 12.9 at most"),
        (PYPI, Driver((11, 4)), "the one here is of an unknown release, for CUDA 11.4 at most"),
        (Wheel("2.9.0", "12.8"), Driver((11, 8)), "driver of 525 or newer"),
        (Wheel("3.1", "14.0"), NEW, "needs an NVIDIA driver for CUDA 14, and the one here is 580"),
        (PYPI, None, "driver of 580 or newer, and here is none (no libcuda.so.1)"),
        (Wheel("2.13.0+cpu", None), NEW, "torch 2.13.0+cpu is built without CUDA"),
        (PYPI, replace(NEW, num_gpus=0), "shows this process no GPU"),
    ],
)
def test_what_torch_cannot_use_is_refused_in_one_line_with_the_remedy(
    wheel: Wheel, driver: Driver | None, words: str
) -> None:
    said = why_no_cuda(wheel, driver)
    assert said is not None
    assert words in said
    assert "device: cpu" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("wheel", "driver"),
    [
        (PYPI, NEW),
        (PYPI, Driver((13, 2), "595.10", num_gpus=None)),
        (Wheel("2.13.0", "13.2"), NEW),  # within a major version any driver of it will do
        (Wheel("2.13.0+cu126", "12.6"), OLD),
        (Wheel("2.13.0+cu126", "12.6"), NEW),
        (
            PYPI,
            Driver((13, 0), "535.129.03", num_gpus=1),
        ),  # forward compatibility: CUDA's word counts
    ],
)
def test_a_driver_of_the_wheel_s_major_version_or_a_later_one_will_do(
    wheel: Wheel, driver: Driver
) -> None:
    assert why_no_cuda(wheel, driver) is None


def test_a_rank_says_in_one_line_what_it_runs_on() -> None:
    h200 = Gpu(
        "NVIDIA H200",
        free_bytes=149_000_000_000,
        total_bytes=150_113_550_336,
        visible_devices="GPU-8932f937",
    )
    said = describe_hardware(PYPI, NEW, h200)
    assert said.startswith(
        "NVIDIA H200, 139.8 GiB (138.8 free), driver 580.65.06, torch 2.13.0 for CUDA 13.0, "
        "NCCL 2.28.9, CUDA_VISIBLE_DEVICES=GPU-8932f937, "
    )
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    place = f"{cores} core{'s' if cores > 1 else ''}, {threads} thread{'s' if threads > 1 else ''}"
    assert said.endswith(place)
    before = dict(os.environ)
    assert prepare_device("cpu", os.environ) == f"CPU, torch {torch.__version__}, {place}"
    assert dict(os.environ) == before


LIBCUDA = "int cuDriverGetVersion(int *v) { *v = %d; return 0; }"
NVML = """
#include <string.h>
int nvmlInit_v2(void) { return %d; }
int nvmlSystemGetDriverVersion(char *v, unsigned n) { strncpy(v, "535.129.03", n); return 0; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 4; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **h) { return i == 2 ? 4 : 0; }
int nvmlShutdown(void) { return 0; }
"""
READ = """
import json
from vssl_dist.jobs.machine import read_driver
driver = read_driver()
print(json.dumps(driver and [*driver.newest_cuda, driver.release, driver.num_gpus]))
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_driver_is_asked_in_its_own_words(tmp_path: Path) -> None:
    """With libraries of the driver's names and functions; permission is refused for one GPU."""

    def answer(cuda: str | None, nvml: str | None) -> list[object] | None:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for name, text in (("libcuda.so.1", cuda), ("libnvidia-ml.so.1", nvml)):
            # One without a single function hides the machine's own.
            (folder / f"{name}.c").write_text(text or "int nothing;")
            library = ["cc", "-shared", "-fPIC", "-o", str(folder / name), f"{folder / name}.c"]
            subprocess.run(library, check=True)
        environ = os.environ | {"LD_LIBRARY_PATH": str(folder)}
        done = subprocess.run(
            [sys.executable, "-c", READ], env=environ, capture_output=True, text=True, check=True
        )
        told: list[object] | None = json.loads(done.stdout)
        return told

    assert answer(LIBCUDA % 12020, NVML % 0) == [12, 2, "535.129.03", 3]
    assert answer(None, None) is None
    silent = answer(LIBCUDA % 13000, NVML % 18)
    assert silent is not None
    assert (silent[:2], silent[3]) == ([13, 0], None)


def test_a_rank_refuses_the_machine_with_exit_code_2_before_the_process_group(
    tmp_path: Path,
    on: Machine,
    stop: StopFlag,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_log_output("rank 1")
    launch = resolve_for_slurm(CUDA, 1, "http://tracker:5000")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # put back to what it was, afterwards
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    variables = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "VSSL_ATTEMPT": "a"}

    def refusal(number: int, **environ: str) -> str:
        for name, value in (variables | environ).items():
            monkeypatch.setenv(name, value)
        cfg = run_in(tmp_path / str(number))
        assert run_rank(TrainJob(config.dump(cfg), launch), stop) == REFUSED_EXIT_CODE
        assert not torch.distributed.is_initialized()
        said = RunFolder(cfg.dir).failure_path("a").read_text()
        out, err = capsys.readouterr()
        assert (out, entry_as_terminal_text(err)) == ("", f"{said}\n")
        assert said.startswith("error: ")
        assert "\n" not in said
        assert "(rank 1 on " in said
        return said

    # This machine as it is: no wheel for CUDA, no driver, or no GPU that is shown.
    assert "CPU" in refusal(0, CUDA_VISIBLE_DEVICES="")
    on(PYPI, OLD)
    assert "535.129.03" in refusal(1)
    on(PYPI, NEW)
    assert "LOCAL_RANK=1" in refusal(2, CUDA_VISIBLE_DEVICES="")
    assert "LOCAL_RANK='x'" in refusal(3, LOCAL_RANK="x")

    def busy() -> tuple[int, int]:
        raise RuntimeError("CUDA error: devices are busy or unavailable\nDevice-side assertions")

    monkeypatch.setattr(torch.cuda, "mem_get_info", busy)
    said = refusal(4, CUDA_VISIBLE_DEVICES="4,6")
    assert "CUDA_VISIBLE_DEVICES=6: this GPU cannot be used: CUDA error: devices are busy" in said


def test_a_local_run_is_refused_before_it_is_written_and_a_login_node_needs_no_gpu(
    on: Machine,
) -> None:
    on(PYPI, OLD)
    cfg = run_in(Path("runs"))
    (first, *others) = Preflight(cfg, resolve_for_this_machine(CUDA, 2, 2, "")).problems()
    assert "needs an NVIDIA driver of 580 or newer" in first
    assert "data.train" in others[0]
    for launch in (
        resolve_for_this_machine(Resources(device="cpu"), 2, 0, ""),
        resolve_for_slurm(CUDA, 1, ""),
    ):
        assert not any("driver" in problem for problem in Preflight(cfg, launch).problems())


def test_an_evaluation_on_such_a_machine_is_one_line_and_exit_code_2(
    tmp_path: Path, on: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    on(PYPI, OLD)
    export = tmp_path / "run" / "export" / "backbone-00000001.safetensors"
    job = EvalJob(tmp_path / "run", export, 1, '{"task": "knn"}', "cuda", threads=1)
    with pytest.raises(SystemExit) as left:
        job()
    _, err = capsys.readouterr()
    assert left.value.code == REFUSED_EXIT_CODE
    assert entry_as_terminal_text(err).startswith("error: torch 2.13.0 is built for CUDA 13.0")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_by_hand_an_evaluation_never_takes_the_cpu_for_a_gpu_that_cannot_be_used(
    on: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(PYPI, OLD)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ([], ["--device", "cuda"]):
        with pytest.raises(ConfigError, match="580 or newer"):
            evaluate.evaluation_settings(evaluate.arguments(["runs/run", *device]))
    chosen = evaluate.evaluation_settings(evaluate.arguments(["runs/run", "--device", "cpu"]))
    assert chosen.device == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert evaluate.evaluation_settings(evaluate.arguments(["runs/run"])).device == "cpu"


@pytest.mark.gpu
def test_on_a_gpu_a_rank_names_it_and_the_driver() -> None:
    program = (
        "import os; from vssl_dist.jobs import machine; "
        "print(machine.prepare_device('cuda', os.environ))"
    )
    environ = os.environ | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True
    )
    parts = [
        r"\S.*",
        r"\d+\.\d GiB \(\d+\.\d free\)",
        r"driver \d+\.\d+\S*",
        r"torch \S+ for CUDA \d+\.\d+",
        r"NCCL \d+\.\d+\.\d+",
        r"CUDA_VISIBLE_DEVICES=\S+",
        r"\d+ cores?, \d+ threads?\n",
    ]
    assert re.fullmatch(", ".join(parts), done.stdout)


def test_a_gpu_that_nobody_shows_is_refused(on: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    on(PYPI, NEW)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    machine.check_device("cpu")
    with pytest.raises(ConfigError, match=r"CUDA_VISIBLE_DEVICES \(''\) shows no GPU"):
        machine.check_device("cuda")
