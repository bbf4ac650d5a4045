"""A profiled run on the ranks that torchrun starts; writes every rank's figures to a folder."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from conftest import make_dataset, make_model
from transformers import AutoTokenizer, DataCollatorWithPadding

from esm_efficient import ProfilerCallback, WeightedTrainer, demo_model_path, prepare_model, recipe_arguments


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    trainer = WeightedTrainer(
        prepare_model(make_model()),
        recipe_arguments("base", folder, max_steps=4, per_device_train_batch_size=4, disable_tqdm=True),
        train_dataset=make_dataset(64),
        data_collator=DataCollatorWithPadding(AutoTokenizer.from_pretrained(demo_model_path())),
    )
    profiler = ProfilerCallback(trainer, compare_with_matmul=False)
    trainer.train()
    if trainer.is_world_process_zero():
        (folder / "ranks.json").write_text(json.dumps(profiler.reports.to_dict()))
    sys.stdout.flush()
    torch.distributed.barrier()
    # With torch 2.13 and gloo, taking the process group down can deadlock with the interpreter's end.
    os._exit(0)


if __name__ == "__main__":
    main()
