"""Fixtures that several tests share: tiny models, small data sets, the demo table, the real data."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from hypothesis import settings
from matplotlib.figure import Figure
from transformers import AutoTokenizer, EsmConfig, EsmForSequenceClassification

from esm_efficient import demo_model_path, finetune, write_demo_table
from esm_efficient.data.clustering import PROGRAM_VARIABLE
from esm_efficient.training import arguments
from esm_efficient.training.intervals import bootstrap_draws

# Tables are split as on a machine without MMseqs2; processes started by tests inherit this.
os.environ[PROGRAM_VARIABLE] = ""

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes with several threads each would compete for the cores; processes started by tests inherit this.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
else:
    torch.set_num_threads(2)


def pytest_collection_finish():
    """Spare the garbage collector what lives as long as the process: accelerate collects after every training run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def uncollected_imports():
    """Spare the garbage collector what the tests of a file have imported too."""
    yield
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


settings.register_profile("tests", deadline=None, derandomize=True, database=None)  # a busy machine fails no test
settings.load_profile("tests")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Keep tables where no earlier run of the tests, with other code, and no user has any; all workers share them."""
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "ESM_EFFICIENT_CACHE", str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache")
        )
        yield


@pytest.fixture(autouse=True, scope="session")
def few_resamples():
    """Draw 5 bootstrap samples instead of 200, which take most of the time of a tiny run."""
    defaults = bootstrap_draws.__kwdefaults__
    usual, defaults["resamples"] = defaults["resamples"], 5
    yield
    defaults["resamples"] = usual


@pytest.fixture(autouse=True, scope="session")
def one_epoch():
    """Train for one epoch instead of three, unless a test asks for more. Yields the usual number."""
    usual = arguments.EPOCHS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arguments, "EPOCHS", 1.0)
        yield usual


@pytest.fixture(autouse=True, scope="session")
def no_probe():
    """Measure no linear probe beside a tiny run, unless a test asks for it: it takes as long as the run."""
    defaults = finetune.__kwdefaults__
    usual, defaults["probe"] = defaults["probe"], False
    yield
    defaults["probe"] = usual


@pytest.fixture(autouse=True, scope="session")
def undrawn_figures():
    """Let matplotlib draw no figure, unless a test asks for `drawn_figures`: reports take a third of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, file, **options: file.write("<svg></svg>"))
        yield patch


@pytest.fixture
def drawn_figures(undrawn_figures):
    """Let matplotlib draw the figures of a test."""
    drawing = Figure.savefig
    undrawn_figures.undo()
    yield
    undrawn_figures.setattr(Figure, "savefig", drawing)


def slow_except(cases: Iterable, *quick) -> list:
    """Return the cases of a test: `quick` ones are always run, and the others are slow tests."""
    cases = list(cases)
    assert 0 < len(quick) < len(cases)
    assert all(case in cases for case in quick)
    marks = pytest.mark.slow
    return [
        case if case in quick else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks)
        for case in cases
    ]


def each_value(*axes: Iterable) -> list:
    """Return all combinations of values: those that show each value at least once are always run, others are slow."""
    axes = [list(axis) for axis in axes]
    quick = [tuple(axis[number % len(axis)] for axis in axes) for number in range(max(map(len, axes)))]
    return slow_except(itertools.product(*axes), *quick)


def from_environment(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set")
    return Path(value)


@pytest.fixture(scope="session")
def deeploc_csv() -> Path:
    """Path of the real DeepLoc-2.0 table."""
    return from_environment("ESM_EFFICIENT_DEEPLOC_CSV")


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """Path of a real ESM-2 backbone."""
    return from_environment("ESM_EFFICIENT_CHECKPOINT")


@pytest.fixture(scope="session")
def demo_table(tmp_path_factory) -> Path:
    return write_demo_table(tmp_path_factory.mktemp("demo") / "table.csv", proteins=300, seed=1)


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_model_path())


def tiny_config(**changes) -> EsmConfig:
    options = {
        "vocab_size": 33,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "pad_token_id": 1,
        "mask_token_id": 32,
        "position_embedding_type": "rotary",
        "token_dropout": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": 1026,
        "num_labels": 2,
    }
    return EsmConfig(**(options | changes))


def make_model(head=EsmForSequenceClassification, *, seed: int = 0, **changes):
    """Return a newly initialised two-layer ESM-2: ``make_model(num_labels=3)``."""
    torch.manual_seed(seed)
    return head(tiny_config(**changes))


