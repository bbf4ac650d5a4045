"""Load a fine-tuned model and predict from sequences, in batches almost without padding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from esm_efficient.data.batching import TokenBudgetBatchSampler
from esm_efficient.data.encoding import ResidueEncoder
from esm_efficient.data.sequences import Keep
from esm_efficient.encoder import apply_lean_encoder
from esm_efficient.errors import ConfigurationError, DataError, listing
from esm_efficient.tasks import SPECIAL_TOKENS, Task, auto_class, head_of_config, task_of_model

_MAX_TRAINED_TOKENS = 1024
"""Tokens of the longest sequence that ESM-2 was trained on."""

_DEFAULT_THRESHOLD = 0.5
"""The probability from which a label is positive, if the model has no tuned threshold for it."""

_HUB_FILES = ("*.safetensors", "*.json", "*.txt")
"""The files to download from the Hub: weights, configs and vocabulary, and never a pickle."""


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
        self.encoder = ResidueEncoder(tokenizer)
        self.padding = tokenizer.pad_token_id
        self.max_tokens = max_tokens
        self.model: Any = apply_lean_encoder(model.eval().requires_grad_(False))
        self.thresholds: np.ndarray | None = None
        if self.task.kind == "multi_label_classification":
            tuned = getattr(model.config, "label_thresholds", None) or {}
            self.thresholds = np.array([tuned.get(name, _DEFAULT_THRESHOLD) for name in self.task.names])

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        device: str | torch.device | None = None,
        max_tokens: int = _MAX_TRAINED_TOKENS,
    ) -> Predictor:
        """Load a model that `finetune` or `export_model` saved, from a folder or from the Hub.

        Only safetensors are read; nothing is unpickled.

        Args:
            name_or_path: the folder or the Hub name of a model, or of an adapter with its ``base_config/``. The base
                model of an adapter is loaded by the name or path in the adapter's config.
            revision: branch, tag or commit on the Hub; None for the main branch.
            cache_dir: the folder of downloaded models; None for that of huggingface_hub.
            device: the device to compute on; None for the accelerator if there is one.
            max_tokens: the most tokens per sequence, special tokens included.

        Raises:
            ConfigurationError: there is no such folder and no such model on the Hub, or it is not a saved model with
                safetensors.
        """
        folder = _find_folder(name_or_path, revision, cache_dir)
        adapter_config = folder / "adapter_config.json"
        is_adapter = adapter_config.is_file()
        config_folder = folder / "base_config" if is_adapter else folder
        if is_adapter and not (folder / "adapter_model.safetensors").is_file():
            raise ConfigurationError(f"{folder} has no adapter_model.safetensors, and pickled weights are not read")
        if not (config_folder / "config.json").is_file():
            raise ConfigurationError(
                f"{folder} has no {(config_folder / 'config.json').relative_to(folder)}: expected the folder of a "
                "saved model"
            )
        config = AutoConfig.from_pretrained(config_folder)
        # The base config of an adapter may still name the head of the pretrained base model.
        of_tokens = head_of_config(config) == "token-classification"
        auto = auto_class("token-classification" if of_tokens else "sequence-classification")
        base = json.loads(adapter_config.read_text())["base_model_name_or_path"] if is_adapter else folder
        try:
            model = auto.from_pretrained(
                base, config=config, dtype=torch.float32, use_safetensors=True, cache_dir=cache_dir
            )
        except OSError as error:
            what = f"the base model {base!r} of the adapter {folder}" if is_adapter else f"the model {folder}"
            raise ConfigurationError(f"the safetensors of {what} cannot be loaded: {error}") from error
        if is_adapter:
            adapted: Any = PeftModel.from_pretrained(model, str(folder))
            model = adapted.merge_and_unload()
        if device is None:
            accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            device = accelerator or "cpu"
        return cls(model.to(device), AutoTokenizer.from_pretrained(folder), max_tokens=max_tokens)

    def predict(
        self, sequences: Sequence[str], *, keep: Keep | None = None, token_budget: int = 8192
    ) -> list[Prediction]:
        """Predict from sequences.

        Args:
            sequences: texts; they are cleaned as by `esm_efficient.data.sequences.clean`.
            keep: the part of a sequence to read if it is too long: its ``"start"``, its ``"end"`` or ``"both"`` ends.
                None refuses such a sequence.
            token_budget: the most tokens per batch.

        Returns:
            One prediction per sequence, in the same order.

        Raises:
            DataError: a sequence is not a text, is empty, or is too long.
        """
        if isinstance(sequences, str):
            raise DataError("expected a list of sequences, got a single text: put it into a list")
        if bad := [f"sequence {i + 1}" for i, s in enumerate(sequences) if not isinstance(s, str)]:
            raise DataError(f"{len(bad)} sequence(s) are not texts: {listing(bad)}")
        if not sequences:
            return []
        max_residues = self.max_tokens - SPECIAL_TOKENS
        ids, offsets, residues = self.encoder(sequences, max_residues=max_residues, keep=keep or "start")
        if bad := [f"sequence {i + 1}" for i in np.flatnonzero(residues == 0)]:
            raise DataError(f"{len(bad)} sequence(s) are empty: {listing(bad)}")
        if keep is None and (long := np.flatnonzero(residues > max_residues)).size:
            raise DataError(
                f"{len(long)} sequence(s) have more than {max_residues} residues: "
                f"{listing([f'sequence {i + 1} ({residues[i]})' for i in long])}. Say which part to read with "
                'keep="start", "end" or "both"'
            )
        lengths = np.diff(offsets)
        predictions: dict[int, Prediction] = {}
        budget = max(token_budget, int(lengths.max()))
        for batch in TokenBudgetBatchSampler(lengths, budget, shuffle=False):
            tokens = np.full((len(batch), lengths[batch].max()), self.padding, dtype=np.int64)
            for row, index in enumerate(batch):
                tokens[row, : lengths[index]] = ids[offsets[index] : offsets[index + 1]]
            for index, logits in zip(batch, self._logits(tokens, lengths[batch]), strict=True):
                # The logits of tokens begin with that of <cls>, and end with that of <eos> and of padding.
                of_residues = logits[1 : lengths[index] - 1] if logits.ndim == 2 else logits
                predictions[index] = self._prediction(of_residues)
        return [predictions[index] for index in range(len(sequences))]

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


def _find_folder(name_or_path: str | Path, revision: str | None, cache_dir: str | Path | None) -> Path:
    """Return the folder of a model; a model on the Hub is downloaded unless it is in the cache.

    Raises:
        ConfigurationError: there is no such folder, and the name is not that of a model on the Hub or in the cache.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(name_or_path, Path):
        raise ConfigurationError(f"there is no folder {folder}")
    model = repr(name_or_path) if revision is None else f"{name_or_path!r} (revision {revision!r})"
    try:
        return Path(
            snapshot_download(name_or_path, revision=revision, cache_dir=cache_dir, allow_patterns=list(_HUB_FILES))
        )
    except HFValidationError as error:
        raise ConfigurationError(f"there is no folder {folder}, and a Hub name has the form owner/name") from error
    except LocalEntryNotFoundError as error:
        raise ConfigurationError(
            f"there is no folder {folder}, the cache {cache_dir or constants.HF_HUB_CACHE} has no complete copy of the "
            f"model {model}, and the Hub is not reachable or HF_HUB_OFFLINE is set. Check the name, or download the "
            "model while online"
        ) from error
    except HfHubHTTPError as error:
        raise ConfigurationError(
            f"there is no folder {folder}, and the Hub does not give the model {model}: {error}. Check the name and "
            "the revision; for a private model, log in with `hf auth login`"
        ) from error
