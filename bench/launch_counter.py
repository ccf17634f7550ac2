"""What a step asks of a GPU, counted where torch dispatches it: nothing here measures time."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench.cuda_meta import RESULTS

_NORM_FILES = ("/vssl_dist/models/norm", "/torch/nn/modules/_functions.py")
_SENT_ARGUMENTS = {"tensors", "input_tensors", "input_tensor", "input", "inputs"}
_COLLECTIVES = ("c10d::", "_c10d_functional::")
_READ_BY_HOST = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
"""Operators whose result, or the shape of it, the host waits for."""
_PACKAGES = ("/vssl_dist/", "/deepspeed/", "/torch/optim/", "/timm/", "/torchvision/")
GIVEN_GRADIENTS = "_GivenGradients"
"""The stand-in for a backward pass, see `fake_step`."""
_READING_METHODS = {Tensor.tolist, Tensor.numpy}


@dataclass
class Traffic:
    """Collectives, and the bytes that one rank puts into them."""

    count: int = 0
    num_bytes: int = 0


class FakeCuda(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets tensors on ``meta`` run what only CUDA has kernels for."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # importing torch's compiler takes longer than a whole step

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = RESULTS.get(func._schema.name)
        if result is not None and args[0].is_meta:
            return result(*args)
        return func(*args, **(kwargs or {}))


class LaunchCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts launches, collectives and host synchronisations of what runs inside.

    A launch is a call of an operator of ATen that is not a view: its schema has no result that
    aliases an argument without writing to it.  A foreach operator is one launch, or as many as it
    has tensors where CUDA would take its slow path, which is where the tensors of a list differ in
    dtype or those of two lists in shape.  Allocations count, although the GPU has nothing to do.

    Args:
        with_places: Also note the source files that launch; slower.
    """

    def __init__(self, with_places: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.with_places = with_places
        self.by_op: Counter[str] = Counter()
        self.by_place: Counter[str] = Counter()
        self.traffic: dict[str, Traffic] = {}
        self.host_syncs = 0
        self.host_numbers: list[Tensor] = []
        """Tensors that stay in the host's memory on a GPU, too: what changes them is no launch."""
        self.purpose = "loss"
        """What collectives count as, except those of batch norm."""

    @property
    def launches(self) -> int:
        """All of them."""
        return self.by_op.total()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        kwargs = kwargs or {}
        if name.startswith(_COLLECTIVES):
            if not name.endswith("wait_tensor"):
                self._count_collective(func, args, kwargs)
        elif name.startswith("aten::") and not is_view(func) and not self._is_on_host(args):
            self.by_op[name] += num_launches(name, args)
            self.host_syncs += is_host_sync(name, args, kwargs)
            if self.with_places:
                self.by_place[_place()] += num_launches(name, args)
        return func(*args, **kwargs)

    def _is_on_host(self, args: Sequence[Any]) -> bool:
        first = next(_tensors(args), None) if self.host_numbers else None
        return any(first is number for number in self.host_numbers)

    def _count_collective(self, func: OpOverload, args: Sequence[Any], kwargs: Any) -> None:
        is_norm = any(_is_norm_file(code.co_filename) for code in _codes_on_stack())
        purpose = "norm" if is_norm else self.purpose
        traffic = self.traffic.setdefault(purpose, Traffic())
        traffic.count += 1
        arguments = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
        for name in _SENT_ARGUMENTS & set(arguments):
            traffic.num_bytes += sum(t.nbytes for t in _tensors(arguments[name]))


class HostReads(TorchFunctionMode):
    """Counts what reads whole tensors on the CPU, where no operator is dispatched for it."""

    def __init__(self, counter: LaunchCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        self.counter.host_syncs += func in _READING_METHODS
        return func(*args, **(kwargs or {}))


@cache
def is_view(op: OpOverload) -> bool:
    """Whether an operator returns a view of an argument, by its schema.

    >>> aten = torch.ops.aten
    >>> [is_view(op) for op in (aten.split.Tensor, aten.detach.default, aten.add_.Tensor)]
    [True, True, False]
    """
    aliases = [result.alias_info for result in op._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def num_launches(name: str, args: Sequence[Any]) -> int:
    """Kernels that one call stands for; see `LaunchCounter`."""
    if not name.startswith("aten::_foreach_"):
        return 1
    lists = [arg for arg in args if isinstance(arg, (list, tuple)) and arg]
    lists = [arg for arg in lists if isinstance(arg[0], Tensor)]
    if not lists:
        return 1
    mixed = any(len({t.dtype for t in tensors}) > 1 for tensors in lists)
    shapes = {tuple(t.shape for t in tensors) for tensors in lists}
    return len(lists[0]) if mixed or len(shapes) > 1 else 1


def is_host_sync(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether the host waits for the GPU here."""
    if name in _READ_BY_HOST:
        return True
    if name == "aten::index":
        return any(i is not None and i.dtype == torch.bool for i in args[1])
    if name == "aten::_to_copy" and args[0].device.type != "cpu":
        device = kwargs.get("device")
        return device is not None and torch.device(device).type == "cpu"
    if name == "aten::copy_":
        target, source = (tensor.device.type == "cpu" for tensor in args[:2])
        return bool(target and not source)
    return False


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _codes_on_stack() -> Iterator[CodeType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back


def _is_norm_file(name: str) -> bool:
    return any(part in name for part in _NORM_FILES)


def _place() -> str:
    """The innermost file on the stack that is this project's, DeepSpeed's or a network's."""
    for code in _codes_on_stack():
        for package in _PACKAGES:
            if package in code.co_filename:
                return f"{package.strip('/')}/{code.co_filename.rpartition(package)[2]}"
        if code.co_qualname.startswith(GIVEN_GRADIENTS):
            return GIVEN_GRADIENTS
    return "torch, most of it backward passes"
