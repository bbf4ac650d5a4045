"""Random models and calls: the lean encoder must agree with the plain model.

`run(seed)` makes one model from a seed, and calls it several times with random batches and in random states. Its errors
name the seed and what was drawn. The tests have the first 500 seeds; this tries others:

    PYTHONPATH=tests python tests/encoder/fuzzing.py 500 10000
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import random
import sys

import torch
from conftest import tiny_config
from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import EsmForMaskedLM, EsmForSequenceClassification, EsmForTokenClassification, EsmModel
from transformers.models.esm import modeling_esm

from esm_efficient import apply_lean_encoder, remove_lean_encoder
from esm_efficient.compat import enable_checkpointing
from esm_efficient.encoder.layer import RECOMPUTES
from esm_efficient.encoder.plan import plan_as

CALLS = 4
"""Calls per model."""
ROTATES_IN_FLOAT32 = hasattr(modeling_esm, "EsmRotaryEmbedding")
"""Whether transformers rotates queries and keys in float32 in a model in float64 too, as since 5.23."""
LIMITS = {torch.float64: 2e-4 if ROTATES_IN_FLOAT32 else 1e-9, torch.float32: 5e-4}
"""Largest relative error of outputs and gradient; a mistake makes a far larger one."""
HALF_LIMIT = 30.0
"""In half precision, how much farther from the exact gradient the lean encoder may be than the plain model."""
HEADS = (EsmForSequenceClassification, EsmForTokenClassification, EsmForMaskedLM, EsmModel)
TARGETS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
MASKS = ("right", "left", "holes", "none", "full", "bool", "float", "numbers", "one row", "empty row", "empty")


class Fuzz:
    """The random choices of one seed, and what they were."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.drawn: list[str] = [f"seed={seed}"]
        torch.manual_seed(seed)

    def choose(self, name, options):
        value = self.random.choice(list(options))
        self.drawn.append(f"{name}={getattr(value, '__name__', value)}")
        return value

    def happens(self, name, probability):
        value = self.random.random() < probability
        if value:
            self.drawn.append(name)
        return value


def make_model(fuzz):
    """A plain model with all kinds of adapters and frozen parameters, in evaluation mode half of the time."""
    rotary = fuzz.happens("rotary", 0.8)
    heads = fuzz.choose("heads", (1, 2, 3))
    config = tiny_config(
        num_hidden_layers=fuzz.choose("layers", (1, 2, 3)),
        num_attention_heads=heads,
        # A layer norm over two numbers loses all digits in float32.
        hidden_size=heads * fuzz.choose("head_width", (4, 6, 8) if rotary else (3, 4, 5)),
        intermediate_size=fuzz.choose("inner", (5, 16)),
        position_embedding_type="rotary" if rotary else "absolute",
        token_dropout=fuzz.happens("token_dropout", 0.5),
        emb_layer_norm_before=fuzz.happens("emb_layer_norm_before", 0.2),
        layer_norm_eps=fuzz.choose("eps", (1e-5, 1e-3)),
        max_position_embeddings=40,
        attn_implementation=fuzz.choose("attention", ("sdpa", "eager")),
    )
    model = fuzz.choose("head", HEADS)(config)
    for parameter in model.parameters():
        parameter.data.mul_(8) if parameter.dim() == 2 else parameter.data.add_(0.1 * torch.randn_like(parameter))
    if fuzz.happens("last norm removed", 0.05):
        (model if isinstance(model, EsmModel) else model.esm).encoder.emb_layer_norm_after = None
    kind = fuzz.choose("adapters", ("none", "none", "lora", "lora", "lora", "two", "ia3"))
    if kind != "none":
        model = add_adapters(fuzz, model, kind)
    part = fuzz.choose("freezes", (None, None, "encoder", "embeddings", "LayerNorm", "layer.0", "bias", ""))
    if part is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and part not in name)
    return model.to(fuzz.choose("dtype", LIMITS)).train(fuzz.happens("training", 0.5))


