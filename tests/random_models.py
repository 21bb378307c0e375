"""Small Llama models with random weights as Hugging Face folders, for tests that need a model but not a trained one."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

CONTEXT_TOKENS = 256
VOCAB_SIZE = 1024


def save_random_model(folder: Path, tokenizer_folder: Path, direction: str | None, *, seed: int = 0) -> Path:
    """Write a 2-layer Llama of width 64 with grouped queries; `direction` None leaves config.json without a record."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.25,  # wide enough that tokens differ in probability by many nats
    )
    return save_model(LlamaForCausalLM, config, folder, tokenizer_folder, direction, seed=seed)


def save_model(
    kind: Any, config: Any, folder: Path, tokenizer_folder: Path, direction: str | None, *, seed: int = 0
) -> Path:
    """Write a model of any class with random weights, its tokenizer and its record."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind(config).save_pretrained(folder)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, folder)
    if direction is not None:
        edit_config(folder, ledom={"format_version": 1, "direction": direction})
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def random_pairs(documents: Sequence[str], count: int, *, longest_chars: int = 300) -> list[tuple[str, str]]:
    """Neighbouring pieces of real text, each of 1 to `longest_chars` characters; the same ones every time."""
    generator = random.Random(7)
    pairs = []
    for _ in range(count):
        document = generator.choice([d for d in documents if len(d) > 3 * longest_chars])
        first, second = (generator.randint(1, longest_chars) for _ in range(2))
        start = generator.randrange(len(document) - first - second)
        pairs.append((document[start : start + first], document[start + first : start + first + second]))
    return pairs
