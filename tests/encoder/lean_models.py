"""Models, batches and gradients that the tests of the lean encoder share."""

from __future__ import annotations

import logging
from contextlib import contextmanager

import torch
from conftest import make_model
from torch import nn
from transformers import (
    EsmForMaskedLM,
    EsmForSequenceClassification,
    EsmForTokenClassification,
    EsmModel,
)

from esm_efficient import PooledEsmForSequenceClassification, lora_config, prepare_model


class MeanPooling(PooledEsmForSequenceClassification):
    """A model whose head reads the mean over the residues."""

    def __init__(self, config):
        super().__init__(config, classifier_pooling="mean")


class AttentionPooling(PooledEsmForSequenceClassification):
    """A model whose head reads a mean over the residues with learned weights."""

    def __init__(self, config):
        super().__init__(config, classifier_pooling="attention")


HEADS = (
    *(EsmForSequenceClassification, EsmForTokenClassification, EsmForMaskedLM, EsmModel),
    *(MeanPooling, AttentionPooling),
)
RECOMPUTES = ("none", "mlp", "layer")


def build(head=EsmForSequenceClassification, trains="all-linear", *, dtype=torch.float32, adapters=None, **changes):
    """Build a model with random weights that are large enough for every part to change the output."""
    model = make_model(head, **({"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4} | changes))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(4)
    if adapters is None and trains not in ("full", "head"):
        adapters = lora_config(model, preset=trains, r=4, lora_dropout=0.0)
    model = prepare_model(model, adapters=adapters, head_only=trains == "head")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).train()


@contextmanager
def nothing_runs_without_fusion(caplog):
    """Fail if a function cannot be compiled: it would give the right numbers, as it is."""
    with torch._dynamo.config.patch(cache_size_limit=64), caplog.at_level(logging.WARNING, "esm_efficient"):
        yield
    assert "without fusion" not in caplog.text


def make_batch(lengths, *, seed=0, masked=True):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(lengths)
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.randint(4, 24, mask.shape, generator=generator)
    ids[:, 0] = 0
    if masked:
        ids[:, 2::5] = 32
    ids = ids.scatter(1, (lengths - 1).clamp(min=1)[:, None] % mask.shape[1], 2) if mask.shape[1] > 1 else ids
    return {"input_ids": ids.where(mask.bool(), 1), "attention_mask": mask}


def loss_of(model, batch, **options):
    """Return a loss of the outputs for tokens; outputs for padding have no effect."""
    output = model(**batch, **options)
    states = output.last_hidden_state if hasattr(output, "last_hidden_state") else output.logits
    weights = torch.linspace(0.5, 1.5, states.shape[-1], dtype=states.dtype)
    if states.dim() == 3:
        states = states * batch["attention_mask"][..., None]
    return ((states * weights).sum(-1).square()).sum() / batch["attention_mask"].sum()


def gradient_of(model, batch, **options):
    model.zero_grad()
    loss = loss_of(model, batch, **options)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def distance(found, expected):
    """Return the relative error of the whole gradient."""
    missing = {name for name in found.keys() ^ expected.keys() if (found | expected)[name].abs().max() > 0}
    assert not missing
    pairs = [(found[n].double(), expected[n].double()) for n in found.keys() & expected.keys()]
    return (sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)).sqrt().item()


def nodes_of(tensor):
    """Return the names of all nodes in a tensor's graph, with repetitions."""
    seen, wanted, names = set(), [tensor.grad_fn], []
    while wanted:
        node = wanted.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.append(node.name())
        wanted += [function for function, _ in node.next_functions]
    return names
