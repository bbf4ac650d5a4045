"""Script of test_ranks: run `finetune` for each case, with the same batches for any number of ranks."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from datasets import load_from_disk

from esm_efficient import RECIPES, finetune

RANKS = int(os.environ.get("WORLD_SIZE", "1"))
SHARDED = {"fsdp": "full_shard", "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["EsmLayer"]}}


def shard_on_a_cpu() -> None:
    """Make accelerate apply FSDP on a CPU, as it does on a GPU; by itself it ignores FSDP there."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def forget_sharding() -> None:
    """Reset accelerate's state, which would apply the FSDP of an earlier case to the next one."""
    AcceleratorState._reset_state()
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    if RANKS > 1:
        PartialState(cpu=True, backend="gloo")
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU


def local_share(model: torch.nn.Module) -> float:
    """Return the share of the encoder layers' frozen and trained numbers that this rank stores."""
    parameters = [p for name, p in model.named_parameters() if ".layer." in name]
    stored = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in parameters)
    return stored / sum(p.numel() for p in parameters)


def run(folder: Path, case: dict) -> dict:
    """Run one case and return what this rank found.

    Args:
        folder: has the model and the data; the result is written to a subfolder.
        case: ``name``, ``recipe``, ``rows`` and ``options`` of `finetune`; ``pooling`` of the head; ``sharded`` for
            FSDP2; ``resume`` for the checkpoint to resume from.
    """
    forget_sharding()
    recipe, options = RECIPES[case["recipe"]], dict(case.get("options", {}))
    recipe = recipe.replace(pooling=case.get("pooling", recipe.pooling))
    if "token_budget" in options:
        # The ranks' micro-batches of one round are those that one process accumulates.
        options["gradient_accumulation_steps"] = 4 // RANKS
    else:
        recipe = recipe.replace(micro_batch=8 // RANKS, learning_rate=recipe.learning_rate)
    if case.get("sharded") and RANKS > 1:
        options |= SHARDED
    if RANKS > 1:
        options["ddp_backend"] = "gloo"
    if case.get("resume"):
        options["resume_from_checkpoint"] = str(folder / case["resume"])
    result = finetune(
        str(folder / "model"),
        load_from_disk(str(folder / f"data{case['rows']}")),
        recipe=recipe,
        output_dir=folder / f"{case['name']}-{RANKS}",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    return {
        "steps": result.steps,
        "metrics": dict(result.metrics),
        "share": local_share(result.model),
        "layers": list(result.trained_layers),
    }


def main() -> None:
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    shard_on_a_cpu()
    results = {case["name"]: run(folder, case) for case in cases}
    (folder / f"rank{torch.distributed.get_rank()}-of-{RANKS}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    # With torch 2.13 and gloo, destroying the process group can deadlock with the exit of the interpreter.
    os._exit(0)


if __name__ == "__main__":
    main()
