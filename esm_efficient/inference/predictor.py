"""Predictions of a fine-tuned model, in batches without padding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from esm_efficient.data.batching import TokenBudgetBatchSampler
from esm_efficient.data.encoding import ResidueEncoder
from esm_efficient.data.sequences import Keep
from esm_efficient.encoder import apply_lean_encoder
from esm_efficient.errors import ConfigurationError, DataError, listing
from esm_efficient.tasks import SPECIAL_TOKENS, Task, auto_class, head_of_config, task_of_model

_POSITIONS = 1024
"""Tokens of the longest sequence that ESM-2 was trained on."""


@dataclass(frozen=True)
class Prediction:
    """What a model says of one sequence.

    Attributes:
        task: what was learnt.
        values: float64; probabilities of shape (classes,) for one class or several labels a sequence, and of shape
            (residues, classes) for one class a residue; numbers of shape (numbers,) for regression.
        labels: the class with the highest probability, for a sequence or for each residue; the labels whose
            probability reaches their threshold; nothing for numbers.
    """

    task: Task
    values: np.ndarray
    labels: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: ``label`` and ``score`` (its probability), or ``labels``; and the values by name.

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
        model: an ESM model with a sequence or token classification head; it is put into evaluation mode and computes
            with the lean encoder from then on.
        tokenizer: of an ESM model.
        max_tokens: the most tokens of a sequence, special ones included.

    Attributes:
        task: what the model was trained on, with its label names.
        thresholds: probabilities from which a label holds, of shape (labels,); None unless there are several labels.

    Raises:
        ConfigurationError: the model has no such head, or the tokenizer is not one of an ESM model.

    Example:
        >>> predictor = Predictor.load("membrane")  # doctest: +SKIP
        >>> predictor.predict(["MKTAYIAKQR"])[0].to_dict()  # doctest: +SKIP
        {'label': 'non-membrane', 'score': 0.98, 'probabilities': {'non-membrane': 0.98, 'membrane': 0.02}}
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int = _POSITIONS
    ) -> None:
        if max_tokens <= SPECIAL_TOKENS:
            raise ConfigurationError(f"max_tokens={max_tokens}: expected room for a residue beside two special tokens")
        self.task = task_of_model(model)
        self.encoder = ResidueEncoder(tokenizer)
        self.padding = tokenizer.pad_token_id
        self.max_tokens = max_tokens
        self.model: Any = apply_lean_encoder(model.eval().requires_grad_(False))
        self.thresholds: np.ndarray | None = None
        if self.task.kind == "multi_label_classification":
            tuned = getattr(model.config, "label_thresholds", None) or {}
            self.thresholds = np.array([tuned.get(name, 0.5) for name in self.task.names])

    @classmethod
    def load(
        cls, folder: str | Path, *, device: str | torch.device | None = None, max_tokens: int = _POSITIONS
    ) -> Predictor:
        """Load what `finetune` or `export_model` saved; safetensors alone, nothing is unpickled.

        Args:
            folder: of a model, or of an adapter with ``base_config/`` beside it, whose base model is then loaded by the
                name or path in the adapter's config.
            device: to compute on; None for the accelerator if there is one.
            max_tokens: the most tokens of a sequence.

        Raises:
            ConfigurationError: it is no such folder.
        """
        folder = Path(folder)
        adapter = folder / "adapter_config.json"
        home = folder / "base_config" if adapter.is_file() else folder
        if adapter.is_file() and not (folder / "adapter_model.safetensors").is_file():
            raise ConfigurationError(f"{folder} has no adapter_model.safetensors, and pickled weights are not read")
        if not (home / "config.json").is_file():
            raise ConfigurationError(f"{folder} has no {home.name}/config.json: expected the folder of a saved model")
        config = AutoConfig.from_pretrained(home)
        # The base config of an adapter may still name the head that the base was pretrained with.
        of_tokens = head_of_config(config) == "token-classification"
        auto = auto_class("token-classification" if of_tokens else "sequence-classification")
        base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else folder
        model = auto.from_pretrained(base, config=config, dtype=torch.float32, use_safetensors=True)
        if adapter.is_file():
            adapted: Any = PeftModel.from_pretrained(model, str(folder))
            model = adapted.merge_and_unload()
        if device is None:
            found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            device = found or "cpu"
        return cls(model.to(device), AutoTokenizer.from_pretrained(folder), max_tokens=max_tokens)

    def predict(
        self, sequences: Sequence[str], *, keep: Keep | None = None, token_budget: int = 8192
    ) -> list[Prediction]:
        """Predict from sequences.

        Args:
            sequences: cleaned on the way as by `esm_efficient.data.sequences.clean`.
            keep: what to read of a sequence that is too long: its ``"start"``, its ``"end"`` or ``"both"`` ends. None
                refuses such a sequence.
            token_budget: the most tokens of a batch.

        Returns:
            As many predictions, in the same order.

        Raises:
            DataError: a sequence is no text, is empty, or is too long.
        """
        if isinstance(sequences, str):
            raise DataError("expected a list of sequences, got a single text: put it into a list")
        if bad := [f"sequence {i + 1}" for i, s in enumerate(sequences) if not isinstance(s, str)]:
            raise DataError(f"{len(bad)} sequence(s) are no text: {listing(bad)}")
        if not sequences:
            return []
        most = self.max_tokens - SPECIAL_TOKENS
        ids, offsets, residues = self.encoder(sequences, max_residues=most, keep=keep or "start")
        if bad := [f"sequence {i + 1}" for i in np.flatnonzero(residues == 0)]:
            raise DataError(f"{len(bad)} sequence(s) hold no residue: {listing(bad)}")
        if keep is None and (bad := [f"sequence {i + 1} ({residues[i]})" for i in np.flatnonzero(residues > most)]):
            raise DataError(f"{len(bad)} sequence(s) have more than {most} residues: {listing(bad)}. Say what to keep")
        lengths = np.diff(offsets)
        found: dict[int, Prediction] = {}
        budget = max(token_budget, int(lengths.max()))
        for batch in TokenBudgetBatchSampler(lengths, budget, shuffle=False):
            tokens = np.full((len(batch), lengths[batch].max()), self.padding, dtype=np.int64)
            for row, index in enumerate(batch):
                tokens[row, : lengths[index]] = ids[offsets[index] : offsets[index + 1]]
            for index, logits in zip(batch, self._logits(tokens, lengths[batch]), strict=True):
                found[index] = self._read(logits[1 : lengths[index] - 1] if logits.ndim == 2 else logits)
        return [found[index] for index in range(len(sequences))]

    @torch.inference_mode()
    def _logits(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """float64 of shape (sequences, labels) or (sequences, tokens, labels)."""
        device = self.model.device
        mask = torch.from_numpy(np.arange(tokens.shape[1]) < lengths[:, None]).to(device, torch.long)
        logits = self.model(input_ids=torch.from_numpy(tokens).to(device), attention_mask=mask).logits
        return logits.double().cpu().numpy()

    def _read(self, logits: np.ndarray) -> Prediction:
        from scipy.special import expit, softmax

        names = self.task.names
        if self.task.kind == "regression":
            return Prediction(self.task, logits, ())
        if self.thresholds is not None:
            values = expit(logits)
            return Prediction(
                self.task, values, tuple(n for n, v, t in zip(names, values, self.thresholds, strict=True) if v >= t)
            )
        values = softmax(logits, axis=-1)
        return Prediction(self.task, values, tuple(names[i] for i in np.atleast_1d(values.argmax(-1)).tolist()))
