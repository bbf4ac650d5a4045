"""Training sets without a length: accumulated batches run on across passes, and runs resume in any pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_dataset, make_model, slow_except
from trainer_runs import Gradients, Losses, Passes, Stream, arguments, reference_gradient, relative_error, weighted
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback

from esm_efficient import WeightedTrainer, lora_config, prepare_model
from esm_efficient.errors import DataError
from esm_efficient.training.batches import EndlessRows


class Rows(TrainerCallback):
    """Makes a collator that keeps the rows of every micro-batch."""

    def __init__(self, tokenizer):
        self.seen = []
        self.pad = DataCollatorWithPadding(tokenizer)

    def __call__(self, rows):
        self.seen.append([tuple(row["input_ids"]) for row in rows])
        return self.pad(rows)


def rows_of(size):
    data = make_dataset(size)
    return [data[i] for i in range(size)]


class Few:
    """Rows for the reference, which asks for a length and for indices."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def test_an_accumulated_batch_runs_on_into_the_next_pass(tmp_path, tokenizer):
    rows, gradients = rows_of(10), Gradients()
    args = arguments(tmp_path, 2, 4, max_steps=4)
    weighted(make_model(), args, Stream(rows), tokenizer, callbacks=[gradients], audit=False).train()
    endless = rows * 4
    assert len(gradients.steps) == 4
    for step, gradient in enumerate(gradients.steps):
        expected = reference_gradient(make_model(), Few(endless[8 * step : 8 * step + 8]), tokenizer)
        assert relative_error(gradient, expected) <= 1e-5


def test_without_accumulation_a_stream_has_the_losses_and_evaluations_of_trainer(tmp_path, tokenizer):
    results = {}
    for cls in (Trainer, WeightedTrainer):
        seen = Losses()
        trainer = cls(
            make_model(),
            arguments(tmp_path, 4, max_steps=8, learning_rate=1e-2, eval_strategy="epoch"),
            train_dataset=Passes(rows_of(10)),
            eval_dataset=make_dataset(8),
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[seen],
        )
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        results[cls] = seen.values, [entry["step"] for entry in history]
    assert results[WeightedTrainer][0] == pytest.approx(results[Trainer][0], rel=1e-5)
    assert results[WeightedTrainer][1] == results[Trainer][1] == [3, 6, 8]


def test_epochs_end_in_the_step_that_has_the_last_batch_of_a_pass(tmp_path, tokenizer):
    class Epochs(TrainerCallback):
        def __init__(self):
            self.ends, self.begins = [], []

        def on_epoch_end(self, args, state, control, **kwargs):
            self.ends.append(state.global_step)

        def on_epoch_begin(self, args, state, control, **kwargs):
            self.begins.append(state.global_step)

    seen = Epochs()
    args = arguments(tmp_path, 2, 4, max_steps=5)  # 5 batches per pass, 20 in the run
    weighted(make_model(), args, Stream(rows_of(10)), tokenizer, callbacks=[seen]).train()
    assert seen.ends == [2, 3, 4, 5]
    assert seen.begins == [0, 2, 3, 4]
    seen = Epochs()
    args = arguments(tmp_path, 4, max_steps=8, save_strategy="steps", save_steps=1)  # 3 batches per pass
    weighted(make_model(), args, Stream(rows_of(10)), tokenizer).train()
    trainer = weighted(make_model(), args, Stream(rows_of(10)), tokenizer, callbacks=[seen])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert (seen.ends, seen.begins) == ([6, 8], [4, 6])


