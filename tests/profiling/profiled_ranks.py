"""Run a profiled training on the ranks that torchrun starts; write the figures of every rank to a folder."""

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
    profiler = ProfilerCallback(compare_with_matmul=False)
    trainer = WeightedTrainer(
        prepare_model(make_model()),
        recipe_arguments("base", folder, max_steps=4, per_device_train_batch_size=4, disable_tqdm=True),
        train_dataset=make_dataset(64),
        data_collator=DataCollatorWithPadding(AutoTokenizer.from_pretrained(demo_model_path())),
        callbacks=[profiler],
    )
    trainer.train()
    if trainer.is_world_process_zero():
        (folder / "ranks.json").write_text(json.dumps(profiler.reports.to_dict()))
    sys.stdout.flush()
    torch.distributed.barrier()
    # With torch 2.13 and gloo, destroying the process group can deadlock with the exit of the interpreter.
    os._exit(0)


if __name__ == "__main__":
    main()
