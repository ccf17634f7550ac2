from __future__ import annotations

import torch
from torch import nn

from vssl_dist.models.heads import GaussianBranch, ProjectionBranch, mlp


def test_mlp_is_linear_norm_relu_with_a_bare_or_a_normalised_end() -> None:
    kinds = [type(layer).__name__ for layer in mlp(8, 4, 4, 2, normalise_output=True)]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    output = mlp(8, 4, 2, normalise_output=True)(torch.randn(64, 8))
    torch.testing.assert_close(output.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    bare = mlp(8, 4, 2)
    assert isinstance(bare[-1], nn.Linear)
    assert bare[-1].bias is not None


def test_a_teacher_without_predictor_predicts_its_projection() -> None:
    backbone, projector = nn.Flatten(), mlp(12, 6, 4)
    h, z, p = ProjectionBranch(backbone, projector)(torch.randn(5, 3, 2, 2))
    assert (h.shape, z.shape) == ((5, 12), (5, 4))
    assert p is z


def test_predictor_of_a_gaussian_changes_the_mean_only() -> None:
    torch.manual_seed(0)
    posterior = mlp(12, 6, 8).eval()
    x = torch.randn(5, 3, 2, 2)
    plain = GaussianBranch(nn.Flatten(), posterior)(x)
    predicted = GaussianBranch(nn.Flatten(), posterior, nn.Linear(4, 4))(x)
    assert torch.equal(plain.logvar, predicted.logvar)
    assert not torch.equal(plain.mu, predicted.mu)
    assert torch.equal(torch.cat([plain.mu, plain.logvar], dim=1), posterior(plain.h))


def test_a_posterior_is_inferred_from_a_stored_embedding_as_from_the_image() -> None:
    torch.manual_seed(0)
    branch = GaussianBranch(
        nn.Flatten(), mlp(12, 6, 12), own_scales=True, radial_scale=2.0
    ).eval()  # fmt: skip
    x = torch.randn(5, 3, 2, 2)
    seen, inferred = branch(x), branch.infer(branch.backbone(x))
    for one, two in zip(seen, inferred, strict=True):
        assert torch.equal(one, two)
    assert seen.mu.shape == seen.logvar.shape == seen.scale_logvar.shape == (5, 4)
    torch.testing.assert_close(seen.radial_scale, torch.tensor(2.0))
    head = {name for name in branch.state_dict() if not name.startswith("backbone.")}
    assert "log_radial_scale" in head
    plain = GaussianBranch(nn.Flatten(), mlp(12, 6, 8))
    assert plain(x).scale_logvar is plain(x).radial_scale is None
    assert "log_radial_scale" not in plain.state_dict()
