"""A trainer's data loaders say where the tokens of a batch are, so that the lean encoder need not read the mask."""

from __future__ import annotations

import pytest
import torch
from conftest import make_dataset, make_model
from trainer_runs import Gradients, arguments, relative_error, weighted
from transformers import DataCollatorWithPadding, DefaultDataCollator

from esm_efficient import WeightedTrainer, apply_lean_encoder
from esm_efficient.encoder import forward
from esm_efficient.errors import ConfigurationError
from esm_efficient.training.collating import PACKING, PackingCollator, attach_packing_of


def run(folder, tokenizer, *, lean=True, stream=False, options=(), **changes):
    data = make_dataset()
    model = apply_lean_encoder(make_model()) if lean else make_model()
    gradients = Gradients()
    args = arguments(folder, micro_batch=4, accumulation=2, **changes)
    given = data.to_iterable_dataset() if stream else data
    trainer = weighted(model, args, given, tokenizer, callbacks=[gradients], class_weights=None, **dict(options))
    collator = trainer.data_collator
    trainer.train()
    assert trainer.data_collator is collator
    return torch.stack(gradients.steps)


def refuse(mask, shape):
    raise AssertionError("the encoder read the attention mask")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"options": {"token_budget": 200}},
        {"stream": True, "max_steps": 2},
        {"dataloader_num_workers": 1},
        {"remove_unused_columns": False},
    ],
    ids=["plain", "token budget", "stream", "worker", "all columns"],
)
def test_training_reads_no_mask_and_has_the_gradient_of_the_plain_model(tmp_path, tokenizer, monkeypatch, options):
    expected = run(tmp_path, tokenizer, lean=False, **options)
    monkeypatch.setattr(forward, "make_packing", refuse)
    assert relative_error(run(tmp_path, tokenizer, **options), expected) < 1e-5


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_reads_no_mask_and_has_the_loss_of_the_plain_model(
    tmp_path, tokenizer, monkeypatch, stream, workers
):
    data = make_dataset()
    data = data.to_iterable_dataset() if stream else data
    args = arguments(tmp_path, max_steps=1, dataloader_num_workers=workers, per_device_eval_batch_size=3)
    model = make_model()

    def evaluate():
        trainer = weighted(model, args, data, tokenizer, eval_dataset=data, class_weights=None)
        return trainer.evaluate()["eval_loss"], torch.from_numpy(trainer.predict(data).predictions)

    loss, logits = evaluate()
    apply_lean_encoder(model)
    monkeypatch.setattr(forward, "make_packing", refuse)
    found, found_logits = evaluate()
    assert found == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(found_logits, logits, atol=1e-6)


def test_batches_that_the_first_rank_dispatches_have_no_packing(tmp_path, tokenizer):
    """The loader would cut a packing as if it had a row per sequence."""
    options = {"stream": True, "max_steps": 2, "accelerator_config": {"dispatch_batches": True}}
    expected = run(tmp_path, tokenizer, lean=False, **options)
    assert relative_error(run(tmp_path, tokenizer, **options), expected) < 1e-5


def test_only_a_model_with_the_lean_encoder_gets_packings(tmp_path, tokenizer):
    for model, has in ((make_model(), False), (apply_lean_encoder(make_model()), True)):
        trainer = weighted(model, arguments(tmp_path), make_dataset(), tokenizer)
        assert (PACKING in next(iter(trainer.get_train_dataloader()))) == has


def test_a_batch_without_a_mask_of_sequences_and_tokens_is_left_as_it_is(tokenizer):
    rows = [{"input_ids": [0, 5, 2]}, {"input_ids": [0, 5, 6, 7, 2]}]
    batch = PackingCollator(DataCollatorWithPadding(tokenizer))(rows)
    assert batch[PACKING]["lengths"] == (3, 5)
    taken = attach_packing_of(batch)
    assert set(taken) == {"input_ids", "attention_mask"}
    for other in ({"states": torch.ones(2, 3)}, {"attention_mask": torch.ones(2, 1, 3, 3)}, [1, 2]):
        assert PackingCollator(lambda rows, other=other: other)(rows) is other
        assert PACKING not in other
        assert attach_packing_of(other) is other


@pytest.mark.parametrize("options", [{}, {"token_budget": 200}], ids=["plain", "token budget"])
@pytest.mark.parametrize("collator", [None, DefaultDataCollator()], ids=["no collator", "a collator that does not pad"])
def test_sequences_of_unequal_lengths_need_a_tokenizer_or_a_collator_that_pads(tmp_path, collator, options):
    data = make_dataset()
    lengths = [len(ids) for ids in data["input_ids"]]
    trainer = WeightedTrainer(
        make_model(), arguments(tmp_path, 8, 1), train_dataset=data, data_collator=collator, **options
    )
    found = f"{min(lengths)} to {max(lengths)} tokens, .* Give processing_class=tokenizer, or data_collator="
    with pytest.raises(ConfigurationError, match=found):
        trainer.train()


def test_sequences_that_need_no_padding_train_without_a_tokenizer(tmp_path):
    data = make_dataset()
    equal = data.map(lambda row: {name: row[name][:7] for name in ("input_ids", "attention_mask")})
    for rows, size in ((equal, 8), (data, 1)):
        trainer = WeightedTrainer(make_model(), arguments(tmp_path, size, 1, max_steps=1), train_dataset=rows)
        assert trainer.train().global_step == 1
