"""recipe_arguments(): options override a recipe, and a precision that cannot train is refused."""

from __future__ import annotations

import inspect
import sys
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from conftest import make_dataset, make_model
from datasets import DatasetDict
from transformers import AutoTokenizer, TrainerCallback, TrainingArguments

from esm_efficient import EsmClassifier, compat, demo_model_path, finetune, recipe_arguments
from esm_efficient.cli import training
from esm_efficient.errors import ConfigurationError, DivergenceError
from esm_efficient.training import arguments, job, run_plan
from esm_efficient.training.arguments import half_dtype, refuse_no_predictions, refuse_unsaved_weights
from esm_efficient.training.divergence import DivergenceWatch


def test_options_override_those_of_the_recipe(tmp_path):
    args = recipe_arguments("all", tmp_path, learning_rate=5e-5, gradient_accumulation_steps=2)
    assert (args.learning_rate, args.gradient_accumulation_steps, args.per_device_train_batch_size) == (5e-5, 2, 2)
    assert compat.asks_for_checkpointing(args)
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        assert compat.asks_for_checkpointing(recipe_arguments("base", tmp_path, **{name: True}))
        assert not compat.asks_for_checkpointing(recipe_arguments("all", tmp_path, **{name: False}))


def test_one_pass_is_not_the_default_anywhere(tmp_path, one_epoch, monkeypatch):
    """One pass over a small table learns less than a linear probe."""
    monkeypatch.setattr(arguments, "EPOCHS", one_epoch)
    option = inspect.signature(training.finetune).parameters["epochs"]
    assert recipe_arguments("top", tmp_path).num_train_epochs == option.default == EsmClassifier("8M").epochs == 3


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("pure-bf16", "precision=.pure-bf16. is for estimates of memory only"),
        ("fp8", "precision='fp8': expected"),
        ("fp16", 'precision="fp16" needs a GPU: expected "float32" or "bf16" on a CPU'),
    ],
)
def test_a_precision_that_cannot_train_is_refused(tmp_path, monkeypatch, precision, message):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match=message):
        recipe_arguments("all", tmp_path, precision=precision)


