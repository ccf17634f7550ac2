"""The one door to torchvision, which also opens beside a CPU-only torch, and to timm behind it.

The wheel on PyPI is linked against CUDA.  Beside a CPU torch its extension is skipped in
silence, and its import then fails because it registers fake kernels for two operators whose
schemas nobody declared.  Declaring those two schemas is all the import needs.

It also imports all of torch's compiler, more than a second of it, for one predicate that its
``roi_align`` asks on a GPU, as timm does for decorators of two of its models.  Here the compiler
is imported when somebody asks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from importlib import import_module
from types import ModuleType
from typing import Any

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
        with compiler_deferred():
            return _with_schemas()
    except ImportError:  # this release asks the compiler for something else
        _forget_torchvision()
    return _with_schemas()


@cache
def timm() -> ModuleType:
    """Import timm, behind torchvision, which it imports and must find open.

    >>> timm().is_model("vit_small_patch16_224")
    True
    """
    torchvision()
    with compiler_deferred():
        return import_module("timm")


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
def compiler_deferred() -> Iterator[None]:
    """Stand in for torch's compiler, for code that imports it without compiling anything.

    What asks it for more than to leave a function alone gets the compiler itself.
    """
    if _COMPILER in sys.modules:
        yield
        return
    package = ModuleType(_COMPILER)
    utils = ModuleType(f"{_COMPILER}.utils")
    stand_ins = {package.__name__: package, utils.__name__: utils}

    def remove_stand_ins() -> None:
        for name, stand_in in stand_ins.items():
            if sys.modules.get(name) is stand_in:
                del sys.modules[name]

    def import_compiler(name: str) -> Any:
        if name.startswith("__"):  # as of any module that has no file
            raise AttributeError(name)
        remove_stand_ins()
        return getattr(import_module(_COMPILER), name)

    package.__getattr__ = import_compiler  # type: ignore[method-assign]
    package.disable = _disable_under_compiler  # type: ignore[attr-defined]
    utils.is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        # Whoever imports the compiler from now on gets the real one.
        remove_stand_ins()


def _disable_under_compiler(
    function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Callable[..., Any]:
    """Decorate like ``torch._dynamo.disable``, which has nothing to do before it is imported."""

    @wraps(function)
    def call(*call_args: Any, **call_kwargs: Any) -> Any:
        compiler = sys.modules.get(_COMPILER)
        if compiler is None or compiler.disable is _disable_under_compiler:
            return function(*call_args, **call_kwargs)
        return compiler.disable(function, *args, **kwargs)(*call_args, **call_kwargs)

    return call


def _is_compile_supported(device_type: str) -> bool:
    """Ask torch's compiler, by its own name, for what torchvision asks it."""
    supported: bool = import_module(f"{_COMPILER}.utils").is_compile_supported(device_type)
    return supported


def _forget_torchvision() -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
