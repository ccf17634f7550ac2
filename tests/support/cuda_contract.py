"""What kernels on a GPU refuse although the CPU's kernels and meta functions take it.

Inside ``CudaContract()`` a call that a CUDA kernel would refuse raises `Refused`, on a machine
without a GPU.  Either device may stand for the GPU: the CPU, where numbers matter, or ``meta``,
where whole networks of any size cost nothing and every tensor left on the CPU is noticed.

Each `Contract` names the file of PyTorch in which the kernel states it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from bench.cuda_meta import RESULTS


class Refused(RuntimeError):
    """A kernel on a GPU would not take this call."""


class Call:
    """One operator with its arguments by name, defaults included."""

    def __init__(
        self, op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], gpu: str
    ) -> None:
        schema = op._schema.arguments
        self.op, self.gpu = op, gpu
        self.arguments = {a.name: a.default_value for a in schema if a.has_default_value()}
        self.arguments |= {a.name: value for a, value in zip(schema, args, strict=False)} | kwargs
        self.written = {
            a.name for a in schema if a.alias_info is not None and a.alias_info.is_write
        }

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def tensors(self, *names: str) -> Iterator[Tensor]:
        """The tensors among the arguments ``names`` (all without any), lists taken apart."""
        for name in names or self.arguments:
            yield from _flat(self.arguments.get(name))

    def on_host(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` would lie in the host's memory."""
        return tensor.device.type != self.gpu


def _flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _flat(one)


@dataclass(frozen=True)
class Contract:
    """What one family of kernels demands of its callers."""

    name: str
    ops: tuple[str, ...]
    """Names with their namespace and without overload; none means every operator that is given a
    tensor of the host or a generator."""
    source: str
    """The file of PyTorch that checks it."""
    refusal: Callable[[Call], str | None]
    """Why this call is refused, None where it is taken."""


class EagerMode(TorchDispatchMode):
    """A dispatch mode that spares each process the 1.4 s of importing torch's compiler."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class CudaContract(EagerMode):
    """Raises `Refused` at the first call that breaks one of ``contracts``.

    Args:
        contracts: Those to hold; all of them by default.
        gpu: The device type that stands for the GPU, ``"cpu"`` or ``"meta"``.
    """

    def __init__(self, contracts: Sequence[Contract] = (), gpu: str = "cpu") -> None:
        super().__init__()
        from tests.support.cuda_kernels import CONTRACTS

        self.gpu = gpu
        self.calls: Counter[str] = Counter()
        """How often each operator ran."""
        self._by_op: dict[str, list[Contract]] = {"": []}
        for contract in contracts or CONTRACTS:
            for op in contract.ops or ("",):
                self._by_op.setdefault(op, []).append(contract)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        self.calls[name] += 1
        contracts = self._by_op.get(name, [])
        if self._reaches_out((*args, *kwargs.values())):
            contracts = contracts + self._by_op[""]
        if contracts:
            call = Call(func, args, kwargs, self.gpu)
            for contract in contracts:
                why = contract.refusal(call)
                if why is not None:
                    raise Refused(f"{func}: {contract.name}: {why} ({contract.source})")
        if self.gpu == "meta" and name in RESULTS and args[0].is_meta:
            return RESULTS[name](*args)
        return func(*args, **kwargs)

    def _reaches_out(self, values: Sequence[Any]) -> bool:
        return any(tensor.device.type != self.gpu for tensor in _flat(values)) or any(
            isinstance(value, torch.Generator) for value in values
        )
