"""WeightedTrainer with subclasses, custom models and losses, and labels that only the batch shows."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest
import torch
from conftest import make_dataset, make_model, make_task_dataset
from datasets import Value
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch.nn import functional as F
from trainer_runs import WEIGHTS, Gradients, Losses, Stream, arguments, reference_loss, relative_error, weighted
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EsmForMaskedLM,
    EsmForSequenceClassification,
    Trainer,
    TrainerCallback,
)

from esm_efficient import WeightedTrainer, compat, lora_config, prepare_model
from esm_efficient.errors import ConfigurationError, DataError


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_a_custom_model_class_keeps_its_loss_unless_weights_are_given(
    tmp_path, tiny_model, tiny_dataset, tokenizer, weights
):
    class Own(EsmForSequenceClassification):
        def forward(self, input_ids=None, attention_mask=None, labels=None):
            output = super().forward(input_ids, attention_mask, labels=labels)
            if labels is not None:
                output.loss = output.loss * 0.0 + 5.0
            return output

    seen, data = Losses(), tiny_dataset(8)
    options = {"class_weights": weights, "callbacks": [seen], "audit": False}
    weighted(tiny_model(Own), arguments(tmp_path, 8), data, tokenizer, **options).train()
    expected = 5.0 if weights is None else reference_loss(tiny_model(), data, tokenizer).item()
    assert seen.values == pytest.approx([expected], rel=1e-5)


def test_the_tutorials_call_trains_every_adapter(tmp_path, tiny_model, tiny_dataset, tokenizer):
    """Weights as a tensor, a peft model, accumulation and checkpointing in the arguments, one evaluation per epoch."""
    model = get_peft_model(tiny_model(), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "key", "value"]))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = WeightedTrainer(
        class_weights=torch.tensor(WEIGHTS),
        model=model,
        args=arguments(
            tmp_path, 4, 2, learning_rate=1e-2, eval_strategy="epoch", **compat.checkpointing_arguments(True)
        ),
        train_dataset=tiny_dataset(32),
        eval_dataset=tiny_dataset(16, seed=1),
        processing_class=tokenizer,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    trainer.train()
    unmoved = [name for name, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[name])]
    assert unmoved == []
    data = tiny_dataset(16, seed=1)
    batch = DataCollatorWithPadding(tokenizer)([data[i] for i in range(16)])
    with torch.no_grad():
        right = model.eval()(batch["input_ids"], batch["attention_mask"]).logits.argmax(-1) == batch["labels"]
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(right.float().mean().item())


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_the_saved_config_has_the_task_and_the_label_names(tmp_path, tiny_model, tiny_dataset, tokenizer, adapters):
    model = tiny_model()
    names = ["non-membrane", "membrane"]
    model = prepare_model(model, adapters=lora_config(model, r=2) if adapters else None, label_names=names)
    trainer = weighted(model, arguments(tmp_path), tiny_dataset(8), tokenizer)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    folder = tmp_path / "saved" / ("base_config" if adapters else "")
    config = json.loads((folder / "config.json").read_text())
    assert config["problem_type"] == "single_label_classification"
    assert config["id2label"] == {"0": "non-membrane", "1": "membrane"}
    assert config["label2id"] == {"non-membrane": 0, "membrane": 1}
    assert (tmp_path / "saved" / "adapter_config.json").exists() == adapters
    # transformers would load a folder with a config.json as a whole model.
    assert (tmp_path / "saved" / "config.json").exists() != adapters
    if not adapters:
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
        assert loaded.config.id2label[1] == "membrane"


class TutorialsTrainer(WeightedTrainer):
    """Computes its own weighted mean, as the tutorial does."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels, weight=torch.tensor(WEIGHTS))
        return (loss, outputs) if return_outputs else loss


class PlainTutorialsTrainer(Trainer):
    compute_loss = TutorialsTrainer.compute_loss

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        compat.leave_division_to_trainer(self.accelerator)  # transformers 5.3 divides the loss twice


class MeanTutorialsTrainer(TutorialsTrainer):
    loss_is_scaled_for_ga = False