def add_adapters(fuzz, model, kind):
    targets = [target for target in TARGETS if fuzz.random.random() < 0.6] or ["key"]
    if kind == "ia3":
        feedforward = [target for target in targets if target == "output.dense"]
        model = get_peft_model(model, IA3Config(target_modules=targets, feedforward_modules=feedforward))
    else:
        dora = fuzz.happens("dora", 0.15)
        lora = LoraConfig(
            r=fuzz.choose("r", (1, 3)),
            lora_alpha=fuzz.choose("alpha", (1, 8)),
            target_modules=targets,
            use_rslora=fuzz.happens("rslora", 0.2),
            use_dora=dora,
            bias=fuzz.choose("bias", ("none", "none", "all", "lora_only")) if kind == "lora" else "none",
            lora_bias=not dora and fuzz.happens("lora_bias", 0.15),
            modules_to_save=["LayerNorm"] if fuzz.happens("saved norms", 0.15) else None,
        )
        model = get_peft_model(model, lora)
        if kind == "two":
            second = LoraConfig(r=2, target_modules=[fuzz.choose("second", TARGETS)])
            model.add_adapter("second", second)
            model.base_model.set_adapter(fuzz.choose("active", (["default", "second"], ["second"])))
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def make_batch(fuzz, embeddings):
    """Arguments of a call, and the mask of the tokens whose results count."""
    rows, columns = fuzz.choose("rows", (1, 2, 5)), fuzz.choose("columns", (1, 2, 7, 20))
    lengths = torch.tensor([fuzz.random.randint(1, columns) for _ in range(rows)])
    kind = fuzz.choose("mask", MASKS)
    tokens = torch.arange(columns) < lengths[:, None]
    tokens = {
        "left": tokens.flip(1),
        "holes": tokens & (torch.rand(rows, columns) < 0.8),
        "none": torch.ones_like(tokens),
        "full": torch.ones_like(tokens),
        "one row": torch.ones_like(tokens),
        "empty row": tokens & (torch.arange(rows) > 0)[:, None],
        "empty": torch.zeros_like(tokens),
    }.get(kind, tokens)
    mask = {
        "none": None,
        "bool": tokens,
        "float": tokens.float(),
        "numbers": tokens * torch.rand(rows, columns).add(0.5),
        "one row": torch.ones(1, columns, dtype=torch.long),
    }.get(kind, tokens.long())
    ids = torch.randint(4, 24, (rows, columns))
    ids[:, 0], ids[:, 2::5] = 0, 32
    batch = {"input_ids": ids.where(tokens, 1), "attention_mask": mask}
    if fuzz.happens("embeddings", 0.1):
        batch["inputs_embeds"] = embeddings(batch.pop("input_ids")).detach()
    if fuzz.happens("position ids", 0.1):
        batch["position_ids"] = torch.randint(0, 30, (rows, columns))
    return batch, tokens


