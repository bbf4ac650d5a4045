"""The inputs of `estimate`: the config of a model, and the tokens of its sequences."""

from __future__ import annotations

import copy
import json
import math
import numbers
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np

from esm_efficient.data.sequences import clean, count_residues
from esm_efficient.errors import ConfigurationError
from esm_efficient.published import BASE_CONFIG, ESM2_SIZES, available, hub_name, size_of
from esm_efficient.tasks import MAX_TOKENS, SPECIAL_TOKENS, Head, Pooling, base_model_of, head_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def resolve_config(
    model: str | Path | PreTrainedConfig | PreTrainedModel, *, keep_layers: int | None = None
) -> tuple[str, PreTrainedConfig]:
    """Return the name and the config of a model; the six ESM-2 sizes need no file and no network.

    Args:
        model: as in `estimate`.
        keep_layers: number of the lowest layers that are kept; None for all.

    Raises:
        ConfigurationError: no size and no folder has this name, the config of a model id cannot be loaded, an adapter
            does not name its base model, or there are fewer layers than are to be kept.

    Example:
        >>> resolve_config("facebook/esm2_t12_35M_UR50D")[1].hidden_size
        480
    """
    name, config = _resolve(model)
    return name, config if keep_layers is None else _shortened(config, keep_layers)


def _resolve(model: Any) -> tuple[str, PreTrainedConfig]:
    from transformers import PreTrainedConfig, PreTrainedModel

    model = getattr(model, "get_base_model", lambda: model)()
    if isinstance(model, PreTrainedModel):
        return type(model).__name__, model.config
    if isinstance(model, PreTrainedConfig):
        return type(model).__name__, model
    if not isinstance(model, str | Path):
        raise ConfigurationError(
            f"model is a {type(model).__name__}, which has no config of transformers: expected a size, a folder, a "
            "model id, or a config or a model of transformers"
        )
    path = Path(hub_name("demo") if model == "demo" else model)
    name = "demo" if model == "demo" else path.resolve().name
    for folder in (path, path / BASE_CONFIG):  # of an adapter, the config of its base is beside it
        if (folder / "config.json").is_file():
            return name, _load_config(folder)
    if (path / "adapter_config.json").is_file():
        base = _base_of(path)
        if (Path(base) / "adapter_config.json").is_file() and not (Path(base) / "config.json").is_file():
            raise ConfigurationError(f"the base model of the adapter {path} is {base}, an adapter too")
        return name, _resolve(base)[1]
    size = size_of(str(model))
    if size is None and re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        with available(model):
            return str(model), _load_config(model)
    if size is None:
        raise ConfigurationError(
            f"model={str(model)!r}: expected a folder with a config.json, a model id, or one of the ESM-2 sizes "
            f"{', '.join(ESM2_SIZES)}"
        )
    return f"ESM-2 {size}", _esm2_config(*ESM2_SIZES[size])


def _load_config(source: str | Path) -> PreTrainedConfig:
    """Return the config of a folder or of a Hub name.

    Raises:
        ConfigurationError: it is damaged, or of an architecture that transformers does not know.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _unread(source, error) from error
    except OSError as error:
        if not Path(source).is_dir():  # the Hub does not give it
            raise
        raise _unread(source, error) from error


def _unread(source: str | Path, error: Exception) -> ConfigurationError:
    reason = str(error).split("\n")[0]
    return ConfigurationError(f"the config of {str(source)!r} could not be loaded: {reason}")


def _base_of(folder: Path) -> str:
    """Return the name of the base model of an adapter that peft saved."""
    file = folder / "adapter_config.json"
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ConfigurationError(f"{file} is not a JSON object: {error}") from error
    if not base or not isinstance(base, str) or Path(base).resolve() == folder.resolve():
        raise ConfigurationError(f"{file} has base_model_name_or_path={base!r}: expected the base model; estimate that")
    return str(base)


def _shortened(config: PreTrainedConfig, kept: int) -> PreTrainedConfig:
    """Return the config of a model's lowest layers."""
    count = config.num_hidden_layers
    if kept > count:
        raise ConfigurationError(f"keep_layers={kept}: expected 1 to {count} layers to keep")
    shorter = copy.deepcopy(config)
    shorter.num_hidden_layers = kept
    return shorter


