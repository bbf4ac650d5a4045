"""The frozen part of an encoder, computed once: split a model, cache the states, cut layers off."""

from esm_efficient.trunk.cache import StatesCollator, cache_states
from esm_efficient.trunk.split import join_model, split_model, truncate

__all__ = ["StatesCollator", "cache_states", "join_model", "split_model", "truncate"]
