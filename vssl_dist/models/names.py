"""The names of backbones, read from the sources of torchvision and timm without importing them.

Importing them takes seconds; a misspelt name is refused in a fraction of one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from vssl_dist.errors import ConfigError

NARROW = {"resnet10_c16": 1, "resnet18_c16": 2}
"""Residual blocks per stage of the networks for a CPU: 16, 32, 64 and 128 channels."""
TIMM = "timm:"
"""Prefix of a name that is timm's even where torchvision has one like it."""
_REGISTERED = re.compile(r"^@register_model(?:\(\))?\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)


def is_resnet(name: str) -> bool:
    """Tell whether a name of torchvision is one of its ResNets, the only models used of it."""
    return "resnet" in name or "resnext" in name


def unknown_backbone(name: str, all_names: Iterable[str]) -> ConfigError:
    """Build the refusal of a name that is neither torchvision's nor timm's.

    Args:
        name: Without `TIMM`.
        all_names: Names that exist, of which the nearest is suggested.
    """
    close = difflib.get_close_matches(name, [*all_names, *NARROW], n=1)
    hint = f"did you mean {close[0]!r}?" if close else "timm.list_models() lists them"
    return ConfigError(
        f"method.backbone: {name!r} is neither a torchvision ResNet nor a timm name ({hint})"
    )


def check_spelling(name: str) -> None:
    """Refuse a backbone that no source registers; where sources cannot be read, refuse nothing.

    Raises:
        ConfigError: One line, as building the network would say it.
    """
    resnets = [model for model in _registered("torchvision") if is_resnet(model)]
    if name in NARROW or name in resnets:
        return
    name = name.removeprefix(TIMM)
    architecture, _, _ = name.partition(".")  # what follows are its weights
    timm = _registered("timm")
    if not timm or architecture in timm or _is_mentioned(architecture):
        return
    raise unknown_backbone(name, [*resnets, *timm])


@cache
def _registered(package: str) -> frozenset[str]:
    return frozenset(name for text in _sources(package) for name in _REGISTERED.findall(text))


def _is_mentioned(architecture: str) -> bool:
    """Tell whether timm's sources quote a name: earlier names of models are keys of a table."""
    quoted = (f"'{architecture}'", f'"{architecture}"')
    return architecture != "" and any(q in text for text in _sources("timm") for q in quoted)


def _sources(package: str) -> Iterator[str]:
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder, "models").glob("*.py")):
            yield path.read_text(encoding="utf-8")
