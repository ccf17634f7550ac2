"""The run configuration: read strictly from YAML, so that a typo dies on the login node."""

from vssl_dist.config.fields import MethodConfig, Model
from vssl_dist.config.reading import ConfigError, dump, load, load_block, loads
from vssl_dist.config.recipes import RECIPES, Normalisation, ViewRecipe
from vssl_dist.config.schema import (
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    KnnConfig,
    OptimConfig,
    RunConfig,
    frozen_part,
)

__all__ = [
    "RECIPES",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "EngineConfig",
    "KnnConfig",
    "MethodConfig",
    "Model",
    "Normalisation",
    "OptimConfig",
    "RunConfig",
    "ViewRecipe",
    "dump",
    "frozen_part",
    "load",
    "load_block",
    "loads",
]
