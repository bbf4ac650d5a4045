"""The audit detects parameters that do not train, and raises no false alarm."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import make_model, slow_except
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from trainer_runs import arguments, weighted
from transformers import (
    BertConfig,
    BertModel,
    EsmForSequenceClassification,
    EsmModel,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from esm_efficient import AuditCallback, AuditError, compat, lora_config, prepare_model
from esm_efficient.adapters.prepare import EXPECTATION
from esm_efficient.training import audit as audit_module


def run(model, folder, tokenizer, data, *, audit=None, class_weights=(0.3, 2.5), **options):
    audit = audit or AuditCallback()
    options = {"learning_rate": 1e-2, "num_train_epochs": 3} | options
    args = arguments(folder, 4, 2, **options)
    weighted(model, args, data, tokenizer, callbacks=[audit], class_weights=class_weights).train()
    return audit.report


class WithoutGradient(nn.Module):
    """Runs an encoder without gradients, as checkpointing did with the library versions of the tutorial."""

    def __init__(self, encoder):
        super().__init__()
        self.inner = encoder

    def forward(self, *args, **kwargs):
        with torch.no_grad():
            return self.inner(*args, **kwargs)


def test_adapters_without_gradient_under_reentrant_checkpointing_are_detected(
    tmp_path, tiny_model, tiny_dataset, tokenizer
):
    """The tutorial's failure: reentrant checkpointing over frozen embeddings, so that only the head trains."""
    model = get_peft_model(tiny_model(), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "key", "value"]))
    base = model.get_base_model()
    compat.enable_checkpointing(base, use_reentrant=True)
    base.disable_input_require_grads()
    with pytest.warns(UserWarning, match="requires_grad"), pytest.raises(AuditError) as caught:
        run(model, tmp_path, tokenizer, tiny_dataset(32))
    names = {name for name, p in model.named_parameters() if "lora_" in name}
    assert set(caught.value.without_gradient) == names
    assert "prepare_model" in str(caught.value)

    # The same run without the audit ends normally, although no adapter has moved.
    weighted(model, arguments(tmp_path, 4, 2, learning_rate=1e-2), tiny_dataset(32), tokenizer, audit=False).train()
    assert all(not p.any() for name, p in model.named_parameters() if "lora_B" in name)


def test_an_encoder_under_no_grad_is_detected(tmp_path, tiny_model, tiny_dataset, tokenizer):
    model = tiny_model()
    model = prepare_model(model, adapters=lora_config(model, r=2))
    inner = model.get_base_model().esm
    inner.encoder = WithoutGradient(inner.encoder)
    with pytest.raises(AuditError, match="no gradient"):
        run(model, tmp_path, tokenizer, tiny_dataset(32))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("preset", ["qkv", "all-linear"])
def test_prepared_adapters_under_checkpointing_pass(tmp_path, tiny_model, tiny_dataset, tokenizer, preset, reentrant):
    model = tiny_model()
    model = prepare_model(
        model, adapters=lora_config(model, preset=preset, r=2), gradient_checkpointing=True, use_reentrant=reentrant
    )
    report = run(
        model, tmp_path, tokenizer, tiny_dataset(32), **compat.checkpointing_arguments(True, use_reentrant=reentrant)
    )
    assert set(report.moved) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert report.pending == report.exempt == ()


