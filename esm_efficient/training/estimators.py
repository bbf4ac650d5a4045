"""EsmClassifier and EsmRegressor: fine-tuning as estimators of scikit-learn."""

from __future__ import annotations

import contextlib
import logging
import random
import tempfile
from collections.abc import Iterable, Iterator
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from esm_efficient.data.schema import WEIGHT_COLUMN
from esm_efficient.data.tokenizing import tokenize_dataset
from esm_efficient.errors import DataError
from esm_efficient.inference.inputs import sequences_from
from esm_efficient.inference.predictor import Predictor
from esm_efficient.published import available, hub_name
from esm_efficient.recipes import Precision, Recipe, get_recipe
from esm_efficient.tasks import SPECIAL_TOKENS, Pooling, task_of
from esm_efficient.training.finetune import finetune

logger = logging.getLogger(__name__)

_EVALUATED = 8
"""`finetune` evaluates a split. An estimator is scored by its user, so it gets a few training rows."""


class _EsmEstimator(BaseEstimator):
    """What both estimators share: the options, and a fit by `finetune`."""

    def __init__(
        self,
        model: str | Path = "35M",
        *,
        recipe: str | Recipe = "top",
        layers: str | tuple[int, ...] | None = None,
        pooling: Pooling | None = None,
        epochs: float = 3.0,
        learning_rate: float | None = None,
        batch_size: int | None = None,
        max_tokens: int = 1024,
        precision: Precision = "auto",
        states_dir: str | Path | None = None,
        random_state: int | np.random.RandomState | None = 0,
    ) -> None:
        self.model = model
        self.recipe = recipe
        self.layers = layers
        self.pooling = pooling
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.precision = precision
        self.states_dir = states_dir
        self.random_state = random_state

    def _fit(self, sequences: list[str], labels: list, feature: Any, sample_weight: Any, **options: Any) -> Any:
        if len(labels) != len(sequences):
            raise DataError(f"{len(sequences)} sequences and {len(labels)} labels: expected the same number of both")
        columns: dict[str, Any] = {"sequence": sequences, "label": labels}
        features = Features({"sequence": Value("string"), "label": feature})
        if sample_weight is not None:
            weights = np.asarray(_listed(sample_weight), dtype=np.float32)
            if weights.shape != (len(sequences),):
                raise DataError(f"sample_weight has the shape {weights.shape}: expected ({len(sequences)},)")
            columns[WEIGHT_COLUMN] = weights.tolist()
            features[WEIGHT_COLUMN] = Value("float32")
        recipe, seed = self._recipe(), self._seed()
        given: dict[str, Any] = {"learning_rate": self.learning_rate, "batch_size": self.batch_size}
        with tempfile.TemporaryDirectory() as folder, _without_bars(), _kept_random_states():
            # Tokenised here, so that no warning counts or names the rows that are evaluated too.
            splits = DatasetDict(train=Dataset.from_dict(columns, features=features))
            with available(name := hub_name(str(self.model))):
                tokenizer = AutoTokenizer.from_pretrained(name)
            splits, _ = tokenize_dataset(splits, tokenizer, max_tokens=self.max_tokens)
            splits["validation"] = splits["train"].select(range(min(len(sequences), _EVALUATED)))
            result = finetune(
                self.model,
                splits,
                recipe=recipe,
                output_dir=folder,
                states_dir=self.states_dir,
                max_tokens=self.max_tokens,
                precision=self.precision,
                seed=seed,
                task=task_of(features),
                epochs=self.epochs,
                early_stopping=None,
                probe=False,
                report=False,
                disable_tqdm=True,
                report_to="none",
                logging_strategy="no",
                **{name: value for name, value in given.items() if value is not None},
                **options,
            )
            tokenizer = AutoTokenizer.from_pretrained(result.model_dir)
        fitted: Any = result.model
        self.predictor_ = Predictor(fitted, tokenizer, max_tokens=self.max_tokens, precision=self.precision)
        return self

    def _recipe(self) -> Recipe:
        """Return the recipe with the layers and the pooling that were given."""
        changes = {"layers": self.layers, "pooling": self.pooling}
        return get_recipe(self.recipe).replace(**{name: value for name, value in changes.items() if value is not None})

    def _seed(self) -> int:
        """Return the seed of a fit: `random_state` if it is a number, and otherwise one that is drawn from it."""
        if isinstance(self.random_state, Integral):
            return int(self.random_state)
        return int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))

    def _values(self, X: Any) -> np.ndarray:
        """Return what the model predicts, of shape (sequences, classes or numbers); of a long sequence, its start."""
        check_is_fitted(self, "predictor_")
        texts, longest = _texts(X), self.predictor_.max_tokens - SPECIAL_TOKENS
        if not texts:
            return np.empty((0, len(self.predictor_.task.names)))
        _, _, residues = self.predictor_.encoder(texts, max_residues=longest, keep="start")
        if long := int((residues > longest).sum()):
            logger.warning(
                "%d of %d sequences have more than %d residues: their start is read, as in training",
                long,
                len(texts),
                longest,
            )
        return np.stack([prediction.values for prediction in self.predictor_.predict(texts, keep="start")])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        return tags


