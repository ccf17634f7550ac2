"""The one door to torchvision, which also opens beside a CPU-only torch.

The wheel on PyPI is linked against CUDA.  Beside a CPU torch its extension is skipped in
silence, and its import then fails because it registers fake kernels for two operators whose
schemas nobody declared.  Declaring those two schemas is all the import needs.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

_MISSING = "operator torchvision::nms does not exist"


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
        return import_module("torchvision")
    except RuntimeError as error:
        if _MISSING not in str(error):
            raise
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        schema = f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        library.define(schema)  # type: ignore[no-untyped-call]
    module = import_module("torchvision")
    # The schemas live as long as the library object does.
    module._vssl_dist_schemas = library  # type: ignore[attr-defined]
    return module
