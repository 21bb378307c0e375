"""Small Megatron checkpoints of many shapes, made by Megatron itself in one process, for the conversion tests.

One more is trained for a few steps on several ranks. Run as a program, in a process of
its own, because Megatron on the CPU needs patches:

    python tests/convert_cases.py build FOLDER TOKENIZER     a --save folder per case below FOLDER
    python tests/convert_cases.py gradients FOLDER EXPORTS   loss and gradients of both models, as JSON on stdout
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_ledom.testing import run_distributed, run_tool, tool_environment

ITERATION = 7
VOCAB_SIZE = 1024
DIRECTIONS = {"mha": "forward"}
"""Cases that are not reverse models."""

BASE = {
    "num_layers": 2,
    "hidden_size": 48,
    "ffn_hidden_size": 80,
    "num_attention_heads": 4,
    "kv_channels": 12,
    "group_query_attention": True,
    "num_query_groups": 2,
    "max_position_embeddings": 64,
    "padded_vocab_size": VOCAB_SIZE,
}
CASES: dict[str, dict[str, Any]] = {
    # Without grouped attention Megatron's own num_query_groups stays at 1 and means nothing.
    "mha": {"group_query_attention": False, "num_query_groups": 1},
    "gqa_padded": {"padded_vocab_size": 1152},
    "mqa": {"num_query_groups": 1},
    "tied": {"untie_embeddings_and_output_weights": False},
    "wide_heads": {"kv_channels": 20},
    "rope_llama3": {"use_rope_scaling": True, "rope_scaling_factor": 8.0, "rotary_base": 500_000},
    "rope_linear": {"rotary_seq_len_interpolation_factor": 4},
    "bfloat16": {"params_dtype": "bfloat16", "padded_vocab_size": 1152},
    "one_key_a_layer": {},
}


def build_cases(folder: Path, tokenizer: Path) -> Path:
    """Build every case below `folder` unless it is there already; return `folder`."""
    if not folder.exists():
        run_this("build", folder, tokenizer)
    return folder


def train_run(folder: Path, corpus: Path, tokenizer: Path) -> Path:
    """Train a reverse model for four steps at TP 2 x PP 2 in `folder`, unless it is there; return the run directory."""
    run = folder / "run"
    if run.exists():
        return run
    named = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer)
    written = run_tool(
        "preprocess_data.py", "--input", corpus, "--output-prefix", folder / "data", *named, "--append-eod"
    )
    assert written.returncode == 0, written.stderr
    done = run_distributed(
        "pretrain.py",
        4,
        *("--preset", "tiny", "--device", "cpu", "--num-layers", 4, "--hidden-size", 64, "--ffn-hidden-size", 128),
        *("--seq-length", 64, "--max-position-embeddings", 128, "--make-vocab-size-divisible-by", 96),
        *("--micro-batch-size", 1, "--global-batch-size", 4, "--train-iters", 4, "--save-interval", 2),
        *("--eval-iters", 1, "--eval-interval", 100, "--log-interval", 1),
        *("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2),
        *("--run-dir", run, "--data-path", folder / "data_text_document", *named),
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return run


def run_this(*arguments: object) -> str:
    """Run this file as a program and return its standard output."""
    command = [sys.executable, str(Path(__file__)), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=tool_environment())
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def _build(folder: Path, tokenizer: Path) -> None:
    from megatron_ledom.data.tokenizers import load_tokenizer
    from megatron_ledom.engine import cpu
    from megatron_ledom.engine.arguments import set_megatron_arguments

    cpu.install()
    argv = ["--preset", "tiny", "--run-dir", str(folder / "unused"), "--tokenizer-type", "HuggingFaceTokenizer"]
    args = set_megatron_arguments([*argv, "--tokenizer-model", str(tokenizer), "--mock-data"], "cpu")
    args.tokenizer_fingerprint = load_tokenizer("HuggingFaceTokenizer", tokenizer).fingerprint
    args.vocab_size = VOCAB_SIZE
    for name, changes in CASES.items():
        case = copy.copy(args)
        vars(case).update(BASE | changes)
        case.direction = DIRECTIONS.get(name, "reverse")
        save_case(folder / name, case, one_key_a_layer=name == "one_key_a_layer")


def save_case(save: Path, args: argparse.Namespace, *, one_key_a_layer: bool, std: float = 0.2) -> None:
    """Save a model with random weights of that spread; norms are about 1."""
    import torch
    from megatron.core import dist_checkpointing

    from megatron_ledom.checkpoint.model import build_megatron_model

    args.params_dtype = getattr(torch, args.params_dtype) if isinstance(args.params_dtype, str) else args.params_dtype
    torch.manual_seed(5)
    model = build_megatron_model(args)
    with torch.no_grad():
        for parameter in model.parameters():  # wide weights and uneven norms: a swap of any two shows
            noise = std * torch.randn(parameter.shape)
            fresh = 1 + noise if parameter.dim() == 1 else noise
            parameter.copy_(fresh)
    model = model.to(args.params_dtype)
    target = save / f"iter_{ITERATION:07d}"
    target.mkdir(parents=True)
    metadata = {"singleton_local_shards": False, "non_homogeneous_layers": one_key_a_layer}
    state = {"args": args, "iteration": ITERATION, "checkpoint_version": 3.0}
    dist_checkpointing.save(state | {"model": model.sharded_state_dict(metadata=metadata)}, str(target))
    (save / "latest_checkpointed_iteration.txt").write_text(str(ITERATION), encoding="utf-8")


def _compare_gradients(folder: Path, exports: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_ledom.checkpoint import Checkpoint

    # transformers first: the CPU engine's patches disturb its loading
    hf_models = {
        name: AutoModelForCausalLM.from_pretrained(exports / name, dtype=torch.float32, attn_implementation="eager")
        for name in CASES
    }
    from megatron_ledom.checkpoint.model import load_megatron_model

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB_SIZE, (2, 33), generator=generator)
    tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    report = {}
    for name, hf in hf_models.items():
        checkpoint = Checkpoint.open(folder / name)
        megatron = load_megatron_model(checkpoint)
        loss = _megatron_loss(megatron, tokens, labels, checkpoint.args.padded_vocab_size)
        loss.backward()
        hf_loss = torch.nn.functional.cross_entropy(hf(input_ids=tokens).logits.flatten(0, 1), labels.flatten())
        hf_loss.backward()
        report[name] = {
            "loss": loss.item(),
            "hf_loss": hf_loss.item(),
            "gradients": {key: _relative(*pair) for key, pair in _gradient_pairs(checkpoint, megatron, hf).items()},
        }
    print(json.dumps(report))


def _megatron_loss(model: Any, tokens: Any, labels: Any, padded_vocab_size: int) -> Any:
    """Megatron's own loss; over the real vocabulary where there is padding, which Megatron's softmax includes."""
    import torch

    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    if padded_vocab_size == VOCAB_SIZE:
        return model(tokens, positions, None, labels=labels).mean()
    logits = model(tokens, positions, None)[..., :VOCAB_SIZE]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _gradient_pairs(checkpoint: Any, megatron: Any, hf: Any) -> dict[str, tuple[Any, Any]]:
    """Megatron's gradient, unpacked, beside transformers', for every parameter of the latter."""
    from megatron_ledom.convert import names
    from megatron_ledom.convert.hf import unpack
    from megatron_ledom.convert.llama_config import attention_shape

    ours = {name: parameter.grad for name, parameter in megatron.named_parameters()}
    shape, pairs = attention_shape(checkpoint.args), {}
    prefixes = [(f"{names.MEGATRON_LAYERS}{i}.", f"{names.HF_LAYERS}{i}.", names.LAYER_RULES) for i in range(2)]
    for prefix, hf_prefix, rules in [("", "", (names.EMBEDDING, names.FINAL_NORM, names.OUTPUT)), *prefixes]:
        for rule in rules:
            key = next((prefix + name for name in rule.megatron if prefix + name in ours), None)
            if key is None:
                assert rule is names.OUTPUT and hf.config.tie_word_embeddings, rule
                continue
            item = names.Item(key, None, rule.hf, rule.packing)
            for name, part in zip(rule.hf, unpack(item, ours.pop(key), shape, VOCAB_SIZE), strict=True):
                pairs[hf_prefix + name] = (part, hf.get_parameter(hf_prefix + name).grad)
    assert not ours, f"gradients that nothing was compared with: {list(ours)}"
    assert set(pairs) == {name for name, _ in hf.named_parameters()}
    return pairs


def _relative(a: Any, b: Any) -> float:
    assert a.shape == b.shape and b.abs().max() > 0
    return ((a - b).abs().max() / b.abs().max()).item()


if __name__ == "__main__":  # the checkpoint writer starts processes that import this file
    action, first, second = sys.argv[1:]
    {"build": _build, "gradients": _compare_gradients}[action](Path(first), Path(second))
