"""Load a fine-tuned model and predict from sequences, in batches almost without padding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from esm_efficient.data.batching import TokenBudgetBatchSampler
from esm_efficient.data.encoding import ResidueEncoder
from esm_efficient.data.sequences import Keep
from esm_efficient.encoder import apply_lean_encoder
from esm_efficient.errors import ConfigurationError, DataError, listing
from esm_efficient.inference.inputs import sequences_from
from esm_efficient.inference.loading import load_model
from esm_efficient.tasks import SPECIAL_TOKENS, Kind, Task, task_of_model

_MAX_TRAINED_TOKENS = 1024
"""Tokens of the longest sequence that ESM-2 was trained on."""

_DEFAULT_THRESHOLD = 0.5
"""The probability from which a label is positive, if the model has no tuned threshold for it."""


@dataclass(frozen=True)
class Prediction:
    """The prediction for one sequence.

    Attributes:
        task: the task of the model.
        values: float64; probabilities of shape (classes,) for one class or several labels per sequence, and of shape
            (residues, classes) for one class per residue; numbers of shape (numbers,) for regression.
        labels: the class with the highest probability, of the sequence or of each residue; with several labels, those
            with a probability of at least their threshold; empty for regression.
    """

    task: Task
    values: np.ndarray
    labels: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return a dict for JSON: ``label`` and ``score`` (its probability), or ``labels``; and the values by name.

        Example:
            >>> task = Task("single_label_classification", ("no", "yes"))
            >>> Prediction(task, np.array([0.25, 0.75]), ("yes",)).to_dict()
            {'label': 'yes', 'score': 0.75, 'probabilities': {'no': 0.25, 'yes': 0.75}}
        """
        if self.task.kind == "token_classification":
            return {"labels": list(self.labels), "scores": self.values.max(axis=1).tolist()}
        named = dict(zip(self.task.names, self.values.tolist(), strict=True))
        if self.task.kind == "regression":
            return {"values": named}
        if self.task.kind == "multi_label_classification":
            return {"labels": list(self.labels), "probabilities": named}
        return {"label": self.labels[0], "score": float(self.values.max()), "probabilities": named}


