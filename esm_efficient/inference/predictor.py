"""Load a fine-tuned model and predict from sequences, in batches almost without padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from esm_efficient.data.encoding import ResidueEncoder, longest_input
from esm_efficient.encoder import apply_lean_encoder_if_supported, has_lean_encoder
from esm_efficient.errors import ConfigurationError, listing
from esm_efficient.heads import pooling_of_model
from esm_efficient.inference.batches import Result, half_of, run_in_batches
from esm_efficient.inference.ensembles import compute_members, joint_logits, load_ensemble
from esm_efficient.inference.foreign import label_thresholds
from esm_efficient.inference.inputs import sequences_from
from esm_efficient.inference.loading import default_device, load_model, place
from esm_efficient.inference.windows import LongReading
from esm_efficient.recipes import Precision
from esm_efficient.tasks import SPECIAL_TOKENS, Kind, Task, base_model_of, task_of_model


@dataclass(frozen=True)
class Prediction:
    """The prediction for one sequence.

    Attributes:
        task: the task of the model.
        values: float64; probabilities of shape (classes,) for one class or several labels per sequence, and of shape
            (residues, classes) for one class per residue; numbers of shape (numbers,) for regression.
        labels: the class with the highest probability, of the sequence or of each residue; with several labels, those
            with a probability of at least their threshold; empty for regression.
        spread: the standard deviation of `values` over the members of an ensemble, of the same shape; None for one
            model. `values` is then the mean over the members.
    """

    task: Task
    values: np.ndarray
    labels: tuple[str, ...]
    spread: np.ndarray | None = None

    @property
    def scores(self) -> np.ndarray:
        """The probability of the class of each residue, of shape (residues,); for one class per residue."""
        return self.values.max(axis=-1)

    @property
    def score_spread(self) -> np.ndarray | None:
        """The spread of `scores`, likewise; None for one model."""
        if self.spread is None:
            return None
        return np.take_along_axis(self.spread, self.values.argmax(axis=-1)[..., None], -1)[..., 0]

    def to_dict(self) -> dict[str, Any]:
        """Return a dict for JSON, whose keys depend on the task.

        One class per sequence: ``label``, ``score`` (its probability) and ``probabilities`` by name. Several labels:
        ``labels`` and ``probabilities``. One class per residue: ``labels`` and ``scores``, lists with an entry per
        residue. Numbers: ``values`` by name. An ensemble adds ``spreads``, by the same names or per residue.

        Example:
            >>> task = Task("single_label_classification", ("no", "yes"))
            >>> Prediction(task, np.array([0.25, 0.75]), ("yes",)).to_dict()
            {'label': 'yes', 'score': 0.75, 'probabilities': {'no': 0.25, 'yes': 0.75}}
        """
        if self.task.kind == "token_classification":
            spreads = {} if self.score_spread is None else {"spreads": self.score_spread.tolist()}
            return {"labels": list(self.labels), "scores": self.scores.tolist()} | spreads
        named = dict(zip(self.task.names, self.values.tolist(), strict=True))
        record: dict[str, Any] = {"values": named}
        if self.task.kind == "multi_label_classification":
            record = {"labels": list(self.labels), "probabilities": named}
        elif self.task.kind == "single_label_classification":
            record = {"label": self.labels[0], "score": float(self.values.max()), "probabilities": named}
        if self.spread is not None:
            record["spreads"] = dict(zip(self.task.names, self.spread.tolist(), strict=True))
        return record


class Predictor:
    """A fine-tuned model that predicts from sequences, or several of them: an ensemble.

    Args:
        model: an ESM model with a sequence or token classification head. It is put into evaluation mode, and an ESM-2
            model computes with the lean encoder from then on. Which of its parameters train stays as it is.
        tokenizer: the tokenizer of an ESM model.
        max_tokens: the most tokens per sequence, special tokens included; None for ``model_max_length`` of the
            tokenizer, which `finetune` saves with a model, or 1,024 if that is unknown.
        precision: ``"float32"``; ``"bf16"`` or ``"fp16"`` for autocast, whose logits differ by about a hundredth; or
            ``"auto"`` for what the device multiplies fastest (`esm_efficient.recipes.Precision`), which is float32 on a
            CPU.
        members: the names of adapters of a model of peft, which are activated in turn for each batch; empty for the
            model as it is. The prediction is the mean of their probabilities, or of their numbers (Lakshminarayanan et
            al. 2017, "Simple and scalable predictive uncertainty estimation using deep ensembles").

    Attributes:
        task: the task of the model, with its label names.
        half: the dtype of autocast; None for float32.
        thresholds: probabilities from which a label is positive, of shape (labels,); None unless there are several
            labels per sequence.

    Raises:
        ConfigurationError: the model has no such head, the tokenizer is not that of an ESM model, the precision is
            unknown, or the model does not have the members.

    Example:
        >>> predictor = Predictor.load("membrane")  # doctest: +SKIP
        >>> predictor.predict(["MKTAYIAKQR"])[0].to_dict()  # doctest: +SKIP
        {'label': 'non-membrane', 'score': 0.98, 'probabilities': {'non-membrane': 0.98, 'membrane': 0.02}}
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int | None = None,
        precision: Precision = "auto",
        members: Sequence[str] = (),
    ) -> None:
        if max_tokens is not None and max_tokens <= SPECIAL_TOKENS:
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
        if unknown := [name for name in members if name not in getattr(model, "peft_config", {})]:
            raise ConfigurationError(
                f"the model has no adapters {listing(unknown)}: expected the names of its adapters"
            )
        self.encoder = ResidueEncoder(tokenizer)
        if (highest := max(tokenizer.get_vocab().values())) >= model.config.vocab_size:
            raise ConfigurationError(
                f"the tokenizer has the id {highest}, but the model has {model.config.vocab_size} tokens: expected the "
                "model's own tokenizer"
            )
        self.half = half_of(precision, model.device)
        self.padding = tokenizer.pad_token_id
        self.max_tokens = longest_input(tokenizer) if max_tokens is None else max_tokens
        self.members = tuple(members)
        self.model: Any = model.eval() if has_lean_encoder(model) else apply_lean_encoder_if_supported(model.eval())
        self.thresholds: np.ndarray | None = None
        if self.task.kind == "multi_label_classification":
            self.thresholds = label_thresholds(model.config, self.task.names)

    @classmethod
    def load(
        cls,
        name_or_path: str | Path | Sequence[str | Path],
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        device: str | torch.device | None = None,
        max_tokens: int | None = None,
        task: Task | None = None,
        precision: Precision = "auto",
    ) -> Predictor:
        """Load a model that `finetune` or `export_model` saved, from a folder or from the Hub.

        Only safetensors are read; nothing is unpickled, and no code of the folder runs. Sizes and adapters are checked
        against the weights before anything is built.

        Args:
            name_or_path: the folder or the Hub name of a model, or of an adapter with its ``base_config/``. The base
                model of an adapter is loaded by the name or path in the adapter's config. A list of adapters is an
                ensemble: they share one base model, which is in memory once, and have the same task and head, and the
                prediction is their mean (`Prediction.spread`). The threshold of a label is the mean of theirs, and the
                most tokens are the fewest of theirs.
            revision: branch, tag or commit on the Hub; None for the main branch.
            cache_dir: the folder of downloaded models; None for that of huggingface_hub.
            device: the device to compute on; None for the accelerator if there is one, one for each rank of a machine.
            max_tokens: as `Predictor`.
            task: what the model predicts, for an adapter that peft saved: it has no label names. None for the task in
                the model's config.
            precision: as `Predictor`.

        Raises:
            ConfigurationError: there is no such folder and no such model on the Hub, it is not a saved ESM model with
                safetensors, its head was not saved, or config, adapter and weights do not fit together; or the members
                of an ensemble are not adapters with the same base model, task and head.
        """
        names = [name_or_path] if isinstance(name_or_path, str | Path) else list(name_or_path)
        if not names:
            raise ConfigurationError("got an empty list of models: expected one, or the members of an ensemble")
        members: tuple[str, ...] = ()
        if len(names) == 1:
            model, tokenizer = load_model(names[0], revision=revision, cache_dir=cache_dir, task=task)
        else:
            model, tokenizer, members = load_ensemble(names, revision=revision, cache_dir=cache_dir, task=task)
        on_device = place(model, default_device() if device is None else device)
        return cls(on_device, tokenizer, max_tokens=max_tokens, precision=precision, members=members)

    def predict(
        self, sequences: Iterable[str], *, keep: LongReading | None = None, token_budget: int = 8192
    ) -> list[Prediction]:
        """Predict from sequences.

        Args:
            sequences: texts, in a list, a numpy array, a pandas Series or a column of a data set; or a split of a data
                set with a column ``sequence``. They are cleaned as by `esm_efficient.data.sequences.clean`.
            keep: what to read of a sequence that is too long: its ``"start"``, its ``"end"`` or ``"both"`` ends; or all
                of it in ``"windows"`` that overlap, whose logits are averaged (`Windows` sets the overlap). None
                refuses such a sequence.
            token_budget: the most tokens per batch, padding included; if a sequence is longer, its tokens.

        Returns:
            One prediction per sequence, in the same order. One with a class per residue has those residues that `keep`
            reads, in their order.

        Raises:
            DataError: a sequence is not a text, is empty, is too long, or is not a protein; or all splits of a data set
                are given at once.
            ConfigurationError: the model's output is not finite.
            OutOfMemoryError: the device has too little memory for a batch.
        """
        return [self._prediction(logits) for logits in self._logits(sequences, keep, token_budget)]

    def logits(
        self, sequences: Iterable[str], *, keep: LongReading | None = None, token_budget: int = 8192
    ) -> list[np.ndarray]:
        """Return what the model computes from each sequence, before probabilities; the arguments are as in `predict`.

        Returns:
            float64 of shape (labels,) per sequence, or of shape (residues, labels) for one class per residue. Those of
            an ensemble are the logits of its probabilities, which are the mean over the members.

        Raises:
            DataError: as `predict`.
            ConfigurationError: the model's output is not finite.
            OutOfMemoryError: as `predict`.
        """
        found = self._logits(sequences, keep, token_budget)
        return [joint_logits(logits, self.task.kind) if self.members else logits[0] for logits in found]

    def _logits(self, sequences: Iterable[str], keep: LongReading | None, token_budget: int) -> list[np.ndarray]:
        """Return the logits of each sequence, of shape (members, ..., labels); one model is one member."""
        result: Result = "residues" if self.task.kind == "token_classification" else "sequence"
        return self._run(lambda **inputs: self.model(**inputs).logits, result, sequences, keep, token_budget)

    def residue_weights(
        self, sequences: Iterable[str], *, keep: LongReading | None = None, token_budget: int = 8192
    ) -> list[np.ndarray]:
        """Return how much each residue counts in the mean that the head reads; the arguments are as in `predict`.

        With attention pooling, the weights show which residues the head looks at. They are not an explanation of the
        prediction: the state of a residue contains what the encoder has read of the others.

        Returns:
            float64 of shape (residues,) per sequence, with the sum 1: those residues that `keep` reads, in their order.

        Raises:
            DataError: as `predict`.
            ConfigurationError: the head does not pool residues.
        """
        if pooling_of_model(self.model) == "first":
            raise ConfigurationError(
                f"the head of {type(self.model).__name__} does not pool residues: expected a model that was trained "
                'with pooling="attention" (or "mean", which gives each residue the same weight)'
            )
        # The method of a model of peft is that of the model inside.
        found = self._run(base_model_of(self.model).residue_weights, "weights", sequences, keep, token_budget)
        return [weights.mean(axis=0) for weights in found]

    def _run(
        self, compute: Any, result: Result, sequences: Iterable[str], keep: LongReading | None, token_budget: int
    ) -> list[np.ndarray]:
        """Return what the members compute from each sequence, with the members as the first axis."""
        texts = sequences_from(sequences)
        if not texts:
            return []
        found = run_in_batches(
            partial(compute_members, self.model, self.members, compute),
            self.encoder,
            texts,
            result=result,
            half=self.half,
            padding=self.padding,
            device=self.model.device,
            max_tokens=self.max_tokens,
            keep=keep,
            token_budget=token_budget,
        )
        return [np.moveaxis(numbers, -1, 0) for numbers in found]

    def _prediction(self, logits: np.ndarray) -> Prediction:
        """Return the prediction for the logits of one sequence, of shape (members, ..., labels)."""
        from scipy.special import expit, softmax

        names = self.task.names
        if self.task.kind == "regression":
            each = logits
        else:
            each = softmax(logits, axis=-1) if self.thresholds is None else expit(logits)
        values = each.mean(axis=0)
        spread = each.std(axis=0) if self.members else None
        if self.task.kind == "regression":
            return Prediction(self.task, values, (), spread)
        if self.thresholds is not None:
            positive = np.flatnonzero(values >= self.thresholds)
            return Prediction(self.task, values, tuple(names[i] for i in positive), spread)
        return Prediction(self.task, values, tuple(names[i] for i in np.atleast_1d(values.argmax(-1))), spread)
