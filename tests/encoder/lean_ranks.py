"""Run by torchrun: the lean encoder under DDP and both kinds of FSDP, each rank with its own part of a batch."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

# fully_shard of torch 2.6 does not run on a CPU.
KINDS = ("ddp", "fsdp1", *(["fsdp2"] if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7) else []))
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]


def wrap(kind, model):
    """The model under a wrapper, and how to get its whole gradient by name."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = base.esm.encoder.layer
    if kind == "ddp":
        return DistributedDataParallel(model), lambda: {n: p.grad for n, p in model.named_parameters()}
    if kind == "fsdp2":
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, lambda: {n: p.grad.full_tensor() for n, p in grads_of(model)}
    trains_all = all(p.requires_grad for n, p in model.named_parameters() if "contact_head" not in n)
    options = {"use_orig_params": not trains_all, "device_id": torch.device("cpu")}
    for number, layer in enumerate(layers):
        layers[number] = FullyShardedDataParallel(layer, **options)
    wrapped = FullyShardedDataParallel(model, ignored_modules=[base.esm.contact_head], **options)

    def whole():
        with FullyShardedDataParallel.summon_full_params(wrapped):
            named = [(n.replace("_fsdp_wrapped_module.", ""), p) for n, p in wrapped.named_parameters()]
            return {n: p.detach().clone() for n, p in named if p.requires_grad}

    def gradients():  # what a step of gradient descent takes off: flat parameters hand out no gradient by name
        before = whole()
        torch.optim.SGD(wrapped.parameters(), lr=1000.0).step()
        return {n: (before[n] - p) / 1000 for n, p in whole().items()}

    return wrapped, gradients


def grads_of(model):
    return [(n, p) for n, p in model.named_parameters() if p.grad is not None]


def main(folder: Path) -> None:
    from conftest import make_model
    from lean_models import make_batch, nodes_of

    from esm_efficient import apply_lean_encoder, lora_config, prepare_model

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    parts = [make_batch([9, 5, 12], seed=seed) for seed in range(2)]

    def build(full):
        torch.manual_seed(0)
        model = make_model(num_hidden_layers=2)
        return prepare_model(model, adapters=None if full else lora_config(model, preset="all-linear", r=2)).train()

    def loss_of(model, batch):
        return model(**batch).logits.square().sum()

    lines = []
    for kind, full, recompute in itertools.product(KINDS, (True, False), ("none", "layer")):
        alone = build(full)
        (sum(loss_of(alone, part) for part in parts) / 2).backward()
        expected = {n: p.grad for n, p in grads_of(alone)}
        wrapped, gradients = wrap(kind, apply_lean_encoder(build(full), recompute=recompute))
        loss = loss_of(wrapped, parts[rank])
        lean_nodes = {"none": "NormMLPBackward", "layer": "RecomputedLayerBackward"}
        assert lean_nodes[recompute] in nodes_of(loss), (kind, full, recompute)
        loss.backward()
        found = {n: g for n, g in gradients().items() if g is not None}
        assert expected.keys() <= found.keys(), (kind, full, expected.keys() ^ found.keys())
        difference = sum((found[n] - expected[n]).square().sum() for n in expected)
        error = float((difference / sum(g.square().sum() for g in expected.values())).sqrt())
        lines.append(f"{kind} {full} {recompute} {error}")
    (folder / f"rank{rank}.txt").write_text("\n".join(lines))
    dist.barrier()
    os._exit(0)  # tearing gloo down may hang


if __name__ == "__main__":
    main(Path(sys.argv[1]))
