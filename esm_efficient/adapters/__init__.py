"""Which parameters train: adapters, heads, frozen parts."""

from esm_efficient.adapters.prepare import prepare_model
from esm_efficient.adapters.quantization import quantization_config
from esm_efficient.adapters.registry import PRESETS, ROLES, Architecture, register_architecture
from esm_efficient.adapters.resolve import TargetMatch, TargetReport, lora_config, recipe_adapters, resolve_targets

__all__ = [
    "PRESETS",
    "ROLES",
    "Architecture",
    "TargetMatch",
    "TargetReport",
    "lora_config",
    "prepare_model",
    "quantization_config",
    "recipe_adapters",
    "register_architecture",
    "resolve_targets",
]
