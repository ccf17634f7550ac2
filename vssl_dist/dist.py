"""Collectives that are the identity when there is one rank."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as td
from torch import Tensor

T = TypeVar("T")


def init(device: str, timeout_s: float = 300.0) -> None:
    """Join the process group that ``RANK``, ``WORLD_SIZE`` and ``MASTER_ADDR`` describe.

    Where ``VSSL_LISTENER`` is set, rank 0 has inherited the socket that listens at the port.  Ranks
    that meet on the loopback also talk there, unless ``GLOO_SOCKET_IFNAME`` or
    ``NCCL_SOCKET_IFNAME`` says otherwise: gloo would listen at the address of the host's name.

    Args:
        device: ``"cuda"`` (NCCL; this process takes the GPU of its local rank) or ``"cpu"``
            (gloo).
        timeout_s: Seconds after which a silent peer counts as dead.
    """
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    inherited, timeout = os.environ.get("VSSL_LISTENER"), timedelta(seconds=timeout_s)
    listener = None if inherited is None else int(inherited)
    if address == "localhost" or address.startswith("127."):
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, loopback())
        if rank == 0 and listener is None:  # torch would listen at every address
            listener = socket.create_server((address, port), backlog=size).detach()
    store = td.TCPStore(  # type: ignore[attr-defined]
        address,
        port,
        size,
        is_master=rank == 0,
        timeout=timeout,
        master_listen_fd=listener,
    )
    backend = "nccl" if device == "cuda" else "gloo"
    td.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def loopback() -> str:
    """The network interface that no other machine reaches."""
    import psutil  # here: all else of this module needs torch alone

    interfaces = psutil.net_if_addrs().items()
    return next(
        (
            str(name)
            for name, addresses in interfaces
            if any(entry.address == "127.0.0.1" for entry in addresses)
        ),
        "lo",
    )


def rank() -> int:
    """Number of this process, 0 when there is no process group."""
    return td.get_rank() if td.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 when there is no process group."""
    return td.get_world_size() if td.is_initialized() else 1


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        td.barrier()


def any_rank(flag: bool) -> bool:
    """True everywhere if true anywhere: the only safe way to leave a loop early."""
    if world_size() == 1:
        return flag
    vote = torch.tensor(int(flag), device="cuda" if td.get_backend() == "nccl" else "cpu")
    td.all_reduce(vote, op=td.ReduceOp.MAX)
    return bool(vote)


def broadcast(value: T) -> T:
    """Rank 0's ``value`` (any picklable object) on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    td.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: T) -> list[T]:
    """Every rank's ``value`` (any picklable object), in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    td.all_gather_object(box, value)
    return box


def mean_over_ranks(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Average detached scalars in one collective and one host synchronisation.

    Args:
        values: Scalars, the same keys in the same order on every rank.

    Returns:
        The means as Python floats, computed in float64 so that one rank gives its value exactly.
    """
    if not values:
        return {}
    packed = torch.stack([v.detach().double() for v in values.values()])
    if world_size() > 1:
        td.all_reduce(packed)
        packed /= world_size()
    return dict(zip(values, packed.tolist(), strict=True))


class _AllReduce(torch.autograd.Function):
    """Sum over ranks whose gradient is the sum over ranks of the gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.contiguous().clone()
        td.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        td.all_reduce(total)
        return total


class _AllGather(torch.autograd.Function):
    """Concatenation over ranks; backward sums every rank's gradient of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.rows = tensor.shape[0]
        tensors = [torch.empty_like(tensor) for _ in range(td.get_world_size())]
        td.all_gather(tensors, tensor.contiguous())
        return torch.cat(tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        td.all_reduce(total)
        return total.narrow(0, td.get_rank() * ctx.rows, ctx.rows)


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum over ranks, differentiable: the gradient of a sum of losses over all ranks.

    The engine averages parameter gradients over ranks, so a loss that every rank computes on
    globally reduced statistics gets the gradient of that one global loss.
    """
    return tensor if world_size() == 1 else _AllReduce.apply(tensor)  # type: ignore[no-untyped-call]


def all_gather(tensor: Tensor) -> Tensor:
    """``(B, ...)`` of every rank as ``(world_size * B, ...)`` in rank order, differentiable."""
    return tensor if world_size() == 1 else _AllGather.apply(tensor)  # type: ignore[no-untyped-call]
