"""The one door to torchvision, which also opens beside a CPU-only torch.

The wheel on PyPI is linked against CUDA.  Beside a CPU torch its extension is skipped in
silence, and its import then fails because it registers fake kernels for two operators whose
schemas nobody declared.  Declaring those two schemas is all the import needs.

It also imports all of torch's compiler, more than a second of it, for one predicate that its
``roi_align`` asks on a GPU.  Here the compiler is imported when somebody asks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

_MISSING = "operator torchvision::nms does not exist"
_COMPILER = "torch._dynamo"


@cache
def torchvision() -> ModuleType:
    """Import torchvision; call this before importing anything that imports it (timm does).

    The schemas are declared only after the ordinary import failed with exactly the known
    message: declaring them beforehand would break an installation that works.

    Raises:
        RuntimeError: torchvision fails to import for any other reason.

    >>> torchvision().models.resnet18(weights=None).fc.in_features
    512
    """
    try:
        with _compiler_deferred():
            return _with_schemas()
    except ImportError:  # this release asks the compiler for something else
        _forget_torchvision()
    return _with_schemas()


def _with_schemas() -> ModuleType:
    try:
        return import_module("torchvision")
    except RuntimeError as error:
        if _MISSING not in str(error):
            raise
    _forget_torchvision()
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        schema = f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        library.define(schema)  # type: ignore[no-untyped-call]
    module = import_module("torchvision")
    # The schemas live as long as the library object does.
    module._vssl_dist_schemas = library  # type: ignore[attr-defined]
    return module


@contextmanager
def _compiler_deferred() -> Iterator[None]:
    """Stand in for torch's compiler while torchvision is imported."""
    if _COMPILER in sys.modules:
        yield
        return
    package = ModuleType(_COMPILER)
    utils = ModuleType(f"{_COMPILER}.utils")
    utils.is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]
    stand_ins = {package.__name__: package, utils.__name__: utils}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        # Whoever imports the compiler from now on gets the real one.
        for name in stand_ins:
            sys.modules.pop(name, None)


def _is_compile_supported(device_type: str) -> bool:
    """Ask torch's compiler, by its own name, for what torchvision asks it."""
    supported: bool = import_module(f"{_COMPILER}.utils").is_compile_supported(device_type)
    return supported


def _forget_torchvision() -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
