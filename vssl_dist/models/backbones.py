"""Backbones by name, each returned with the width of its features.

Their weights have the names that torchvision or timm gave them, so an export opens there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vssl_dist.errors import ConfigError
from vssl_dist.models.determinism import with_deterministic_position_embedding
from vssl_dist.models.names import NARROW, TIMM, is_resnet, unknown_backbone
from vssl_dist.vision import compiler_deferred, timm, torchvision

SMALL_IMAGE = 64
"""Up to this size a ResNet gets the CIFAR stem: its own would leave a map of 2 x 2 or less."""


def build_backbone(
    name: str, image_size: int, *, zero_init_residual: bool = False, any_size: bool = False
) -> tuple[nn.Module, int]:
    """An untrained backbone that maps ``(B, 3, H, W)`` to ``(B, D)``, and ``D``.

    Args:
        name: A torchvision ResNet (``resnet50``, ``wide_resnet50_2``, ...), one of
            ``NARROW`` (a quarter of the channels, ``D = 128``), or any timm name
            (``vit_small_patch16_224``, ...); torchvision wins where both know a name, and
            ``timm:resnet50`` asks timm.
        image_size: Side of the images in pixels.  Up to 64, ResNets of torchvision start with a
            3 x 3 convolution of stride 1 and no pooling; otherwise the stem is the model's own.
        zero_init_residual: Start every residual block as the identity (torchvision only: timm's
            models bring their own initialisation).
        any_size: Images of other sizes will come, too: a ViT then interpolates its position
            embedding to each; the weights are the same.  `check_sides` tells what a model takes.

    Raises:
        ConfigError: Nobody knows ``name``, or its batch is not ``(B, D)`` features.

    >>> net, width = build_backbone("resnet18_c16", image_size=32)
    >>> width, net.maxpool, net.conv1
    (128, Identity(), Conv2d(3, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False))
    """
    if name not in NARROW and not is_torchvision(name):
        return _timm(name.removeprefix(TIMM), image_size, any_size)
    net = torchvision().models.get_model("resnet18" if name in NARROW else name, weights=None)
    if name in NARROW:
        _narrow(net, 16, blocks=NARROW[name])
    width: int = net.fc.in_features
    net.fc = nn.Identity()
    if image_size <= SMALL_IMAGE:
        net.conv1 = nn.Conv2d(3, net.conv1.out_channels, 3, stride=1, padding=1, bias=False)
        net.maxpool = nn.Identity()
    _initialise(net, zero_init_residual)
    return net, width


@contextmanager
def shapes_only() -> Iterator[None]:
    """Build networks on the meta device: they have shapes, and no weights to draw or to hold."""
    # Meta tensors run code in Python that imports torch's compiler: longer than all else here.
    with torch.device("meta"), compiler_deferred():
        yield


def check_name(name: str) -> None:
    """Refuse a name that `build_backbone` does not know.

    Raises:
        ConfigError: One line.
    """
    if name not in NARROW and not is_torchvision(name):
        _known_to_timm(name.removeprefix(TIMM))


def is_torchvision(name: str) -> bool:
    """Whether ``name`` is a ResNet of torchvision itself."""
    return name in _resnets()


def _resnets() -> list[str]:
    models = torchvision().models
    names: list[str] = models.list_models(module=models)
    return [name for name in names if is_resnet(name)]


def _narrow(net: Any, channels: int, blocks: int) -> None:
    """Rebuild a torchvision ResNet-18 with ``channels * (1, 2, 4, 8)`` channels in its stages."""
    block = torchvision().models.resnet.BasicBlock
    net.conv1 = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
    net.bn1 = nn.BatchNorm2d(channels)
    before = channels
    for stage, factor in enumerate((1, 2, 4, 8)):
        after, stride, shortcut = channels * factor, 1 if stage == 0 else 2, None
        if stage:
            shortcut = nn.Sequential(
                nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after)
            )
        first = block(before, after, stride, shortcut)
        more = (block(after, after) for _ in range(blocks - 1))
        setattr(net, f"layer{stage + 1}", nn.Sequential(first, *more))
        before = after
    net.fc = nn.Linear(before, 1)


def _initialise(net: nn.Module, zero_init_residual: bool) -> None:
    """Initialise as torchvision's constructor does, the replaced layers included."""
    resnet = torchvision().models.resnet
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif zero_init_residual and isinstance(module, resnet.BasicBlock):
            nn.init.zeros_(module.bn2.weight)
        elif zero_init_residual and isinstance(module, resnet.Bottleneck):
            nn.init.zeros_(module.bn3.weight)


def _known_to_timm(name: str) -> None:
    if not timm().is_model(name):
        raise unknown_backbone(name, [*_resnets(), *timm().list_models()])


