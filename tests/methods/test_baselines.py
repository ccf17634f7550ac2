"""What the oracle and the certificate leave open: shapes, switches, schedules and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.photos import tiny_dataset
from tests.support.views import NoNoise, two_views
from vssl_dist import config
from vssl_dist.config import MethodConfig
from vssl_dist.data.loader import refuse_other_classes
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.errors import ConfigError, DataError
from vssl_dist.methods import MicroStep, build_method
from vssl_dist.methods.barlow_twins import BarlowTwins, BarlowTwinsConfig
from vssl_dist.methods.dino import DINO, DINOConfig, by_size
from vssl_dist.methods.moco_v3 import MoCoV3, MoCoV3Config
from vssl_dist.methods.simclr import SimCLR, SimCLRConfig
from vssl_dist.methods.supervised import SupervisedConfig
from vssl_dist.methods.vicreg import VICReg, VICRegConfig
from vssl_dist.models.heads import Prototypes, Scores

NARROW: dict[str, Any] = {"backbone": "resnet10_c16"}
HEAD: dict[str, Any] = NARROW | {"hidden": 32, "dim": 16}
PAIRED = {
    "simclr": SimCLRConfig(**HEAD),
    "moco_v3": MoCoV3Config(**HEAD),
    "barlow_twins": BarlowTwinsConfig(**HEAD),
    "vicreg": VICRegConfig(**HEAD),
}
DINO_CFG = DINOConfig(local_crops=2, hidden=32, bottleneck=16, prototypes=24, **NARROW)


def at(epoch: float = 5.0, images: int = 8) -> MicroStep:
    return MicroStep(NoNoise(), epoch, torch.arange(images) % 3)


def crops(images: int = 8) -> list[Tensor]:
    """Two global crops and two local ones."""
    one, two = two_views(images)
    return [one, two, one[..., :16, :16], two[..., 16:, 16:]]


@pytest.mark.parametrize("cfg", PAIRED.values(), ids=PAIRED.keys())
def test_every_weight_learns_and_views_may_be_swapped(cfg: MethodConfig) -> None:
    torch.manual_seed(0)
    method, (one, two) = build_method(cfg, 32), two_views(8)
    out = method.loss((one, two), at())
    torch.testing.assert_close(method.loss((two, one), at()).loss, out.loss, rtol=1e-4, atol=1e-4)
    out.loss.backward()
    assert all(p.grad is not None for p in method.student.parameters())
    assert out.embedding.shape == (8, 128)
    assert not out.embedding.requires_grad
    with pytest.raises(ConfigError, match=r"data\.views: this method compares 2 views, not 1"):
        method.loss((one,), at())


@pytest.mark.parametrize("name", [*PAIRED, "dino", "supervised"])
def test_half_precision_networks_give_a_float32_loss(name: str) -> None:
    torch.manual_seed(0)
    one_view = SupervisedConfig(classes=3, **NARROW)
    cfg = (PAIRED | {"dino": DINO_CFG, "supervised": one_view})[name]
    method, views = build_method(cfg, 32), crops()[: cfg.views_wanted]
    exact = method.loss(views, at()).loss
    for network in (method.student, method.teacher):
        if network is not None:
            network.forward = torch.autocast("cpu", torch.bfloat16)(network.forward)
    half = method.loss(views, at()).loss
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.1, atol=0.1)
    half.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.student.parameters())


def widths(net: nn.Module) -> list[tuple[int, int]]:
    return [(m.in_features, m.out_features) for m in net.modules() if isinstance(m, nn.Linear)]


def test_defaults_have_the_papers_shapes() -> None:
    with torch.device("meta"):
        simclr = SimCLR(SimCLRConfig(), 224).student
        moco = MoCoV3(MoCoV3Config(), 224).student
        barlow = BarlowTwins(BarlowTwinsConfig(), 224).student
        vicreg = VICReg(VICRegConfig(), 224).student
        dino = DINO(DINOConfig(), 224).student
    assert widths(simclr) == [(2048, 2048), (2048, 128)]
    assert widths(moco) == [(2048, 4096), (4096, 256), (256, 4096), (4096, 256)]
    for net in (barlow, vicreg):
        assert widths(net) == [(2048, 8192), (8192, 8192), (8192, 8192)]
        assert sum(isinstance(m, nn.Linear) and m.bias is not None for m in net.modules()) == 0
    last = widths(dino)[-4:]
    assert last == [(384, 2048), (2048, 2048), (2048, 256), (256, 65536)]
    ends = [type(list(net.children())[1][-1]) for net in (simclr, moco, barlow, vicreg)]
    assert ends == [nn.BatchNorm1d] * 3 + [nn.Linear]


def test_barlow_twins_scale_is_a_factor_of_the_loss_alone() -> None:
    torch.manual_seed(0)
    cfg, views = BarlowTwinsConfig(**HEAD), two_views(8)
    method = BarlowTwins(cfg, 32)
    whole = method.loss(views, NoNoise()).loss
    method.cfg = cfg.model_copy(update={"scale_loss": 0.25})
    torch.testing.assert_close(method.loss(views, NoNoise()).loss, 0.25 * whole)


def test_a_frozen_patch_projection_stays_and_needs_a_vit() -> None:
    vit = HEAD | {"backbone": "vit_tiny_patch16_224", "freeze_patches": True}
    method = MoCoV3(MoCoV3Config(**vit), 32)
    still = {n for n, p in method.student.named_parameters() if not p.requires_grad}
    assert still == {"backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias"}
    with pytest.raises(ConfigError, match=r"freeze_patches: resnet10_c16 has no patch"):
        MoCoV3(MoCoV3Config(freeze_patches=True, **HEAD), 32)


def test_supervised_is_cross_entropy_on_one_view_and_counts_its_hits() -> None:
    torch.manual_seed(0)
    cfg = SupervisedConfig(classes=3, label_smoothing=0.1, **NARROW)
    method, (view, other) = build_method(cfg, 32), two_views(8)
    method.student.eval()
    out, now = method.loss([view], at()), at()
    logits = method.student(view).z
    want = F.cross_entropy(logits, now.labels, label_smoothing=0.1)
    torch.testing.assert_close(out.loss, want)
    hits = (logits.argmax(-1) == now.labels).float().mean()
    assert out.metrics["accuracy"] == hits
    with pytest.raises(ConfigError, match="sees 1 view, not 2"):
        method.loss([view, other], at())
    assert cfg.views_wanted == 1


def test_a_training_set_with_other_classes_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = tiny_dataset(tmp_path, samples=8, classes=4)
    for classes, method in ((4, "supervised"), (10, "supervised"), (10, "simclr")):
        chosen = SupervisedConfig(classes=classes, **NARROW)
        cfg = config.RunConfig.model_validate(
            {
                "name": "t",
                "data": {"train": str(folder), "views": ["cifar"] * 2, "streams": 1},
                "optim": {"base_lr": 0.1},
                "method": PAIRED["simclr"],
            }
        ).model_copy(update={"method": chosen if method == "supervised" else PAIRED[method]})
        if (classes, method) == (10, "supervised"):
            with pytest.raises(DataError, match=r"has 4 classes, but method\.classes=10"):
                refuse_other_classes(cfg, Dataset.open(folder))
        else:
            refuse_other_classes(cfg, Dataset.open(folder))


# DINO.


def test_teacher_sees_global_crops_alone_and_the_student_all() -> None:
    torch.manual_seed(0)
    method = DINO(DINO_CFG, 32)
    seen: dict[str, list[tuple[int, int]]] = {"student": [], "teacher": []}
    for name, network in (("student", method.student), ("teacher", method.teacher)):
        assert network is not None
        network.register_forward_pre_hook(
            lambda _, given, name=name: seen[name].append((len(given[0]), given[0].shape[-1]))
        )
    method.loss(crops(), at()).loss.backward()
    assert seen == {"student": [(16, 32), (16, 16)], "teacher": [(16, 32)]}
    assert method.teacher is not None
    assert all(p.grad is None for p in method.teacher.parameters())


def test_a_vit_takes_local_crops_of_another_size() -> None:
    torch.manual_seed(0)
    cfg = DINO_CFG.model_copy(update={"backbone": "vit_tiny_patch16_224"})
    method = DINO(cfg, 32)
    loss = method.loss(crops(2), at(images=2)).loss
    loss.backward()
    position = method.student.get_parameter("backbone.pos_embed")
    assert position.grad is not None
    assert position.grad.abs().sum() > 0


def test_prototypes_rest_for_the_first_epoch_with_a_gradient_of_zero() -> None:
    torch.manual_seed(0)
    method = DINO(DINO_CFG.model_copy(update={"fixed_norm": False}), 32)
    head = method.student.get_submodule("prototypes")
    assert isinstance(head, Prototypes)
    parts = [head.direction.weight, head.scale]
    method.loss(crops(), at(epoch=0.99)).loss.backward()
    assert all(p is not None and p.grad is not None and not p.grad.any() for p in parts)
    others = [p for n, p in method.student.named_parameters() if "prototypes" not in n]
    assert all(p.grad is not None and p.grad.any() for p in others)
    method.loss(crops(), at(epoch=1.0)).loss.backward()
    assert all(p is not None and p.grad is not None and p.grad.any() for p in parts)


def test_resting_prototypes_answer_as_the_others_do() -> None:
    torch.manual_seed(0)
    head, unit = Prototypes(4, 6, scaled=True), F.normalize(torch.randn(3, 4), dim=-1)
    assert torch.equal(head(unit, frozen=True), head(unit))
    rows = F.normalize(head.direction.weight, dim=-1)
    torch.testing.assert_close(head(unit), torch.stack([unit @ row for row in rows], dim=1))
    with torch.no_grad():
        head.direction.weight.mul_(0.3)  # as weight decay does
    torch.testing.assert_close(head(unit), torch.stack([unit @ row for row in rows], dim=1))


def test_centre_follows_the_mean_of_the_teachers_scores_after_the_loss() -> None:
    torch.manual_seed(0)
    method, views = DINO(DINO_CFG, 32), crops()
    assert method.teacher is not None
    with torch.no_grad():
        mean = method.teacher(torch.cat(views[:2])).scores.mean(0)
    first = method.loss(views, at()).loss
    torch.testing.assert_close(method.centre.value, 0.1 * mean, rtol=1e-4, atol=1e-6)
    assert method.loss(views, at()).loss != first
    assert "centre.value" in method.student.state_dict()


def test_crops_of_one_size_share_a_batch_and_come_back_in_order() -> None:
    views = [torch.full((2, 3, size, size), float(n)) for n, size in enumerate((8, 8, 4, 4, 8))]
    calls = []

    def network(batch: Tensor) -> Scores:
        calls.append(len(batch))
        return Scores(batch.mean((1, 2, 3)), batch.amax((1, 2, 3)))

    seen = by_size(network, views)
    assert calls == [4, 4, 2]
    assert [crop.h.tolist() for crop in seen] == [[float(n)] * 2 for n in range(5)]


def test_wrong_lists_of_crops_are_refused_in_one_line() -> None:
    method, views = DINO(DINO_CFG, 32), crops()
    with pytest.raises(ConfigError, match=r"3 views, but method\.local_crops=2 .* make 4"):
        method.loss(views[:3], at())
    with pytest.raises(ConfigError, match=r"list the two global crops first"):
        method.loss(views[::-1], at())
    assert DINO_CFG.views_wanted == 4


def test_crops_of_sizes_that_dino_has_no_use_for_are_refused_before_anything_is_built() -> None:
    whole, small, tiny = {"recipe": "cifar"}, {"recipe": "cifar", "size": 16}, {"size": 12}
    for views, why in (
        ([whole, whole, small, tiny], "local crops of 12, 16 pixels: give all local crops one"),
        ([small, whole, small, small], "list the two global crops first|global crops of 16, 32"),
        ([small, small, whole, whole], "list the two global crops first"),
        ([whole, {"size": 24}, small, small], "global crops of 24, 32 pixels"),
    ):
        data = {"train": "x", "image_size": 32, "views": views, "streams": 1}
        keys = {"name": "t", "data": data, "optim": {"base_lr": 0.1}, "method": DINO_CFG}
        with pytest.raises(ValueError, match=rf"data\.views: ({why})"):
            config.RunConfig.model_validate(keys)
    fine = {"train": "x", "image_size": 32, "views": [whole, whole, small, small], "streams": 1}
    config.RunConfig.model_validate(keys | {"data": fine})


def test_a_config_with_too_few_views_is_refused_before_anything_is_built() -> None:
    data = {"train": "x", "image_size": 32, "views": ["cifar", "cifar"], "streams": 1}
    whole = {"name": "t", "data": data, "optim": {"base_lr": 0.1}, "method": DINO_CFG}
    with pytest.raises(ValueError, match=r"data\.views has 2 entries, but dino compares 4 views"):
        config.RunConfig.model_validate(whole)


def test_micro_step_is_the_noise_that_it_was_given() -> None:
    now = replace(at(), noise=NoNoise())
    assert now.normal("any", (2, 3)).shape == (2, 3)
