"""Mistakes of learning rate, weight decay, schedule, batch and teacher."""

from __future__ import annotations

import math

from vssl_dist import schedule
from vssl_dist.config import EngineConfig, OptimConfig, RunConfig
from vssl_dist.linter.rule import Facts, Rule, is_vit

_RATES = {"sgd": (0.002, 1.0), "adamw": (1e-5, 1e-2), "lars": (0.02, 3.0)}
"""Rates per 256 images between which every recipe lies that we know of."""
_LARGE_BATCH = 1024
_WHOLE_BATCH = {"simclr", "moco_v3", "barlow_twins", "vicreg"}
"""Methods whose loss compares the images of a batch with each other."""
_FEW, _FEW_TO_COMPARE = 32, 128
_LEFT = 0.01
"""Share of its random start that a teacher may keep."""


def learning_rate(cfg: RunConfig, facts: Facts) -> str | None:
    """A rate that was already multiplied for the batch, or is another optimizer's."""
    optim = cfg.optim
    low, high = _RATES[optim.name]
    if low <= optim.base_lr <= high:
        return None
    return (
        f"optim.base_lr={optim.base_lr:g} is outside the {low:g} to {high:g} of known recipes with "
        f"{optim.name}; it is per 256 images and becomes {optim.peak_lr:g} at this batch: give it "
        "unmultiplied, and for this optimizer"
    )


def warm_up(cfg: RunConfig, facts: Facts) -> str | None:
    """Large batches, LARS and ViTs started at the full rate."""
    optim = cfg.optim
    reason = (
        "LARS"
        if optim.name == "lars"
        else "a ViT"
        if is_vit(cfg)
        else f"a batch of {optim.global_batch}"
        if optim.global_batch >= _LARGE_BATCH
        else None
    )
    if reason is None or optim.warmup_epochs >= 1:
        return None
    return (
        f"{reason} starts at (nearly) the full learning rate with optim.warmup_epochs="
        f"{optim.warmup_epochs:g}: give it 1 to 10"
    )


def warm_up_too_long(cfg: RunConfig, facts: Facts) -> str | None:
    """A warm-up that takes most of the run, as after epochs or max_steps were cut."""
    optim, steps = cfg.optim, facts.steps(cfg)
    if steps is None or facts.samples is None:
        share = optim.warmup_epochs / optim.epochs
    else:
        share = optim.warmup_epochs * facts.samples / optim.global_batch / max(steps, 1)
    if share <= 0.5:
        return None
    consequence = "the peak is never reached" if share >= 1 else "little is left for the decay"
    return (
        f"optim.warmup_epochs={optim.warmup_epochs:g} is {share:.0%} of the run, {consequence}: "
        "shorten it with the run"
    )


def max_steps(cfg: RunConfig, facts: Facts) -> str | None:
    """A run whose schedules end long before its epochs do."""
    optim = cfg.optim
    if optim.max_steps is None or facts.samples is None:
        return None
    full_steps = optim.epochs * facts.samples / optim.global_batch
    if optim.max_steps >= full_steps - 1:
        return None
    return (
        f"optim.max_steps={optim.max_steps} ends the run and all its schedules after "
        f"{optim.max_steps / full_steps * optim.epochs:.3g} of optim.epochs={optim.epochs:g} "
        "epochs: the learning rate is zero there and cannot go on; drop it, or ask for fewer epochs"
    )


def norm_and_bias_decay(cfg: RunConfig, facts: Facts) -> str | None:
    """Weight decay on biases and batch norms under LARS or AdamW."""
    optim = cfg.optim
    if optim.name == "sgd" or not optim.decay_norm_and_bias or not optim.weight_decay:
        return None
    return (
        f"optim.decay_norm_and_bias=true shrinks biases and batch norms under {optim.name}, whose "
        "recipes all spare them: set it to false"
    )


def weight_decay(cfg: RunConfig, facts: Facts) -> str | None:
    """AdamW's weight decay under an optimizer that adds it to the gradient."""
    optim = cfg.optim
    if optim.name == "adamw" or optim.weight_decay < 0.01:
        return None
    return (
        f"optim.weight_decay={optim.weight_decay:g} is on AdamW's scale, where it is apart from "
        f"the gradient; {optim.name} adds it to the gradient: 1e-6 to 5e-4"
    )


def small_batch(cfg: RunConfig, facts: Facts) -> str | None:
    """Too few images for negatives, covariances or batch norm."""
    optim, name = cfg.optim, cfg.method.name
    images = optim.global_batch // optim.accumulate
    least = _FEW_TO_COMPARE if name in _WHOLE_BATCH else _FEW
    if images >= least:
        return None
    observer = "its loss compares" if name in _WHOLE_BATCH else "batch norm sees"
    return (
        f"{observer} only {images} images at a time (optim.global_batch / optim.accumulate): "
        f"{name} needs at least {least}, better 256 and more"
    )


