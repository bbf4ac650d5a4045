"""How the encoder computes: padding-free, memory-lean, exact."""

from esm_efficient.encoder.apply import apply_lean_encoder, has_lean_encoder, remove_lean_encoder

__all__ = ["apply_lean_encoder", "has_lean_encoder", "remove_lean_encoder"]
