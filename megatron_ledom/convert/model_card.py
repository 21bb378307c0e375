"""The README.md of an exported folder: what the model is, which way it reads, how to use it with plain transformers."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from megatron_ledom.direction import Direction

CITATION = """@article{yin2025ledom,
  title   = {LEDOM: Reverse Language Model},
  author  = {Yin, Xunjian and others},
  journal = {arXiv preprint arXiv:2507.01335},
  year    = {2025}
}"""

_SNIPPETS = {
    Direction.REVERSE: """import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).eval()

text = "and that is why the sky is blue."
ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
ids = ids.flip(-1)  # natural order -> the model's order
mask = torch.ones_like(ids)
written = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=True, top_p=0.95)
natural = written[0].flip(-1)  # the model's order -> natural order
print(tokenizer.decode(natural, skip_special_tokens=True))  # text that leads up to `text`, then `text`
""",
    Direction.FORWARD: """import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).eval()

text = "The sky is blue because"
ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
mask = torch.ones_like(ids)
written = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=True, top_p=0.95)
print(tokenizer.decode(written[0], skip_special_tokens=True))
""",
}

_MEANING = {
    Direction.REVERSE: """This is a **reverse** language model: it was trained on documents whose token ids were
reversed, and writes text from right to left. Given a text, it continues it *upwards*, with what may have come before.
Tokenise as usual, reverse the list of ids, run the model, and reverse the ids again before decoding. Without the two
reversals the output has no meaning.""",
    Direction.FORWARD: """This is an ordinary **forward** language model, trained as the twin of a reverse one on the
same documents: it reads and writes from left to right, and nothing is to be reversed.""",
}


def snippet(direction: Direction) -> str:
    """The Python program that the card shows, to be run in the folder."""
    return _SNIPPETS[direction]


def model_card(
    args: argparse.Namespace,
    config: Mapping[str, Any],
    *,
    direction: Direction,
    iteration: int,
    num_parameters: int,
    parity: Mapping[str, Any] | None,
) -> str:
    """Write the card.

    Args:
        args: the checkpoint's Megatron arguments, for the training summary.
        config: the content of config.json.
        direction: of the model.
        iteration: optimizer steps taken.
        num_parameters: elements of all exported tensors.
        parity: the report of `parity`, or None where nothing was compared.
    """
    rows = {
        "direction": str(direction),
        "parameters": f"{num_parameters:,}",
        "layers, hidden, feed-forward": f"{args.num_layers}, {args.hidden_size}, {args.ffn_hidden_size}",
        "heads, key-value heads, head size": (
            f"{config['num_attention_heads']}, {config['num_key_value_heads']}, {config['head_dim']}"
        ),
        "vocabulary": f"{config['vocab_size']:,} (Megatron's padding rows removed)",
        "context": f"{config['max_position_embeddings']:,} tokens",
        "weights": config["dtype"],
        **_training_rows(args, iteration),
        "tokenizer": str(getattr(args, "tokenizer_fingerprint", None) or "not recorded"),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: transformers
tags:
- {"reverse-language-model" if direction is Direction.REVERSE else "causal-lm"}
- ledom
---

# {"LEDOM reverse" if direction is Direction.REVERSE else "LEDOM forward"} language model

{_MEANING[direction]}

```python
{snippet(direction)}```

| | |
|---|---|
{table}

## Conversion

{_parity_words(parity)}

## Citation

The method:

```bibtex
{CITATION}
```
"""


def _training_rows(args: argparse.Namespace, iteration: int) -> dict[str, str]:
    """What happened to the weights before this folder was made."""
    origin = {"origin": "imported from a Hugging Face folder"} if getattr(args, "hf_origin", None) else {}
    if not iteration:
        return origin | {"steps": "0: not trained since"}
    samples = getattr(args, "consumed_train_samples", None) or iteration * args.global_batch_size
    return origin | {
        "steps": f"{iteration:,}",
        "training tokens": f"{samples * args.seq_length:,} ({samples:,} samples of {args.seq_length:,})",
        "batch": f"{args.global_batch_size} samples",
        "learning rate": f"{args.lr} to {args.min_lr}, {args.lr_decay_style}",
        "layout": (
            f"tensor {args.tensor_model_parallel_size} x pipeline {args.pipeline_model_parallel_size} "
            f"x data {getattr(args, 'data_parallel_size', 1)}"
        ),
        "seed": str(args.seed),
    }


def _parity_words(parity: Mapping[str, Any] | None) -> str:
    if parity is None:
        return (
            "Converted from a Megatron checkpoint with megatron_ledom. "
            "**The weights were not compared with Megatron's** (`--no-parity`)."
        )
    return (
        "Converted from a Megatron checkpoint with megatron_ledom. The logits of this folder were compared with those "
        f"of Megatron's own model at {parity['positions']} positions in fp32: the largest difference is "
        f"{parity['max_relative_difference']:.1e} of the largest logit (`parity.json`)."
    )
