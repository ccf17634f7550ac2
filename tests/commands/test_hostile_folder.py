"""Commands that are typed in a folder, and on a machine, that others use, too."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests.support.others import needs_root
from tests.support.photos import tiny_dataset

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
HOSTILE = (
    "psutil", "yaml", "torch", "numpy", "filelock", "pydantic", "mlflow", "deepspeed", "selectors",
    "submitit", "vssl_dist", "launch", "data_prep", "sitecustomize",
)  # fmt: skip
UNDER_ANOTHER_NAME = 'hostname {}; umask 002; exec "$@"'


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of others with modules that leave a mark, and a config whose run is 12 steps."""
    folder = tmp_path_factory.mktemp("shared")
    for name in HOSTILE:
        mark = f"open({str(folder / 'hijacked')!r}, 'a').write({name + chr(10)!r})\n"
        (folder / f"{name}.py").write_text(f"{mark}raise SystemExit(1)\n")
    data = tmp_path_factory.mktemp("data")
    text = {
        "log_every": 1,
        "method": {"name": "simsiam", "backbone": "resnet18_c16"},
        "data": {
            "train": str(tiny_dataset(data, samples=192, shard_size=64)),
            "val": str(tiny_dataset(data, samples=64, shard_size=64, split="val", first=1000)),
            "image_size": 32,
            "streams": 2,
            "window": 16,
            "threads": 1,
            "views": ["cifar", "cifar"],
        },
        "optim": {"base_lr": 0.05, "epochs": 1, "global_batch": 16},
        "engine": {"autocast": "none"},
        "checkpoint": {"every_steps": 6},
        "evaluations": [{"task": "knn", "k": [5], "temperature": [0.1], "batch": 8}],
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(text))
    return folder


def outer_address() -> str | None:
    """An address of this machine that others reach."""
    for addresses in psutil.net_if_addrs().values():
        for one in addresses:
            if one.family == socket.AF_INET and not one.address.startswith("127."):
                return str(one.address)
    return None


def doors(process: psutil.Popen) -> Iterator[str]:
    """Addresses at which a command and all that it started listen."""
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for one in family:
        try:
            for connection in one.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    yield connection.laddr.ip
        except psutil.Error:
            continue


@needs_root
def test_a_run_in_a_folder_of_others_imports_none_of_it_and_opens_no_door_of_the_machine(
    shared: Path,
) -> None:
    """Under a host name that leads to the machine's outer address, as those of clusters do."""
    address = outer_address()
    unshare = ["unshare", "--uts", "sh", "-c", UNDER_ANOTHER_NAME.format(address), "sh"]
    if address is None or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("this machine has no other address, or gives nobody another name")
    submit = [sys.executable, str(ROOT / "launch" / "submit.py"), "--local", "2", "tiny.yaml"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    with (shared / "output").open("wb") as output:
        process = psutil.Popen(
            [*unshare, *submit], cwd=shared, env=environment, stdout=output, stderr=output
        )
        listening, end = set[str](), time.monotonic() + 240
        while process.poll() is None and time.monotonic() < end:
            listening.update(doors(process))
            time.sleep(0.05)
        process.wait(10)
    assert process.returncode == 0, (shared / "output").read_text()
    assert listening == {"127.0.0.1"}
    evaluate = [sys.executable, str(ROOT / "launch" / "evaluate.py"), "runs/tiny", "--ranks", "2"]
    done = subprocess.run(
        [*unshare, *evaluate, "--device", "cpu", "--task", "knn,collapse"],
        cwd=shared, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    hijacked = shared / "hijacked"
    assert not hijacked.exists(), hijacked.read_text()
    run = shared / "runs" / "tiny"
    loose = {
        path.relative_to(run)
        for path in run.rglob("*")
        if path.lstat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    }
    assert loose == set()
