"""A run on a device with too little memory ends with our error, which says what to change."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import make_dataset, make_model
from sequence_files import frame
from trainer_runs import arguments, weighted

from esm_efficient import OutOfMemoryError, demo_model_path
from esm_efficient.cli import main
from esm_efficient.errors import EsmEfficientError


def fill_device(model, *, training):
    """Let the forward pass of a model raise what torch raises on a full GPU, in training or in evaluation."""

    def fail(module, *_):
        if module.training == training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return model.register_forward_pre_hook(fail)


def test_training_says_with_which_micro_batch_memory_ran_out(tmp_path, tokenizer):
    model, data = make_model(), make_dataset(8)
    trainer = weighted(model, arguments(tmp_path, 4), data, tokenizer)
    hook = fill_device(model, training=True)
    with pytest.raises(OutOfMemoryError, match=r"in the phase 'training', with a micro-batch of 4 x \d+ tokens.*torch"):
        trainer.train()
    hook.remove()
    assert trainer.train().global_step == 2


def test_the_setting_that_fits_a_gpu_is_named(tmp_path, tokenizer, monkeypatch):
    model = make_model()
    trainer = weighted(model, arguments(tmp_path, 4), make_dataset(8), tokenizer)
    fill_device(model, training=True)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer.train()
    assert "By the estimator" not in str(caught.value)  # it is for GPUs, and this is a CPU
    with monkeypatch.context() as patch:
        patch.setattr(type(trainer.accelerator), "device", torch.device("cuda"))
        patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**33))
        explained = trainer._explain(caught.value.__cause__)
    assert "By the estimator this setting would fit 8.00 GiB" in str(explained)
    assert "micro-batch 2 x accumulation 2" in str(explained)


def fill_at_once():
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_evaluation_names_its_own_options(tmp_path, tokenizer, monkeypatch):
    model, data = make_model(), make_dataset(8)
    args = arguments(tmp_path, 4, eval_strategy="steps", eval_steps=1)
    trainer = weighted(model, args, data, tokenizer, eval_dataset=data)
    fill_device(model, training=False)
    for run in (trainer.train, trainer.evaluate, lambda: trainer.predict(data)):
        with pytest.raises(OutOfMemoryError, match=r"phase 'evaluation'. Use a smaller per_device_eval_batch_size"):
            run()
    monkeypatch.setattr(trainer, "get_train_dataloader", fill_at_once)
    with pytest.raises(OutOfMemoryError, match=r"phase 'training'\. torch said"):
        trainer.train()


@pytest.mark.parametrize("place", ["training_step", "_move_model_to_device"])
def test_the_command_says_so_in_one_line(tmp_path, capsys, monkeypatch, place):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")

    monkeypatch.setattr(f"transformers.Trainer.{place}", fail)
    frame(30).to_csv(tmp_path / "t.csv", index=False)
    options = ["--model", demo_model_path(), "--recipe", "frozen", "--no-cache", "--no-probe"]
    assert main(["finetune", str(tmp_path / "t.csv"), *options, "-o", str(tmp_path / "out")]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert "memory" in line
    assert "Tried to allocate" in line


def test_our_out_of_memory_error_is_an_error_of_torch_and_of_the_library():
    error = OutOfMemoryError("no memory", phase="forward", held={"weights": 1})
    assert isinstance(error, torch.OutOfMemoryError)
    assert isinstance(error, EsmEfficientError)
    assert not isinstance(torch.OutOfMemoryError("no memory"), OutOfMemoryError)
    assert (error.phase, error.held, str(error)) == ("forward", {"weights": 1}, "no memory")
    for kind in (torch.OutOfMemoryError, torch.cuda.OutOfMemoryError, RuntimeError, EsmEfficientError):
        with pytest.raises(kind):
            raise error
