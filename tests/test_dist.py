"""Where the ranks of one machine meet, seen from outside their process."""

from __future__ import annotations

import os
import subprocess
import sys

RANK = """
import os, psutil, torch
from vssl_dist import dist
dist.init("cpu")
torch.distributed.all_reduce(torch.ones(1))
print({c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"})
print(os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"])
"""


def test_ranks_that_meet_on_the_loopback_listen_nowhere_else_and_use_it_unless_told_otherwise() -> (
    None
):
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for theirs, interfaces in (({}, "lo lo"), ({"NCCL_SOCKET_IFNAME": "ib0"}, "lo ib0")):
        environment = {k: v for k, v in os.environ.items() if "SOCKET_IFNAME" not in k}
        done = subprocess.run(
            [sys.executable, "-c", RANK],
            env=environment | alone | theirs, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.splitlines() == ["{'127.0.0.1'}", interfaces]
