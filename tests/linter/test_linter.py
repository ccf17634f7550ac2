"""Each rule fires on its mistake and on nothing else; our own recipes are free of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from vssl_dist import config
from vssl_dist.config import RunConfig
from vssl_dist.errors import ConfigError
from vssl_dist.linter import RULES, Facts, lint
from vssl_dist.linter.__main__ import table
from vssl_dist.linter.rule import is_vit
from vssl_dist.methods import CONFIGS, build_method

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SAMPLES = {
    "cifar10": 50_000,
    "cifar100": 50_000,
    "stl10": 105_000,
    "in100": 126_689,
    "in1k": 1_281_167,
    "quickstart": 6_400,
}
MORE = {"supervised": {"classes": 10}}
"""What a method's block cannot do without."""
BY_NAME = {rule.name: rule for rule in RULES}


def read(name: str, *overrides: str) -> RunConfig:
    path = Path(__file__).parents[2] / "configs" / f"{name}.yaml"
    return config.load(path, overrides, methods=CONFIGS)


def facts_of(name: str, ranks: int = 2) -> Facts:
    return Facts(ranks, SAMPLES.get(name.split("_")[0]))


def fired(cfg: RunConfig, facts: Facts) -> list[str]:
    return [finding.rule.name for finding in lint(cfg, facts)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_recipe_of_ours_is_warned_about(path: Path) -> None:
    cfg = config.load(path, methods=CONFIGS)
    for ranks in {1, 2, 8 if cfg.data.streams % 8 == 0 else 1, cfg.data.streams}:
        assert fired(cfg, facts_of(path.stem, ranks)) == []
    assert fired(cfg, Facts()) == []


BYOL = ["method={name: byol}", "data.views=[cifar, cifar_byol_2]"]
MISTAKES = [
    # Rates: SGD's in AdamW, AdamW's in SGD, one that was multiplied by the batch already.
    ("learning_rate", "cifar10_vje", ["optim.base_lr=0.05"]),
    ("learning_rate", "cifar10_simsiam", ["optim.base_lr=1e-3"]),
    ("learning_rate", "in1k_byol", ["optim.base_lr=3.2"]),
    ("warm_up", "in1k_moco_v3", ["optim.warmup_epochs=0"]),
    ("warm_up", "in1k_vje", ["optim.warmup_epochs=0"]),
    ("warm_up", "in1k_dino", ["optim.warmup_epochs=0.1"]),
    ("warm_up_too_long", "cifar10_byol", ["optim.epochs=15"]),
    ("max_steps", "cifar10_simsiam", ["optim.max_steps=500"]),
    ("norm_and_bias_decay", "in1k_byol", ["optim.decay_norm_and_bias=true"]),
    ("norm_and_bias_decay", "in1k_dino", ["optim.decay_norm_and_bias=true"]),
    ("weight_decay", "cifar10_byol", ["optim.weight_decay=0.05"]),
    ("small_batch", "cifar10_simclr", ["optim.global_batch=64"]),
    ("small_batch", "cifar10_simsiam", ["optim.global_batch=16"]),
    ("small_batch", "cifar10_byol", ["optim.global_batch=128", "optim.accumulate=8"]),
    ("accumulate", "in1k_barlow_twins", ["optim.accumulate=4"]),
    ("teacher_start", "quickstart", [*BYOL, "engine.ema_decay=[0.996, 1.0]"]),
    ("teacher_start", "cifar10_dino", ["engine.ema_decay=[1.0, 1.0]"]),
    ("teacher_start", "quickstart", ["method.target=ema", "engine.ema_decay=[0.99, 1.0]"]),
    ("teacher_too_fast", "cifar10_byol", ["engine.ema_decay=[0.5, 1.0]"]),
    ("teacher_falls", "cifar10_moco_v3", ["engine.ema_decay=[1.0, 0.99]"]),
    ("unused_key", "cifar10_simsiam", ["engine.ema_decay=[0.996, 1.0]"]),
    ("unused_key", "cifar10_simsiam", ["optim.trust=0.02"]),
    ("unused_key", "cifar10_vje", ["optim.momentum=0.95"]),
    ("unused_key", "cifar10_byol", ["optim.betas=[0.9, 0.95]"]),
    ("temperature", "cifar10_simclr", ["method.temperature=1.0"]),
    ("temperature", "in1k_moco_v3", ["method.temperature=0.01"]),
    ("temperature", "in1k_moco_v3_vit_s", ["method.temperature=1.0"]),
    ("dino_temperature", "in1k_dino", ["method.teacher_temperature=[0.04, 0.2]"]),
    ("dino_schedule", "cifar10_dino", ["method.freeze_epochs=1000"]),
    ("dino_schedule", "cifar10_dino", ["method.teacher_warmup_epochs=2000"]),
    ("dino_clip", "in1k_dino", ["optim.clip=0"]),
    ("moco_v3_vit", "in1k_moco_v3_vit_s", ["method.freeze_patches=false"]),
    ("barlow_scale", "cifar10_barlow_twins", ["method.scale_loss=1"]),
    ("narrow_projector", "cifar10_barlow_twins", ["method.dim=128"]),
    ("narrow_projector", "in1k_vicreg", ["method.dim=256"]),
    ("dino_centre", "in1k_dino", ["method.centre_decay=1"]),
    ("vicreg_variance", "cifar10_vicreg", ["method.variance_weight=0"]),
    ("vje_beta", "cifar10_vje", ["method.beta=0.01"]),
    ("vje_beta", "cifar10_vje", ["method.kl_reduce=mean"]),
    ("vje_beta_warm_up", "cifar10_vje", ["method.beta_warmup_epochs=1000"]),
    ("vje_gaussian", "cifar10_vje", ["method.dof=inf"]),
    ("vje_rate", "cifar10_vje", ["optim.name=sgd", "optim.base_lr=0.05"]),
    ("vje_zero_init", "cifar10_vje", ["method.zero_init_residual=true"]),
    (
        "vssl_variance",
        "cifar10_vssl",
        ["method.preset=vssl_derived_gauss", "method.variance_weight=0"],
    ),
    ("vssl_predictor", "cifar10_vssl", ["method.predictor=false"]),
    ("normalisation", "cifar10_vje", ["data.normalise={}"]),
    ("normalisation", "cifar100_vje", ["data.normalise={mean: [0, 0, 0], std: [1, 1, 1]}"]),
    ("normalisation", "in1k_vje", ["data.normalise={mean: [123, 116, 103], std: [58, 57, 57]}"]),
    ("image_size", "cifar10_byol", ["data.image_size=96"]),
    ("symmetric_views", "in1k_byol", ["data.views=[byol_1, byol_1]"]),
    ("symmetric_views", "cifar10_moco_v3", ["data.views=[cifar, cifar]"]),
    ("blur_missing", "in1k_simclr", ["data.views=[cifar_simclr, cifar_simclr]"]),
    ("blur_small", "cifar10_simclr", ["data.views=[simclr, simclr]"]),
    ("whole_crops", "in1k_vje", ["data.views=[{crop_scale: [0.8, 1], count: 2}]"]),
    ("same_colours", "in1k_vje", ["data.views=[{jitter: 0, grayscale: 0, count: 2}]"]),
    (
        "dino_crops",
        "in1k_dino",
        [
            "data.views=[{recipe: dino_local, size: null, count: 2}, "
            "{recipe: dino_global_1, size: 96, count: 8}]"
        ],
    ),
    (
        "held_out",
        "cifar10_vje",
        ["data.val=data/cifar10/train", "evaluations=[{task: collapse}]"],
    ),
    ("knn_vote", "cifar10_vje", ["evaluations.0.temperature=[0.07]"]),
    ("knn_vote", "cifar10_vje", ["evaluations.0.temperature=[inf]"]),
    ("no_evaluations", "cifar10_vje", ["evaluations=[]"]),
    ("no_checkpoints", "cifar10_vje", ["checkpoint.every_minutes=null"]),
    ("window", "cifar10_vje", ["data.window=16"]),
]


@pytest.mark.parametrize(("rule", "recipe", "mistake"), MISTAKES)
def test_a_rule_fires_on_its_mistake_and_no_other_does(
    rule: str, recipe: str, mistake: list[str]
) -> None:
    facts = facts_of(recipe)
    assert fired(read(recipe), facts) == []
    wrong = read(recipe, *mistake)
    assert fired(wrong, facts) == [rule]
    assert fired(wrong.model_copy(update={"silence": (rule,)}), facts) == []
    (finding,) = lint(wrong, facts)
    assert "\n" not in finding.line()
    assert finding.line().startswith(f"{rule}: ")
    assert finding.line().endswith(f"[{BY_NAME[rule].evidence}; silence=[{rule}] hides this]")


def test_streams_that_only_one_number_of_ranks_can_share_are_told() -> None:
    cfg = read("cifar10_vje", "data.streams=3", "optim.global_batch=192")
    assert fired(cfg, facts_of("cifar10", ranks=3)) == ["streams"]
    assert fired(cfg, facts_of("cifar10", ranks=1)) == ["streams"]
    assert fired(read("cifar10_vje", "data.streams=8"), facts_of("cifar10", ranks=8)) == []


def test_the_same_shards_under_two_paths_are_told() -> None:
    facts = facts_of("cifar10")._replace(held_out_is_train=True)
    assert fired(read("cifar10_vje", "evaluations=[{task: collapse}]"), facts) == ["held_out"]


def test_accuracies_of_a_single_class_are_told_and_what_can_tell_something_is_not() -> None:
    facts = facts_of("cifar10")._replace(classes=1)
    assert fired(read("cifar10_vje"), facts) == ["one_class"]
    assert fired(read("cifar10_vje", "evaluations=[{task: collapse}]"), facts) == []
    assert fired(read("cifar10_vje"), facts._replace(classes=2)) == []


def test_what_became_a_refusal_may_still_be_silenced_by_older_configs() -> None:
    cfg = read("cifar10_vje", "silence=[strangers, unlabelled_bank]")
    assert fired(cfg, facts_of("cifar10")) == []


@pytest.mark.parametrize("name", CONFIGS)
def test_a_method_has_a_teacher_if_its_config_says_so(name: str) -> None:
    targets = ("symmetric", "ema") if name == "vje" else (None,)
    for target in targets:
        cfg = CONFIGS[name].model_validate({"backbone": "resnet10_c16"} | MORE.get(name, {}))
        if target:
            cfg = cfg.model_copy(update={"target": target})
        with torch.device("meta"):
            method = build_method(cfg, 32)
        assert (method.teacher is not None) == cfg.has_teacher


@pytest.mark.parametrize(
    ("backbone", "wanted"),
    [("deit_tiny_patch16_224", True), ("beit_base_patch16_224", True), ("mobilevit_s", False),
     ("eva02_tiny_patch14_224", True), ("maxvit_tiny_tf_224", False), ("resnet50", False),
     ("vit_small_r26_s32_224", True), ("timm:resnet50", False), ("swin_tiny_patch4_window7_224",
     False)],
)  # fmt: skip
def test_a_vision_transformer_is_known_by_what_it_is_made_of(backbone: str, wanted: bool) -> None:
    assert is_vit(read("in1k_vje", f"method.backbone={backbone}")) == wanted


def test_the_shards_own_name_counts_more_than_that_of_their_folder() -> None:
    cfg = read("cifar10_vje", "data.train=data/mine/train")
    assert fired(cfg, facts_of("cifar10")._replace(dataset="cifar10")) == []
    assert fired(cfg, facts_of("cifar10")._replace(dataset="imagenet")) == ["normalisation"]
    assert fired(read("cifar10_vje"), facts_of("cifar10")._replace(dataset="photos")) == []
    foreign = read("cifar10_vje", "data.normalise={}")
    for anything in ("webdataset", "imagefolder"):
        assert fired(foreign, Facts(dataset=anything)) == ["normalisation"]


def on_gpus(nodes: int, per_node: int = 8) -> Facts:
    return Facts(nodes * per_node, gpus_per_node=per_node)


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.stem.startswith("in1k_")], ids=lambda path: path.stem
)
def test_the_command_in_the_head_of_each_imagenet_config_fills_its_gpus(path: Path) -> None:
    cfg = config.load(path, methods=CONFIGS)
    command = re.search(r"--nodes (\d+) configs/(\w+)\.yaml  \((\d+) ranks, (\d+) images each\)",
                        path.read_text())  # fmt: skip
    assert command is not None
    nodes, name, ranks, images = command.groups()
    assert (name, int(ranks)) == (path.stem, 8 * int(nodes))
    assert cfg.micro_batch(int(ranks)) == int(images)
    assert "images_per_gpu" not in fired(cfg, on_gpus(int(nodes)))
    assert "images_per_gpu" in fired(cfg, on_gpus(2 * int(nodes)))