class PenaltyTrainer(WeightedTrainer):
    """Adds a mean over the micro-batch to the weighted loss, and passes on no number of items."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        loss = loss + 0.1 * outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


class MeanPenaltyTrainer(PenaltyTrainer):
    loss_is_scaled_for_ga = False


def gradients_of(cls, tmp_path, model, data, tokenizer, accumulation=4, **options):
    gradients, losses = Gradients(), Losses()
    options = {"callbacks": [gradients, losses], "data_collator": DataCollatorWithPadding(tokenizer)} | options
    cls(model, arguments(tmp_path, 16 // accumulation, accumulation), train_dataset=data, **options).train()
    return gradients.steps, losses.values


@pytest.mark.parametrize("cls", [TutorialsTrainer, MeanTutorialsTrainer])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_subclass_with_its_own_loss_has_the_gradient_of_trainer(
    tmp_path, tiny_model, tiny_dataset, tokenizer, cls, accumulation
):
    data = tiny_dataset(21)
    expected = gradients_of(PlainTutorialsTrainer, tmp_path, tiny_model(), data, tokenizer, accumulation)
    gradients, losses = gradients_of(cls, tmp_path, tiny_model(), data, tokenizer, accumulation, audit=False)
    assert losses == pytest.approx(expected[1], rel=1e-6)
    assert all(relative_error(*pair) <= 1e-6 for pair in zip(gradients, expected[0], strict=True))


@pytest.mark.parametrize("cls", [PenaltyTrainer, MeanPenaltyTrainer])
def test_a_subclass_may_add_a_mean_to_the_weighted_loss(tmp_path, tiny_model, tiny_dataset, tokenizer, cls):
    data, model = tiny_dataset(16), tiny_model()
    batch = DataCollatorWithPadding(tokenizer)([data[i] for i in range(16)])
    expected = reference_loss(model, data, tokenizer) + 0.1 * model(**batch).logits.square().mean()
    expected.backward()
    vector = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    gradients, losses = gradients_of(cls, tmp_path, tiny_model(), data, tokenizer, audit=False, class_weights=WEIGHTS)
    assert losses == pytest.approx([expected.item()], rel=1e-5)
    assert relative_error(gradients[0], vector) <= 1e-5


@pytest.mark.parametrize("options", [{"class_weights": WEIGHTS}, {"focal_gamma": 2.0}], ids=str)
def test_options_of_the_loss_that_a_subclass_does_not_use_are_refused(
    tmp_path, tiny_model, tiny_dataset, tokenizer, options
):
    with pytest.raises(ConfigurationError, match=r"TutorialsTrainer\.compute_loss does not use them"):
        gradients_of(TutorialsTrainer, tmp_path, tiny_model(), tiny_dataset(16), tokenizer, **options)


def test_a_subclass_may_have_labels_that_the_weighted_loss_refuses(tmp_path, tiny_model, tiny_dataset, tokenizer):
    class SoftLabels(WeightedTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss = F.mse_loss(model(inputs["input_ids"]).logits[:, 0], inputs["labels"])
            return (loss, None) if return_outputs else loss

    data = tiny_dataset(16).cast_column("labels", Value("float32"))
    model = tiny_model(problem_type="single_label_classification")
    _, losses = gradients_of(SoftLabels, tmp_path, model, data, tokenizer, audit=False)
    assert len(losses) == 1


class StreamWithLength(Stream):
    def __len__(self):
        return len(self.rows)


def several_labels(size=16):
    data = make_task_dataset("several", size).remove_columns("sample_weight")
    return [row | {"labels": torch.tensor(row["labels"]).nan_to_num(0.0)} for row in data]


def tensor_collator(tokenizer):
    """Return a collator for rows whose labels are tensors."""
    pad = DataCollatorWithPadding(tokenizer)

    def collate(rows):
        rest = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
        return dict(pad(rest)) | {"labels": torch.stack([row["labels"] for row in rows])}

    return collate


@pytest.mark.parametrize("cls", [Stream, StreamWithLength, list])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_labels_are_recognised_in_the_first_batch(tmp_path, tokenizer, cls, dtype):
    rows, losses, model = several_labels(), {}, make_model(num_labels=3)
    rows = [row | {"labels": row["labels"].to(dtype)} for row in rows]
    for trainer in (Trainer, WeightedTrainer):
        seen, model = Losses(), make_model(num_labels=3)
        args = arguments(tmp_path, 8, max_steps=2)
        collate = tensor_collator(tokenizer)
        trainer(model, args, train_dataset=cls(rows), data_collator=collate, callbacks=[seen]).train()
        losses[trainer] = seen.values
        assert model.config.problem_type == "multi_label_classification"
    assert losses[WeightedTrainer] == pytest.approx(losses[Trainer], rel=1e-5 if dtype == torch.float32 else 1e-2)


def test_labels_that_the_collator_makes_are_recognised(tmp_path, tokenizer):
    rows, collate = several_labels(), DataCollatorWithPadding(tokenizer)
    labels = {tuple(row["input_ids"]): row.pop("labels") for row in rows}

    def with_labels(batch):
        return collate(batch) | {"labels": torch.stack([labels[tuple(row["input_ids"])] for row in batch])}

    losses = {}
    for cls in (Trainer, WeightedTrainer):
        seen = Losses()
        args = arguments(tmp_path, 8)
        cls(make_model(num_labels=3), args, train_dataset=rows, data_collator=with_labels, callbacks=[seen]).train()
        losses[cls] = seen.values
    assert losses[WeightedTrainer] == pytest.approx(losses[Trainer], rel=1e-5)


def test_a_dict_of_evaluation_sets_needs_no_training_set(tmp_path, tokenizer):
    sets = {"a": several_labels(8), "b": several_labels(16)[8:]}
    losses = {}
    for cls in (Trainer, WeightedTrainer):
        trainer = cls(
            make_model(num_labels=3),
            arguments(tmp_path),
            eval_dataset=sets,
            data_collator=tensor_collator(tokenizer),
        )
        losses[cls] = [trainer.evaluate()[f"eval_{name}_loss"] for name in sets]
    assert losses[WeightedTrainer] == pytest.approx(losses[Trainer], rel=1e-5)


def test_an_empty_list_is_a_training_set_until_it_is_trained_on(tmp_path, tiny_model):
    assert WeightedTrainer(tiny_model(), arguments(tmp_path), train_dataset=[]).train_dataset == []


def test_a_masked_language_model_with_the_config_of_a_regressor_has_cross_entropy(tmp_path, tokenizer):
    data = make_dataset(8)
    data = data.remove_columns("labels").add_column("labels", data["input_ids"][:])
    losses = {}
    for cls in (Trainer, WeightedTrainer):
        seen, collate = Losses(), DataCollatorForTokenClassification(tokenizer)
        model = make_model(EsmForMaskedLM, num_labels=1, problem_type="regression")
        cls(model, arguments(tmp_path, 8), train_dataset=data, data_collator=collate, callbacks=[seen]).train()
        losses[cls] = seen.values
        assert model.config.problem_type == "regression"
    assert losses[WeightedTrainer] == pytest.approx(losses[Trainer], rel=1e-5)


def test_class_weights_of_a_masked_language_model_are_those_of_its_tokens(tmp_path, tokenizer):
    data = make_dataset(8)
    data = data.remove_columns("labels").add_column("labels", data["input_ids"][:])
    model, collate, seen = make_model(EsmForMaskedLM), DataCollatorForTokenClassification(tokenizer), Losses()
    weights = torch.linspace(0.5, 2, model.config.vocab_size)
    batch = collate([data[row] for row in range(8)])
    logits = model(batch["input_ids"], batch["attention_mask"]).logits
    expected = F.cross_entropy(logits.transpose(1, 2), batch["labels"], weight=weights).item()
    options = {"train_dataset": data, "data_collator": collate, "audit": False}
    WeightedTrainer(model, arguments(tmp_path, 8), class_weights=weights, callbacks=[seen], **options).train()
    assert seen.values == pytest.approx([expected], rel=1e-5)
    for wrong, message in ((WEIGHTS, "one number for each of 0, 1, 2"), ("balanced", "per token of the vocabulary")):
        with pytest.raises(ConfigurationError, match=message):
            WeightedTrainer(model, arguments(tmp_path, 8), class_weights=wrong, **options)


def test_one_output_trains_on_integers(tmp_path, tiny_model, tiny_dataset, tokenizer):
    losses = []
    for data in (tiny_dataset(16), tiny_dataset(16).cast_column("labels", Value("float32"))):
        model = tiny_model(num_labels=1)
        losses.append(gradients_of(WeightedTrainer, tmp_path, model, data, tokenizer, audit=False)[1])
    assert losses[0] == losses[1]
    assert losses[0][0] > 0


def test_a_model_keeps_a_loss_function_of_its_own(tmp_path, tiny_model, tiny_dataset, tokenizer):
    class Asked(EsmForSequenceClassification):
        """Reads its loss function, as most models of transformers do."""

        def forward(self, input_ids=None, attention_mask=None, labels=None):
            output = super().forward(input_ids, attention_mask)
            output.loss = self.loss_function(output.logits, labels)
            return output

    Asked.forward.__module__ = "transformers.models.esm.modeling_esm"
    model = tiny_model(Asked)
    model.loss_function = lambda logits, labels: logits.sum() * 0 + 3.0
    _, losses = gradients_of(WeightedTrainer, tmp_path, model, tiny_dataset(16), tokenizer, audit=False)
    assert losses == pytest.approx([3.0])


class Own(torch.nn.Module):
    """A custom module; it takes no sample_weight."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(1, 2)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.head(input_ids.float().mean(1, keepdim=True))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return (logits,) if loss is None else (loss, logits)


