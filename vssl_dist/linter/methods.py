"""Mistakes in a method's own keys."""

from __future__ import annotations

from vssl_dist.config import RunConfig
from vssl_dist.linter.rule import Facts, Rule, is_vit
from vssl_dist.methods.barlow_twins import BarlowTwinsConfig
from vssl_dist.methods.dino import DINOConfig
from vssl_dist.methods.moco_v3 import MoCoV3Config
from vssl_dist.methods.simclr import SimCLRConfig
from vssl_dist.methods.vicreg import VICRegConfig
from vssl_dist.methods.vje import VJEConfig
from vssl_dist.methods.vssl import VSSLConfig

_WIDE = 1024
_GAUSSIAN = 100
"""Degrees of freedom from which a Student-t is as good as its limit."""


def temperature(cfg: RunConfig, facts: Facts) -> str | None:
    """A softmax that is flat, or knows only the hardest negative."""
    method = cfg.method
    if not isinstance(method, (SimCLRConfig, MoCoV3Config)):
        return None
    # MoCo v3's code has 1.0 for ResNet-50; its sum is scaled by 2T.
    high = 1.0 if isinstance(method, MoCoV3Config) and not is_vit(cfg) else 0.5
    if 0.05 <= method.temperature <= high:
        return None
    return (
        f"method.temperature={method.temperature:g} is outside 0.05 to {high:g}: "
        "SimCLR has 0.1, MoCo v3 0.2 for a ViT"
    )


def dino_temperature(cfg: RunConfig, facts: Facts) -> str | None:
    """A teacher that does not sharpen."""
    method = cfg.method
    if not isinstance(method, DINOConfig):
        return None
    hottest = max(method.teacher_temperature)
    if hottest < method.student_temperature:
        return None
    return (
        f"method.teacher_temperature reaches {hottest:g}, not below the student's "
        f"{method.student_temperature:g}: without sharpening all outputs become uniform; 0.04 to "
        "0.07 beside 0.1"
    )


def dino_schedule(cfg: RunConfig, facts: Facts) -> str | None:
    """DINO's own schedules, in epochs, kept while the run was shortened."""
    method, epochs = cfg.method, cfg.optim.epochs
    if not isinstance(method, DINOConfig):
        return None
    if method.freeze_epochs >= epochs:
        return (
            f"method.freeze_epochs={method.freeze_epochs:g} of {epochs:g} epochs: the prototypes "
            "are never trained; shorten it"
        )
    start, end = method.teacher_temperature
    if start != end and method.teacher_warmup_epochs > epochs:
        return (
            f"method.teacher_warmup_epochs={method.teacher_warmup_epochs:g} of {epochs:g} epochs: "
            f"the teacher's temperature never reaches {end:g}; shorten it"
        )
    return None


def dino_clip(cfg: RunConfig, facts: Facts) -> str | None:
    """DINO with a ViT and unbounded gradients."""
    if cfg.method.name != "dino" or not is_vit(cfg) or cfg.optim.clip:
        return None
    return "optim.clip=0: DINO's gradients through a ViT are clipped everywhere, at 0.3 to 3"


def moco_v3_vit(cfg: RunConfig, facts: Facts) -> str | None:
    """MoCo v3 with a ViT and ResNet's settings."""
    method = cfg.method
    if not isinstance(method, MoCoV3Config) or not is_vit(cfg) or method.freeze_patches:
        return None
    return (
        "method.freeze_patches=false: a ViT under MoCo v3 has sudden dips that its loss hardly "
        "shows: freeze the patch projection (and projector_layers: 3, normalise_prediction: true)"
    )


def barlow_scale(cfg: RunConfig, facts: Facts) -> str | None:
    """The authors' rates with a gradient that theirs divides by the number of processes."""
    method = cfg.method
    if not isinstance(method, BarlowTwinsConfig) or cfg.optim.name == "adamw":
        return None
    if method.scale_loss <= 0.2:
        return None
    return (
        f"method.scale_loss={method.scale_loss:g} with {cfg.optim.name}: known rates belong to a "
        "smaller gradient (the authors' code divides it by its processes and gives biases 0.0048, "
        "solo-learn multiplies by 0.1): 0.1 or less"
    )


def narrow_projector(cfg: RunConfig, facts: Facts) -> str | None:
    """Too few features for losses that live on them."""
    method = cfg.method
    if not isinstance(method, (BarlowTwinsConfig, VICRegConfig)) or method.dim >= _WIDE:
        return None
    return (
        f"method.dim={method.dim}: {method.name} compares features and gains up to thousands of "
        f"them: {_WIDE} at least, 2048 for small images, 8192 for ImageNet"
    )


def dino_centre(cfg: RunConfig, facts: Facts) -> str | None:
    """A centre that does not follow the teacher."""
    method = cfg.method
    if not isinstance(method, DINOConfig) or method.centre_decay <= 0.995:
        return None
    return (
        f"method.centre_decay={method.centre_decay:g}: the centre lags behind the teacher, and one "
        "prototype wins everywhere: 0.9 to 0.99"
    )


def vicreg_variance(cfg: RunConfig, facts: Facts) -> str | None:
    """VICReg without what keeps it from collapsing."""
    method = cfg.method
    if not isinstance(method, VICRegConfig) or method.variance_weight:
        return None
    return "method.variance_weight=0: nothing keeps the embedding from one point: 25"