class Predictor:
    """A fine-tuned model that predicts from sequences.

    Args:
        model: an ESM model with a sequence or token classification head. It is put into evaluation mode, and computes
            with the lean encoder from then on.
        tokenizer: the tokenizer of an ESM model.
        max_tokens: the most tokens per sequence, special tokens included.

    Attributes:
        task: the task of the model, with its label names.
        thresholds: probabilities from which a label is positive, of shape (labels,); None unless there are several
            labels per sequence.

    Raises:
        ConfigurationError: the model has no such head, or the tokenizer is not that of an ESM model.

    Example:
        >>> predictor = Predictor.load("membrane")  # doctest: +SKIP
        >>> predictor.predict(["MKTAYIAKQR"])[0].to_dict()  # doctest: +SKIP
        {'label': 'non-membrane', 'score': 0.98, 'probabilities': {'non-membrane': 0.98, 'membrane': 0.02}}
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int = _MAX_TRAINED_TOKENS
    ) -> None:
        if max_tokens <= SPECIAL_TOKENS:
            raise ConfigurationError(
                f"max_tokens={max_tokens}: expected room for a residue beside {SPECIAL_TOKENS} special tokens"
            )
        self.task = task_of_model(model)
        if len(set(self.task.names)) < len(self.task.names) or self.task.kind not in get_args(Kind):
            names = listing([repr(name[:80]) for name in self.task.names])
            raise ConfigurationError(
                f"the model's config has problem_type {str(self.task.kind)!r:.80} and the label names {names}: "
                f"expected one of {', '.join(get_args(Kind))}, and different names"
            )
        self.encoder = ResidueEncoder(tokenizer)
        if (highest := max(tokenizer.get_vocab().values())) >= model.config.vocab_size:
            raise ConfigurationError(
                f"the tokenizer has the id {highest}, but the model has {model.config.vocab_size} tokens: expected the "
                "model's own tokenizer"
            )
        self.padding = tokenizer.pad_token_id
        self.max_tokens = max_tokens
        self.model: Any = apply_lean_encoder(model.eval().requires_grad_(False))
        self.thresholds: np.ndarray | None = None
        if self.task.kind == "multi_label_classification":
            self.thresholds = _thresholds(getattr(model.config, "label_thresholds", None) or {}, self.task.names)

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        device: str | torch.device | None = None,
        max_tokens: int = _MAX_TRAINED_TOKENS,
        task: Task | None = None,
    ) -> Predictor:
        """Load a model that `finetune` or `export_model` saved, from a folder or from the Hub.

        Only safetensors are read; nothing is unpickled, and no code of the folder runs. Sizes and adapters are checked
        against the weights before anything is built.

        Args:
            name_or_path: the folder or the Hub name of a model, or of an adapter with its ``base_config/``. The base
                model of an adapter is loaded by the name or path in the adapter's config.
            revision: branch, tag or commit on the Hub; None for the main branch.
            cache_dir: the folder of downloaded models; None for that of huggingface_hub.
            device: the device to compute on; None for the accelerator if there is one.
            max_tokens: the most tokens per sequence, special tokens included.
            task: what the model predicts, for an adapter that peft saved: it has no label names. None for the task in
                the model's config.

        Raises:
            ConfigurationError: there is no such folder and no such model on the Hub, it is not a saved ESM model with
                safetensors, its head was not saved, or config, adapter and weights do not fit together.
        """
        model, tokenizer = load_model(name_or_path, revision=revision, cache_dir=cache_dir, task=task)
        if device is None:
            accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            device = accelerator or "cpu"
        on_device: Any = model
        return cls(on_device.to(device), tokenizer, max_tokens=max_tokens)

    def predict(
        self, sequences: Iterable[str], *, keep: Keep | None = None, token_budget: int = 8192
    ) -> list[Prediction]:
        """Predict from sequences.

        Args:
            sequences: texts, in a list, a numpy array, a pandas Series or a column of a data set; or a split of a data
                set with a column ``sequence``. They are cleaned as by `esm_efficient.data.sequences.clean`.
            keep: the part of a sequence to read if it is too long: its ``"start"``, its ``"end"`` or ``"both"`` ends.
                None refuses such a sequence.
            token_budget: the most tokens per batch.

        Returns:
            One prediction per sequence, in the same order.

        Raises:
            DataError: a sequence is not a text, is empty, is too long, or is not a protein; or all splits of a data set
                are given at once.
            ConfigurationError: the model's output is not finite.
        """
        return [self._prediction(logits) for logits in self.logits(sequences, keep=keep, token_budget=token_budget)]

    def logits(
        self, sequences: Iterable[str], *, keep: Keep | None = None, token_budget: int = 8192
    ) -> list[np.ndarray]:
        """Return what the model computes from each sequence, before probabilities; the arguments are as in `predict`.

        Returns:
            float64 of shape (labels,) per sequence, or of shape (residues, labels) for one class per residue.

        Raises:
            DataError: as `predict`.
            ConfigurationError: the model's output is not finite.
        """
        sequences = sequences_from(sequences)
        if not sequences:
            return []
        max_residues = self.max_tokens - SPECIAL_TOKENS
        ids, offsets, residues = self.encoder(sequences, max_residues=max_residues, keep=keep or "start")
        if keep is None and (long := np.flatnonzero(residues > max_residues)).size:
            raise DataError(
                f"{len(long)} sequence(s) have more than {max_residues} residues: "
                f"{listing([f'sequence {i + 1} ({residues[i]})' for i in long])}. Say which part to read with "
                'keep="start", "end" or "both"'
            )
        lengths = np.diff(offsets)
        found: dict[int, np.ndarray] = {}
        budget = max(token_budget, int(lengths.max()))
        for batch in TokenBudgetBatchSampler(lengths, budget, shuffle=False):
            tokens = np.full((len(batch), lengths[batch].max()), self.padding, dtype=np.int64)
            for row, index in enumerate(batch):
                tokens[row, : lengths[index]] = ids[offsets[index] : offsets[index + 1]]
            for index, logits in zip(batch, self._logits(tokens, lengths[batch]), strict=True):
                # The logits of tokens begin with that of <cls>, and end with that of <eos> and of padding.
                found[index] = logits[1 : lengths[index] - 1] if logits.ndim == 2 else logits
        if bad := [f"sequence {i + 1}" for i in range(len(sequences)) if not np.isfinite(found[i]).all()]:
            raise ConfigurationError(
                f"the model's output for {len(bad)} of {len(sequences)} sequence(s) is not finite ({listing(bad)}): "
                "its training diverged, or its weights are damaged. Use another checkpoint"
            )
        return [found[index] for index in range(len(sequences))]

    @torch.inference_mode()
    def _logits(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return the logits, float64 of shape (sequences, labels) or (sequences, tokens, labels)."""
        device = self.model.device
        mask = torch.from_numpy(np.arange(tokens.shape[1]) < lengths[:, None]).to(device, torch.long)
        logits = self.model(input_ids=torch.from_numpy(tokens).to(device), attention_mask=mask).logits
        return logits.double().cpu().numpy()

    def _prediction(self, logits: np.ndarray) -> Prediction:
        """Return the prediction for the logits of one sequence, of shape (labels,) or (residues, labels)."""
        from scipy.special import expit, softmax

        names = self.task.names
        if self.task.kind == "regression":
            return Prediction(self.task, logits, ())
        if self.thresholds is not None:
            chances = expit(logits)
            return Prediction(self.task, chances, tuple(names[i] for i in np.flatnonzero(chances >= self.thresholds)))
        chances = softmax(logits, axis=-1)
        return Prediction(self.task, chances, tuple(names[i] for i in np.atleast_1d(chances.argmax(-1))))


def _thresholds(tuned: Any, names: tuple[str, ...]) -> np.ndarray:
    """Return the threshold of each label from a model's config, float64 of shape (labels,)."""
    values = [tuned.get(name, _DEFAULT_THRESHOLD) if isinstance(tuned, dict) else None for name in names]
    if any(isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1 for value in values):
        raise ConfigurationError(
            f"the model's config has label_thresholds {str(tuned)!r:.200}: expected a probability by label name"
        )
    return np.array(values, dtype=np.float64)