@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_sample_weights_do_not_reach_a_custom_module(tmp_path, tiny_dataset, tokenizer, caplog, remove_unused_columns):
    data = tiny_dataset(16).add_column("sample_weight", [2.0] * 16)
    args = arguments(tmp_path, 4, 4, remove_unused_columns=remove_unused_columns)
    trainer = WeightedTrainer(
        Own(), args, train_dataset=data, eval_dataset=data, data_collator=DataCollatorWithPadding(tokenizer)
    )
    trainer.train()
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    assert trainer.predict(data.remove_columns("labels")).predictions.shape == (16, 2)
    assert "sample_weight has no effect" in caplog.text


def test_sample_weights_do_not_hinder_a_prediction_without_labels(tmp_path, tiny_model, tiny_dataset, tokenizer):
    data = tiny_dataset(8).add_column("sample_weight", [2.0] * 8).remove_columns("labels")
    assert weighted(tiny_model(), arguments(tmp_path), None, tokenizer).predict(data).predictions.shape == (8, 2)


@pytest.mark.parametrize("config", [None, types.SimpleNamespace(num_labels=2), types.SimpleNamespace(hidden_size=4)])
def test_a_custom_module_with_any_config_trains(tmp_path, tiny_dataset, tokenizer, config):
    model = Own()
    if config is not None:
        model.config = config
    trainer = WeightedTrainer(
        model,
        arguments(tmp_path, 4, 4),
        train_dataset=tiny_dataset(16),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    assert trainer.train().global_step == 1
    if not hasattr(config, "num_labels"):
        with pytest.raises(ConfigurationError, match="num_labels"):
            WeightedTrainer(model, arguments(tmp_path), train_dataset=tiny_dataset(8), class_weights=WEIGHTS)


def test_regression_refuses_weights_and_its_loss_is_that_of_transformers(tmp_path, tiny_model, tiny_dataset, tokenizer):
    data = tiny_dataset(8).cast_column("labels", Value("float32"))
    for options in ({"class_weights": WEIGHTS}, {"class_weights": None, "focal_gamma": 2.0}):
        with pytest.raises(ConfigurationError, match="regression"):
            weighted(tiny_model(num_labels=1), arguments(tmp_path), data, tokenizer, **options)
    seen = Losses()
    weighted(
        tiny_model(num_labels=1), arguments(tmp_path, 8), data, tokenizer, class_weights=None, callbacks=[seen]
    ).train()
    plain = tiny_model(num_labels=1)
    batch = DataCollatorWithPadding(tokenizer)([data[i] for i in range(8)])
    assert seen.values[0] == pytest.approx(plain(**batch).loss.item(), rel=1e-5)


def test_a_custom_loss_function_is_used(tmp_path, tiny_model, tiny_dataset, tokenizer):
    def half(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch / 2

    seen = Losses()
    data = tiny_dataset(16)
    options = {"class_weights": None, "compute_loss_func": half, "callbacks": [seen]}
    weighted(tiny_model(), arguments(tmp_path, 4, 4), data, tokenizer, **options).train()
    expected = reference_loss(tiny_model(), data, tokenizer, weights=None).item() / 2
    assert seen.values[0] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ConfigurationError, match="compute_loss_func"):
        weighted(tiny_model(), arguments(tmp_path), data, tokenizer, compute_loss_func=half)


def test_every_model_of_model_init_has_the_problem_type(tmp_path, tiny_model, tiny_dataset, tokenizer):
    trainer = WeightedTrainer(
        model_init=lambda: tiny_model(),
        args=arguments(tmp_path, 8),
        train_dataset=tiny_dataset(16),
        data_collator=DataCollatorWithPadding(tokenizer),
        class_weights=WEIGHTS,
        audit=False,
    )
    trainer.train()
    assert trainer.model.config.problem_type == "single_label_classification"


def test_a_batch_without_labels_is_an_error(tmp_path, tiny_model, tiny_dataset, tokenizer):
    data = tiny_dataset(8).remove_columns("labels")
    with pytest.raises(DataError, match="no 'labels'"):
        weighted(tiny_model(), arguments(tmp_path), data, tokenizer).train()


def test_an_accumulated_batch_without_labels_changes_no_weight(tmp_path, tiny_model, tiny_dataset, tokenizer):
    class Weights(TrainerCallback):
        def __init__(self):
            self.steps = []

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.steps.append(torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()]))

    data = tiny_dataset(16).cast_column("labels", Value("int64"))
    data = data.map(lambda row, index: {"labels": -100 if index < 8 else row["labels"]}, with_indices=True)
    model, seen = tiny_model(), Weights()
    before = torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])
    args = arguments(tmp_path, 4, 2, learning_rate=1e-2, weight_decay=0.0)
    weighted(model, args, data, tokenizer, callbacks=[seen], audit=False).train()
    assert torch.equal(seen.steps[0], before)
    assert not torch.equal(seen.steps[1], before)


