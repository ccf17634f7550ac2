"""The run configuration: read strictly from YAML, so that a typo dies on the login node."""

from vssl_dist.config.blocks import CheckpointConfig, DataConfig, EngineConfig, OptimConfig
from vssl_dist.config.evaluations import (
    TASKS,
    CollapseConfig,
    Evaluation,
    FinetuneConfig,
    KnnConfig,
    LinearConfig,
    OnlineConfig,
    OodConfig,
    UncertaintyConfig,
    read_task,
)
from vssl_dist.config.fields import MethodConfig, Model
from vssl_dist.config.reading import (
    dump,
    load,
    load_block,
    load_run,
    loads,
    override,
    refuse_no_file,
)
from vssl_dist.config.recipes import RECIPES, Normalisation, ViewRecipe
from vssl_dist.config.schema import RunConfig, frozen_part
from vssl_dist.config.task import TaskConfig

__all__ = [
    "RECIPES",
    "TASKS",
    "CheckpointConfig",
    "CollapseConfig",
    "DataConfig",
    "EngineConfig",
    "Evaluation",
    "FinetuneConfig",
    "KnnConfig",
    "LinearConfig",
    "MethodConfig",
    "Model",
    "Normalisation",
    "OnlineConfig",
    "OodConfig",
    "OptimConfig",
    "RunConfig",
    "TaskConfig",
    "UncertaintyConfig",
    "ViewRecipe",
    "dump",
    "frozen_part",
    "load",
    "load_block",
    "load_run",
    "loads",
    "override",
    "read_task",
    "refuse_no_file",
]
