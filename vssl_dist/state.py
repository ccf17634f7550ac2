"""State as plain values: to store it, to put it back bit by bit, to compare it by a digest."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_TWISTER_STATE_WORDS = 624
"""Words of state of a Mersenne Twister."""


def cpu_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Copy a state dict to contiguous CPU tensors that share no memory, as safetensors wants it."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in module.state_dict().items()
    }


def copy_tensors(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors, of each type all at once.

    torch's kernels for lists take one type: a list that mixes batch norm's counters with its
    statistics is copied tensor by tensor.

    >>> targets = [torch.zeros(2), torch.tensor(0)]
    >>> copy_tensors(targets, [torch.ones(2), torch.tensor(3)])
    >>> targets
    [tensor([1., 1.]), tensor(3)]
    """
    for dtype in {target.dtype for target in targets}:
        pairs = [pair for pair in zip(targets, sources, strict=True) if pair[0].dtype == dtype]
        torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])


def nested_digest(value: Any) -> str:
    """Compute the sha256 of nested dicts and lists of tensors and plain values.

    The order of a dict's keys does not count; every bit of a value does, and a tensor's type
    and shape do.

    >>> one, other = {"a": torch.zeros(2), "b": [1, 0.5]}, {"b": [1, 0.5], "a": torch.zeros(2)}
    >>> (
    ...     nested_digest(one) == nested_digest(other),
    ...     nested_digest(one) == nested_digest({"a": torch.zeros(2), "b": [1, 0.25]}),
    ... )
    (True, False)
    """
    running_hash = hashlib.sha256()
    for piece in _digest_pieces(value):
        running_hash.update(piece)
    return running_hash.hexdigest()


def _digest_pieces(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        array = value.detach().cpu().contiguous().numpy()
        yield f"{array.dtype}{array.shape}".encode()
        yield array.tobytes()
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield f"{key}:".encode()
            yield from _digest_pieces(value[key])
    elif isinstance(value, list | tuple):
        yield f"{len(value)} of:".encode()
        for item in value:
            yield from _digest_pieces(item)
    else:
        yield f"{value!r};".encode()


def require_counts(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, int]:
    """Return the named counts out of JSON that may hold anything.

    Raises:
        ValueError: One is none, or is missing.

    >>> require_counts({"step": 3, "loss": 0.5}, ["step"])
    {'step': 3}
    """
    for name in names:
        if type(values.get(name)) is not int or values[name] < 0:
            raise ValueError(f"{name} is no count")
    return {name: values[name] for name in names}


def generator_states() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's global generators as JSON values.

    The current GPU's is among them.

    Nothing in the mathematics draws from them: augmentations and noise are keyed by sample and
    step.  A backbone that drops paths or features does.

    >>> before = generator_states()
    >>> drawn = torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
    >>> restore_generator_states(before)
    >>> drawn == (torch.rand(1), random.random(), np.random.rand())  # noqa: NPY002
    True
    """
    numpy = dict(np.random.get_state(legacy=False))  # noqa: NPY002
    numpy["state"] = {"key": numpy["state"]["key"].tolist(), "pos": numpy["state"]["pos"]}
    return {
        "python": random.getstate(),
        "numpy": numpy,
        "torch": _tensor_as_hex(torch.get_rng_state()),
        "cuda": _tensor_as_hex(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }


def restore_generator_states(state: dict[str, Any]) -> None:
    """Put the generators back to states of `generator_states`; ``state`` may come from JSON.

    Raises:
        Exception: Nearly any: it is no such state.
    """
    python_state_version, twister_words, next_gauss = state["python"]
    numpy_key, numpy_position = state["numpy"]["state"]["key"], state["numpy"]["state"]["pos"]
    # NumPy would read beyond the key.
    if len(numpy_key) != _TWISTER_STATE_WORDS or not 0 <= numpy_position <= _TWISTER_STATE_WORDS:
        raise ValueError("the state of NumPy's generator is none")
    random.setstate((python_state_version, tuple(twister_words), next_gauss))
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(_tensor_from_hex(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor_from_hex(state["cuda"]))


def _tensor_as_hex(state: Tensor) -> str:
    return bytes(state.numpy()).hex()


def _tensor_from_hex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