def vje_beta(cfg: RunConfig, facts: Facts) -> str | None:
    """A KL divergence too light to keep the variances from shrinking."""
    method = cfg.method
    if not isinstance(method, VJEConfig):
        return None
    if method.kl_reduce == "mean" and method.beta <= 10:
        return (
            f"method.kl_reduce=mean divides beta={method.beta:g} by the embedding's width: the "
            "variances shrink and the embedding degenerates; use sum"
        )
    if method.beta >= 0.1:
        return None
    return (
        f"method.beta={method.beta:g} lets the posterior's variances shrink and the embedding "
        "degenerate: stay near 1"
    )


def vje_beta_warm_up(cfg: RunConfig, facts: Facts) -> str | None:
    """A KL divergence that never gets its weight."""
    method, epochs = cfg.method, cfg.optim.epochs
    if not isinstance(method, VJEConfig) or method.beta_warmup_epochs < epochs:
        return None
    return (
        f"method.beta_warmup_epochs={method.beta_warmup_epochs:g} of {epochs:g} epochs: beta never "
        f"stays at {method.beta:g}; shorten it"
    )


def vje_gaussian(cfg: RunConfig, facts: Facts) -> str | None:
    """VJE in the limit of which its author warns."""
    method = cfg.method
    if not isinstance(method, VJEConfig) or method.dof < _GAUSSIAN:
        return None
    return (
        f"method.dof={method.dof:g} is (nearly) the Gaussian likelihood, of which VJE's author "
        "says that training becomes unstable and fails: 1 to 30"
    )


def vje_rate(cfg: RunConfig, facts: Facts) -> str | None:
    """Another method's SGD, for gradients that are hundreds of times larger."""
    if cfg.method.name != "vje" or cfg.optim.name != "sgd" or cfg.optim.clip:
        return None
    if cfg.optim.base_lr < 1e-2:
        return None
    return (
        f"optim.name=sgd at base_lr={cfg.optim.base_lr:g}: VJE's gradient grows with the width of "
        "the embedding and is hundreds of times SimSiam's; adamw, or optim.clip"
    )


def vje_zero_init(cfg: RunConfig, facts: Facts) -> str | None:
    """Embeddings that start at zero, where they have no direction."""
    method = cfg.method
    if not isinstance(method, VJEConfig) or not method.zero_init_residual:
        return None
    return (
        "method.zero_init_residual=true starts embeddings near zero, where the direction that VJE "
        "explains is noise: false"
    )


def vssl_variance(cfg: RunConfig, facts: Facts) -> str | None:
    """Variances that are rewarded for shrinking without end."""
    method = cfg.method
    if not isinstance(method, VSSLConfig):
        return None
    if method.cosine != "none" or method.variance_weight:
        return None
    return (
        "method.cosine=none without method.variance_weight: the bound grows as variances shrink, "
        "and the loss runs away once they reach their floor: variance_weight=1, or cosine=C1"
    )


def vssl_predictor(cfg: RunConfig, facts: Facts) -> str | None:
    """VSSL without the predictor."""
    method = cfg.method
    if not isinstance(method, VSSLConfig) or method.predictor:
        return None
    return "method.predictor=false: means drift together (spread 0.19 instead of 0.73): true"


_MINE = "short runs of ours on CIFAR-10"
RULES = (
    Rule("temperature", temperature, "SimCLR, arXiv 2002.05709, table 5; MoCo v3's CONFIG.md"),
    Rule("dino_temperature", dino_temperature, "DINO, arXiv 2104.14294, section 5.3"),
    Rule("dino_centre", dino_centre, "DINO, arXiv 2104.14294: its ablation of the centre"),
    Rule("dino_schedule", dino_schedule, "vssl_dist/methods/dino.py: both count in epochs"),
    Rule("dino_clip", dino_clip, "dino#58 (NaN); the default of the authors' main_dino.py is 3.0"),
    Rule("moco_v3_vit", moco_v3_vit, "MoCo v3, arXiv 2104.02057, section 4; its CONFIG.md"),
    Rule("barlow_scale", barlow_scale, "lightly#1977; docs/certificate.md; the authors' main.py"),
    Rule(
        "narrow_projector", narrow_projector, "Barlow Twins, arXiv 2103.03230: its ablation of it"
    ),
    Rule("vicreg_variance", vicreg_variance, "VICReg, arXiv 2105.04906: its ablation of the terms"),
    Rule("vje_beta", vje_beta, f"{_MINE}: k-NN 29.4 % at beta 0.01, 42.7 % at 1"),
    Rule("vje_beta_warm_up", vje_beta_warm_up, "a weight that is never reached is another weight"),
    Rule("vje_gaussian", vje_gaussian, "the first author's public summary of arXiv 2602.05639"),
    Rule("vje_rate", vje_rate, "gradient norms in the thousands at a width of 2,048: ours"),
    Rule("vje_zero_init", vje_zero_init, "vssl_dist/methods/vje.py: polar()"),
    Rule("vssl_variance", vssl_variance, f"{_MINE}: KL per dimension 1,344 at the floor"),
    Rule("vssl_predictor", vssl_predictor, "a synthetic two-view task of ours: k-NN 0.46 for 0.75"),
)
