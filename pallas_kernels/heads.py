"""Heads of models that people run, for the specs of both kernels."""

from typing import Any

LLAMA_8B: dict[str, Any] = dict(kv_heads=8, q_per_kv=4, head_dim=128)
LLAMA_70B: dict[str, Any] = dict(kv_heads=8, q_per_kv=8, head_dim=128)
PAPER_67M: dict[str, Any] = dict(kv_heads=8, q_per_kv=1, head_dim=128)
SMOLLM2: dict[str, Any] = dict(kv_heads=3, q_per_kv=3, head_dim=64)
GEMMA_2B: dict[str, Any] = dict(kv_heads=1, q_per_kv=8, head_dim=256)
