"""The contracts of `CudaContract` about where tensors lie and what goes to other ranks."""

from __future__ import annotations

import torch
from torch._prims_common import suggest_memory_format

from tests.support.cuda_contract import Call, Contract

NCCL = "torch/csrc/distributed/c10d/"
BETWEEN_DEVICES = {
    f"aten::{name}"
    for name in (
        "copy_", "copy", "_to_copy", "_foreach_copy_", "_foreach_copy",
        # Indices of their own device:
        "index", "index_put", "index_put_", "_index_put_impl_",
        # Lengths, places and factors that must lie in the host's memory:
        "tensor_split", "_ctc_loss", "_pack_padded_sequence", "_foreach_addcdiv",
        "_foreach_addcdiv_", "_foreach_addcmul", "_foreach_addcmul_",
    )
}  # fmt: skip
COLLECTIVES = {
    "c10d::allreduce_": ("tensors",),
    "c10d::broadcast_": ("tensors",),
    "c10d::allgather_": ("input_tensors",),
    "c10d::_allgather_base_": ("input_tensor", "output_tensor"),
    "c10d::_reduce_scatter_base_": ("input_tensor", "output_tensor"),
}
UNSENT = (torch.int16, torch.uint16, torch.uint32, torch.uint64)
"""What NCCL has no type for; it takes all others, floats of 8 bits too."""


def _one_device(call: Call) -> str | None:
    name = call.op._schema.name
    if name in BETWEEN_DEVICES or not name.startswith("aten::"):
        return None
    tensors = list(call.tensors())
    host = [t for t in tensors if call.on_host(t)]
    if not host or len(host) == len(tensors):
        return None
    # A CUDA kernel takes a number from the host, but no more, and leaves none there.
    if any(t.dim() for t in host):
        return f"a host tensor of {tuple(next(t for t in host if t.dim()).shape)} among the GPU's"
    if any(call.on_host(t) for name in call.written for t in call.tensors(name)):
        return "the result is written into the host's memory"
    return None


def _index_device(call: Call) -> str | None:
    if call.on_host(call["self"]) and not all(call.on_host(i) for i in call.tensors("indices")):
        return "a host tensor is indexed by one on the GPU"
    values = [t for t in call.tensors("values") if t.dim()]
    if any(call.on_host(t) != call.on_host(call["self"]) for t in values):
        return "values of another device are written"
    return None


def _generator_device(call: Call) -> str | None:
    generator = call.arguments.get("generator")
    if generator is None:
        return None
    tensor = next(call.tensors(), None)
    device = tensor.device if tensor is not None else call.arguments.get("device")
    wanted = torch.device(device or "cpu").type
    if generator.device.type != wanted:
        return f"draws on {wanted} from a generator on {generator.device.type}"
    return None


def _sent_from_gpu(call: Call) -> str | None:
    if any(
        call.on_host(t) or t.is_sparse for t in call.tensors(*COLLECTIVES[call.op._schema.name])
    ):
        return "tensors must be CUDA and dense"
    return None


def _sent_whole(call: Call) -> str | None:
    for tensor in call.tensors(*COLLECTIVES[call.op._schema.name]):
        if not tensor.is_contiguous(memory_format=suggest_memory_format(tensor)):
            return f"tensors must be contiguous, not of strides {tensor.stride()}"
    return None


def _sent_types(call: Call) -> str | None:
    for tensor in call.tensors(*COLLECTIVES[call.op._schema.name]):
        if tensor.dtype in UNSENT:
            return f"{tensor.dtype} is not supported"
    return None


DEVICES = (
    Contract("one device", (), "aten/src/ATen/TensorIterator.cpp", _one_device),
    Contract(
        "device of indices",
        ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"),
        "aten/src/ATen/native/TensorAdvancedIndexing.cpp",
        _index_device,
    ),
    Contract("device of generators", (), "aten/src/ATen/core/Generator.h", _generator_device),
    Contract("sent from the GPU", (*COLLECTIVES,), NCCL + "ProcessGroupNCCL.cpp", _sent_from_gpu),
    Contract("sent whole", (*COLLECTIVES,), NCCL + "ProcessGroupNCCL.cpp", _sent_whole),
    Contract("types on the wire", (*COLLECTIVES,), NCCL + "NCCLUtils.cpp", _sent_types),
)
