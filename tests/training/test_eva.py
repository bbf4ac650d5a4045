"""EVA: the first values of adapters are the main directions of what their layers get."""

from __future__ import annotations

import pytest
import torch
from conftest import make_dataset, slow_except
from datasets import DatasetDict
from transformers import EsmForSequenceClassification, TrainerCallback

from esm_efficient import RECIPES, Predictor, demo_model_path, finetune, lora_config, prepare_model
from esm_efficient.errors import ConfigurationError

EVA = {"init_lora_weights": "eva"}
OPTIONS = {"epochs": 1, "batch_size": 8, "micro_batch": 8, "class_weights": None, "adapter_options": EVA}


class FirstValues(TrainerCallback):
    """Keep the matrix A of the encoder's last layer as it is when training begins."""

    def on_train_begin(self, args, state, control, model=None, **_):
        named = [(name, p) for name, p in model.named_parameters() if "output.dense.lora_A" in name]
        self.found = named[-1][1].detach().double()


def pretrained():
    return EsmForSequenceClassification.from_pretrained(demo_model_path()).eval()


def inputs_of_the_last_layer(rows) -> torch.Tensor:
    """Return what the last linear layer of the pretrained encoder gets for all tokens of some sequences, centred."""
    model, seen = pretrained(), []
    model.esm.encoder.layer[-1].output.dense.register_forward_hook(lambda _, given, out: seen.append(given[0][0]))
    with torch.no_grad():
        for ids in rows:
            model(input_ids=torch.tensor([ids]))
    inputs = torch.cat(seen).double()
    return inputs - inputs.mean(0)


@pytest.mark.parametrize(
    ("layers", "cache", "precision", "rounding"),
    slow_except(
        [("all", False, "float32", 1e-4), ("top-1", True, "float32", 1e-4), ("all", False, "bf16", 1e-2)],
        ("top-1", True, "float32", 1e-4),
    ),
)
def test_the_first_values_are_the_main_directions_of_the_data(layers, cache, precision, rounding, tmp_path, recwarn):
    data, first = make_dataset(40), FirstValues()
    result = finetune(
        demo_model_path(),
        DatasetDict(train=data, test=data),
        recipe=RECIPES["lora"].replace(layers=layers, cache=cache),
        output_dir=tmp_path,
        callbacks=[first],
        precision=precision,
        **OPTIONS,
    )
    assert [str(w.message) for w in recwarn if "eva" in str(w.message).lower()] == []
    matrix = first.found
    assert torch.allclose(matrix @ matrix.T, torch.eye(len(matrix), dtype=matrix.dtype), atol=rounding)
    inputs = inputs_of_the_last_layer(data["input_ids"])
    best = torch.linalg.svdvals(inputs)[: len(matrix)].square().sum()
    assert (inputs @ matrix.T).square().sum() > 0.95 * best
    assert Predictor.load(result.model_dir).task.names == ("class0", "class1")  # with ranks that differ by layer


def test_without_data_nothing_trains(tiny_model):
    model = tiny_model()
    adapted = prepare_model(model, adapters=lora_config(model, **EVA))
    with pytest.raises(RuntimeError, match="meta"):
        adapted(input_ids=torch.tensor([[0, 5, 6, 2]])).logits.sum().backward()


def test_a_stream_is_refused(tmp_path):
    data = make_dataset(16)
    with pytest.raises(ConfigurationError, match="these are a stream"):
        finetune(
            demo_model_path(),
            {"train": data.to_iterable_dataset(), "test": data},
            recipe="lora",
            output_dir=tmp_path,
            max_steps=1,
            **OPTIONS,
        )
