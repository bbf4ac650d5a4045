"""Batches of a token budget, and DataLoaders for a custom training loop."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from esm_efficient import deeploc_dataloaders, load_deeploc
from esm_efficient.data.batching import TokenBudgetBatchSampler
from esm_efficient.errors import ConfigurationError

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=80)


def all_ranks(lengths, budget, ranks, *, epoch=0, **options):
    """The batches of each rank in an epoch."""
    samplers = [TokenBudgetBatchSampler(lengths, budget, ranks=ranks, rank=r, **options) for r in range(ranks)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    batches = [list(sampler) for sampler in samplers]
    assert [len(part) for part in batches] == [len(sampler) for sampler in samplers]
    return batches


@given(LENGTHS, st.integers(1, 200), st.integers(1, 5), st.integers(0, 3), st.integers(0, 3), st.booleans())
@settings(max_examples=400, deadline=None)
def test_an_epoch_has_every_sequence_once_within_the_budget_evenly_over_ranks(
    lengths, budget, ranks, epoch, seed, shuffle
):
    least = len(TokenBudgetBatchSampler(lengths, budget))
    if -(-least // ranks) * ranks > len(lengths):
        # No multiple of the ranks is between the fewest batches and one batch per sequence.
        with pytest.raises(ConfigurationError, match="cannot be spread evenly"):
            TokenBudgetBatchSampler(lengths, budget, ranks=ranks)
        return
    batches = all_ranks(lengths, budget, ranks, epoch=epoch, seed=seed, shuffle=shuffle)
    assert len({len(part) for part in batches}) == 1
    whole = list(itertools.chain.from_iterable(batches))
    assert all(whole)
    assert sorted(itertools.chain.from_iterable(whole)) == list(range(len(lengths)))
    for batch in whole:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


@given(LENGTHS, st.integers(30, 200), st.integers(1, 3), st.integers(0, 20))
@settings(max_examples=100, deadline=None)
def test_an_epoch_that_is_resumed_in_its_middle_continues_there(lengths, budget, ranks, skip):
    assume(-(-len(TokenBudgetBatchSampler(lengths, budget)) // ranks) * ranks <= len(lengths))
    sampler = TokenBudgetBatchSampler(lengths, budget, ranks=ranks, rank=ranks - 1, seed=1)
    sampler.set_epoch(2)
    whole = list(sampler)
    again = TokenBudgetBatchSampler(lengths, budget, ranks=ranks, rank=ranks - 1, seed=1)
    again.set_epoch(2, skip=skip)
    assert list(again) == whole[skip:]
    assert list(again) == whole  # batches are skipped in one iteration only


@given(LENGTHS, st.integers(30, 200), st.integers(2, 5), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_ranks_together_take_the_sequences_that_one_process_takes(lengths, budget, ranks, epoch):
    assume(-(-len(TokenBudgetBatchSampler(lengths, budget)) // ranks) * ranks <= len(lengths))
    (alone,) = all_ranks(lengths, budget, 1, epoch=epoch)
    rounds = zip(*all_ranks(lengths, budget, ranks, epoch=epoch), strict=True)
    together = [list(itertools.chain.from_iterable(batches)) for batches in rounds]
    expected = [list(itertools.chain.from_iterable(alone[i : i + ranks])) for i in range(0, len(alone), ranks)]
    last = alone[len(alone) - len(alone) % ranks :]
    if sum(map(len, last)) >= ranks or not last:
        assert together == expected
    # If the last batches have too few sequences to halve, earlier ones are halved too, and only the order is the same.
    assert len(together) == len(expected)
    assert [i for batch in together for i in batch] == [i for batch in expected for i in batch]


def test_epochs_and_seeds_give_other_batches_but_the_same_number():
    lengths = np.random.default_rng(0).integers(100, 513, size=500)
    orders = {}
    for seed, epoch in itertools.product((0, 1), (0, 1)):
        (batches,) = all_ranks(lengths, 4096, 1, seed=seed, epoch=epoch)
        orders[seed, epoch] = batches
    assert len({len(batches) for batches in orders.values()}) == 1
    assert len({str(batches) for batches in orders.values()}) == 4
    # Not only the order of the batches changes: their members do too.
    together = [{frozenset(batch) for batch in batches} for batches in orders.values()]
    assert len(together[0] & together[1]) < len(together[0]) / 2
    assert all_ranks(lengths, 4096, 1, seed=0, epoch=0)[0] == orders[0, 0]


def test_batches_are_nearly_free_of_padding():
    lengths = np.random.default_rng(0).integers(100, 513, size=4000)
    (batches,) = all_ranks(lengths, 4096, 1)
    assert lengths.sum() / sum(len(batch) * lengths[batch].max() for batch in batches) > 0.97


def test_a_sequence_over_the_budget_is_alone_and_logged(caplog):
    (batches,) = all_ranks([5, 30, 5, 40], 12, 1)
    assert sorted(map(sorted, batches)) == [[0, 2], [1], [3]]
    assert "2 sequence(s) exceed the budget of 12 tokens (the longest has 40)" in caplog.text


@pytest.mark.parametrize(
    ("lengths", "budget", "options", "message"),
    [
        ([], 10, {}, "at least one sequence"),
        ([3, 0], 10, {}, "at least one token"),
        ([3], 0, {}, "number above 0"),
        ([3], 2.5, {}, "whole number above 0"),
        ([3], 10, {"ranks": 2, "rank": 2}, "a rank from 0 to 1"),
        ([9, 9, 9], 10, {"ranks": 2}, "leave out 1 sequence"),
    ],
)
def test_invalid_lengths_budgets_and_ranks_are_refused(lengths, budget, options, message):
    with pytest.raises(ConfigurationError, match=message):
        TokenBudgetBatchSampler(lengths, budget, **options)


def test_a_plain_dataloader_accepts_the_sampler():
    data = [torch.full((n,), n) for n in (3, 9, 4, 4)]
    sampler = TokenBudgetBatchSampler([len(row) for row in data], 10)
    loader = torch.utils.data.DataLoader(data, batch_sampler=sampler, collate_fn=lambda rows: [len(r) for r in rows])
    assert sorted(map(sorted, loader)) == [[3], [4, 4], [9]]


def test_loaders_yield_every_protein_once_with_its_label(demo_table, tokenizer, tiny_model):
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


def test_residues_and_tokens_are_bounded_separately(demo_table, tokenizer):
    """`max_residues` leaves proteins out; `max_tokens` truncates those that are left."""
    bounds = {"min_residues": 60, "max_residues": 200}
    whole = load_deeploc(demo_table, seed=0, **bounds)
    loaders = deeploc_dataloaders(tokenizer, demo_table, batch_size=1, max_tokens=102, **bounds)
    lengths = [batch["input_ids"].shape[1] for batch in loaders.test]
    assert lengths == [min(n + 2, 102) for n in whole["test"]["residues"][:]]
    assert max(lengths) == 102 > min(lengths)
    unbounded = deeploc_dataloaders(tokenizer, demo_table, min_residues=None, max_residues=None)
    with pytest.warns(UserWarning, match="homologous"):
        at_random = deeploc_dataloaders(tokenizer, demo_table, min_residues=None, max_residues=None, split="random")
    for name in ("train", "validation", "test"):
        assert len(getattr(unbounded, name).dataset) > len(getattr(loaders, name).dataset)
    assert sum(len(loader.dataset) for loader in at_random) == sum(len(loader.dataset) for loader in unbounded)