@pytest.mark.parametrize(
    ("adapters", "accumulation"), slow_except([(False, 1), (False, 2), (True, 1), (True, 2)], (True, 2))
)
def test_a_stream_resumes_in_its_second_and_third_pass(tmp_path, tokenizer, adapters, accumulation):
    def run(**train):
        collate = Rows(tokenizer)
        model = make_model()
        torch.manual_seed(1)
        adapted = lora_config(model, r=2, init_lora_weights=False, lora_dropout=0.3) if adapters else None
        args = arguments(
            tmp_path, 4, accumulation, max_steps=8, learning_rate=1e-2, save_strategy="steps", save_steps=1
        )
        model = prepare_model(model, adapters=adapted)
        trainer = weighted(model, args, Passes(rows_of(10)), tokenizer, data_collator=collate)
        trainer.train(**train)
        weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        return weights, trainer.state.epoch, trainer.steps_resumed

    whole, epoch, _ = run()
    for step in (2, 3, 4, 7, 8):
        resumed, resumed_epoch, resumed_steps = run(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert torch.equal(resumed, whole)
        assert (resumed_epoch, resumed_steps) == (epoch, step)


def test_a_stream_with_fewer_batches_than_an_accumulated_batch_trains(tmp_path, tokenizer):
    gradients, rows = Gradients(), rows_of(3)
    args = arguments(tmp_path, 1, 8, max_steps=2)
    weighted(make_model(), args, Stream(rows), tokenizer, callbacks=[gradients], audit=False).train()
    expected = reference_gradient(make_model(), Few((rows * 6)[8:16]), tokenizer)
    assert relative_error(gradients.steps[1], expected) <= 1e-5


def test_an_empty_stream_is_refused_and_one_that_ends_stops_the_run(tmp_path, tokenizer, caplog):
    args = arguments(tmp_path, 2, 2, max_steps=9)
    with pytest.raises(DataError, match="fewer than 2 batches"):
        weighted(make_model(), args, Stream([]), tokenizer).train()

    class Once(Stream):
        def __iter__(self):
            rows, self.rows = self.rows, []
            return iter(rows)

    done = weighted(make_model(), args, Once(rows_of(14)), tokenizer, audit=False).train()
    assert done.global_step == 3
    assert "last 1 batch" in caplog.text
    assert caplog.text.count("ended for good") == 1


def test_a_callback_may_end_a_pass_early(tmp_path, tokenizer):
    class EndsEarly(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = state.global_step == 2

    collate = Rows(tokenizer)
    args = arguments(tmp_path, 2, max_steps=4)
    rows = rows_of(10)
    weighted(make_model(), args, Stream(rows), tokenizer, callbacks=[EndsEarly()], data_collator=collate).train()
    first = [tuple(row["input_ids"]) for row in rows[:2]]
    assert collate.seen.count(first) == 2


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_ranks_of_a_stream_share_its_rows_without_repeats(ranks):
    shares = [iter(EndlessRows(Passes(list(range(11))), batch_size=2, ranks=ranks, rank=rank)) for rank in range(ranks)]
    seen = [next(share) for _ in range(11) for share in shares for _ in range(2)]
    expected = [np.random.default_rng(number).permutation(11).tolist() for number in range(2 * ranks)]
    assert seen == np.concatenate(expected)[: 22 * ranks].tolist()
    assert list(EndlessRows(Stream([]), batch_size=2, ranks=ranks, rank=0)) == []


def test_a_stream_without_rows_cannot_be_evaluated(tmp_path, tokenizer):
    trainer = weighted(make_model(), arguments(tmp_path), make_dataset(2), tokenizer)
    with pytest.raises(DataError, match="the evaluation set is a stream without rows: expected at least one"):
        trainer.evaluate(Stream([]))


@pytest.mark.parametrize("size", [8, 10, 3])
def test_a_short_last_batch_of_a_stream_counts_by_its_rows_if_the_user_gives_the_loss(tmp_path, tokenizer, size):
    def own(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs["logits"], labels)

    results = []
    for rows in (Stream(rows_of(size)), make_dataset(size)):
        args = arguments(tmp_path, per_device_eval_batch_size=4, include_for_metrics=["loss"])
        options = {"compute_loss_func": own, "compute_metrics": lambda evaluation: {"count": len(evaluation.losses)}}
        trainer = WeightedTrainer(make_model(), args, data_collator=DataCollatorWithPadding(tokenizer), **options)
        metrics = trainer.evaluate(rows)
        results.append((metrics["eval_loss"], metrics["eval_count"]))
    assert results[0][1] == results[1][1] == size
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
