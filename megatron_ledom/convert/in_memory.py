"""A checkpoint as a transformers model in memory, without a folder of weights in between.

The same plan, tensors and tokenizer as an export (`hf.py`), so the model is the one that the exported folder
would give. What an export proves beside that (parity with Megatron's logits, checksums) is not done here.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from megatron_ledom.checkpoint import Checkpoint
from megatron_ledom.checkpoint.locate import INDEX, TRACKER
from megatron_ledom.convert.hf import ExportOptions, converted_parts, plan_weights, write_configuration
from megatron_ledom.convert.llama_config import check_is_llama
from megatron_ledom.convert.tokenizer_files import find_tokenizer, num_table_rows
from megatron_ledom.log import Progress


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` is Megatron's: a `--save` folder, or one iteration in it."""
    return (folder / TRACKER).is_file() or (folder / INDEX).is_file()


def load_llama(load: Path, *, dtype: str) -> tuple[dict[str, Any], Any, Any]:
    """Build the transformers model of a checkpoint's last iteration, one stored tensor at a time.

    Args:
        load: Megatron's `--save` folder, or an `iter_NNNNNNN` folder.
        dtype: "float32", "bfloat16", "float16", or "checkpoint" for what is stored.

    Returns:
        The content of the `config.json` that an export would write, the model in evaluation mode on the CPU, and the
        tokenizer as `AutoTokenizer` loads it.

    Raises:
        CheckpointError: the checkpoint is absent, unfinished or damaged, or is no Llama.
        InputError, TokenizerMismatchError: no tokenizer, or not the one of the weights.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    checkpoint = Checkpoint.open(load)
    check_is_llama(checkpoint.args, where=str(checkpoint.folder))
    tokenizer = find_tokenizer(checkpoint.args, checkpoint.folder, None)
    vocab_size = num_table_rows(checkpoint.args, tokenizer)
    items, plan = plan_weights(checkpoint, vocab_size=vocab_size, options=ExportOptions(dtype=dtype))
    with tempfile.TemporaryDirectory(prefix="ledom_configuration_") as folder:
        content = write_configuration(checkpoint, tokenizer, Path(folder), vocab_size=vocab_size, dtype=plan.dtype)
        config, theirs = LlamaConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    wanted = {name for item in items for name in item.hf}
    progress = Progress(f"load {load}", plan.tensor_bytes / 1e6, "MB")
    for name, tensor in converted_parts(checkpoint, items, wanted, vocab_size=vocab_size, dtype=plan.dtype):
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, torch.nn.Parameter(tensor.contiguous(), requires_grad=False))
        progress.update(tensor.nbytes / 1e6)
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # no file holds its frequencies
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not left, f"weights without a value: {left}"
    return content, model.eval(), theirs
