"""Save and load weights so that every supported version of transformers computes the same numbers with them.

Two things in a file of an ESM model differ between versions: the names of LayerNorm's weights, and where the rotary
frequencies are. A checkpoint's frequencies are often rounded, and a version that does not find them under the names
that it knows computes with exact ones.
"""

from __future__ import annotations

import copy
import itertools
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from esm_efficient import compat

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

_FREQUENCIES = "rotary_embeddings.inv_freq"
_LAYER_PATH = "encoder.layer.{}.attention.self."


@contextmanager
def portable_saving(model: PreTrainedModel) -> Iterator[None]:
    """Make ``model.save_pretrained`` write names, in a ``with`` block, that every supported version reads.

    - LayerNorm's weights get the names of their modules. transformers 5 would write the legacy names ``gamma`` and
      ``beta`` if the model was built from a config, or loaded from a file with such names. ``from_pretrained`` reads
      them. A Trainer that resumes does not: it only warns, and keeps the LayerNorm weights that the model had.
    - Rotary frequencies are written once per layer, as versions before 5.23 name them. Later versions read them too.

    Args:
        model: a transformers model, not a wrapper of one.

    Example:
        >>> with portable_saving(model):  # doctest: +SKIP
        ...     model.save_pretrained("membrane")
    """
    save = model.save_pretrained

    def save_portably(folder: Any, *, state_dict: Mapping[str, Tensor] | None = None, **options: Any) -> Any:
        weights = _repeat_frequencies(model.state_dict() if state_dict is None else state_dict, model.config)
        return save(folder, state_dict=weights, save_original_format=False, **options)

    patched: Any = model
    patched.save_pretrained = save_portably
    try:
        yield
    finally:
        del patched.save_pretrained


def save_base_config(model: PeftModel, folder: Path) -> None:
    """Save the config of an adapter's base model, with the class of this model and not of the pretrained one.

    `Predictor.load` reads the kind of head from it.

    Args:
        model: a model with adapters.
        folder: the folder of the config.
    """
    base: Any = model.get_base_model()
    base.config.architectures = [type(base).__name__]
    config = copy.deepcopy(base.config)
    vars(config).pop("quantization_config", None)  # the adapter is for whole weights too
    config.save_pretrained(folder)


def share_weights(folder: Path) -> None:
    """Give the weights in a folder the permissions of the config beside them.

    safetensors 0.8 lets only their owner read them, whatever the umask.
    """
    for config in itertools.islice(folder.glob("*config.json"), 1):
        for weights in folder.glob("*.safetensors"):
            weights.chmod(config.stat().st_mode)


class Loaded(NamedTuple):
    """A model from a checkpoint.

    Attributes:
        model: the model.
        missing: names of the weights that the checkpoint lacks, sorted; they are newly initialised.
        mismatched: names of the weights that have another shape in the checkpoint, sorted; with
            ``ignore_mismatched_sizes=True`` they are newly initialised too.
    """

    model: Any
    missing: list[str]
    mismatched: list[str]


def load_pretrained(auto: Any, name_or_path: Any, **options: Any) -> Loaded:
    """Load a model with the rotary frequencies of its checkpoint, whichever version wrote it.

    transformers' report of missing and unexpected weights is not logged: the caller decides what may be missing.

    Args:
        auto: a model class or an auto class of transformers.
        name_or_path: as ``from_pretrained``.
        **options: as ``from_pretrained``.

    Returns:
        A named tuple: ``model``; ``missing``, the names of the weights that the checkpoint lacks, which are newly
        initialised; and ``mismatched``, those that have another shape there.

    Example:
        >>> from transformers import AutoModelForSequenceClassification
        >>> from esm_efficient.demo import demo_model_path
        >>> load_pretrained(AutoModelForSequenceClassification, demo_model_path()).missing[0]
        'classifier.dense.bias'
    """
    first = _LAYER_PATH.format(0) + _FREQUENCIES
    per_layer = compat.rotates_per_layer()
    if per_layer:
        # transformers 5.23 and later write the frequencies of the model, or those of a layer named "*".
        renamings = {
            rf"(?<!attention\.self\.){re.escape(_FREQUENCIES)}": first,
            r"encoder\.layer\.\*\.": "encoder.layer.0.",
        }
        options = {"key_mapping": renamings} | options
    with _without_report():
        model, info = auto.from_pretrained(name_or_path, output_loading_info=True, **options)
    if per_layer:
        compat.forget_renaming(model, "encoder.layer.0.")
    missing = {name for name in info["missing_keys"] if not name.endswith(_FREQUENCIES)}
    without = set(info["missing_keys"]) - missing
    buffers = dict(model.named_buffers())
    for name in without:
        prefix, found, _ = name.rpartition("encoder.layer.")
        if found and prefix + first not in without:
            buffers[name].copy_(buffers[prefix + first])
    # An entry is a name, or in older versions a name with both shapes.
    mismatched = [entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]]
    return Loaded(model, sorted(missing), sorted(mismatched))


@contextmanager
def without_deprecation() -> Iterator[None]:
    """Keep peft from warning, in a ``with`` block, that it asks transformers 5.23 and later by a deprecated name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers from logging which weights a checkpoint lacks, in a ``with`` block."""

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    log = logging.getLogger("transformers.modeling_utils")
    log.addFilter(is_other)
    try:
        yield
    finally:
        log.removeFilter(is_other)


def _repeat_frequencies(weights: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Return a state dict in which each layer has a copy of the rotary frequencies of the whole model."""
    result = {}
    for name, value in weights.items():
        prefix = name.removesuffix(_FREQUENCIES)
        if prefix == name or prefix.endswith("attention.self."):
            result[name] = value
            continue
        for layer in range(config.num_hidden_layers):
            result[f"{prefix}{_LAYER_PATH.format(layer)}{_FREQUENCIES}"] = value.clone()
    return result