@pytest.mark.parametrize(
    ("capability", "precision", "dtype"),
    [
        ((8, 6), "auto", torch.bfloat16),
        ((7, 5), "auto", torch.float16),
        ((6, 1), "auto", None),
        ((8, 6), "fp16", torch.float16),
        ((7, 5), "float32", None),
        ((7, 5), "bf16", torch.bfloat16),
    ],
)
def test_auto_precision_is_what_the_hardware_multiplies(tmp_path, monkeypatch, capability, precision, dtype):
    """torch reports support for bfloat16 on a T4 (7.5) too: it emulates it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or capability >= (8, 0)
    )
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": None}
    assert names[arguments._half_precision(precision, use_cpu=False)] == dtype
    if precision == "fp16":
        with pytest.raises(ConfigurationError, match="needs a GPU"):
            recipe_arguments("all", tmp_path, precision=precision, use_cpu=True)
    else:
        found = half_dtype(recipe_arguments("all", tmp_path, precision=precision, use_cpu=True))
        assert found == (torch.bfloat16 if precision == "bf16" else None)


def test_several_gpus_in_one_process_are_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    data = DatasetDict(train=make_dataset(2), test=make_dataset(2))
    with pytest.raises(ConfigurationError, match=r"has 2 GPUs.*torchrun --nproc-per-node=2.*CUDA_VISIBLE_DEVICES=0"):
        finetune(tmp_path / "no model", data, output_dir=tmp_path)


@pytest.mark.parametrize(
    ("zero", "refused"),
    [
        ({"stage": 2}, False),
        ({"stage": 3}, True),
        ({"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}, True),
        ({"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}, False),
    ],
)
def test_deepspeed_options_that_save_no_weights_are_refused(tmp_path, zero, refused):
    args = recipe_arguments("all", tmp_path)
    refuse_unsaved_weights(args)  # without DeepSpeed
    args.hf_deepspeed_config = HfDeepSpeedConfig({"zero_optimization": zero})
    with (
        pytest.raises(ConfigurationError, match='"stage3_gather_16bit_weights_on_model_save": true')
        if refused
        else nullcontext()
    ):
        refuse_unsaved_weights(args)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_weights": {"class0": 1, "typo": 2}}, "wrong or missing: class1, typo"),
        ({"class_weights": [1.0]}, r"class_weights has shape \(1,\)"),
        ({"focal_gamma": -1.0}, "focal_gamma=-1.0 with label_smoothing=0.0"),
        ({"focal_gamma": 2.0, "label_smoothing_factor": 0.1}, "focal_gamma=2.0 with label_smoothing=0.1"),
        ({"token_budget": 100, "dataloader_drop_last": True}, "token_budget keeps all batches"),
        ({"attention": "fast"}, "attention='fast': expected one of auto, flash"),
        ({"adapter_options": {"lora_alhpa": 3}}, "unknown option 'lora_alhpa': did you mean 'lora_alpha'"),
        ({"adapter_options": {"frobnicate": 3}}, "expected an option of lora_config or of peft.LoraConfig"),
        ({"adapter_options": {"r": 3}, "recipe": "base"}, "has no adapters: leave out r"),
        ({"adapter_options": {"bias": "all"}, "recipe": "top"}, "bias='all' trains below the layers whose states"),
        (
            {"adapter_options": {"modules_to_save": "classifier"}, "recipe": "lora"},
            r"expected a list .*\['classifier'\]",
        ),
        ({"adapter_options": {"modules_to_save": "classifier"}, "recipe": "top"}, "='classifier' is a text"),
        ({"adapter_options": {"modules_to_save": ["dense"]}, "recipe": "top"}, "modules_to_save=.*replace.cache=False"),
        ({"adapter_options": {"trainable_token_indices": [4]}, "recipe": "lora"}, "trainable_token_indices=.4. is not"),
        (
            {"adapter_options": {"init_lora_weights": "corda"}, "recipe": "lora"},
            "init_lora_weights='corda' is not read",
        ),
        ({"prediction_loss_only": True}, "prediction_loss_only=True: a run is evaluated by its predictions"),
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches=False"),
        ({"batch_eval_metrics": True}, "batch_eval_metrics=True"),
        ({"seed": None}, "seed=None: expected a whole number"),
        ({"output_dir": __file__}, "is a file: expected a folder"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_a_wrong_option_is_refused_before_anything_is_loaded(tmp_path, options, message):
    data = DatasetDict(train=make_dataset(4), test=make_dataset(2))
    with pytest.raises(ConfigurationError, match=message):
        finetune(tmp_path / "no model", data, **({"output_dir": tmp_path} | options))


def test_attention_and_fusion_reach_the_lean_encoder(tmp_path, monkeypatch):
    class Stop(Exception):
        """Raised where the model would be trained."""

    options = []

    def note(*args, **given):
        options.append(given)
        raise ConfigurationError("not estimated") if len(options) == 1 else Stop

    monkeypatch.setattr(run_plan, "estimate", note)
    monkeypatch.setattr(sys.modules["esm_efficient.training.finetune"], "apply_lean_encoder_if_supported", note)
    data = (["MKT" + "A" * row for row in range(16)], ["a", "b", "a", "b"] * 4)
    given = {"attention": "sequences", "fused": True}
    with pytest.raises(Stop):
        finetune(demo_model_path(), data, output_dir=tmp_path, probe=False, announce=lambda plan: None, **given)
    assert options[0]["fused"] is True  # in the estimate
    assert options[1] == given


class Steps(TrainerCallback):
    """Notes the dtypes of the parameters, and after each optimizer step the loss scale."""

    def __init__(self, scaler):
        self.scaler, self.scales, self.dtypes = scaler, [], set()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.dtypes = {(p.requires_grad, p.dtype) for p in model.parameters()}

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.scales.append(self.scaler.get_scale())


@pytest.fixture
def fp16_on_a_cpu(monkeypatch):
    """Let accelerate train in float16 with a loss scale on a CPU, as on a GPU; by itself it refuses. Returns the scale.

    The scale is far too large at first, so that the gradients of the first steps overflow.
    """
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    original = Accelerator.__init__

    def init(self, *args, mixed_precision=None, **kwargs):
        original(self, *args, mixed_precision="no", **kwargs)
        if mixed_precision == "fp16":
            self.native_amp, self.scaler = True, scaler
            self.state._mixed_precision = "fp16"

    make = job.recipe_arguments

    def as_on_a_gpu(*args, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(arguments, "_half_precision", lambda precision, *, use_cpu: precision)
            return make(*args, **options)

    monkeypatch.setattr(Accelerator, "__init__", init)
    monkeypatch.setattr(job, "recipe_arguments", as_on_a_gpu)
    yield scaler
    AcceleratorState._reset_state()


@pytest.mark.parametrize("recipe", ["lora", "frozen"])
def test_fp16_trains_with_a_loss_scale_and_frozen_parameters_in_float16(tmp_path, fp16_on_a_cpu, recipe):
    data = DatasetDict(train=make_dataset(32), test=make_dataset(8, seed=1))
    make_model().save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    options = {"disable_tqdm": True, "use_cpu": True, "num_train_epochs": 6, "logging_steps": 1}
    steps = Steps(fp16_on_a_cpu)
    results = {}
    for precision, callbacks in (("fp16", [steps]), ("float32", [])):
        results[precision] = finetune(
            tmp_path / "model",
            data,
            recipe=recipe,
            tokenizer=tokenizer,
            output_dir=tmp_path / precision,
            precision=precision,
            callbacks=callbacks,
            **options,
        )
    assert steps.dtypes == {(True, torch.float32), (False, torch.float16)}
    # A step that overflows halves the scale and is left out; the others train.
    assert steps.scales[:4] == [2.0**29, 2.0**28, 2.0**27, 2.0**26]
    assert steps.scales[-1] == steps.scales[-2]
    half, whole = results.values()
    assert half.trained_layers == whole.trained_layers
    assert half.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=0.05)


def test_a_gradient_that_no_loss_scale_makes_finite_stops_the_run(tmp_path, fp16_on_a_cpu):
    watch = DivergenceWatch(Accelerator(mixed_precision="fp16"))
    fp16_on_a_cpu.scale(torch.ones(()))
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    watch.look_at_logs({"loss": 0.7, "grad_norm": float("inf")}, args)
    fp16_on_a_cpu.update(new_scale=0.5)
    with pytest.raises(DivergenceError, match=r"gradient is nan at step 0, although the loss scale fell to 0\.5"):
        watch.look_at_logs({"loss": 0.7, "grad_norm": float("nan")}, args)


@pytest.mark.parametrize("name", ["bf16_full_eval", "fp16_full_eval"])
def test_an_evaluation_that_rounds_the_weights_is_refused(tmp_path, name):
    with pytest.raises(ConfigurationError, match=f"{name}=True rounds the weights"):
        refuse_no_predictions(TrainingArguments(str(tmp_path), use_cpu=True, **{name: True}))