def accumulate(cfg: RunConfig, facts: Facts) -> str | None:
    """Accumulation taken for a larger batch by a loss that needs the batch at once."""
    optim = cfg.optim
    if optim.accumulate == 1 or cfg.method.name not in _WHOLE_BATCH:
        return None
    return (
        f"optim.accumulate={optim.accumulate} averages losses of "
        f"{optim.global_batch // optim.accumulate} images, which for {cfg.method.name} is not the "
        f"loss of {optim.global_batch}: use more ranks, or a smaller global_batch knowingly"
    )


def teacher_start(cfg: RunConfig, facts: Facts) -> str | None:
    """A teacher too slow for the length of the run, which keeps its random start."""
    steps = facts.steps(cfg)
    if steps is None or not cfg.method.has_teacher:
        return None
    first, last = cfg.engine.ema_decay
    left = _left(steps, first, last)
    if left <= _LEFT:
        return None
    # Half a cosine from first to last: its mean is the middle.
    fitting = 2 - last + 2 * math.log(_LEFT) / max(steps, 1)
    remedy = f"start at {fitting:.3f} or less" if fitting > 0.9 else "train longer"
    return (
        f"engine.ema_decay=[{first:g}, {last:g}] leaves {left:.0%} of the teacher at its random "
        f"start after the {steps} steps of this run: {remedy}"
    )


def _left(steps: int, first: float, last: float) -> float:
    """Share of its start that the teacher keeps: the product of all decays."""
    # From the mean of their logarithms at so many points: a run may have millions of steps.
    points = 1000
    decays = (schedule.cosine(point, points, first, last) for point in range(points))
    return math.exp(steps / points * sum(math.log(max(decay, 1e-9)) for decay in decays))


def teacher_too_fast(cfg: RunConfig, facts: Facts) -> str | None:
    """A teacher that is hardly another network than the student."""
    first, _ = cfg.engine.ema_decay
    if not cfg.method.has_teacher or first >= 0.9:
        return None
    return (
        f"engine.ema_decay starts at {first:g}: the teacher is nearly the student, which invites "
        "collapse: 0.99 to 0.9995"
    )


def teacher_falls(cfg: RunConfig, facts: Facts) -> str | None:
    """First and last decay in the wrong order."""
    first, last = cfg.engine.ema_decay
    if not cfg.method.has_teacher or first <= last:
        return None
    return (
        f"engine.ema_decay=[{first:g}, {last:g}] falls, so the teacher becomes less steady towards "
        f"the end: [{last:g}, {first:g}]?"
    )


def unused_key(cfg: RunConfig, facts: Facts) -> str | None:
    """A key that was changed although nothing reads it."""
    optim, default = cfg.optim, OptimConfig(base_lr=cfg.optim.base_lr)
    readers = {"momentum": {"sgd", "lars"}, "betas": {"adamw"}, "trust": {"lars"}}
    for key, names in (readers | {"trust_clip": {"lars"}}).items():
        if getattr(optim, key) != getattr(default, key) and optim.name not in names:
            return f"optim.{key} is changed, but {optim.name} does not read it: remove it"
    if cfg.engine.ema_decay != EngineConfig().ema_decay and not cfg.method.has_teacher:
        return f"engine.ema_decay is changed, but {cfg.method.name} has no teacher: remove it"
    return None


RULES = (
    Rule("learning_rate", learning_rate, "solo-learn's README: rates re-scaled twice by mistake"),
    Rule("warm_up", warm_up, "Goyal et al., arXiv 1706.02677, section 2.2"),
    Rule("warm_up_too_long", warm_up_too_long, "the schedule itself: vssl_dist/schedule.py"),
    Rule("max_steps", max_steps, "solo-learn#286: a schedule over after a few epochs"),
    Rule("norm_and_bias_decay", norm_and_bias_decay, "VISSL PR 230, mmselfsup#644"),
    Rule("weight_decay", weight_decay, "Loshchilov & Hutter, arXiv 1711.05101"),
    Rule(
        "small_batch",
        small_batch,
        "SimCLR 62.7 % at a batch of 256, 66.9 % at 4,096: mmselfsup's model zoo, 200 epochs",
    ),
    Rule("accumulate", accumulate, "Gao et al., arXiv 2101.06983, section 1"),
    Rule("teacher_start", teacher_start, "the product of the decays; solo-learn#286"),
    Rule("teacher_too_fast", teacher_too_fast, "BYOL, arXiv 2006.07733: its ablation of the decay"),
    Rule("teacher_falls", teacher_falls, "BYOL, arXiv 2006.07733, section 3.3: the decay rises"),
    Rule("unused_key", unused_key, "what nothing reads changes nothing: vssl_dist/optim.py"),
)
