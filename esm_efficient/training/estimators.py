"""EsmClassifier and EsmRegressor: fine-tuning as estimators of scikit-learn."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.validation import check_is_fitted
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from esm_efficient.data.schema import WEIGHT_COLUMN
from esm_efficient.errors import DataError
from esm_efficient.inference.inputs import sequences_from
from esm_efficient.inference.predictor import Predictor
from esm_efficient.recipes import Precision, Recipe, get_recipe
from esm_efficient.tasks import Pooling
from esm_efficient.training.finetune import finetune

_EVALUATED = 8
"""`finetune` evaluates a split. An estimator is scored by its user, so it gets a few training rows."""


class _EsmEstimator(BaseEstimator):
    """What both estimators share: the options, and a fit by `finetune`."""

    def __init__(
        self,
        model: str | Path = "35M",
        *,
        recipe: str | Recipe = "top",
        layers: str | tuple[int, ...] = "top-1/3",
        pooling: Pooling = "first",
        epochs: float = 3.0,
        learning_rate: float | None = None,
        batch_size: int | None = None,
        max_tokens: int = 1024,
        precision: Precision = "auto",
        states_dir: str | Path | None = None,
        random_state: int = 0,
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
            columns[WEIGHT_COLUMN] = np.asarray(sample_weight, dtype=np.float32).tolist()
            features[WEIGHT_COLUMN] = Value("float32")
        rows = Dataset.from_dict(columns, features=features)
        splits = DatasetDict(train=rows, validation=rows.select(range(min(len(rows), _EVALUATED))))
        given: dict[str, Any] = {"learning_rate": self.learning_rate, "batch_size": self.batch_size}
        with tempfile.TemporaryDirectory() as folder, _without_bars():
            result = finetune(
                self.model,
                splits,
                recipe=self._recipe(),
                output_dir=folder,
                states_dir=self.states_dir,
                max_tokens=self.max_tokens,
                precision=self.precision,
                seed=self.random_state,
                epochs=self.epochs,
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
        recipe = get_recipe(self.recipe)
        if recipe.trains == "head":
            return recipe.replace(pooling=self.pooling)
        return recipe.replace(layers=self.layers, cache=self.layers != "all", pooling=self.pooling)

    def _values(self, X: Any) -> np.ndarray:
        """Return what the model predicts, of shape (sequences, classes or numbers)."""
        check_is_fitted(self, "predictor_")
        return np.stack([prediction.values for prediction in self.predictor_.predict(_texts(X))])

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
        layers: the layers that train (`esm_efficient.recipes.select_layers`). Unless they are ``"all"``, the states
            below them are computed once per fit.
        pooling: what the head reads: ``"first"``, ``"mean"`` or ``"attention"``.
        epochs: passes over the training sequences.
        learning_rate: peak learning rate; None for that of the recipe.
        batch_size: sequences per optimizer step; None for that of the recipe.
        class_weight: ``"balanced"``, a dict of weights by class, or None.
        max_tokens: maximal number of tokens of a sequence, special tokens included.
        precision: as `finetune`.
        states_dir: folder for cached states. Fits on the same sequences share them, as those of a grid search do.
        random_state: seed of the head, the adapters and the order of the batches.

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
        layers: str | tuple[int, ...] = "top-1/3",
        pooling: Pooling = "first",
        epochs: float = 3.0,
        learning_rate: float | None = None,
        batch_size: int | None = None,
        class_weight: str | dict | None = "balanced",
        max_tokens: int = 1024,
        precision: Precision = "auto",
        states_dir: str | Path | None = None,
        random_state: int = 0,
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
            DataError: X and y have different lengths, y has one class or several columns, or a text is not a protein.
        """
        import pandas as pd

        labels = np.asarray(y)
        # numpy would make the text "nan" of a missing label among names.
        if missing := sum(bool(pd.isna(cell)) for cell in y if np.ndim(cell) == 0):
            raise DataError(f"{missing} of {len(labels)} labels are missing: remove these sequences")
        if labels.ndim != 1:
            raise DataError(
                f"y has the shape {labels.shape}: expected one class per sequence. finetune() trains several"
            )
        self.classes_, numbers = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise DataError(f"all sequences have the class {self.classes_[0]!r}: expected two classes or more")
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
        max_tokens: maximal number of tokens of a sequence, special tokens included.
        precision: as `finetune`.
        states_dir: as `EsmClassifier`.
        random_state: seed of the head, the adapters and the order of the batches.

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
            DataError: X and y have different lengths, a number is not finite, or a text is not a protein.
        """
        numbers = np.asarray(y, dtype=np.float32)
        self.one_number_ = numbers.ndim == 1
        feature = Value("float32") if self.one_number_ else List(Value("float32"), length=numbers.shape[1])
        if not np.isfinite(numbers).all():
            raise DataError("y has numbers that are not finite: remove these rows")
        return self._fit(_texts(X), numbers.tolist(), feature, sample_weight)

    def predict(self, X: Any) -> np.ndarray:
        """Return the number of each sequence, float64 of shape (sequences,), or of the shape of `y`."""
        values = self._values(X)
        return values[:, 0] if self.one_number_ else values


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


def _texts(X: Any) -> list[str]:
    """Return sequences; a table with one column, which pipelines pass, is taken as that column."""
    if getattr(X, "ndim", 1) == 2 and X.shape[1] == 1:
        X = np.asarray(X)[:, 0]
    return sequences_from(X)