@pytest.mark.parametrize(
    ("name", "overrides", "facts", "remedy"),
    [
        ("in1k_simsiam", [], on_gpus(8), "8 images per GPU and pass .* --nodes 1 gives them 64,"),
        ("in1k_vicreg", [], on_gpus(8), "--nodes 4 gives them 64,"),
        ("in1k_vje", ["optim.accumulate=2"], on_gpus(8), "--nodes 4 gives them 64,"),
        ("in100_byol", [], on_gpus(1), "4 GPUs of one node would have 64,"),
        ("cifar10_simsiam", ["optim.global_batch=64"], on_gpus(1), "1 GPU of one node"),
        ("cifar10_simsiam", ["optim.global_batch=32"], on_gpus(1), ": use a larger batch"),
    ],
)
def test_too_few_images_per_gpu_names_the_size_that_fits(
    name: str, overrides: list[str], facts: Facts, remedy: str
) -> None:
    (finding,) = [f for f in lint(read(name, *overrides), facts) if f.rule.name == "images_per_gpu"]
    assert re.search(remedy, finding.message)


def test_one_gpu_and_cpus_may_have_as_few_images_as_they_like() -> None:
    cfg = read("in1k_simsiam")
    assert "images_per_gpu" not in fired(cfg, Facts(64))
    assert "images_per_gpu" not in fired(read("quickstart"), on_gpus(1, per_node=1))