class DearerTrainer(WeightedTrainer):
    """Adds a constant to the weighted loss."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        return (loss + 1, outputs) if return_outputs else loss + 1


@pytest.mark.parametrize("cls", [DearerTrainer, TutorialsTrainer, WeightedTrainer])
def test_the_loss_of_an_evaluation_is_that_of_the_subclass(tmp_path, tiny_model, tiny_dataset, tokenizer, cls):
    data, model, collator = tiny_dataset(16), tiny_model(), DataCollatorWithPadding(tokenizer)
    args = arguments(tmp_path, per_device_eval_batch_size=16)
    trainer = cls(model, args, eval_dataset=data, data_collator=collator, class_weights=[1.0, 1.0])
    with torch.no_grad():
        expected = cls.compute_loss(trainer, model, collator([data[i] for i in range(16)]))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_adapters_that_are_injected_are_saved_and_mixed_ones_have_the_weighted_loss(tmp_path, tiny_model):
    config = LoraConfig(target_modules=["query"])
    args = arguments(tmp_path)
    trainer = WeightedTrainer(inject_adapter_in_model(config, tiny_model()), args)
    trainer.save_model(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    mixed = WeightedTrainer(get_peft_model(tiny_model(), LoraConfig(target_modules=["query"]), mixed=True), args)
    assert mixed._is_weighted
