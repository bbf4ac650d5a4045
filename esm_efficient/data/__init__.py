"""Sequences in, `datasets.Dataset` out."""

from esm_efficient.data.batching import DeepLocLoaders, deeploc_dataloaders
from esm_efficient.data.deeploc import load_deeploc, stratified_sample
from esm_efficient.data.encoding import TokenizationReport, tokenize_dataset

__all__ = [
    "DeepLocLoaders",
    "TokenizationReport",
    "deeploc_dataloaders",
    "load_deeploc",
    "stratified_sample",
    "tokenize_dataset",
]
