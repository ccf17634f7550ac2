"""Mistakes in what the network is shown."""

from __future__ import annotations

from vssl_dist.config import Normalisation, RunConfig
from vssl_dist.linter.rule import Facts, Rule, self_supervised

_STATISTICS = {
    "cifar10": Normalisation(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
    "cifar100": Normalisation(mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)),
    "stl10": Normalisation(mean=(0.43, 0.42, 0.39), std=(0.27, 0.26, 0.27)),
    "imagenet": Normalisation(),
}
"""Channel statistics: solo-learn's for CIFAR, W-MSE's for STL-10, torchvision's for ImageNet."""
_ALIASES = {"in1k": "imagenet", "in100": "imagenet", "imagenet100": "imagenet"}
_ANYTHING = {None, "imagefolder", "webdataset"}
"""Names that shards have which were made of somebody's own files."""
_CLOSE = 0.02
_SIDES = {"cifar10": 32, "cifar100": 32, "stl10": 96}
_LARGE, _SMALL = 128, 64
_TWO_SIDED = {"byol", "moco_v3"}
_GLOBAL = 2
"""Views of DINO that the teacher sees."""


def dataset_of(cfg: RunConfig, facts: Facts) -> str | None:
    """One of the datasets known here: by what the shards say, else by the folder's name."""
    stated = None if facts.dataset in _ANYTHING else facts.dataset
    # The innermost folder first: imagenet/cifar10/train holds CIFAR-10.
    names = [stated] if stated else list(reversed(cfg.data.train.parts))
    canonical_names = (_ALIASES.get(name, name) for name in names)
    return next((name for name in canonical_names if name in _STATISTICS), None)


def normalisation(cfg: RunConfig, facts: Facts) -> str | None:
    """Views that are not normalised, or by another dataset's statistics."""
    normalise = cfg.data.normalise
    if max(normalise.mean) > 1 or max(normalise.std) > 1:
        return "data.normalise is meant for pixels from 0 to 1: divide it by 255"
    if normalise.mean == (0, 0, 0) and normalise.std == (1, 1, 1):
        return "data.normalise changes nothing (mean 0, std 1): give the dataset's statistics"
    name = dataset_of(cfg, facts)
    if name is None or _distance(normalise, _STATISTICS[name]) <= _CLOSE:
        return None
    fitting = _STATISTICS[name]
    return (
        f"data.normalise is not that of {name}: {{mean: {list(fitting.mean)}, "
        f"std: {list(fitting.std)}}}"
    )


def _distance(a: Normalisation, b: Normalisation) -> float:
    pairs = zip((*a.mean, *a.std), (*b.mean, *b.std), strict=True)
    return max(abs(x - y) for x, y in pairs)


def image_size(cfg: RunConfig, facts: Facts) -> str | None:
    """Small images blown up, as when the size was left at its default."""
    side = _SIDES.get(dataset_of(cfg, facts) or "")
    if side is None or cfg.data.image_size <= 2 * side:
        return None
    return (
        f"data.image_size={cfg.data.image_size} enlarges images of {side} pixels, at "
        f"{(cfg.data.image_size / side) ** 2:.0f} times the cost and with the stem for large "
        f"images: {side}"
    )


def symmetric_views(cfg: RunConfig, facts: Facts) -> str | None:
    """One recipe for both views where the method's own has two."""
    first, *others = cfg.data.views
    if cfg.method.name not in _TWO_SIDED or any(view != first for view in others):
        return None
    pair = "[cifar, cifar_byol_2]" if cfg.data.image_size <= _SMALL else "[byol_1, byol_2]"
    return (
        f"data.views gives both views of {cfg.method.name} one recipe; its own has two sides, the "
        f"second with solarisation and less blur: {pair}"
    )


def blur_missing(cfg: RunConfig, facts: Facts) -> str | None:
    """No view of a large image is ever blurred."""
    large = cfg.data.image_size >= _LARGE
    if not self_supervised(cfg) or not large or any(view.blur for view in cfg.data.views):
        return None
    return (
        f"data.views never blurs at {cfg.data.image_size} pixels: blur half of the views, or one "
        "side, as all recipes for this size do"
    )


def blur_small(cfg: RunConfig, facts: Facts) -> str | None:
    """Small images blurred with the sigma of large ones."""
    views, side = cfg.data.views, cfg.data.image_size
    if not self_supervised(cfg) or side > _SMALL:
        return None
    if not any(view.blur and view.blur_sigma[1] > 1 for view in views):
        return None
    return (
        f"data.views blurs images of {side} pixels with a sigma of up to "
        f"{max(view.blur_sigma[1] for view in views):g} pixels: recipes for this size leave it out "
        "(cifar, cifar_simclr, cifar_simsiam)"
    )


def whole_crops(cfg: RunConfig, facts: Facts) -> str | None:
    """Crops that are nearly the whole image in every view."""
    least = min(view.crop_scale[0] for view in cfg.data.views)
    if not self_supervised(cfg) or least < 0.6:
        return None
    return (
        f"data.views crops at least {least:.0%} of the image: the task is too easy; crop_scale "
        "starts at 0.08 to 0.2 (DINO's global views: 0.14 to 0.4)"
    )


def same_colours(cfg: RunConfig, facts: Facts) -> str | None:
    """Views that keep the image's colours, which give it away."""
    if not self_supervised(cfg):
        return None
    for view in cfg.data.views:
        if view.jitter and max(view.brightness, view.contrast, view.saturation, view.hue):
            return None
        if view.grayscale:
            return None
    return (
        "data.views never changes colours: crops of one image are told by their histograms; "
        "jitter: 0.8, grayscale: 0.2"
    )


def dino_crops(cfg: RunConfig, facts: Facts) -> str | None:
    """Local crops where DINO's teacher expects the global ones."""
    views = cfg.data.views
    if cfg.method.name != "dino" or len(views) <= _GLOBAL:
        return None
    largest_crops = [view.crop_scale[1] for view in views]
    if min(largest_crops[:_GLOBAL]) >= max(largest_crops[_GLOBAL:]):
        return None
    return (
        "data.views: the teacher sees the first two views, and one of them crops less of the image "
        "than a later one: list the two global recipes first"
    )


_SIMCLR = "SimCLR, arXiv 2002.05709"
RULES = (
    Rule(
        "normalisation",
        normalisation,
        "statistics: solo-learn (CIFAR), W-MSE (STL-10), torchvision (ImageNet)",
    ),
    Rule("image_size", image_size, "methods' CIFAR recipes all keep 32 pixels: solo-learn's"),
    Rule("symmetric_views", symmetric_views, "BYOL, arXiv 2006.07733, table 6; MoCo v3's code"),
    Rule("blur_missing", blur_missing, "lightly#1051: a broken blur cost SimCLR 7 points of k-NN"),
    Rule("blur_small", blur_small, f"{_SIMCLR}: its appendix on CIFAR-10"),
    Rule("whole_crops", whole_crops, f"{_SIMCLR}, section 3"),
    Rule("same_colours", same_colours, f"{_SIMCLR}, section 3.1"),
    Rule("dino_crops", dino_crops, "DINO, arXiv 2104.14294, section 3.1"),
)