OPTIONS = {
    "default": {},
    "short warm-up": {"warmup_steps": 1},
    "warm-up": {"warmup_steps": 5},
    "long warm-up": {"learning_rate": 1e-5, "warmup_steps": 8},
    "decay": {"weight_decay": 0.1},
    "sgd": {"optim": "sgd"},
    "adafactor": {"optim": "adafactor"},
    "clipping": {"max_grad_norm": 1.0},
    "cosine": {"lr_scheduler_type": "cosine"},
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize(
    ("name", "trains"),
    slow_except(
        [(name, trains) for name in OPTIONS for trains in ("full", "lora")],
        *((name, ("full", "lora")[number % 2]) for number, name in enumerate(OPTIONS)),
    ),
)
def test_no_false_alarm(tmp_path, tiny_model, tiny_dataset, tokenizer, trains, name):
    options = OPTIONS[name]
    model = tiny_model()
    model = prepare_model(model, adapters=lora_config(model, r=2) if trains == "lora" else None)
    report = run(model, tmp_path, tokenizer, tiny_dataset(32), **options)
    assert {*report.moved, *report.pending} == {name for name, p in model.named_parameters() if p.requires_grad}
    # Plain gradient descent moves LoRA's A by less than float32 resolves: it stays pending, without an alarm.
    assert all(options.get("optim") == "sgd" and "lora_A" in name for name in report.pending)


def test_a_long_warm_up_with_tiny_gradients_raises_no_alarm(tmp_path, tiny_model, tiny_dataset, tokenizer):
    """Gradients far below Adam's epsilon move a weight by less than the learning rate."""
    model = tiny_model()
    model = prepare_model(model, adapters=lora_config(model, r=2))
    options = {"learning_rate": 1e-4, "warmup_steps": 10_000, "num_train_epochs": 4}
    report = run(model, tmp_path, tokenizer, tiny_dataset(32), **options)
    assert all("lora_B" not in name for name in report.pending)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_batches_without_weight_raise_no_alarm(tmp_path, tiny_model, tiny_dataset, tokenizer, optim):
    """Only the rare class has a weight, and it is not in the first batches."""
    data = tiny_dataset(64).sort("labels")
    audit = AuditCallback()
    args = arguments(tmp_path, 4, 1, learning_rate=1e-2, optim=optim)
    trainer = weighted(prepare_model(tiny_model()), args, data, tokenizer, class_weights=[0, 1], callbacks=[audit])
    trainer.train()
    assert audit.report.pending == ()


def test_a_single_step_raises_no_alarm_for_lora_a(tmp_path, tiny_model, tiny_dataset, tokenizer):
    model = tiny_model()
    model = prepare_model(model, adapters=lora_config(model, r=2))
    report = run(model, tmp_path, tokenizer, tiny_dataset(32), max_steps=1)
    assert report.pending
    assert all("lora_A" in name for name in report.pending)


def test_bfloat16_weights_that_lose_their_updates_are_detected(tmp_path, tiny_model, tiny_dataset, tokenizer):
    model = tiny_model().to(torch.bfloat16)
    with torch.no_grad():
        model.classifier.dense.weight.fill_(0.5)
    model.esm.requires_grad_(False)
    with pytest.raises(AuditError, match="did not move") as caught:
        run(model, tmp_path, tokenizer, tiny_dataset(32), learning_rate=1e-4, audit=AuditCallback(strict=True))
    assert "classifier.dense.weight" in caught.value.unmoved
    assert "bfloat16" in str(caught.value)


def test_a_parameter_that_no_loss_uses_is_detected(tmp_path, tiny_model, tiny_dataset, tokenizer, caplog):
    model = tiny_model()
    model.orphan = nn.Parameter(torch.ones(3))
    with pytest.raises(AuditError, match="orphan"):
        run(model, tmp_path, tokenizer, tiny_dataset(32), audit=AuditCallback(strict=True))
    with pytest.raises(AuditError, match="orphan"):
        run(prepare_model(model), tmp_path, tokenizer, tiny_dataset(32))
    model = tiny_model()
    model.orphan = nn.Parameter(torch.ones(3))
    report = run(model, tmp_path, tokenizer, tiny_dataset(32))
    assert "orphan" in report.exempt
    assert "each got no gradient (optimizer step 1): orphan" in caplog.text


class Muted(EsmForSequenceClassification):
    def __init__(self, config):
        super().__init__(config)
        self.muted = nn.Parameter(torch.ones(1))

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        output = super().forward(input_ids, attention_mask)
        output.logits = output.logits + 0.0 * self.muted
        return output


def test_a_gradient_of_zero_at_every_step_is_detected(tmp_path, tiny_model, tiny_dataset, tokenizer, caplog):
    with pytest.raises(AuditError, match="gradient of zero") as caught:
        run(tiny_model(Muted), tmp_path, tokenizer, tiny_dataset(32), audit=AuditCallback(strict=True))
    assert caught.value.without_gradient == ("muted",)
    report = run(tiny_model(Muted), tmp_path, tokenizer, tiny_dataset(32))
    assert "muted" in report.exempt
    assert "each had a gradient of zero at every step" in caplog.text


@pytest.mark.parametrize(
    ("rate", "usual", "advice"),
    [
        (
            1e-2,
            1e-3,
            "on it, or the learning rate is too high: this run has 0.01, the recipe 0.001. Give",
        ),
        (1e-2, 2e-3, "The loss does not depend on it. If"),
        (1e-2, None, "The loss does not depend on it. If"),
    ],
)
def test_a_much_too_high_learning_rate_is_named_as_a_cause(
    tmp_path, tiny_model, tiny_dataset, tokenizer, caplog, rate, usual, advice
):
    audit = AuditCallback(usual_rate=usual)
    run(tiny_model(Muted), tmp_path, tokenizer, tiny_dataset(32), learning_rate=rate, audit=audit)
    assert advice in caplog.text


def test_a_parameter_outside_the_optimizer_is_detected(tmp_path, tiny_model, tiny_dataset, tokenizer):
    model = prepare_model(tiny_model())
    chosen = [p for name, p in model.named_parameters() if p.requires_grad and name != "classifier.out_proj.bias"]
    optimizer = torch.optim.AdamW(chosen, lr=1e-2)
    trainer = weighted(model, arguments(tmp_path, 4, 2), tiny_dataset(32), tokenizer, optimizers=(optimizer, None))
    with pytest.raises(AuditError, match=r"classifier\.out_proj\.bias"):
        trainer.train()


def test_the_unused_contact_head_of_a_plain_model_is_a_warning(tmp_path, tiny_model, tiny_dataset, tokenizer, caplog):
    report = run(tiny_model(), tmp_path, tokenizer, tiny_dataset(32))
    assert report.layers == (0, 1)
    assert sorted(report.exempt) == ["esm.contact_head.regression.bias", "esm.contact_head.regression.weight"]
    assert "contact_head" in caplog.text


class MeanPooling(nn.Module):
    """A head that reads the mean of the last states, over an encoder with a pooler that it does not read."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.config = encoder.config
        self.head = nn.Linear(encoder.config.hidden_size, 2)

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        states = self.encoder(input_ids, attention_mask).last_hidden_state
        mean = (states * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        logits = self.head(mean)
        return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def bert():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return MeanPooling(BertModel(BertConfig(vocab_size=33, **sizes)))


def esm(prepared=False):
    encoder = make_model(EsmModel)
    return MeanPooling(prepare_model(encoder) if prepared else encoder)


@pytest.mark.parametrize("build", [bert, esm, lambda: esm(prepared=True)], ids=["bert", "esm", "prepared esm"])
def test_a_pooler_that_a_custom_head_does_not_read_is_a_warning(tmp_path, tiny_dataset, tokenizer, caplog, build):
    report = run(build(), tmp_path, tokenizer, tiny_dataset(32), class_weights=None)
    assert {name.split(".")[-2] for name in report.exempt if "contact_head" not in name} == {"dense"}
    assert "pooler.dense.weight" in caplog.text
    assert report.layers == (0, 1)
    with pytest.raises(AuditError, match="pooler"):
        run(build(), tmp_path, tokenizer, tiny_dataset(32), class_weights=None, audit=AuditCallback(strict=True))


def test_an_optimizer_for_the_head_alone_is_a_warning_unless_adapters_are_left_out(
    tmp_path, tiny_model, tiny_dataset, tokenizer, caplog
):
    def train(model, **options):
        head = [p for name, p in model.named_parameters() if p.requires_grad and "classifier" in name]
        optimizer = torch.optim.AdamW(head, lr=1e-2)
        args = arguments(tmp_path, 4, 2, num_train_epochs=3)
        audit = AuditCallback(**options)
        weighted(model, args, tiny_dataset(32), tokenizer, optimizers=(optimizer, None), callbacks=[audit]).train()
        return audit.report

    report = train(tiny_model())
    assert all("classifier" in name for name in report.moved)
    assert "each is not in the optimizer" in caplog.text
    model = get_peft_model(tiny_model(), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    with pytest.raises(AuditError, match="lora_A"):
        train(model)
    for expected in (prepare_model(tiny_model()), tiny_model()):
        with pytest.raises(AuditError, match="is not in the optimizer"):
            train(expected, strict=not hasattr(expected, EXPECTATION))


@pytest.mark.parametrize("layers", [[1], [0, 1]])
def test_a_layer_in_which_nothing_trains_fails_an_unprepared_model_too(
    tmp_path, tiny_model, tiny_dataset, tokenizer, layers
):
    model = tiny_model()
    for index in layers:
        model.esm.encoder.layer[index].forward = lambda hidden_states, *_, **__: hidden_states
    with pytest.raises(AuditError, match="got no gradient") as caught:
        run(model, tmp_path, tokenizer, tiny_dataset(32))
    assert {int(name.split(".layer.")[1][0]) for name in caught.value.without_gradient} == set(layers)


def test_nothing_that_moves_fails(tmp_path, tiny_model, tiny_dataset, tokenizer):
    model = tiny_model().to(torch.bfloat16).requires_grad_(False)
    model.classifier.out_proj.weight.requires_grad_(True)
    with torch.no_grad():
        model.classifier.out_proj.weight.fill_(0.5)
    with pytest.raises(AuditError, match="did not move"):
        run(model, tmp_path, tokenizer, tiny_dataset(32), learning_rate=1e-4)


def test_steps_that_overflow_at_their_loss_scale_do_not_count():
    model = nn.Linear(2, 2)
    audit, optimizer = AuditCallback(), torch.optim.AdamW(model.parameters(), lr=0.1)
    args = TrainingArguments(output_dir="unused", use_cpu=True, report_to="none")
    state, control = TrainerState(), TrainerControl()
    audit.on_train_begin(args, state, control, model=model)
    for step in range(6):
        overflows = step < 4  # clipping by an infinite norm makes the finite gradients 0 and the others NaN
        model.weight.grad = torch.full((2, 2), float("nan") if overflows else 1.0)
        model.bias.grad = torch.full((2,), 0.0 if overflows else 1.0)
        audit.on_pre_optimizer_step(args, state, control, model=model)
        if not overflows:
            optimizer.step()
        audit.on_optimizer_step(args, state, control, optimizer=optimizer)
    assert audit.report.moved == ("weight", "bias")


@pytest.mark.parametrize(
    ("kind", "optim", "message"),
    [
        (DistributedType.FSDP, "adamw_torch", "FSDP divides gradients among the ranks: this run is not audited"),
        (DistributedType.DEEPSPEED, "adamw_torch", "DEEPSPEED divides gradients among the ranks: this run is not"),
        (DistributedType.NO, "adalomo", "adalomo takes its steps within the backward pass: this run is not audited"),
        (DistributedType.MULTI_GPU, "adamw_torch", None),
    ],
)
def test_a_run_that_cannot_be_audited_says_so_in_one_line(kind, optim, message, monkeypatch, caplog):
    monkeypatch.setattr(audit_module, "is_initialized", lambda: True)
    monkeypatch.setattr(audit_module, "AcceleratorState", lambda: SimpleNamespace(distributed_type=kind))
    args = SimpleNamespace(optim=optim, learning_rate=1e-3)
    audit, model = AuditCallback(), nn.Linear(2, 2)
    audit.on_train_begin(args, TrainerState(), TrainerControl(), model=model)
    assert len(caplog.messages) == (message is not None)
    assert (message or "") in caplog.text
    assert audit.report.pending == (() if message else ("weight", "bias"))


@pytest.fixture
def one_rank():
    """A process group of one process, and its mesh."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("moves", [True, False])
def test_shards_are_audited(one_rank, moves):
    model = nn.Linear(2, 2)
    for name, parameter in list(model.named_parameters()):
        setattr(model, name, nn.Parameter(distribute_tensor(parameter.data, one_rank, [Shard(0)])))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    args = TrainingArguments(output_dir="unused", use_cpu=True, report_to="none")
    audit, state, control = AuditCallback(), TrainerState(), TrainerControl()
    audit.on_train_begin(args, state, control, model=model)

    def step():
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        audit.on_pre_optimizer_step(args, state, control, model=model)
        if moves:
            optimizer.step()
        audit.on_optimizer_step(args, state, control, optimizer=optimizer)

    if moves:
        step()
        assert audit.report.moved == ("weight", "bias")
        return
    for _ in range(2):
        step()
    with pytest.raises(AuditError, match=r"had a gradient and did not move.*weight, bias"):
        step()
