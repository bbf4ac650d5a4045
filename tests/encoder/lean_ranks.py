"""Run by torchrun: the lean encoder under DDP and FSDP, each rank with its own part of a batch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]


def main(kind: str, folder: Path) -> None:
    from conftest import make_model
    from test_lean import make_batch

    from esm_efficient import apply_lean_encoder, lora_config, prepare_model

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    parts = [make_batch([9, 5, 12], seed=seed) for seed in range(2)]

    def build(full):
        model = make_model(num_hidden_layers=2)
        return prepare_model(model, adapters=None if full else lora_config(model, preset="all-linear", r=2)).train()

    def loss_of(model, batch):
        return model(**batch).logits.square().sum()

    errors = []
    for full in (True, False):
        for recompute in ("none", "layer"):
            torch.manual_seed(0)
            alone = build(full)
            torch.manual_seed(0)
            model = apply_lean_encoder(build(full), recompute=recompute)
            expected = {}
            (sum(loss_of(alone, part) for part in parts) / 2).backward()
            expected = {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
            if kind == "ddp":
                wrapped = DistributedDataParallel(model)
            else:
                base = model if full else model.get_base_model()
                mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
                for layer in base.esm.encoder.layer:
                    fully_shard(layer, mesh=mesh)
                wrapped = fully_shard(model, mesh=mesh)
            loss_of(wrapped, parts[rank]).backward()
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            full_grads = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}
            assert full_grads.keys() == expected.keys()
            difference = sum((full_grads[n] - expected[n]).square().sum() for n in expected)
            errors.append(float((difference / sum(g.square().sum() for g in expected.values())).sqrt()))
    (folder / f"rank{rank}.txt").write_text("\n".join(map(str, errors)))
    dist.barrier()
    os._exit(0)  # tearing gloo down may hang


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
