"""Configuration: what a user sets, as frozen dataclasses, and every check that can be made before anything compiles.

The edge of the program is an ``ml_collections.ConfigDict`` (``configs/*.py`` and ``--config.field=value`` flags);
:func:`from_mapping` turns it into the dataclasses (``model.py``, ``run.py``) and reports an unknown field, a wrong type
or a broken rule with the field's full name, the value, the rule and a way out. Below the edge nobody sees a ConfigDict.
"""

from moejax.config.convert import ConfigError, config_hash, from_mapping, to_dict
from moejax.config.model import AttentionConfig, ModelConfig, MoEConfig, RopeConfig, RouterConfig
from moejax.config.run import (
    DataConfig,
    DomainConfig,
    EvalConfig,
    ExperimentConfig,
    MeshConfig,
    TableConfig,
    TrainConfig,
    WatchConfig,
)

__all__ = [
    "AttentionConfig",
    "ConfigError",
    "DataConfig",
    "DomainConfig",
    "EvalConfig",
    "ExperimentConfig",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "RopeConfig",
    "RouterConfig",
    "TableConfig",
    "TrainConfig",
    "WatchConfig",
    "config_hash",
    "from_mapping",
    "to_dict",
]