def _timm(name: str, image_size: int, any_size: bool) -> tuple[nn.Module, int]:
    _known_to_timm(name)
    pretrained = timm().get_pretrained_cfg(name)
    fixed = pretrained is not None and pretrained.fixed_input_size
    size = {"img_size": image_size} if fixed else {}
    try:
        net = _any_size(name, size) if fixed and any_size else _plain(name, size)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(
            f"method.backbone: timm cannot build {name!r} for {image_size}-pixel images "
            f"({_line(error)}); choose another backbone or data.image_size"
        ) from error
    return net, net.head_hidden_size


def _plain(name: str, size: Mapping[str, Any]) -> Any:
    return timm().create_model(name, pretrained=False, num_classes=0, **size)


def _any_size(name: str, size: Mapping[str, Any]) -> Any:
    try:
        return with_deterministic_position_embedding(
            _plain(name, {**size, "dynamic_img_size": True})
        )
    except TypeError:  # it knows no such switch; whether it needs one is seen in `check_sides`
        return _plain(name, size)


def is_vit(name: str, image_size: int) -> bool:
    """Whether a backbone is a vision transformer: patches, and blocks of one width over them.

    Args:
        name: Name of a backbone, as `build_backbone` takes it.
        image_size: Side of the images in pixels.

    Raises:
        ConfigError: Nobody knows ``name``.

    >>> is_vit("deit_tiny_patch16_224", 224), is_vit("resnet50", 224), is_vit("mobilevit_s", 224)
    (True, False, False)
    """
    if name in NARROW or is_torchvision(name):
        return False
    with shapes_only():
        net: Any = build_backbone(name, image_size, any_size=True)[0]
    one_width = getattr(net, "embed_dim", None) == getattr(net, "num_features", 0)
    return hasattr(net, "patch_embed") and hasattr(net, "blocks") and one_width


def check_sides(backbone: nn.Module, image_size: int, sides: Sequence[int]) -> None:
    """Refuse views that a backbone cannot take, or of which it leaves out a part.

    Args:
        backbone: On the meta device, where a pass costs neither memory nor arithmetic; it is left
            in eval mode, and of no use afterwards.
        image_size: Side of the images that it was built for.
        sides: Sides of the views in pixels.

    Raises:
        ConfigError: One line that names the side.

    >>> def vit() -> nn.Module:
    ...     with shapes_only():
    ...         return build_backbone("vit_tiny_patch16_224", 32, any_size=True)[0]
    >>> check_sides(vit(), 32, [32, 16])
    >>> check_sides(vit(), 32, [32, 20])
    Traceback (most recent call last):
    vssl_dist.errors.ConfigError: data.views: ... views of 20 pixels ...
    """
    device, home = "meta", f" (data.image_size={image_size} fits)"
    if _complaint(backbone.eval(), image_size, device):
        # Which may be the meta device's fault: it has no values to look at.
        device, home = "cpu", ""
        backbone.to_empty(device=device)
    if complaint := _complaint(backbone, image_size, device):
        raise ConfigError(
            f"method.backbone cannot take images of {image_size} pixels ({_line(complaint)}): "
            "give data.image_size another value, or choose another backbone"
        )
    for side in sorted({image_size, *sides}):
        if complaint := _complaint(backbone, side, device):
            raise ConfigError(
                f"data.views: method.backbone cannot take views of {side} pixels "
                f"({_line(complaint)}); give them another size{home}, or choose another backbone"
            )
        if patch := _unfitting_patch(backbone, side, device):
            key = "data.image_size" if side == image_size else "data.views"
            covered = (side - side % patch) ** 2 / side**2
            raise ConfigError(
                f"{key}: method.backbone cuts images of {side} pixels into patches of {patch} and "
                f"sees {covered:.0%} of them: give a multiple of {patch}, such as "
                f"{-(-side // patch) * patch}, or choose a backbone with another patch"
            )


def _unfitting_patch(backbone: nn.Module, side: int, device: str) -> int | None:
    """The side of the patches that images are cut into, if some pixels are in none of them."""
    sides: list[int] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        conv: Any = module
        cuts_patches = conv.kernel_size == conv.stride and conv.padding in (0, (0, 0))
        takes_images = tuple(inputs[0].shape[1:]) == (3, side, side)
        if cuts_patches and takes_images and side % conv.stride[0]:
            sides.append(conv.stride[0])

    hooks = [
        module.register_forward_pre_hook(look)
        for module in backbone.modules()
        if isinstance(module, nn.Conv2d)
    ]
    try:
        _complaint(backbone, side, device)
    finally:
        for hook in hooks:
            hook.remove()
    return max(sides, default=None)


@torch.no_grad()
def _complaint(backbone: nn.Module, side: int, device: str) -> Exception | None:
    try:
        with compiler_deferred() if device == "meta" else nullcontext():
            backbone(torch.empty(2, 3, side, side, device=device))
    except (AssertionError, RuntimeError, ValueError, IndexError) as error:
        return error
    return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or f"{type(error).__name__} in its forward pass"