class EsmClassifier(ClassifierMixin, _EsmEstimator):
    """Fine-tune ESM-2 to tell classes of proteins apart, as an estimator of scikit-learn.

    It works in `sklearn.model_selection.cross_val_score`, `GridSearchCV` and in pipelines. Each fit is a run of
    `finetune` on all rows that it is given. scikit-learn's own splitters do not know homologues: give a grouped
    splitter the clusters of the proteins.

    Args:
        model: a folder, a Hub name or a size of an ESM-2 model.
        recipe: as `finetune`.
        layers: the layers that train (`esm_efficient.recipes.select_layers`); None for those of the recipe. With the
            recipe ``"top"``, the states below them are computed once per fit.
        pooling: what the head reads: ``"first"``, ``"mean"`` or ``"attention"``; None for that of the recipe.
        epochs: passes over the training sequences.
        learning_rate: peak learning rate; None for that of the recipe.
        batch_size: sequences per optimizer step; None for that of the recipe.
        class_weight: ``"balanced"``, a dict of weights by class, or None.
        max_tokens: maximal number of tokens of a sequence, special tokens included. Of a longer one, its start is read,
            in training and in prediction, with a warning.
        precision: as `finetune`.
        states_dir: folder for cached states. Fits on the same sequences share them, as those of a grid search do.
        random_state: seed of the head, the adapters and the order of the batches; or what draws it for each fit: a
            `numpy.random.RandomState`, or None for numpy's global one. A fit changes no other random numbers.

    Attributes:
        classes_: the classes, sorted.
        predictor_: the fitted `Predictor`.

    Example:
        >>> from sklearn.model_selection import cross_val_score
        >>> scores = cross_val_score(EsmClassifier("8M"), sequences, labels, cv=5)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | Path = "35M",
        *,
        recipe: str | Recipe = "top",
        layers: str | tuple[int, ...] | None = None,
        pooling: Pooling | None = None,
        epochs: float = 3.0,
        learning_rate: float | None = None,
        batch_size: int | None = None,
        class_weight: str | dict | None = "balanced",
        max_tokens: int = 1024,
        precision: Precision = "auto",
        states_dir: str | Path | None = None,
        random_state: int | np.random.RandomState | None = 0,
    ) -> None:
        super().__init__(
            model,
            recipe=recipe,
            layers=layers,
            pooling=pooling,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            max_tokens=max_tokens,
            precision=precision,
            states_dir=states_dir,
            random_state=random_state,
        )
        self.class_weight = class_weight

    def fit(self, X: Any, y: Iterable, sample_weight: Any = None) -> EsmClassifier:
        """Fine-tune on sequences and their classes.

        Args:
            X: sequences: a list, an array, a Series, or a table with one column.
            y: class of each sequence: texts, numbers or truth values.
            sample_weight: weight of each sequence; None for 1.

        Returns:
            The estimator.

        Raises:
            DataError: X, y and the weights have different lengths, y has one class, several columns or several types,
                or a text is not a protein.
        """
        import pandas as pd

        y = _listed(y)
        labels = np.asarray(y)
        # numpy would make the text "nan" of a missing label among names.
        if missing := sum(bool(pd.isna(cell)) for cell in y if np.ndim(cell) == 0):
            raise DataError(f"{missing} of {len(labels)} labels are missing: remove these sequences")
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        if labels.ndim != 1:
            raise DataError(
                f"y has the shape {labels.shape}: expected one class per sequence. finetune() trains several"
            )
        if not len(labels):
            raise DataError("y is empty: expected a class for each sequence")
        if labels.dtype.kind == "f" and (labels != np.floor(labels)).any():
            raise DataError(
                f"y has numbers with fractions, such as {labels[labels != np.floor(labels)][0]:g}: expected classes. "
                "EsmRegressor trains on numbers; write them as texts if each is a class"
            )
        try:
            self.classes_, numbers = np.unique(labels, return_inverse=True)
        except TypeError as error:
            kinds = sorted({type(cell).__name__ for cell in labels.tolist()})
            raise DataError(f"y has several types of values ({', '.join(kinds)}): expected one") from error
        if len(self.classes_) < 2:
            raise DataError(f"all sequences have the class {self.classes_.tolist()[0]!r}: expected two classes or more")
        names = [str(name) for name in self.classes_]
        weights: Any = self.class_weight
        if isinstance(weights, dict):
            known = dict(zip(self.classes_.tolist(), names, strict=True))  # 0, 0.0 and False are one key
            weights = {known.get(name, str(name)): weight for name, weight in weights.items()}
        return self._fit(_texts(X), numbers.tolist(), ClassLabel(names=names), sample_weight, class_weights=weights)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probability of each class, float64 of shape (sequences, classes), in the order of `classes_`."""
        return self._values(X)

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable class of each sequence."""
        best = self._values(X).argmax(axis=1)
        return self.classes_[best]


class EsmRegressor(RegressorMixin, _EsmEstimator):
    """Fine-tune ESM-2 to predict numbers of proteins, as an estimator of scikit-learn.

    The numbers are standardised for training, and predictions are in their unit.

    Args:
        model: a folder, a Hub name or a size of an ESM-2 model.
        recipe: as `finetune`.
        layers: as `EsmClassifier`.
        pooling: as `EsmClassifier`.
        epochs: passes over the training sequences.
        learning_rate: peak learning rate; None for that of the recipe.
        batch_size: sequences per optimizer step; None for that of the recipe.
        max_tokens: maximal number of tokens of a sequence, special tokens included. Of a longer one, its start is read,
            in training and in prediction, with a warning.
        precision: as `finetune`.
        states_dir: as `EsmClassifier`.
        random_state: seed of the head, the adapters and the order of the batches; or what draws it for each fit: a
            `numpy.random.RandomState`, or None for numpy's global one. A fit changes no other random numbers.

    Attributes:
        predictor_: the fitted `Predictor`.

    Example:
        >>> EsmRegressor("8M").fit(sequences, melting_points).predict(others)  # doctest: +SKIP
    """

    def fit(self, X: Any, y: Iterable, sample_weight: Any = None) -> EsmRegressor:
        """Fine-tune on sequences and their numbers.

        Args:
            X: as `EsmClassifier.fit`.
            y: a number of each sequence, or several, of shape (sequences, numbers).
            sample_weight: weight of each sequence; None for 1.

        Returns:
            The estimator.

        Raises:
            DataError: X, y and the weights have different lengths, y is one number or has three dimensions, a number is
                not finite, or a text is not a protein.
        """
        try:
            numbers = np.asarray(_listed(y), dtype=np.float32)
        except (ValueError, TypeError) as error:
            raise DataError(f"y is not a table of numbers ({error}). EsmClassifier trains on classes") from error
        if numbers.ndim not in (1, 2):
            raise DataError(f"y has the shape {numbers.shape}: expected (sequences,) or (sequences, numbers)")
        self.one_number_ = numbers.ndim == 1
        feature = Value("float32") if self.one_number_ else List(Value("float32"), length=numbers.shape[1])
        if not np.isfinite(numbers).all():
            raise DataError("y has numbers that are not finite: remove these rows")
        return self._fit(_texts(X), numbers.tolist(), feature, sample_weight)

    def predict(self, X: Any) -> np.ndarray:
        """Return the numbers of each sequence, float64.

        The shape is (sequences,) if `y` had one dimension in `fit`, and (sequences, numbers) otherwise.
        """
        values = self._values(X)
        return values[:, 0] if self.one_number_ else values


@contextlib.contextmanager
def _kept_random_states() -> Iterator[None]:
    """Leave the global random numbers of Python, numpy and torch as they are found: `finetune` seeds them.

    Otherwise every fold of a splitter without a seed would be drawn again after each fit.
    """
    numpy_numbers = check_random_state(None)
    of_python, of_numpy = random.getstate(), numpy_numbers.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(of_python)
        numpy_numbers.set_state(of_numpy)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Show no progress bars of datasets and transformers, as estimators are silent."""
    libraries = (
        (not are_progress_bars_disabled(), disable_progress_bars, enable_progress_bars),
        (is_progress_bar_enabled(), disable_progress_bar, enable_progress_bar),
    )
    shown = [(hide, show) for is_shown, hide, show in libraries if is_shown]
    for hide, _ in shown:
        hide()
    try:
        yield
    finally:
        for _, show in shown:
            show()


def _listed(values: Any) -> Any:
    """Return values that can be read twice: those of an iterator as a list."""
    return list(values) if isinstance(values, Iterator) else values


def _texts(X: Any) -> list[str]:
    """Return sequences; a table with one column, which pipelines pass, is taken as that column."""
    if getattr(X, "ndim", 1) == 2 and X.shape[1] == 1:
        X = np.asarray(X)[:, 0]
    return sequences_from(X)
