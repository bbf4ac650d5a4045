"""Several ranks train to the weights of one process: all recipes, DDP and FSDP2, token budgets, and resumed runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import rank_runs
import torch
import transformers
from conftest import make_dataset, make_model
from copies import run_on_ranks
from datasets import DatasetDict
from packaging.version import Version
from safetensors.torch import load_file

from esm_efficient import RECIPES

# fully_shard of torch 2.6 does not run on a CPU, and transformers before 5.20 has other options for FSDP2.
has_fsdp2 = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)
without_fsdp2 = pytest.mark.skipif(not has_fsdp2, reason="FSDP2 of this version of torch does not run on a CPU")
# With older versions the model that was passed to the Trainer is not the one that is sharded.
stores_shards = Version(transformers.__version__) >= Version("5.23")
CHECKPOINTS = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3}
BUDGET = {"token_budget": 64, **CHECKPOINTS}

# 37 rows: the last batch of an epoch has 5 rows, so that ranks have none, or repeated ones.
QUICK = [
    {"name": "adapters", "recipe": "all", "rows": 37, "options": CHECKPOINTS},
    {"name": "budget", "recipe": "lora", "rows": 64, "options": BUDGET},
    {"name": "sharded adapters", "recipe": "all", "rows": 37, "sharded": True, "options": CHECKPOINTS},
    {"name": "sharded", "recipe": "base", "rows": 37, "sharded": True},
    {"name": "sharded bf16", "recipe": "lora", "rows": 37, "sharded": True, "options": {"precision": "bf16"}},
]
EVERY = [
    *({"name": f"ddp {recipe}", "recipe": recipe, "rows": 37, "options": CHECKPOINTS} for recipe in RECIPES),
    *({"name": f"fsdp {recipe}", "recipe": recipe, "rows": 37, "sharded": True} for recipe in RECIPES),
    {"name": "ddp budget", "recipe": "lora", "rows": 64, "options": BUDGET},
    {"name": "fsdp budget", "recipe": "lora", "rows": 64, "sharded": True, "options": BUDGET},
    *(
        {"name": f"{kind} {pooling}", "recipe": "lora", "rows": 37, "pooling": pooling, "options": CHECKPOINTS}
        | ({"sharded": True} if kind == "fsdp" else {})
        for pooling in ("mean", "attention")
        for kind in ("ddp", "fsdp")
    ),
    {"name": "ddp full budget", "recipe": "base", "rows": 64, "options": BUDGET},
]


FEW = {*(f"{kind} {name}" for kind in ("ddp", "fsdp") for name in ("base", "all", "budget", "mean")), "ddp frozen"}
"""Cases that run on four ranks too."""


def resumed(case, ranks):
    """The same case, resumed from the third optimizer step of a run on `ranks` ranks."""
    return case | {"name": f"{case['name']} resumed", "resume": f"{case['name']}-{ranks}/checkpoint-3"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A folder with a tiny model and data sets."""
    path = tmp_path_factory.mktemp("ranks")
    make_model().save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    for rows in (37, 64):
        DatasetDict(train=make_dataset(rows), test=make_dataset(13, seed=1)).save_to_disk(path / f"data{rows}")
    return path


def on_ranks(folder, ranks, cases):
    """Run cases on ranks and return each rank's results."""
    run_on_ranks(Path(rank_runs.__file__), folder, json.dumps(cases), ranks=ranks, folder=folder, timeout=1200)
    return [json.loads((folder / f"rank{rank}-of-{ranks}.json").read_text()) for rank in range(ranks)]


def weights(folder, name, ranks):
    """The weights that a run has saved, in one vector."""
    (file,) = [*(folder / f"{name}-{ranks}").glob("model/*.safetensors")] or [
        *(folder / f"{name}-{ranks}").glob("adapter/*.safetensors")
    ]
    tensors = load_file(file)
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def assert_as_one_process(folder, case, ranks, results, *, alone):
    """Compare a run with that of one process: steps, saved weights, metrics, and the share that a rank stores."""
    name = case["name"]
    expected, found = weights(folder, alone["name"], 1), weights(folder, name, ranks)
    tolerance = 1e-2 if case.get("options", {}).get("precision") == "bf16" else 1e-6
    assert float((found - expected).norm() / expected.norm()) < tolerance
    for result in results:
        assert result[name]["steps"] == alone["steps"]
        assert result[name]["metrics"]["loss"] == pytest.approx(alone["metrics"]["loss"], rel=10 * tolerance)
        if stores_shards or not case.get("sharded"):
            assert result[name]["layers"] == alone["layers"]  # the audit has seen these move
            share = 1 / ranks if case.get("sharded") and ranks > 1 else 1
            assert result[name]["share"] == pytest.approx(share, abs=0.02)


def alone(folder, case):
    """Run a case in this process."""
    return rank_runs.run(folder, case) | {"name": case["name"]}


@pytest.mark.slow
def test_two_ranks_train_to_the_weights_of_one_process_which_resumes_their_run(folder):
    cases = [case for case in QUICK if has_fsdp2 or not case.get("sharded")]
    results = on_ranks(folder, 2, cases)
    for case in cases:
        whole = alone(folder, case)
        assert_as_one_process(folder, case, 2, results, alone=whole)
        if "save_steps" in case.get("options", {}) and not case.get("sharded"):
            again = resumed(case, 2)
            assert_as_one_process(folder, again, 1, [{again["name"]: alone(folder, again)}], alone=whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sharded", "ranks", "others"),
    [
        (False, 2, (1, 4)),
        # A checkpoint of sharded ranks resumes on sharded ranks only.
        pytest.param(True, 2, (), marks=without_fsdp2),
        pytest.param(True, 4, (2,), marks=without_fsdp2),
    ],
)
def test_every_recipe_trains_on_several_ranks_and_resumes_on_other_numbers(folder, sharded, ranks, others):
    cases = [case for case in EVERY if case.get("sharded", False) == sharded and (ranks == 2 or case["name"] in FEW)]
    wholes = {case["name"]: alone(folder, case) for case in cases}
    results = on_ranks(folder, ranks, cases)
    for case in cases:
        assert_as_one_process(folder, case, ranks, results, alone=wholes[case["name"]])
    saved = [case for case in cases if "save_steps" in case.get("options", {}) and case["name"] in FEW]
    for other in others:
        again = [resumed(case, ranks) for case in saved]
        if other == 1:
            results = [{case["name"]: alone(folder, case) for case in again}]
        else:
            results = on_ranks(folder, other, again)
        for case in again:
            whole = wholes[case["name"].removesuffix(" resumed")]
            assert_as_one_process(folder, case, other, results, alone=whole)
