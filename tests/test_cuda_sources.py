"""`CudaContract` and `AutocastOfCuda` against what torch itself records of CUDA."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchgen
import yaml
from torch import nn

from bench.cuda_autocast import FULL, LOWER, autocast_of_cuda
from tests.support.cuda_contract import Call
from tests.support.cuda_kernels import CONTRACTS

HALF = torch.bfloat16


def test_what_has_no_kernel_is_what_torch_registers_none_for() -> None:
    (alone,) = (c for c in CONTRACTS if c.name == "kernels for the CPU alone")
    text = (
        Path(torchgen.__file__).parent / "packaged" / alone.source[len("aten/src/") :]
    ).read_text()
    names: set[str] = set()
    for function in yaml.load(text, Loader=yaml.CSafeLoader):
        keys = {key for keys in function.get("dispatch", {}) for key in keys.split(", ")}
        if "CPU" in keys and not any("CUDA" in key or "Composite" in key for key in keys):
            names.add("aten::" + re.split(r"[.(]", function["func"])[0])
    assert set(alone.ops) <= names


def test_what_runs_only_in_any_order_is_what_torch_documents() -> None:
    (any_order,) = (c for c in CONTRACTS if c.name == "only in any order")
    text = torch.use_deterministic_algorithms.__doc__
    assert text is not None
    throws = text.split(":class:`RuntimeError` when ``mode=True``:")[1].split("In addition")[0]
    throws = throws.lower().replace("_", "")
    for op in any_order.ops:
        words = re.sub(r"(aten::|_aa|_backward|_forward|_)", "", op)
        words = {"upsamplebicubic2d": "bicubic", "upsamplebilinear2d": "bilinear"}.get(words, words)
        words = {"nllloss2d": "nllloss", "gridsampler2d": "gridsample"}.get(words, words)
        assert words in throws, op


DTYPES = {
    "products of integers": "mm addmm bmm baddbmm addbmm mv addmv dot vdot",
    "convolutions of integers": "nn.functional.conv2d nn.functional.conv3d",
    "largest of integers": "nn.functional.max_pool2d nn.functional.max_pool3d",
    "averages of integers": "nn.functional.avg_pool2d nn.functional.avg_pool3d",
    "bytes between pixels": "nn.functional.interpolate/bilinear nn.functional.interpolate/bicubic "
    "_upsample_bilinear2d_aa",
    "histogram of halves": "histc",
    "gamma function of halves": "igamma igammac",
    "distances of halves": "cdist nn.functional.pdist",
    "decompositions of halves": "linalg.svd linalg.eigh linalg.qr linalg.cholesky linalg.lstsq",
}
"""The names under which torch's own tests keep what each device takes."""
OWN_TABLE = """
import json, sys, types, unittest
try:
    import expecttest
except ModuleNotFoundError:  # a test tool that the table has no use for
    sys.modules["expecttest"] = types.SimpleNamespace(
        TestCase=unittest.TestCase, assert_expected_inline=None
    )
from torch.testing._internal.common_methods_invocations import op_db
names = lambda dtypes: sorted(str(dtype) for dtype in dtypes)
key = lambda op: op.name + ("/" + op.variant_test_name if op.variant_test_name else "")
print(json.dumps({key(op): names(op.dtypesIfCUDA) for op in op_db}))
"""


@pytest.mark.slow  # the table takes 8 s to import, and changes flags of torch for the process
def test_refused_dtypes_are_those_that_torchs_own_tests_know_no_cuda_kernel_for() -> None:
    done = subprocess.run([sys.executable, "-c", OWN_TABLE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    taken = json.loads(done.stdout)
    contracts = {contract.name: contract for contract in CONTRACTS}
    for name, ops in DTYPES.items():
        refused = {
            str(dtype)
            for dtype in (torch.int64, torch.uint8, torch.float16, HALF)
            if contracts[name].refusal(_touching(dtype)) is not None
        }
        assert refused, name
        for op in ops.split():
            assert not refused & set(taken[op]), f"{name}: {op}"


def _touching(dtype: torch.dtype) -> Call:
    op = torch.ops.aten.clone.default
    return Call(op, (torch.empty(0, dtype=dtype),), {}, gpu="cpu")


def test_autocast_lists_are_those_of_torchs_own_tests() -> None:
    path = Path(torch.__file__).parent / "testing/_internal/autocast_test_lists.py"
    of_cuda, _ = path.read_text().split("class AutocastCPUTestLists")
    names: dict[str, set[str]] = {"fp16": set(), "fp32": set()}
    for kind, block in re.findall(r"self\.\w+_(fp16|fp32) = \[(.*?)\n        \]", of_cuda, re.S):
        names[kind] |= set(re.findall(r'\("(?:linalg_)?(\w+)"', block))
    # Younger than those tests; and the sum of two that are there.
    names["fp16"].add("scaled_dot_product_attention")
    names["fp32"].add("cross_entropy")
    assert {function.__name__.removeprefix("linalg_") for function in LOWER} <= names["fp16"]
    assert {function.__name__ for function in FULL} <= names["fp32"]


def test_autocast_of_cuda_leaves_layer_norm_its_digits_and_batch_norm_its_halves() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.LayerNorm(16))
    dtypes = []
    for layer in net:
        layer.register_forward_hook(lambda _, inputs, output: dtypes.append(output.dtype))
    autocast_of_cuda(net)
    net(torch.randn(2, 3, 2, 2)).sum().backward()
    assert dtypes == [HALF, HALF, HALF, torch.float32]
    assert {p.grad.dtype for p in net.parameters() if p.grad is not None} == {torch.float32}
    assert torch.randn(2, 2).matmul(torch.randn(2, 2)).dtype == torch.float32
