"""Complete run configurations by name: `tiny`, `2b`, `7b`.

A preset is a table from the name of a Megatron argument (its `dest`) to a value. It
becomes the default of that argument, so that any flag on the command line overrides
it. No layout here is measured on GPUs (`2b` took a few steps on one, docs/operations.md):
layouts and batch sizes are the usual choices for this size, and the learning rates are
Megatron's and Llama's habits, since the paper does not publish them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_ledom.errors import UsageError

ARCHITECTURE: dict[str, Any] = {
    # The paper's family: a Llama-shaped decoder (RoPE, RMSNorm, SwiGLU, no biases, untied embeddings).
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "group_query_attention": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "init_method_std": 0.02,
}

OPTIMIZATION: dict[str, Any] = {
    # AdamW and a cosine decay are the paper's; the numbers are Llama's.
    "optimizer": "adam",
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_eps": 1e-8,
    "weight_decay": 0.1,
    "clip_grad": 1.0,
    "lr_decay_style": "cosine",
    "use_distributed_optimizer": True,
}

BOOKKEEPING: dict[str, Any] = {
    # Holds for runs without a preset too.
    # A checkpoint must load at any layout: the optimizer's default sharding reshards over DP only.
    "ckpt_format": "torch_dist",
    "dist_ckpt_optim_fully_reshardable": True,
    "auto_detect_ckpt_format": True,
    # Data: no mask tensors through the loader, the attention is causal in the order of the data.
    "create_attention_mask_in_dataloader": False,
    "split": "99,1,0",
    "eval_interval": 1000,  # Megatron needs both, and has no defaults
    "save_interval": 1000,
    "log_throughput": True,
    "log_validation_ppl_to_tensorboard": True,
    "log_memory_to_tensorboard": True,
    "tensorboard_queue_size": 1,  # each point is on disk at once: a killed run keeps its curve
}

COMMON: dict[str, Any] = ARCHITECTURE | OPTIMIZATION | BOOKKEEPING


@dataclass(frozen=True)
class Preset:
    """A named configuration.

    Attributes:
        name: as given to `--preset`.
        summary: one line for `--help`.
        settings: Megatron argument name to value.
    """

    name: str
    summary: str
    settings: dict[str, Any]


TINY = Preset(
    name="tiny",
    summary="0.79 M parameters besides the embeddings, 256 context, fp32: minutes on two CPU cores",
    settings=COMMON
    | {
        "num_layers": 4,
        "hidden_size": 128,
        "ffn_hidden_size": 384,
        "num_attention_heads": 4,
        "num_query_groups": 2,  # grouped, so that every path that packs QKV is exercised
        "seq_length": 256,
        "max_position_embeddings": 256,
        "make_vocab_size_divisible_by": 128,
        "micro_batch_size": 4,
        "global_batch_size": 16,
        "train_iters": 400,
        # About 1 / sqrt(hidden). With 0.02 this narrow a network starts slowly, and at this rate the reverse twin met a
        # spike of loss that cost it 0.27 nats after 100 steps (5.57 against 5.30); now 5.16 against 5.18.
        "init_method_std": 0.08,
        "lr": 3e-3,
        "min_lr": 3e-4,
        "lr_warmup_fraction": 0.05,
        "split": "95,5,0",
        "eval_interval": 100,
        "eval_iters": 8,
        "save_interval": 100,
        "log_interval": 10,
        "num_workers": 0,  # reading 16 samples is cheaper than waking a process
    },
)

LARGE: dict[str, Any] = COMMON | {
    "seq_length": 8192,
    "max_position_embeddings": 8192,
    # 512 x 8,192 = 4.2 M tokens a step; 103,712 steps are the paper's 435 B tokens.
    "micro_batch_size": 1,
    "global_batch_size": 512,
    "train_iters": 103_712,
    "lr_warmup_fraction": 0.02,
    "min_lr": 3e-5,
    "bf16": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "eval_iters": 20,
    "log_interval": 10,
    "num_workers": 2,
}

SEVEN_B = Preset(
    name="7b",
    summary="7.79 B parameters: the shape of the released Reverse-Model-7B (28 layers, hidden 3072, head size 192)",
    settings=LARGE
    | {
        "num_layers": 28,
        "hidden_size": 3072,
        "ffn_hidden_size": 24576,
        "num_attention_heads": 16,
        "num_query_groups": 16,
        "kv_channels": 192,
        # Its vocabulary is 64,256 = 2 x 128 x 251: no padding is added up to TP 2, as released.
        "make_vocab_size_divisible_by": 128,
        "lr": 3e-4,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
    },
)

TWO_B = Preset(
    name="2b",
    summary="2.24 B parameters (vocabulary 64,256): the same family with one KV head; the paper's table is not known",
    settings=LARGE
    | {
        "num_layers": 18,
        "hidden_size": 2048,
        "ffn_hidden_size": 16384,  # 8 x hidden, the 7B's ratio
        "num_attention_heads": 16,
        "num_query_groups": 1,
        "kv_channels": 128,
        "make_vocab_size_divisible_by": 128,
        "lr": 3e-4,
    },
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in (TINY, TWO_B, SEVEN_B)}


def get_preset(name: str) -> Preset:
    """Return the preset called `name`.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in PRESETS:
        raise UsageError(f"--preset {name}: known presets are {', '.join(PRESETS)}")
    return PRESETS[name]


def count_parameters(settings: dict[str, Any], vocab_size: int) -> int:
    """Count the parameters of the network that `settings` describes.

    Args:
        settings: a preset's table; a Llama-shaped decoder without biases.
        vocab_size: rows of the embedding, padding included.

    Returns:
        Embedding, layers, final norm, and the output layer where it is not tied.
    """
    hidden, ffn, layers = settings["hidden_size"], settings["ffn_hidden_size"], settings["num_layers"]
    heads = settings["num_attention_heads"]
    head_dim = settings.get("kv_channels") or hidden // heads
    query, key_value = heads * head_dim, 2 * settings["num_query_groups"] * head_dim
    attention = hidden * (query + key_value) + query * hidden
    layer = attention + 3 * hidden * ffn + 2 * hidden
    num_tables = 2 if settings["untie_embeddings_and_output_weights"] else 1
    return num_tables * vocab_size * hidden + layers * layer + hidden