def test_every_rule_has_a_mistake_here() -> None:
    assert {rule for rule, _, _ in MISTAKES} | {"streams", "one_class", "images_per_gpu"} == set(BY_NAME)
    assert len(BY_NAME) == len(RULES)


def test_what_is_not_known_is_not_guessed() -> None:
    cfg = read("quickstart", "method.target=ema", "optim.max_steps=99")
    assert fired(cfg, Facts()) == []
    assert fired(cfg, facts_of("quickstart")) == ["max_steps", "teacher_start"]


def test_silencing_what_does_not_exist_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=re.escape("(did you mean 'warm_up'?)")):
        lint(read("cifar10_vje", "silence=[warmup]"), Facts())


def test_the_teachers_share_of_its_start_is_the_product_of_its_decays() -> None:
    from vssl_dist.schedule import cosine

    steps = 450
    left = 1.0
    for step in range(steps):
        left *= cosine(step, steps, 0.99, 1.0)
    (finding,) = lint(read("quickstart", "method.target=ema"), facts_of("quickstart"))
    assert f"leaves {left:.0%} of the teacher" in finding.message
    fitting = float(re.findall(r"start at ([\d.]+)", finding.message)[0])
    again = read("quickstart", "method.target=ema", f"engine.ema_decay=[{fitting - 0.001}, 1.0]")
    assert fired(again, facts_of("quickstart")) == []


def test_the_published_list_of_rules_is_this_one() -> None:
    page = (Path(__file__).parents[2] / "docs" / "linter.md").read_text()
    assert table() in page, "python -m vssl_dist.linter prints what belongs into docs/linter.md"
