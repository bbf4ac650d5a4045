"""WeightedTrainer has the same gradient however the accumulated batch is divided, and otherwise works as Trainer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from conftest import TASK_LOSS, each_value, make_dataset, make_model, make_task_dataset, slow_except
from peft import get_peft_model
from trainer_runs import (
    WEIGHTS,
    Gradients,
    Losses,
    arguments,
    reference_gradient,
    reference_loss,
    relative_error,
    resumed_weights,
    task_gradient,
    task_model,
    task_options,
    weighted,
)
from transformers import DataCollatorWithPadding, EsmForSequenceClassification, Trainer, TrainerCallback

from esm_efficient import AuditCallback, WeightedTrainer, compat, lora_config, prepare_model
from esm_efficient.errors import ConfigurationError

CUTS = [(16, 1), (8, 2), (4, 4), (1, 16)]


@pytest.mark.parametrize(("micro_batch", "accumulation"), CUTS)
@pytest.mark.parametrize("size", [32, 37], ids=["even", "uneven"])
def test_gradient_equals_the_one_batch_reference(
    tmp_path, tiny_model, tiny_dataset, tokenizer, micro_batch, accumulation, size
):
    data = tiny_dataset(size)
    gradients, losses = Gradients(), Losses()
    trainer = weighted(
        tiny_model(),
        arguments(tmp_path, micro_batch, accumulation),
        data,
        tokenizer,
        callbacks=[gradients, losses],
        audit=False,
    )
    trainer.train()
    assert len(gradients.steps) == -(-size // 16)
    for step, gradient in enumerate(gradients.steps):
        rows = data.select(range(16 * step, min(16 * step + 16, size)))
        expected = reference_gradient(tiny_model(), rows, tokenizer)
        assert relative_error(gradient, expected) <= 1e-5
        assert losses.values[step] == pytest.approx(reference_loss(tiny_model(), rows, tokenizer).item(), rel=1e-5)


def test_mean_of_micro_batch_means_is_far_off(tiny_model, tiny_dataset, tokenizer):
    """The error of the mean of means is much larger than rounding, so the tests above would detect it."""
    data, model = tiny_dataset(32), tiny_model()
    expected = reference_gradient(model, data, tokenizer)
    parts = [reference_gradient(model, data.select(range(i, i + 4)), tokenizer) for i in range(0, 32, 4)]
    assert relative_error(torch.stack(parts).mean(0), expected) > 0.02


@pytest.mark.parametrize(
    ("adapters", "checkpointing", "smoothing"),
    slow_except(
        itertools.product([False, True], ["off", "plain", "reentrant"], [0.0, 0.1]),
        (False, "off", 0.0),
        (True, "off", 0.1),
        (False, "plain", 0.1),
        (True, "plain", 0.0),
        (False, "reentrant", 0.0),
        (True, "reentrant", 0.1),
    ),
)
def test_exact_with_adapters_checkpointing_and_smoothing(
    tmp_path, tiny_model, tiny_dataset, tokenizer, adapters, checkpointing, smoothing
):
    data = tiny_dataset(13)

    def adapters_of(model):
        torch.manual_seed(1)
        return lora_config(model, r=2, init_lora_weights=False) if adapters else None

    model = tiny_model()
    model = prepare_model(
        model,
        adapters=adapters_of(model),
        gradient_checkpointing=checkpointing != "off",
        use_reentrant=checkpointing == "reentrant",
    )
    gradients = Gradients()
    args = arguments(
        tmp_path,
        4,
        4,
        label_smoothing_factor=smoothing,
        **compat.checkpointing_arguments(checkpointing != "off", use_reentrant=checkpointing == "reentrant"),
    )
    weighted(model, args, data, tokenizer, callbacks=[gradients], audit=False).train()
    # The reference uses neither prepare_model nor checkpointing.
    plain = tiny_model()
    config = adapters_of(plain)
    plain = plain if config is None else get_peft_model(plain, config)
    expected = reference_gradient(plain, data, tokenizer, label_smoothing=smoothing)
    assert relative_error(gradients.steps[0], expected) <= 1e-5


@pytest.mark.parametrize(
    ("kind", "micro_batch", "accumulation"),
    slow_except(
        [(kind, *cut) for kind in TASK_LOSS for cut in ((16, 1), (4, 4), (1, 16))],
        *((kind, 4, 4) for kind in TASK_LOSS),
        *((kind, *((16, 1), (1, 16))[number % 2]) for number, kind in enumerate(TASK_LOSS)),
    ),
)
def test_every_task_is_exact_with_unknown_labels_and_sample_weights(
    tmp_path, tokenizer, kind, micro_batch, accumulation
):
    data, gradients, losses = make_task_dataset(kind, 21), Gradients(), Losses()
    options = task_options(kind, tokenizer) | {"callbacks": [gradients, losses], "audit": False, "eval_dataset": data}
    trainer = weighted(task_model(kind), arguments(tmp_path, micro_batch, accumulation), data, tokenizer, **options)
    trainer.train()
    for step, rows in enumerate((data.select(range(16)), data.select(range(16, 21)))):
        loss, gradient = task_gradient(kind, rows, tokenizer)
        assert relative_error(gradients.steps[step], gradient) <= 1e-5
        assert losses.values[step] == pytest.approx(loss, rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(task_gradient(kind, data, tokenizer)[0], rel=1e-5)


def test_batches_of_a_token_budget_train_every_sequence_once_and_stay_exact(tmp_path, tiny_model, tokenizer):
    data, gradients = make_dataset(37), Gradients()
    token_counts = []
    collate = DataCollatorWithPadding(tokenizer)

    def count_tokens(rows):
        batch = collate(rows)
        token_counts.append(batch["input_ids"].numel())
        return batch

    options = {"token_budget": 64, "callbacks": [gradients], "audit": False, "data_collator": count_tokens}
    # With more accumulation than micro-batches, one optimizer step contains the whole dataset.
    weighted(tiny_model(), arguments(tmp_path, 1, 100), data, tokenizer, **options).train()
    assert len(gradients.steps) == 1
    assert max(token_counts) <= 64
    assert len(token_counts) < 37 / 2
    assert relative_error(gradients.steps[0], reference_gradient(tiny_model(), data, tokenizer)) <= 1e-5


def test_residues_are_counted_without_padding_and_special_tokens(tmp_path, tiny_model, tokenizer):
    data = make_dataset(37)
    trainer = weighted(tiny_model(), arguments(tmp_path, 4, 2, num_train_epochs=2), data, tokenizer, token_budget=64)
    trainer.train()
    assert trainer.residues_trained == 2 * sum(len(ids) - 2 for ids in data["input_ids"])


def test_residues_are_kept_in_a_checkpoint_and_those_of_aborted_attempts_are_not_counted(
    tmp_path, tiny_model, tokenizer
):
    data = make_dataset(32)
    whole = sum(len(ids) - 2 for ids in data["input_ids"])
    args = arguments(tmp_path, 4, 2, save_strategy="steps", save_steps=2, learning_rate=1e-3)
    weighted(tiny_model(), args, data, tokenizer).train()
    resumed = weighted(tiny_model(), args, data, tokenizer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.residues_trained == whole
    assert resumed.residues_resumed == sum(len(ids) - 2 for ids in data["input_ids"][:16])

    class OutOfMemory(TrainerCallback):
        attempts = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.attempts += 1
            if self.attempts == 2:
                raise RuntimeError("CUDA out of memory.")

    args = arguments(tmp_path, 16, auto_find_batch_size=True, train_sampling_strategy="sequential")
    trainer = weighted(tiny_model(), args, data, tokenizer, callbacks=[OutOfMemory()], audit=False)
    trainer.train()
    assert trainer.residues_trained == whole


def test_options_that_a_token_budget_or_regression_would_ignore_are_refused(tmp_path, tiny_model, tokenizer):
    args = arguments(tmp_path, dataloader_drop_last=True)
    with pytest.raises(ConfigurationError, match="dataloader_drop_last"):
        weighted(tiny_model(), args, make_dataset(8), tokenizer, token_budget=64)
    args = arguments(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ConfigurationError, match="label_smoothing_factor"):
        weighted(task_model("number"), args, make_task_dataset("number"), tokenizer, class_weights=None)


@pytest.mark.parametrize("is_own", [True, False], ids=["our loss", "another loss"])
def test_no_warning_says_that_smoothed_labels_are_not_smoothed(tmp_path, tokenizer, recwarn, is_own):
    data, losses = make_task_dataset("several", 8), []
    options = {} if is_own else {"compute_loss_func": lambda outputs, labels, **_: outputs["logits"].sum()}
    for smoothing in (0.0, 0.4):
        args = arguments(tmp_path, label_smoothing_factor=smoothing)
        trainer = weighted(task_model("several"), args, data, tokenizer, class_weights=None, **options)
        losses.append(trainer.evaluate(data)["eval_loss"])
    said = [warning for warning in recwarn if "Label smoothing is not compatible" in str(warning.message)]
    assert (losses[0] == losses[1]) == (not is_own)
    assert len(said) == (0 if is_own else 1)


def test_a_token_budget_refuses_a_stream(tmp_path, tiny_model, tokenizer):
    stream = make_dataset(8).to_iterable_dataset()
    trainer = weighted(tiny_model(), arguments(tmp_path, max_steps=1), stream, tokenizer, token_budget=64)
    with pytest.raises(ConfigurationError, match="with a length"):
        trainer.train()


def test_balanced_weights_of_several_labels_are_negatives_over_positives(tmp_path, tokenizer):
    data = make_task_dataset("several", 40)
    trainer = weighted(task_model("several"), arguments(tmp_path), data, tokenizer, class_weights="balanced")
    labels = np.array(data["labels"][:])
    expected = (labels == 0).sum(0) / (labels == 1).sum(0)
    assert trainer.class_weights == pytest.approx(expected)


@pytest.mark.parametrize(
    ("accumulation", "adapters", "smoothing"),
    slow_except(
        itertools.product([1, 4], [False, True], [0.0, 0.1]),
        (1, False, 0.0),
        (1, True, 0.1),
        (4, False, 0.1),
        (4, True, 0.0),
    ),
)
def test_without_weights_the_loss_of_every_step_is_trainers(
    tmp_path, tiny_model, tiny_dataset, tokenizer, accumulation, adapters, smoothing
):
    losses = {}
    for cls in (Trainer, WeightedTrainer):
        seen = Losses()
        model = tiny_model()
        if adapters:
            torch.manual_seed(1)
            model = get_peft_model(model, lora_config(model, r=2))
        cls(
            model=model,
            args=arguments(
                tmp_path,
                4,
                accumulation,
                learning_rate=1e-2,
                num_train_epochs=2,
                train_sampling_strategy="random",
                label_smoothing_factor=smoothing,
            ),
            train_dataset=tiny_dataset(32),
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[seen],
        ).train()
        losses[cls] = seen.values
    assert len(losses[Trainer]) == 2 * 8 // accumulation
    assert losses[WeightedTrainer] == pytest.approx(losses[Trainer], rel=1e-5)
    assert losses[Trainer][0] != pytest.approx(losses[Trainer][-1], rel=1e-3)


@pytest.mark.parametrize("options", [{"train_sampling_strategy": "group_by_length"}, {"dataloader_drop_last": True}])
def test_predictions_are_of_all_rows_in_their_order(tmp_path, tiny_model, tiny_dataset, tokenizer, options):
    rows = tiny_dataset(13)  # the last batch is not full
    expected = weighted(tiny_model(), arguments(tmp_path), rows, tokenizer).predict(rows)
    args = arguments(tmp_path, **options)
    trainer = weighted(tiny_model(), args, rows, tokenizer, eval_dataset=rows)
    found = trainer.predict(rows)
    np.testing.assert_array_equal(found.label_ids, rows["labels"])
    np.testing.assert_allclose(found.predictions, expected.predictions, atol=1e-6)
    evaluated = torch.cat([batch["labels"] for batch in trainer.get_eval_dataloader()])
    assert evaluated.tolist() == rows["labels"][:]
    assert {name: getattr(args, name) for name in options} == options


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
def test_evaluation_loss_does_not_depend_on_the_batch_size(tmp_path, tiny_model, tiny_dataset, tokenizer, batch_size):
    data, model = tiny_dataset(21), tiny_model()
    trainer = weighted(
        model, arguments(tmp_path, per_device_eval_batch_size=batch_size), data, tokenizer, eval_dataset=data
    )
    expected = reference_loss(tiny_model(), data, tokenizer).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.predict(data).metrics["test_loss"] == pytest.approx(expected, rel=1e-5)


def test_evaluation_during_training_does_not_change_the_training_loss(tmp_path, tiny_model, tiny_dataset, tokenizer):
    runs = []
    for strategy in ("no", "steps"):
        seen = Losses()
        args = arguments(tmp_path, 4, 2, learning_rate=1e-2, eval_strategy=strategy, eval_steps=1)
        weighted(
            tiny_model(), args, tiny_dataset(32), tokenizer, eval_dataset=tiny_dataset(9, seed=3), callbacks=[seen]
        ).train()
        runs.append(seen.values)
    assert runs[0] == pytest.approx(runs[1], rel=1e-6)


def test_predict_works_without_labels_and_with_tuples(tmp_path, tiny_model, tiny_dataset, tokenizer):
    data = tiny_dataset(10)
    trainer = weighted(tiny_model(), arguments(tmp_path), data, tokenizer)
    unlabelled = trainer.predict(data.remove_columns("labels"))
    assert unlabelled.predictions.shape == (10, 2)
    assert "test_loss" not in unlabelled.metrics
    assert np.allclose(trainer.predict(data).predictions, unlabelled.predictions, atol=1e-6)

    class Tuples(EsmForSequenceClassification):
        def forward(self, input_ids=None, attention_mask=None, labels=None):
            return super().forward(input_ids, attention_mask, labels=labels).to_tuple()

    tuples = weighted(tiny_model(Tuples), arguments(tmp_path), data, tokenizer).predict(data)
    assert np.allclose(tuples.predictions, unlabelled.predictions, atol=1e-6)


def test_bf16_autocast_trains_close_to_float32(tmp_path, tiny_model, tiny_dataset, tokenizer):
    seen = {}
    for bf16 in (False, True):
        seen[bf16] = Losses()
        args = arguments(tmp_path, 4, 2, learning_rate=1e-3, bf16=bf16)
        weighted(tiny_model(), args, tiny_dataset(32), tokenizer, callbacks=[seen[bf16]]).train()
    assert seen[True].values == pytest.approx(seen[False].values, rel=2e-2)
    assert seen[True].values != seen[False].values


def test_a_model_that_was_trained_in_half_precision_is_weighted_again(tmp_path, tiny_model, tiny_dataset, tokenizer):
    """accelerate leaves the model's forward decorated, which is no loss of the user's."""
    model, data = tiny_model(), tiny_dataset(16).add_column("sample_weight", [1.0, 5.0] * 8)
    options = {"train_dataset": data, "processing_class": tokenizer}
    WeightedTrainer(model, arguments(tmp_path, 4, bf16=True), **options).train()
    assert "forward" in vars(model)
    found = WeightedTrainer(model, arguments(tmp_path, 4), **options).evaluate(data)["eval_loss"]
    even = data.remove_columns("sample_weight")
    plain = WeightedTrainer(model, arguments(tmp_path, 4), **options | {"train_dataset": even}).evaluate(even)
    assert found != pytest.approx(plain["eval_loss"], rel=1e-4)


@pytest.mark.parametrize(("adapters", "budget"), each_value([False, True], [64, None]))
def test_a_resumed_run_ends_with_the_weights_of_a_whole_run(
    tmp_path, tiny_model, tiny_dataset, tokenizer, adapters, budget
):
    def run(seed, **train):
        # Another seed starts with other trainable weights: the runs agree only if the checkpoint is read.
        model = tiny_model(seed=0 if adapters else seed)
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.classifier.out_proj.weight)
        model = prepare_model(model, adapters=lora_config(model, r=2, init_lora_weights=False) if adapters else None)
        args = arguments(
            tmp_path,
            4,
            2,
            learning_rate=1e-2,
            num_train_epochs=2,
            save_strategy="steps",
            save_steps=3,
            train_sampling_strategy="random",
        )
        weighted(model, args, tiny_dataset(29), tokenizer, token_budget=budget).train(**train)
        return torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])

    whole = run(2)
    for step in (3, 6):  # in the middle of the first epoch, and in the middle of the second
        resumed = run(3, resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert relative_error(resumed, whole) <= 1e-6
    assert relative_error(run(3), whole) > 0.1


@pytest.mark.parametrize("length", [{"max_steps": 3}, {"num_train_epochs": 2}], ids=str)
@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_run_that_resumes_after_its_last_step_takes_none(tmp_path, tokenizer, length, strategy):
    def run(**train):
        model = make_model()
        options = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_strategy": strategy, "save_steps": 1}
        trainer = weighted(model, arguments(tmp_path, 4, 2, **length, **options), make_dataset(29), tokenizer)
        trainer.train(**train)
        return trainer.state.global_step, torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    steps, whole = run()
    again, resumed = run(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
    assert again == steps
    assert torch.equal(resumed, whole)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("strategy", "seedable"), [("group_by_length", True), ("random", False)])
def test_a_run_resumes_in_a_later_epoch_with_its_order(tmp_path, tokenizer, strategy, seedable, drop_last):
    whole, resumed = (resumed_weights(tmp_path, tokenizer, strategy, seedable, drop_last, step) for step in (None, 5))
    assert torch.equal(resumed, whole)


def test_the_first_epoch_of_one_process_has_the_order_of_trainer(tmp_path, tiny_model, tiny_dataset, tokenizer):
    losses = {}
    for cls in (Trainer, WeightedTrainer):
        seen = Losses()
        args = arguments(tmp_path, 4, train_sampling_strategy="group_by_length")
        collate = DataCollatorWithPadding(tokenizer)
        cls(tiny_model(), args, train_dataset=tiny_dataset(32), data_collator=collate, callbacks=[seen]).train()
        losses[cls] = seen.values
    assert losses[WeightedTrainer] == pytest.approx(losses[Trainer], rel=1e-5)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path, tiny_model, tiny_dataset, tokenizer):
    from safetensors.torch import load_file, save_file

    args = arguments(tmp_path, 4, 2, learning_rate=1e-2, save_strategy="steps", save_steps=2)
    weighted(tiny_model(), args, tiny_dataset(32), tokenizer).train()
    path = tmp_path / "checkpoint-2" / "model.safetensors"
    weights = load_file(path)
    del weights["esm.encoder.layer.0.LayerNorm.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"esm\.encoder\.layer\.0\.LayerNorm\.weight"):
        weighted(tiny_model(), args, tiny_dataset(32), tokenizer).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


def test_balanced_weights_are_those_of_scikit_learn(tmp_path, tiny_model, tiny_dataset, tokenizer):
    from sklearn.utils.class_weight import compute_class_weight

    data = tiny_dataset(50)
    trainer = weighted(tiny_model(), arguments(tmp_path), data, tokenizer, class_weights="balanced")
    labels = data["labels"][:]
    expected = compute_class_weight("balanced", classes=np.array([0, 1]), y=np.array(labels))
    assert trainer.class_weights == pytest.approx(expected)


def test_weights_by_label_name_are_in_the_order_of_the_config(tmp_path, tiny_model, tiny_dataset, tokenizer):
    model = prepare_model(tiny_model(), label_names=["non-membrane", "membrane"])
    trainer = weighted(
        model, arguments(tmp_path), tiny_dataset(8), tokenizer, class_weights={"membrane": 3.0, "non-membrane": 1.0}
    )
    assert trainer.class_weights.tolist() == [1.0, 3.0]


def test_class_weights_are_keyword_only(tmp_path, tiny_model):
    with pytest.raises(TypeError):
        WeightedTrainer(tiny_model(), arguments(tmp_path), *[None] * 11, WEIGHTS, True)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "one number for each"),
        ([1.0, -1.0], ">= 0"),
        ([0.0, 0.0], "not all of them 0"),
        ([1.0, float("nan")], "finite"),
        ({"LABEL_0": 1.0}, "LABEL_1"),
        ("equal", '"balanced"'),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, tiny_model, tiny_dataset, tokenizer, weights, message):
    with pytest.raises(ConfigurationError, match=message):
        weighted(tiny_model(), arguments(tmp_path), tiny_dataset(8), tokenizer, class_weights=weights)


def test_the_audit_is_on_unless_it_is_switched_off(tmp_path, tiny_model, tiny_dataset, tokenizer):
    def audits(**options):
        trainer = weighted(tiny_model(), arguments(tmp_path), tiny_dataset(8), tokenizer, **options)
        return [c for c in trainer.callback_handler.callbacks if isinstance(c, AuditCallback)]

    custom = AuditCallback(patience=9)
    assert len(audits()) == 1
    assert audits(callbacks=[custom]) == [custom]
    assert audits(audit=False) == []