def resolve_head(model: Any, head: Head | None, num_labels: int | None) -> tuple[Head, int, Pooling | None]:
    """Return the kind of head and the number of labels to estimate: what is given, or what a model object has.

    The third value is what the head of a model object reads; None without such an object.

    Args:
        model: as in `estimate`.
        head: as in `estimate`.
        num_labels: as in `estimate`.

    Raises:
        ConfigurationError: no head is given, and the model object has an unknown one or none.
    """
    from transformers import PreTrainedModel

    from esm_efficient.heads import pooling_of_model

    base = base_model_of(model)
    own: tuple[Head | None, Any, Pooling | None] = ("sequence-classification", 2, None)
    if isinstance(base, PreTrainedModel):
        kind = head_of(base)
        own = kind, base.config.num_labels, pooling_of_model(base) if kind == "sequence-classification" else None
    chosen = head or own[0]
    if chosen is None:
        raise ConfigurationError(
            f"{type(base).__name__} has no head that can be estimated: give head=, one of {', '.join(get_args(Head))}"
        )
    return chosen, own[1] if num_labels is None else num_labels, own[2]


def _esm2_config(layers: int, width: int, heads: int) -> PreTrainedConfig:
    from transformers import EsmConfig

    return EsmConfig(
        vocab_size=33,
        mask_token_id=32,
        pad_token_id=1,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=1026,
        layer_norm_eps=1e-5,
        position_embedding_type="rotary",
        emb_layer_norm_before=False,
        token_dropout=True,
    )


_UNREADABLE = (
    "tokens: got {}: expected a whole number, many of them, or a dataset, such as load_sequences returns for a file"
)

DEFAULT_SEQUENCES = 15_876
"""Sequences of a data set that is known only by the tokens of a sequence: the proteins of DeepLoc-2.0 with 100 to 512
residues."""


@dataclass(frozen=True)
class DataLengths:
    """The lengths of the sequences of a run.

    Attributes:
        train: tokens of one training sequence, or of many.
        sequences: number of training sequences.
        validation: tokens of each validation sequence.
        is_assumed: whether nobody gave the number of training sequences, so that it is `DEFAULT_SEQUENCES`.
    """

    train: int | list[int]
    sequences: int
    validation: tuple[int, ...] = ()
    is_assumed: bool = False

    def total(self, figure: Callable[[np.ndarray], np.ndarray]) -> float:
        """Sum a figure that depends on a sequence's tokens over the sequences of both splits."""
        trained = np.atleast_1d(self.train)
        total = figure(trained).sum() * (self.sequences / len(trained))
        return float(total + figure(np.array(self.validation, dtype=np.int64)).sum())


def data_lengths(tokens: Any, sequences: int | None = None, *, max_tokens: int = MAX_TOKENS) -> DataLengths:
    """Return the lengths of a run's sequences.

    Args:
        tokens: as in `token_lengths`. Of a DatasetDict the split ``validation`` is read too.
        sequences: number of training sequences. None for that of `tokens`, or `DEFAULT_SEQUENCES` if `tokens` is one
            number.
        max_tokens: as in `token_lengths`.

    Raises:
        ConfigurationError: as `token_lengths`, or `sequences` is below 1.
    """
    if isinstance(tokens, DataLengths):
        return tokens
    if sequences is not None and sequences < 1:
        raise ConfigurationError(f"sequences={sequences}: expected at least 1 training sequence")
    train = token_lengths(tokens, max_tokens=max_tokens)
    validation: Any = ()
    if isinstance(tokens, dict) and "validation" in tokens:
        try:
            validation = np.atleast_1d(token_lengths(tokens["validation"], max_tokens=max_tokens)).tolist()
        except ConfigurationError as error:
            raise ConfigurationError(f"the split validation: {error}") from error
    count = DEFAULT_SEQUENCES if isinstance(train, int) else len(train)
    is_assumed = sequences is None and isinstance(train, int)
    return DataLengths(train, sequences or count, tuple(validation), is_assumed)


