"""Names of backbones that are read from sources are those that the packages know."""

from __future__ import annotations

import pytest

from vssl_dist.errors import ConfigError
from vssl_dist.models import names
from vssl_dist.models.backbones import check_name
from vssl_dist.vision import torchvision


def test_the_names_in_the_sources_are_those_that_torchvision_and_timm_list() -> None:
    models = torchvision().models
    import timm

    assert names._registered("timm") == {*timm.list_models()}
    in_sources = {name for name in names._registered("torchvision") if names.is_resnet(name)}
    assert in_sources == {*filter(names.is_resnet, models.list_models(module=models))}


def refusal(check: object, name: str) -> str | None:
    assert callable(check)
    try:
        check(name)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "name",
    ["resnet50", "timm:resnet50", "resnet10_c16", "vit_tiny_patch16_224.augreg_in21k",
     "tv_resnet50", "vit_tiny_patch16_224_in21k", "resnet5", "timm:resnet5", "timm:resnet10_c17",
     "vgg", "", "x", "vit_tny_patch16_224.x", "rédnet"],
)  # fmt: skip
def test_a_name_is_refused_from_the_sources_in_the_words_of_the_packages(name: str) -> None:
    assert refusal(names.check_spelling, name) == refusal(check_name, name)
