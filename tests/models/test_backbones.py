from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from vssl_dist.errors import ConfigError
from vssl_dist.models.backbones import build_backbone, check_sides
from vssl_dist.models.norm import SyncBatchNorm, synchronise
from vssl_dist.vision import torchvision


def _same_features(one: nn.Module, two: nn.Module, size: int) -> bool:
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        return torch.equal(one.eval()(x), two.eval()(x))


@pytest.mark.parametrize(
    ("name", "size", "width"),
    [
        ("resnet18", 32, 512),
        ("resnet50", 64, 2048),
        ("resnet18_c16", 32, 128),
        ("resnet18_c16", 96, 128),
        ("vit_tiny_patch16_224", 32, 192),
        ("convnext_atto", 64, 320),
        ("mobilenetv3_small_050", 64, 1024),
    ],
)
def test_width_is_what_comes_out(name: str, size: int, width: int) -> None:
    net, said = build_backbone(name, size)
    assert said == width
    assert net.eval()(torch.randn(2, 3, size, size)).shape == (2, width)


def test_weights_open_in_plain_torchvision() -> None:
    net, _ = build_backbone("resnet18", 224)
    plain = torchvision().models.resnet18(weights=None)
    missing = plain.load_state_dict(net.state_dict(), strict=False)
    assert set(missing.missing_keys) == {"fc.weight", "fc.bias"}
    assert not missing.unexpected_keys
    plain.fc = nn.Identity()
    assert _same_features(net, plain, 96)


def test_weights_of_small_images_open_in_torchvision_with_the_cifar_stem() -> None:
    net, _ = build_backbone("resnet18", 32)
    plain = torchvision().models.resnet18(weights=None)
    plain.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    plain.maxpool = plain.fc = nn.Identity()
    plain.load_state_dict(net.state_dict())
    assert _same_features(net, plain, 32)


def test_weights_open_in_plain_timm_and_its_batch_norms_are_synchronised() -> None:
    net, _ = build_backbone("mobilenetv3_small_050", 64)
    torchvision()
    import timm

    plain = timm.create_model("mobilenetv3_small_050", num_classes=0)
    synchronise(net)
    assert any(isinstance(module, SyncBatchNorm) for module in net.modules())
    plain.load_state_dict(net.state_dict())
    assert _same_features(net, plain, 64)


def test_narrow_resnet_has_the_names_and_the_depth_of_resnet18() -> None:
    narrow, _ = build_backbone("resnet18_c16", 224)
    full, _ = build_backbone("resnet18", 224)
    pairs = zip(narrow.state_dict().items(), full.state_dict().items(), strict=True)
    for (name, small), (other, large) in pairs:
        assert name == other
        expected = [n if n in (1, 3, 7) else n // 4 for n in large.shape]
        assert list(small.shape) == expected, name
    assert pickle.loads(pickle.dumps(narrow)) is not None


def test_residual_blocks_can_start_as_the_identity() -> None:
    for name in ("resnet18_c16", "resnet50"):
        net, _ = build_backbone(name, 32, zero_init_residual=True)
        last = "bn2" if name == "resnet18_c16" else "bn3"
        zeros = [n for n, p in net.named_parameters() if n.endswith(".weight") and not p.any()]
        assert zeros
        assert all(last in n for n in zeros)


def test_unknown_names_are_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"method\.backbone: 'resnet5O'.*'resnet50'") as caught:
        build_backbone("resnet5O", 224)
    assert "\n" not in str(caught.value)


def test_images_that_a_model_cannot_take_are_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="timm cannot build") as caught:
        build_backbone("nest_tiny", 30)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "timm:resnet18"])
def test_trained_weights_open_in_plain_timm_with_equal_features(name: str) -> None:
    torch.manual_seed(0)
    net, width = build_backbone(name, 64, any_size=name.startswith("vit"))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    torchvision()
    import timm

    size = {"img_size": 64} if name.startswith("vit") else {}
    plain = timm.create_model(name.removeprefix("timm:"), num_classes=0, **size)
    plain.load_state_dict(net.state_dict())
    assert plain.num_features == width
    assert _same_features(net, plain, 64)


def test_vit_widths_are_those_of_their_size() -> None:
    names = ("tiny", "small", "base", "large")
    with torch.device("meta"):
        widths = [build_backbone(f"vit_{n}_patch16_224", 224)[1] for n in names]
    assert widths == [192, 384, 768, 1024]


def test_a_vit_takes_other_sizes_where_it_is_asked_to() -> None:
    net, _ = build_backbone("vit_tiny_patch16_224", 64, any_size=True)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 192)
    rigid, _ = build_backbone("vit_tiny_patch16_224", 64)
    with pytest.raises(AssertionError):
        rigid(torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize(
    ("name", "size", "sides", "wrong"),
    [
        ("vit_tiny_patch16_224", 224, (224, 96), None),
        ("vit_tiny_patch16_224", 224, (224, 90), 90),
        ("vit_tiny_patch16_224", 32, (40, 32), 40),
        ("mixer_s32_224", 64, (64, 32), 32),
        ("xcit_nano_12_p8_224", 64, (64, 32), None),
        ("swin_tiny_patch4_window7_224", 224, (224, 96), None),
        ("resnet50", 224, (224, 1), None),
        ("convnext_atto", 64, (64, 48), None),
        ("mobilenetv3_small_050", 64, (64, 33), None),
    ],
)
def test_a_size_that_would_fail_in_training_is_refused_before_and_no_other(
    name: str, size: int, sides: tuple[int, ...], wrong: int | None
) -> None:
    with torch.device("meta"):
        shapes, _ = build_backbone(name, size, any_size=True)
    net, _ = build_backbone(name, size, any_size=True)
    for side in sides:
        image = torch.randn(1, 3, side, side)
        if side != wrong:
            assert net.eval()(image).isfinite().all()
            check_sides(shapes, size, [side])
            continue
        with pytest.raises(AssertionError):
            net.eval()(image)
        with pytest.raises(
            ConfigError, match=rf"(data\.views: .*|images of) {side} pixels"
        ) as refused:
            check_sides(shapes, size, sides)
        assert "\n" not in str(refused.value)


def test_what_the_check_itself_cannot_run_is_no_reason_to_refuse() -> None:
    class Peeks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3)) * (x.sum().item() > 0)

    check_sides(Peeks(), 32, [32, 16])


_CHECK = """
import sys
from vssl_dist.config import RunConfig
from vssl_dist.models.backbones import build_backbone, check_sides, shapes_only
for name, side in (("resnet10_c16", 32), ("resnet50", 32), ("vit_tiny_patch16_224", 224)):
    with shapes_only():
        backbone, _ = build_backbone(name, side, any_size=side > 32)
    check_sides(backbone, side, [side, side // 7 * 3])
print("torch._dynamo" in sys.modules)
from torchvision.ops.roi_align import is_compile_supported
import torch._dynamo.utils
print(is_compile_supported("cpu") == torch._dynamo.utils.is_compile_supported("cpu"))
"""


def test_a_network_is_checked_without_torch_s_compiler_which_is_there_when_somebody_asks() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CHECK], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "True"]