def make_dataset(size: int = 32, *, classes: int = 2, seed: int = 0) -> Dataset:
    """Return tokenised random sequences of unequal length with imbalanced labels."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 20, size=size)
    ids = [[0, *rng.integers(4, 24, size=n).tolist(), 2] for n in lengths]
    labels = rng.choice(classes, size=size, p=[0.8] + [0.2 / (classes - 1)] * (classes - 1))
    labels[:classes] = np.arange(classes)
    return Dataset.from_dict(
        {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": labels.tolist()},
        features=Features(
            {
                "input_ids": List(Value("int64")),
                "attention_mask": List(Value("int64")),
                "labels": ClassLabel(names=[f"class{i}" for i in range(classes)]),
            }
        ),
    )


TASK_LOSS = {
    "several": "multi_label_classification",
    "several, weighted": "multi_label_classification",
    "number": "regression",
    "whole number": "regression",
    "numbers": "regression",
    "tokens": None,
    "focal": "single_label_classification",
}


def make_task_dataset(kind: str, size: int = 32, *, seed: int = 0) -> Dataset:
    """Return tokenised random sequences with sample weights and a task's labels, of which some are unknown."""
    rng = np.random.default_rng(seed)
    data = make_dataset(size, seed=seed)
    lengths = [len(ids) for ids in data["input_ids"]]
    if kind == "focal":
        labels: list = data["labels"][:]
    elif kind == "tokens":
        labels = [[-100, *rng.choice([0, 1, -100], size=n - 2).tolist(), -100] for n in lengths]
    elif kind == "whole number":
        labels = rng.integers(0, 5, size=size).tolist()
    elif kind == "number":
        labels = rng.normal(size=size).tolist()
    else:
        table = rng.random((size, 3)) < 0.4 if "several" in kind else rng.normal(size=(size, 3))
        labels = np.where(rng.random((size, 3)) < 0.2, np.nan, table).tolist()
    rows = data.remove_columns("labels").to_dict() | {"labels": labels}
    if kind != "tokens":
        rows["sample_weight"] = rng.uniform(0.2, 3, size=size).tolist()
    return Dataset.from_dict(rows)


def task_loss(kind: str, logits: torch.Tensor, batch: dict) -> torch.Tensor:
    """Return the loss of one batch of `make_task_dataset`, computed from the definition of the loss."""
    labels, weights = batch["labels"], batch.get("sample_weight")
    if kind == "tokens":
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), weight=torch.tensor([0.3, 2.5])
        )
    if kind == "focal":
        right = logits.softmax(-1).gather(1, labels[:, None]).squeeze(1)
        table = torch.tensor([0.3, 2.5])[labels] * weights
        return (-table * (1 - right) ** 2 * right.log()).sum() / table.sum()
    known = ~labels.isnan()
    weights = weights.reshape(-1, *[1] * (labels.dim() - 1)).expand(labels.shape)[known]
    outputs, labels = logits.reshape(labels.shape)[known], labels[known]
    if "several" in kind:
        positive = torch.tensor([1.0, 3.0, 0.5] if "weighted" in kind else [1.0] * 3).expand(known.shape)[known]
        probability = outputs.sigmoid()
        values = -(positive * labels * probability.log() + (1 - labels) * (1 - probability).log())
    else:
        values = (outputs - labels) ** 2
    return (values * weights).sum() / weights.sum()


@pytest.fixture
def tiny_model():
    return make_model


@pytest.fixture
def tiny_dataset():
    return make_dataset


@pytest.fixture(scope="session")
def aws(tmp_path_factory):
    """S3 and SageMaker, served on the loopback interface."""
    from aws_on_loopback import BUCKET, Aws

    services = Aws(tmp_path_factory.mktemp("aws"))
    services.client("s3").create_bucket(Bucket=BUCKET)
    yield services
    services.server.stop()


@pytest.fixture(scope="session")
def place(aws) -> str:
    """URL of a folder in S3 with the demo's splits from prepare_data.py, and the demo's model."""
    from aws_on_loopback import BUCKET

    done = aws.run("prepare_data.py", "--place", f"s3://{BUCKET}/work", "--data", "demo", "--max-residues", 180)
    assert done.returncode == 0, done.stderr[-3000:]
    aws.upload(Path(demo_model_path()), "work/model")
    return f"s3://{BUCKET}/work"


@pytest.fixture
def table_cache(tmp_path, monkeypatch):
    """A cache folder that no other test reads."""
    monkeypatch.setenv("ESM_EFFICIENT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
