"""WeightedTrainer on two ranks has the gradient and the losses of one batch, and resumed runs end as whole ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import TASK_LOSS, make_dataset, make_model, make_task_dataset
from copies import run_on_ranks
from packaging.version import Version
from peft import get_peft_model
from trainer_runs import WEIGHTS, reference_gradient, reference_loss, relative_error, task_gradient

from esm_efficient import lora_config
from esm_efficient.saving import portable_saving

# (examples, micro-batch per rank, accumulation, kind): 16 examples per optimizer step over both ranks. With 37 examples
# the last step has 5 real ones; with 17 a rank has none in the last step.
TWO_RANKS = [(size, *cut, "full") for size in (32, 37, 17) for cut in ((8, 1), (4, 2), (1, 8))]
TWO_RANKS += [(37, 4, 2, "lora"), (37, 4, 2, "checkpointing")]
TWO_RANKS += [(37, 4, 2, kind) for kind in TASK_LOSS] + [(37, 1, 100, "budget")]
TWO_RANKS += [(1, 4, 1, "one row"), (37, 4, 2, "subclass"), (11, 4, 2, "stream")]
# 16 rows are evaluated in a batch of both ranks: the last batch is whole, or has rows for one rank, or for both.
TWO_RANKS += [(size, 4, 1, "evaluation") for size in (1, 7, 16, 29)]
if Version(transformers.__version__) >= Version("5.23"):
    # Older versions load an optimizer to the device "cpu:0", which torch does not know.
    TWO_RANKS += [(29, 4, 2, f"resumed {order}") for order in ("group_by_length", "random", "stream")]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, tokenizer):
    """Run every case on two processes with gloo."""
    folder = tmp_path_factory.mktemp("two_ranks")
    for size in {case[0] for case in TWO_RANKS if case[0] > 1 and case[3] != "evaluation"}:
        make_dataset(size).save_to_disk(folder / f"data{size}")
    for kind in TASK_LOSS:
        make_task_dataset(kind, 37).save_to_disk(folder / kind)
    model = make_model()
    with portable_saving(model):
        model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    script = Path(__file__).with_name("two_ranks.py")
    run_on_ranks(script, folder, json.dumps([WEIGHTS, TWO_RANKS]), ranks=2, folder=folder)
    return dict(zip(TWO_RANKS, torch.load(folder / "results.pt"), strict=True))


@pytest.mark.parametrize("case", [case for case in TWO_RANKS if case[3] in TASK_LOSS], ids=str)
def test_two_ranks_equal_one_batch_for_every_task(two_ranks, tokenizer, case):
    size, _, _, kind = case
    result, data = two_ranks[case], make_task_dataset(kind, size)
    assert len(result["gradients"]) == 3
    for step, gradient in enumerate(result["gradients"]):
        loss, expected = task_gradient(kind, data.select(range(16 * step, min(16 * step + 16, size))), tokenizer)
        assert relative_error(gradient, expected) <= 1e-5
        assert result["losses"][step] == pytest.approx(loss, rel=1e-5)
    assert result["eval_loss"] == pytest.approx(task_gradient(kind, data, tokenizer)[0], rel=1e-5)


def test_two_ranks_with_a_token_budget_equal_one_batch(two_ranks, tiny_model, tiny_dataset, tokenizer):
    (gradient,) = two_ranks[37, 1, 100, "budget"]["gradients"]
    assert relative_error(gradient, reference_gradient(tiny_model(), tiny_dataset(37), tokenizer)) <= 1e-5


PLAIN = ("full", "lora", "checkpointing", "subclass")


@pytest.mark.parametrize("case", [c for c in TWO_RANKS if c[3] in PLAIN], ids=str)
def test_two_ranks_equal_one_batch(two_ranks, tiny_model, tiny_dataset, tokenizer, case):
    result, data = two_ranks[case], tiny_dataset(case[0])
    assert len(result["gradients"]) == -(-case[0] // 16)
    for step, gradient in enumerate(result["gradients"]):
        rows = data.select(range(16 * step, min(16 * step + 16, case[0])))
        plain = tiny_model()
        if case[3] == "lora":
            torch.manual_seed(1)
            plain = get_peft_model(plain, lora_config(plain, r=2, init_lora_weights=False))
        expected = reference_gradient(plain, rows, tokenizer)
        assert relative_error(gradient, expected) <= 1e-5
        assert result["losses"][step] == pytest.approx(reference_loss(plain, rows, tokenizer).item(), rel=1e-5)
    assert result["eval_loss"] == pytest.approx(reference_loss(plain, data, tokenizer).item(), rel=1e-5)


def test_one_row_on_two_ranks_counts_once(two_ranks, tokenizer):
    result = two_ranks[1, 4, 1, "one row"]
    expected = reference_gradient(make_model(), make_dataset(2).select([0]), tokenizer)
    assert relative_error(result["gradients"][0], expected) <= 1e-5
    assert result["eval_loss"] == pytest.approx(
        reference_loss(make_model(), make_dataset(2).select([0]), tokenizer).item(), rel=1e-5
    )


@pytest.mark.parametrize("case", [c for c in TWO_RANKS if c[3] in (*PLAIN, "budget", "one row", "stream")], ids=str)
def test_two_ranks_count_the_residues_of_each_row_once(two_ranks, case):
    size, kind = case[0], case[3]
    lengths = [len(ids) - 2 for ids in make_dataset(max(size, 2))["input_ids"][:size]]
    assert two_ranks[case]["mean_losses"][0] == pytest.approx(two_ranks[case]["mean_losses"][1], rel=1e-6)
    rows = 48 if kind == "stream" else size  # three steps of the stream, which begins again at its end
    assert two_ranks[case]["residues"] == sum(lengths[row % size] for row in range(rows))


def test_a_stream_on_two_ranks_has_the_gradients_of_one_batch(two_ranks, tokenizer):
    data = make_dataset(11)
    endless = [data[i % 11] for i in range(48)]
    gradients = two_ranks[11, 4, 2, "stream"]["gradients"]
    assert len(gradients) == 3
    for step, gradient in enumerate(gradients):
        expected = reference_gradient(make_model(), endless[16 * step : 16 * step + 16], tokenizer)
        assert relative_error(gradient, expected) <= 1e-5


@pytest.mark.parametrize("case", [c for c in TWO_RANKS if c[3].startswith("resumed")], ids=str)
def test_two_ranks_resume_in_a_later_epoch(two_ranks, case):
    assert torch.equal(two_ranks[case]["resumed"], two_ranks[case]["whole"])


@pytest.mark.parametrize("case", [c for c in TWO_RANKS if c[3] == "evaluation"], ids=str)
def test_each_row_of_a_stream_is_evaluated_once_on_two_ranks(two_ranks, tokenizer, case):
    result, data = two_ranks[case], make_dataset(max(case[0], 2)).select(range(case[0]))
    model = make_model().eval()
    assert result["loss"] == pytest.approx(reference_loss(model, data, tokenizer).item(), rel=1e-5)
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in data]
    for logits, labels in zip(result["logits"], result["labels"], strict=True):
        assert labels == data["labels"][:]
        torch.testing.assert_close(logits, torch.stack(expected), atol=1e-5, rtol=1e-4)
