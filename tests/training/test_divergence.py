"""A run with broken numbers stops within one logging step, says why, and saves nothing broken."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import Accelerator
from conftest import make_dataset, make_model
from datasets import Value
from safetensors.torch import load_file
from trainer_runs import Stream, arguments, weighted
from transformers import TrainerCallback

from esm_efficient import WeightedTrainer, prepare_model
from esm_efficient.errors import DataError, DivergenceError
from esm_efficient.training.divergence import DivergenceWatch, check_parameters


def with_nulls(labels):
    """Return a data set with these class ids, of which some are null."""
    rows = make_dataset(len(labels)).remove_columns("labels")
    return rows.add_column("labels", labels)


def numbers(values):
    data = make_dataset(len(values)).remove_columns("labels")
    return data.add_column("labels", [float(value) for value in values])


class Breaks(TrainerCallback):
    """Sets a parameter to NaN after an optimizer step."""

    def __init__(self, step, value=float("nan")):
        self.step, self.value = step, value

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            model.classifier.out_proj.weight.data[0, 0] = self.value


def run(tmp_path, tokenizer, *, model=None, data=None, callbacks=(), cls=WeightedTrainer, options=(), **changes):
    args = arguments(tmp_path, 4, 1, **({"learning_rate": 1e-3, "logging_steps": 3, "num_train_epochs": 2} | changes))
    data = make_dataset(32) if data is None else data
    trainer = weighted(
        model or make_model(),
        args,
        data,
        tokenizer,
        callbacks=list(callbacks),
        audit=False,
        **({"class_weights": None} | dict(options)),
    )
    return trainer, trainer.train


@pytest.mark.parametrize("broken", [2, 4])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_loss_stops_the_run_at_the_next_logging_step(tmp_path, tokenizer, broken, value):
    trainer, train = run(tmp_path, tokenizer, callbacks=[Breaks(broken, value)], max_grad_norm=1.0)
    with pytest.raises(
        DivergenceError,
        match=f"since step {broken + 1} .*learning_rate .it is 0.001|norm of the gradient is nan at step {broken + 1}",
    ):
        train()
    assert trainer.state.global_step <= 3 * (broken // 3 + 1)
    assert all(entry.get("loss") != 0.0 for entry in trainer.state.log_history)


def test_a_rate_that_is_far_too_large_stops_the_run_and_saves_nothing_broken(tmp_path, tokenizer):
    _, train = run(tmp_path, tokenizer, learning_rate=1e6, save_strategy="steps", save_steps=1, logging_steps=5)
    with pytest.raises(DivergenceError, match=r"learning_rate .it is 1e\+06"):
        train()
    saved = list(tmp_path.glob("checkpoint-*"))
    assert saved
    for folder in saved:
        assert all(value.isfinite().all() for value in load_file(folder / "model.safetensors").values())


def test_a_broken_parameter_is_not_saved_and_is_named(tmp_path, tokenizer):
    _, train = run(tmp_path, tokenizer, callbacks=[Breaks(4)], save_strategy="steps", save_steps=2, logging_steps=100)
    with pytest.raises(DivergenceError, match=r"1 of \d+ trainable parameters .*classifier\.out_proj\.weight"):
        train()
    saved = sorted(folder.name for folder in tmp_path.glob("checkpoint-*") if (folder / "model.safetensors").exists())
    assert saved == ["checkpoint-2"]
    assert json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2


def test_a_parameter_that_breaks_in_the_last_step_is_found(tmp_path, tokenizer):
    _, train = run(tmp_path, tokenizer, callbacks=[Breaks(16)], logging_steps=100)
    with pytest.raises(DivergenceError, match=r"classifier\.out_proj\.weight"):
        train()


def test_a_loss_that_is_broken_in_the_first_step_points_at_the_data(tmp_path, tokenizer):
    model = make_model()
    model.classifier.dense.weight.data.fill_(float("nan"))
    _, train = run(tmp_path, tokenizer, model=model)
    with pytest.raises(DivergenceError, match="before any parameter has changed"):
        train()


def test_a_broken_number_stops_the_run_before_an_evaluation(tmp_path, tokenizer):
    def fails(prediction):
        raise AssertionError("metrics of a broken model")

    options = {"eval_dataset": make_dataset(8), "compute_metrics": fails}
    _, train = run(
        tmp_path,
        tokenizer,
        callbacks=[Breaks(1)],
        eval_strategy="steps",
        eval_steps=3,
        logging_steps=100,
        options=options,
    )
    with pytest.raises(DivergenceError, match="since step 2"):
        train()


def test_a_custom_loss_is_watched_too(tmp_path, tokenizer):
    options = {"compute_loss_func": lambda outputs, labels, **kwargs: outputs.logits.sum() * torch.nan}
    _, train = run(tmp_path, tokenizer, options=options)
    with pytest.raises(DivergenceError, match="since step 1"):
        train()


def test_an_exploding_loss_stops_the_run_and_an_exploding_gradient_is_warned_of(tmp_path, tokenizer, caplog):
    _, train = run(tmp_path, tokenizer, callbacks=[Breaks(5, 1e12)], logging_steps=1, max_grad_norm=1.0)
    with pytest.raises(DivergenceError, match=r"exploded.*at step 6.*learning_rate"):
        train()
    watch = DivergenceWatch(Accelerator())
    args = arguments(tmp_path)
    for norm in (0.5, 900.0, 2e4, 3e4):
        watch.look_at_logs({"loss": 0.7, "grad_norm": norm}, args)
    assert caplog.text.count("gradient explodes") == 1
    assert "2e+04" in caplog.text
    with pytest.raises(DivergenceError, match="norm of the gradient is inf"):
        watch.look_at_logs({"grad_norm": float("inf")}, args)


def test_equal_logits_are_warned_of_at_the_first_logging_step(tmp_path, tokenizer, caplog):
    model = make_model()
    model.classifier.dense.weight.data.zero_()
    model.classifier.dense.bias.data.zero_()
    model.classifier.out_proj.weight.data.zero_()
    _, train = run(tmp_path, tokenizer, model=prepare_model(model, head_only=True), learning_rate=0.0)
    train()
    assert caplog.text.count("all logits were equal") == 1
    assert "up to step 3" in caplog.text


def test_healthy_runs_raise_and_warn_of_nothing(tmp_path, tokenizer, caplog):
    _, train = run(tmp_path, tokenizer, max_grad_norm=1.0, save_strategy="steps", save_steps=4, fp16=False)
    train()
    assert not [record for record in caplog.records if "divergence" in record.name]


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (make_dataset(8).cast_column("labels", Value("int64")).map(lambda row: {"labels": -100}), {}, "no label of"),
        (numbers([float("nan")] * 8), {"num_labels": 1}, "no label of"),
        (numbers([0.5] * 5 + [1e30] + [0.5] * 2), {"num_labels": 1}, r"row 5 .*1e\+30"),
        (make_dataset(8, classes=5), {}, r"row 2 .* label 2: expected a class id from 0 to 1"),
        (with_nulls([0, 1, 1, None]), {}, r"row 3 .* label null: expected a class id from 0 to 1"),
        (with_nulls([0, None, 1, 1]), {"problem_type": "single_label_classification"}, "row 1 .* label null"),
        (make_dataset(8).remove_columns("labels").add_column("labels", [[0, 1, 1]] * 8), {"num_labels": 3}, "floats"),
        (
            make_dataset(8).remove_columns("labels").add_column("labels", [[0.0, 1.0, 4.0]] * 8),
            {"num_labels": 3},
            r"row 0 .* label 4: expected a number from 0 to 1",
        ),
        (make_dataset(8).select([]), {}, "no rows"),
    ],
    ids=["all -100", "all NaN", "huge", "out of range", "null", "null id", "multi-hot integers", "not 0 to 1", "empty"],
)
def test_labels_that_do_not_fit_are_refused_before_the_first_step(tmp_path, tokenizer, data, options, message):
    trainer, train = run(tmp_path, tokenizer, model=make_model(**options), data=data)
    with pytest.raises(DataError, match=message):
        train()
    assert trainer.state.global_step == 0


def test_labels_of_a_stream_are_checked_in_their_batch(tmp_path, tokenizer):
    rows = [dict(row) for row in make_dataset(8)]
    rows[6]["labels"] = 7
    _, train = run(tmp_path, tokenizer, data=Stream(rows), max_steps=4)
    with pytest.raises(DataError, match=r"first in its row 2: 7\. Expected class ids from 0 to 1"):
        train()
    unknown = [row | {"labels": -100} for row in rows]
    _, train = run(tmp_path, tokenizer, data=Stream(unknown), max_steps=4)
    with pytest.raises(DataError, match="no label had a weight in 4 step"):
        train()


def test_labels_that_a_collator_changes_are_not_judged_before(tmp_path, tokenizer):
    from transformers import DataCollatorWithPadding

    pad = DataCollatorWithPadding(tokenizer)

    def shifted(rows):
        batch = pad(rows)
        return dict(batch) | {"labels": batch["labels"] % 2}

    trainer, train = run(tmp_path, tokenizer, data=make_dataset(16, classes=4), options={"data_collator": shifted})
    train()
    assert trainer.state.global_step == 8


def test_an_empty_evaluation_set_is_refused(tmp_path, tokenizer):
    trainer, _ = run(tmp_path, tokenizer)
    with pytest.raises(DataError, match="no rows"):
        trainer.evaluate(make_dataset(8).select([]))


def test_wrong_labels_are_counted_where_looking_at_them_takes_time(tmp_path):
    watch = DivergenceWatch(Accelerator())
    watch.observe_labels(torch.tensor([False, True, True]))
    with pytest.raises(DataError, match="2 label"):
        watch.look(arguments(tmp_path))


def test_only_trainable_parameters_are_checked(tmp_path):
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    model.bias.data.fill_(float("nan"))
    check_parameters(model, arguments(tmp_path))
    model.weight.data[0, 0] = float("inf")
    with pytest.raises(DivergenceError, match=r"1 of 1 trainable parameters .*weight"):
        check_parameters(model, arguments(tmp_path))
