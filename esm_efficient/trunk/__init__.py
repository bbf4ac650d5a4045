"""The frozen part of an encoder, computed once: split a model, cache the states, cut layers off."""

from esm_efficient.trunk.cache import cache_states
from esm_efficient.trunk.folders import delete_states, list_states
from esm_efficient.trunk.split import join_model, split_model, truncate
from esm_efficient.trunk.states import StatesCollator

__all__ = ["StatesCollator", "cache_states", "delete_states", "join_model", "list_states", "split_model", "truncate"]
