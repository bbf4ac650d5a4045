"""Load, split, encode, tokenise and batch sequences, as `datasets.Dataset`."""

from esm_efficient.data.batching import DeepLocLoaders, TokenBudgetBatchSampler, deeploc_dataloaders
from esm_efficient.data.deeploc import load_deeploc
from esm_efficient.data.encoding import ResidueEncoder
from esm_efficient.data.loading import load_sequences
from esm_efficient.data.splits import stratified_sample
from esm_efficient.data.tokenizing import TokenizationReport, tokenize_dataset

__all__ = [
    "DeepLocLoaders",
    "ResidueEncoder",
    "TokenBudgetBatchSampler",
    "TokenizationReport",
    "deeploc_dataloaders",
    "load_deeploc",
    "load_sequences",
    "stratified_sample",
    "tokenize_dataset",
]