def compute(model, batch, tokens):
    """The outputs that count, and the gradient of a loss of them by name."""
    model.zero_grad()
    output = model(**batch)
    states = output.logits if "logits" in output else output.last_hidden_state
    parts = [states[tokens] if states.dim() == 3 else states]
    if output.get("pooler_output") is not None:
        parts.append(output.pooler_output)
    result = torch.cat([part.flatten() for part in parts]).double()
    loss = (result * torch.linspace(0.5, 1.5, len(result))).square().sum()
    if loss.requires_grad:
        loss.backward()
    return result.detach(), {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def errors(found, expected, dtype):
    """Relative errors of the outputs and of the whole gradient, and infinity where only one side is a number.

    A gradient that should be zero, such as that of a query of a single token, may have rounding errors of the dtype.
    """
    (outputs, grads), (wanted, wanted_grads) = found, expected
    known = wanted.isfinite()
    if not torch.equal(outputs.isfinite(), known):
        return float("inf"), 0.0
    if not all(gradient.isfinite().all() for gradient in wanted_grads.values()):
        grads = wanted_grads = {}  # of a row without tokens, for which transformers divides by zero
    zero = torch.zeros(())
    pairs = [(grads.get(name, zero), wanted_grads.get(name, zero)) for name in grads.keys() | wanted_grads.keys()]
    differences = torch.stack([zero.double(), *((a - b).norm() for a, b in pairs)])
    norms = torch.stack([zero.double(), *(b.norm() for _, b in pairs)])
    output_error = (outputs[known] - wanted[known]).norm() / wanted[known].norm().clamp(min=1e-6)
    least = max(1e-6, 1e4 * torch.finfo(dtype).eps)
    return float(output_error), float(differences.norm() / norms.norm().clamp(min=least))


def change(fuzz, plain, lean):
    """Change both models in the same way, and the lean one in its options; return the models."""
    adapted = hasattr(plain, "peft_config") and "default" in plain.peft_config
    names = ["options", "removed", "mode", "freeze", "deepcopy", "pickle", "checkpointing", "nothing", "nothing"]
    kind = fuzz.choose("change", names + (["merge", "unmerge", "adapter off", "adapter on"] if adapted else []))
    if kind == "options":
        apply_lean_encoder(lean, recompute=fuzz.choose("recompute", RECOMPUTES))
    elif kind == "removed":
        apply_lean_encoder(remove_lean_encoder(remove_lean_encoder(lean)))
    elif kind == "deepcopy":
        lean = copy.deepcopy(lean)
    elif kind == "pickle" and not {"change=checkpointing", "hidden states"} & set(fuzz.drawn):
        # Of both, transformers keeps local functions in the model, which cannot be pickled.
        lean = pickle.loads(pickle.dumps(lean))
    trains = fuzz.happens("trains", 0.5)
    frozen = fuzz.random.randrange(4)
    for model in (plain, lean):
        if kind == "mode":
            model.train(trains)
        elif kind == "freeze":
            for number, parameter in enumerate(model.parameters()):
                parameter.requires_grad_(number % 4 != frozen)
        elif kind == "checkpointing":
            enable_checkpointing(model.get_base_model() if hasattr(model, "get_base_model") else model)
        for module in model.modules() if adapted else ():
            if isinstance(module, BaseTunerLayer):
                if kind == "merge" and not (module.merged or module.disable_adapters):
                    module.merge()
                elif kind in ("unmerge", "adapter off") and module.merged:
                    module.unmerge()
                if kind in ("adapter off", "adapter on"):
                    module.enable_adapters(kind == "adapter on")
    return plain, lean


def run(seed):
    """Compare a random model with its lean form in several calls; raise AssertionError where they differ.

    Half of the models are computed as on a GPU.
    """
    with plan_as("cuda" if seed % 2 else None):
        compare(Fuzz(seed))


def compare(fuzz):
    plain = make_model(fuzz)
    lean = apply_lean_encoder(copy.deepcopy(plain), recompute=fuzz.choose("recompute", RECOMPUTES))
    for number in range(CALLS):
        fuzz.drawn.append(f"| call {number}:")
        if number:
            plain, lean = change(fuzz, plain, lean)
        batch, tokens = make_batch(fuzz, plain.get_input_embeddings())
        if fuzz.happens("hidden states", 0.05):
            batch["output_hidden_states"] = True
        dtype = next(plain.parameters()).dtype
        with torch.set_grad_enabled(not fuzz.happens("no gradient", 0.15)):
            expected = compute(plain, batch, tokens)
            limits = [LIMITS[dtype]] * 2
            half = dtype == torch.float32 and fuzz.happens("autocast", 0.1)
            with torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext():
                if half:
                    usual = errors(compute(plain, batch, tokens), expected, dtype)
                    limits = [HALF_LIMIT * value + 0.25 for value in usual]
                found = errors(compute(lean, batch, tokens), expected, dtype)
        assert all(a <= b for a, b in zip(found, limits, strict=True)), f"{found} > {limits}: {' '.join(fuzz.drawn)}"


if __name__ == "__main__":
    for seed in range(*map(int, sys.argv[1:])):
        run(seed)
