"""DataLoaders for a loop of one's own."""

from __future__ import annotations

import torch

from esm_efficient import deeploc_dataloaders, load_deeploc


def test_batches_hold_every_protein_once_with_its_label(demo_table, tokenizer, tiny_model):
    loaders = deeploc_dataloaders(tokenizer, demo_table, batch_size=7, seed=5)
    data = load_deeploc(demo_table, seed=5)
    for name in ("train", "validation", "test"):
        expected = sorted((tuple(tokenizer(row["sequence"])["input_ids"]), row["label"]) for row in data[name])
        found = []
        for batch in getattr(loaders, name):
            assert set(batch) == {"input_ids", "attention_mask", "labels"}
            assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
            assert batch["input_ids"].shape == batch["attention_mask"].shape
            for ids, mask, label in zip(*(batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True):
                assert (ids[mask == 0] == tokenizer.pad_token_id).all()
                found.append((tuple(ids[mask == 1].tolist()), int(label)))
        assert sorted(found) == expected
    assert torch.isfinite(tiny_model()(**next(iter(loaders.train))).loss)


def test_training_order_changes_by_epoch_and_follows_the_seed(demo_table, tokenizer):
    def labels(loader):
        return torch.cat([batch["input_ids"][:, 1:6].sum(1) for batch in loader]).tolist()

    first, second = (deeploc_dataloaders(tokenizer, demo_table, seed=s) for s in (1, 1))
    epochs = labels(first.train), labels(first.train)
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert labels(second.train) == epochs[0]
    assert labels(first.test) == labels(first.test)


def test_without_a_validation_partition_there_is_no_validation_loader(demo_table, tokenizer):
    assert deeploc_dataloaders(tokenizer, demo_table, validation_partitions=()).validation is None
