"""Every method, by the name a config uses.  To add one: write the file, add the line."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from vssl_dist.config import MethodConfig
from vssl_dist.methods.barlow_twins import BarlowTwins, BarlowTwinsConfig
from vssl_dist.methods.base import GlobalNoise, LossOutput, Method, MicroStep, Noise
from vssl_dist.methods.byol import BYOL, BYOLConfig
from vssl_dist.methods.dino import DINO, DINOConfig
from vssl_dist.methods.moco_v3 import MoCoV3, MoCoV3Config
from vssl_dist.methods.simclr import SimCLR, SimCLRConfig
from vssl_dist.methods.simsiam import SimSiam, SimSiamConfig
from vssl_dist.methods.supervised import Supervised, SupervisedConfig
from vssl_dist.methods.vicreg import VICReg, VICRegConfig
from vssl_dist.methods.vje import VJE, VJEConfig
from vssl_dist.methods.vssl import VSSL, VSSLConfig
from vssl_dist.models.norm import synchronise

__all__ = [
    "CONFIGS",
    "METHODS",
    "GlobalNoise",
    "LossOutput",
    "Method",
    "MicroStep",
    "Noise",
    "build_method",
]

METHODS: dict[str, tuple[type[MethodConfig], Callable[[Any, int, bool], Method]]] = {
    "barlow_twins": (BarlowTwinsConfig, BarlowTwins),
    "byol": (BYOLConfig, BYOL),
    "dino": (DINOConfig, DINO),
    "moco_v3": (MoCoV3Config, MoCoV3),
    "simclr": (SimCLRConfig, SimCLR),
    "simsiam": (SimSiamConfig, SimSiam),
    "supervised": (SupervisedConfig, Supervised),
    "vicreg": (VICRegConfig, VICReg),
    "vje": (VJEConfig, VJE),
    "vssl": (VSSLConfig, VSSL),
}
CONFIGS: dict[str, type[MethodConfig]] = {name: config for name, (config, _) in METHODS.items()}
"""Each method's own model by name, for ``config.load``."""


def build_method(cfg: MethodConfig, image_size: int, sides: Iterable[int] = ()) -> Method:
    """The untrained networks and the loss that ``cfg`` describes.

    Batch norms are synchronised over the ranks, whatever their number is by the time of use.

    Args:
        cfg: The method's own block.
        image_size: Side of the images in pixels.
        sides: Sides of the views, if they may differ from ``image_size``: a ViT then takes each.

    Raises:
        ConfigError: The backbone is unknown or cannot be built for these sizes.
    """
    method = METHODS[cfg.name][1](cfg, image_size, any(side != image_size for side in sides))
    method.student = synchronise(method.student)
    if method.teacher is not None:
        method.teacher = synchronise(method.teacher)
    return method
