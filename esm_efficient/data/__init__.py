"""Sequences in, `datasets.Dataset` out."""

from esm_efficient.data.batching import DeepLocLoaders, TokenBudgetBatchSampler, deeploc_dataloaders
from esm_efficient.data.deeploc import load_deeploc, stratified_sample
from esm_efficient.data.encoding import ResidueEncoder, TokenizationReport, tokenize_dataset
from esm_efficient.data.files import load_sequences
from esm_efficient.data.labels import Task, task_of

__all__ = [
    "DeepLocLoaders",
    "ResidueEncoder",
    "Task",
    "TokenBudgetBatchSampler",
    "TokenizationReport",
    "deeploc_dataloaders",
    "load_deeploc",
    "load_sequences",
    "stratified_sample",
    "task_of",
    "tokenize_dataset",
]