def token_lengths(tokens: Any, *, max_tokens: int = MAX_TOKENS) -> int | list[int]:
    """Return the tokens of one sequence or of many, special tokens included.

    Args:
        tokens: a number; many numbers; or a dataset with one of the columns ``tokens``, ``input_ids``, ``residues`` or
            ``sequence``. Two special tokens are added to residues. In a DatasetDict the split ``train`` is read.
        max_tokens: the most tokens that `finetune` reads of a sequence; numbers and token ids stay as they are.

    Raises:
        ConfigurationError: there is no sequence, the dataset has none of these columns or a row without a value, a
            DatasetDict has no split ``train``, or `tokens` is anything else.

    Example:
        >>> token_lengths(512), token_lengths([100, 200])
        (512, [100, 200])
    """
    if isinstance(tokens, numbers.Integral):
        return int(tokens)
    if isinstance(tokens, str | Path | numbers.Number):
        raise ConfigurationError(_UNREADABLE.format(tokens))
    if isinstance(tokens, dict) and "train" not in tokens:
        raise ConfigurationError(f"tokens: got the splits {', '.join(map(str, tokens))}: expected a split train")
    data = tokens["train"] if isinstance(tokens, dict) else tokens
    columns = getattr(data, "column_names", None)
    if columns is None:
        try:
            lengths = [int(n) for n in data]
        except (TypeError, ValueError) as error:
            raise ConfigurationError(_UNREADABLE.format(f"a {type(data).__name__}")) from error
    else:
        lengths = _lengths_of(data, columns, max_tokens)
    if not lengths:
        raise ConfigurationError("tokens: got no sequence; expected at least one")
    return lengths


def _lengths_of(data: Any, columns: Sequence[str], max_tokens: int) -> list[int]:
    """Return the tokens of the sequences of a dataset, by the first known column."""
    known: dict[str, tuple[str, Callable[[Any], int]]] = {
        "tokens": ("a number", int),
        "input_ids": ("a list of token ids", len),
        "residues": ("a number", lambda n: min(int(n) + SPECIAL_TOKENS, max_tokens)),
        "sequence": ("a text", lambda text: min(count_residues(clean(text)) + SPECIAL_TOKENS, max_tokens)),
    }
    column = next((name for name in known if name in columns), None)
    if column is None:
        raise ConfigurationError(
            f"the dataset has the columns {', '.join(columns)}: expected one of {', '.join(known)}. Rename a column of "
            "lengths to tokens or to residues"
        )
    expected, measure = known[column]
    lengths = []
    for row, value in enumerate(data[column]):
        try:
            lengths.append(measure(value))
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"row {row} of the column {column!r} is {value!r:.60}: expected {expected}"
            ) from error
    return lengths


class BatchTokens(NamedTuple):
    """Tokens per sequence in micro-batches, padding included.

    Attributes:
        longest: tokens per sequence in the micro-batch of the longest sequences.
        average: mean tokens per sequence over random micro-batches.
        residues: mean residues per sequence, without padding.
    """

    longest: int
    average: int
    residues: float


def batch_lengths(lengths: Sequence[int], micro_batch: int, padding: str) -> BatchTokens:
    """Return the tokens per sequence of the largest and of the average micro-batch, from the tokens of all sequences.

    A padded sequence takes as many tokens as the longest one in its micro-batch.
    """
    ordered = np.sort(np.asarray(lengths))[::-1]
    residues = float(np.mean(np.maximum(ordered - SPECIAL_TOKENS, 0)))
    if padding == "padding-free":
        return BatchTokens(math.ceil(ordered[:micro_batch].mean()), round(ordered.mean()), residues)
    drawn = np.random.default_rng(0).choice(ordered, size=(1000, micro_batch))
    return BatchTokens(int(ordered[0]), round(drawn.max(axis=1).mean()), residues)
