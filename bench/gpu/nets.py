"""A ResNet-50 and a ViT-S/16 in plain torch, as `bench.gpu_first` measures them without packages.

Shapes and operations are those of torchvision's and timm's; weights have other names.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vssl_dist.models.determinism import with_deterministic_position_embedding


class Bottleneck(nn.Module):
    """Three convolutions beside a shortcut (He et al., arXiv 1512.03385, stride in the 3 x 3)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.body = nn.Sequential(
            *_convolution(channels, width, 1),
            nn.ReLU(inplace=True),
            *_convolution(width, width, 3, stride),
            nn.ReLU(inplace=True),
            *_convolution(width, out, 1),
        )
        changes = stride != 1 or channels != out
        self.shortcut = nn.Sequential(*_convolution(channels, out, 1, stride) if changes else ())

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> ``(B, 4 width, H / stride, W / stride)``."""
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)


def _convolution(channels: int, out: int, side: int, stride: int = 1) -> Sequence[nn.Module]:
    return (
        nn.Conv2d(channels, out, side, stride, padding=side // 2, bias=False),
        nn.BatchNorm2d(out),
    )


def resnet(blocks: Sequence[int] = (3, 4, 6, 3), width: int = 64) -> nn.Sequential:
    """``(B, 3, H, W)`` -> ``(B, 32 width)``; by default a ResNet-50."""
    layers: list[nn.Module] = [
        *_convolution(3, width, 7, 2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, padding=1),
    ]
    channels = width
    for stage, count in enumerate(blocks):
        for number in range(count):
            stride = 2 if stage and not number else 1
            layers.append(Bottleneck(channels, width * 2**stage, stride))
            channels = 4 * width * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Block(nn.Module):
    """Attention and a perceptron, each on normalised inputs and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, D)`` -> ``(B, T, D)``."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv.unbind())
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed


class ViT(nn.Module):
    """A vision transformer whose positions are resized to smaller images, as in DINO."""

    def __init__(self, side: int, patch: int = 16, width: int = 384, depth: int = 12) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.grid = side // patch
        self.positions = nn.Parameter(0.02 * torch.randn(1, width, self.grid, self.grid))
        self.blocks = nn.Sequential(*(Block(width, max(width // 64, 1)) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def _pos_embed(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        if tuple(size) == (self.grid, self.grid):
            return x + self.positions
        resized = F.interpolate(self.positions, size=tuple(size), mode="bicubic", antialias=True)
        return x + resized

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W)`` -> ``(B, D)``."""
        tokens = self._pos_embed(self.patches(x)).flatten(2).transpose(1, 2)
        features: Tensor = self.norm(self.blocks(tokens)).mean(1)
        return features


def build_net(name: str, side: int, is_tiny: bool) -> nn.Module:
    """A net of its name, ``"resnet50"`` or ``"vit_small"``, or its like in tiny.

    Args:
        name: Its name.
        side: Side of its images in pixels.
        is_tiny: Whether it only has to run.
    """
    if name == "resnet50":
        return resnet((1, 1), 8) if is_tiny else resnet()
    vit = ViT(side, width=16, depth=1) if is_tiny else ViT(side)
    return with_deterministic_position_embedding(vit)


def two_view_loss(net: nn.Module, views: Sequence[Tensor]) -> Tensor:
    """Distance of the two views' directions, in float32: a loss that costs nothing beside a net."""
    first, second = (F.normalize(net(view).float(), dim=1) for view in views)
    return (first - second.detach().roll(1, 0)).square().sum(1).mean()
