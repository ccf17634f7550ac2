"""The contracts of `CudaContract`: what kernels of torch 2.13 check on a GPU, one function each.

A function returns why a call is refused.  What a CPU kernel checks as well stands here where the
meta function does not, since on ``meta`` nobody else would notice.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from tests.support.cuda_contract import Call, Contract
from tests.support.cuda_devices import DEVICES
from tests.support.cuda_norms import ATEN, HALVES, INT_MAX, NORMS

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
SHARED_MEMORY = 48 * 1024
"""Bytes that a block may ask for on every GPU."""


def _one_type(*names: str) -> Callable[[Call], str | None]:
    """Refuses where the tensors ``names`` are not all of one dtype."""

    def refusal(call: Call) -> str | None:
        dtypes = {name: t.dtype for name in names for t in call.tensors(name)}
        return f"mixed types {dtypes}" if len(set(dtypes.values())) > 1 else None

    return refusal


def _none_of(*dtypes: torch.dtype) -> Callable[[Call], str | None]:
    """Refuses where a tensor has one of ``dtypes``."""

    def refusal(call: Call) -> str | None:
        seen = sorted({str(t.dtype) for t in call.tensors() if t.dtype in dtypes})
        return f"not implemented for {', '.join(seen)}" if seen else None

    return refusal


def _no_kernel(call: Call) -> str | None:
    return "there is no kernel for the CUDA backend"


def _class_indices(call: Call) -> str | None:
    dtype = call["target"].dtype
    return None if dtype in (torch.int64, torch.uint8) else f"classes are {dtype}"


def _written_type(call: Call) -> str | None:
    values = next(call.tensors("values", "source"))
    same = values.dtype == call["self"].dtype
    return None if same else f"{values.dtype} is written into {call['self'].dtype}"


def _antialias_memory(call: Call) -> str | None:
    x, (height, width) = next(call.tensors()), call["output_size"]
    taps = 4 if "bicubic" in call.op._schema.name else 2
    across = [
        1 + 2 * math.ceil(taps * 0.5 * max(before / after, 1.0))
        for before, after in ((x.shape[2], height), (x.shape[3], width))
    ]
    warp, size = 32, x.element_size()
    room = (SHARED_MEMORY // size - across[1] * warp) // (across[0] * (warp + 1))
    rows = min(8, 1 << (room.bit_length() - 1)) if room > 0 else 1
    needed = (across[1] * warp + across[0] * rows * (warp + 1)) * size
    if needed <= SHARED_MEMORY:
        return None
    return f"too much shared memory required: {needed} of {SHARED_MEMORY} bytes"


def _long_dimension(call: Call) -> str | None:
    x, dim = call["self"], call["dim"]
    longest = x.shape[dim] if x.dim() else 1
    return f"{longest} elements to sort, {INT_MAX} at most" if longest > INT_MAX else None


def _long_vector(call: Call) -> str | None:
    longest = max(x.numel() for x in call.tensors())
    return f"{longest} elements, {INT_MAX} at most" if longest > INT_MAX else None


def _driver(call: Call) -> str | None:
    driver = call["driver"]
    return None if driver in (None, "gels") else f"driver is {driver}, and only gels is there"


def _not_deterministic(call: Call) -> str | None:
    if not torch.are_deterministic_algorithms_enabled():
        return None
    if torch.is_deterministic_algorithms_warn_only_enabled():
        return None
    name = call.op._schema.name
    x = next(call.tensors())
    exact = name.endswith("cumsum") and not (x.is_floating_point() or x.is_complex())
    counted = name.endswith("bincount") and call["weights"] is None
    return None if exact or counted else "does not have a deterministic implementation"


def _aten(*names: str) -> tuple[str, ...]:
    return tuple(f"aten::{name}" for name in names)


PRODUCTS = _aten("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot")
INDEXED = _aten("index_put", "index_put_", "_index_put_impl_", "index_add", "index_add_")

CONTRACTS = (
    *NORMS,
    Contract(
        "layer norm of one type",
        _aten("native_layer_norm", "native_layer_norm_backward"),
        ATEN + "cuda/layer_norm_kernel.cu",
        _one_type("grad_out", "input", "weight", "bias"),
    ),
    Contract(
        "group norm of one type",
        _aten("native_group_norm", "native_group_norm_backward"),
        ATEN + "cuda/group_norm_kernel.cu",
        _one_type("grad_out", "input", "weight", "bias"),
    ),
    Contract(
        "products of integers", PRODUCTS, ATEN + "cuda/Blas.cpp", _none_of(*INTEGERS, torch.bool)
    ),
    Contract(
        "products of one type",
        PRODUCTS,
        ATEN + "cuda/Blas.cpp",
        _one_type("self", "other", "mat1", "mat2", "batch1", "batch2", "mat", "vec", "tensor"),
    ),
    Contract(
        "convolutions of integers",
        _aten("convolution", "convolution_backward"),
        "aten/src/ATen/cudnn/Types.cpp",
        _none_of(torch.int64),
    ),
    Contract(
        "convolutions of one type",
        _aten("convolution", "convolution_backward"),
        ATEN + "Convolution.cpp",
        _one_type("grad_output", "input", "weight"),
    ),
    Contract(
        "largest of integers",
        _aten("max_pool2d_with_indices", "max_pool3d_with_indices"),
        ATEN + "cuda/DilatedMaxPool2d.cu",
        _none_of(*INTEGERS),
    ),
    Contract(
        "averages of integers",
        _aten("avg_pool2d", "avg_pool3d"),
        ATEN + "cuda/AveragePool2d.cu",
        _none_of(torch.int64),
    ),
    Contract(
        "bytes between pixels",
        _aten("upsample_bilinear2d", "upsample_bicubic2d")
        + _aten("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
        ATEN + "cuda/UpSampleBilinear2d.cu",
        _none_of(torch.uint8),
    ),
    Contract(
        "antialiased far down",
        _aten("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
        ATEN + "cuda/UpSampleBilinear2d.cu",
        _antialias_memory,
    ),
    Contract("histogram of halves", _aten("histc"), ATEN + "cuda/SummaryOps.cu", _none_of(*HALVES)),
    Contract(
        "gamma function of halves",
        _aten("igamma", "igammac"),
        ATEN + "cuda/IGammaKernel.cu",
        _none_of(*HALVES),
    ),
    Contract(
        "distances of halves",
        _aten("_cdist_forward", "_cdist_backward", "_pdist_forward"),
        ATEN + "cuda/DistanceKernel.cu",
        _none_of(*HALVES),
    ),
    Contract(
        "decompositions of halves",
        _aten("_linalg_svd", "_linalg_eigh", "linalg_qr", "linalg_cholesky_ex", "linalg_lstsq"),
        ATEN + "cuda/linalg/BatchLinearAlgebraLib.cpp",
        _none_of(*HALVES),
    ),
    Contract("least squares", _aten("linalg_lstsq"), ATEN + "BatchLinearAlgebra.cpp", _driver),
    Contract(
        "kernels for the CPU alone",
        _aten("histogram", "_histogramdd_bin_edges", "_histogramdd_from_bin_cts")
        + _aten("_histogramdd_from_bin_tensors", "_upsample_lanczos2d_aa"),
        ATEN + "native_functions.yaml",
        _no_kernel,
    ),
    Contract("longest sort", _aten("sort"), ATEN + "cuda/Sort.cpp", _long_dimension),
    Contract("longest dot product", _aten("dot", "vdot"), ATEN + "cuda/Blas.cpp", _long_vector),
    Contract(
        "types of classes",
        _aten("nll_loss_forward", "nll_loss2d_forward"),
        ATEN + "cuda/Loss.cu",
        _class_indices,
    ),
    Contract("types of indexed writes", INDEXED, ATEN + "cuda/Indexing.cu", _written_type),
    Contract(
        "only in any order",
        _aten("upsample_bicubic2d_backward", "_upsample_bicubic2d_aa_backward")
        + _aten("_upsample_bilinear2d_aa_backward", "_adaptive_avg_pool2d_backward")
        + _aten("adaptive_max_pool2d_backward", "avg_pool3d_backward", "reflection_pad2d_backward")
        + _aten("nll_loss2d_forward", "grid_sampler_2d_backward", "histc", "bincount", "cumsum"),
        "aten/src/ATen/Context.cpp",
        _not_deterministic,
    ),
    *DEVICES,
)
