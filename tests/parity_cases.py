"""Damage done to exported folders on purpose, and checkpoints of many layers, for the tests of the parity check.

Run as a program, in a process of its own, because Megatron on the CPU needs patches:

    python tests/parity_cases.py compare JOBS                      the reports of many comparisons, as JSON on stdout
    python tests/parity_cases.py deep FOLDER TOKENIZER NUM_LAYERS...  a --save folder for each number, in bfloat16
    python tests/parity_cases.py streamed SAVE...                  the streamed model beside the whole one, as JSON

JOBS is a JSON file: a list of keyword arguments of `parity_compare.compare`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ledom.testing import tool_environment

Weights = dict[str, Any]
SCALE = 1.01
DEEP = {
    "hidden_size": 768,
    "ffn_hidden_size": 3072,
    "num_attention_heads": 12,
    "kv_channels": 64,
    "group_query_attention": False,
    "num_query_groups": 1,
    "max_position_embeddings": 64,
    "padded_vocab_size": 1024,
    "vocab_size": 1024,
}
DEEP_LAYER_BYTES = 4 * (4 * 768 * 768 + 3 * 768 * 3072)  # one layer of it in fp32: 38 MB


def swap_kv_heads(weights: Weights, config: dict[str, Any]) -> None:
    import torch

    name, size = "model.layers.1.self_attn.k_proj.weight", config["head_dim"]
    first, second = weights[name].split(size)
    weights[name] = torch.cat([second, first])


def swap_gate_and_up(weights: Weights, config: dict[str, Any]) -> None:
    gate, up = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up"))
    weights[gate], weights[up] = weights[up], weights[gate]


def change_rotary_base(weights: Weights, config: dict[str, Any]) -> None:
    config["rope_parameters"]["rope_theta"] = config["rope_theta"] = 10_500.0


def scale_a_norm(weights: Weights, config: dict[str, Any]) -> None:
    weights["model.layers.1.post_attention_layernorm.weight"] *= SCALE


def exchange_layers(weights: Weights, config: dict[str, Any]) -> None:
    for name in [name for name in weights if name.startswith("model.layers.0.")]:
        other = name.replace(".0.", ".1.", 1)
        weights[name], weights[other] = weights[other], weights[name]


def scale_an_embedding_row(weights: Weights, config: dict[str, Any]) -> None:
    weights["model.embed_tokens.weight"][777] *= SCALE


def scale_an_output_row(weights: Weights, config: dict[str, Any]) -> None:
    weights["lm_head.weight"][778] *= SCALE


def change_epsilon(weights: Weights, config: dict[str, Any]) -> None:
    config["rms_norm_eps"] = 1e-3


def break_a_number(weights: Weights, config: dict[str, Any]) -> None:
    weights["model.layers.0.mlp.down_proj.weight"][3, 4] = float("nan")


def leave_out_a_tensor(weights: Weights, config: dict[str, Any]) -> None:
    del weights["model.layers.1.mlp.down_proj.weight"]


def add_a_tensor(weights: Weights, config: dict[str, Any]) -> None:
    weights["model.layers.1.mlp.down_proj.bias"] = weights["model.norm.weight"].clone()


def widen_a_tensor(weights: Weights, config: dict[str, Any]) -> None:
    weights["model.norm.weight"] = weights["model.norm.weight"].repeat(2)


DAMAGES: dict[str, tuple[Callable[[Weights, dict[str, Any]], None], str]] = {
    # name: (what is done, what the check must say)
    "kv heads": (swap_kv_heads, r"first module .* model\.layers\.1\.self_attn \(Megatron's decoder\.layers\.1\.self_a"),
    "gate and up": (swap_gate_and_up, r"first module .* model\.layers\.1\.mlp \(Megatron's decoder\.layers\.1\.mlp\)"),
    "rotary base": (change_rotary_base, r"first module .* model\.layers\.0\.self_attn "),
    "norm": (scale_a_norm, r"first module .* model\.layers\.1\.post_attention_layernorm "),
    "layers": (exchange_layers, r"first module .* model\.layers\.0\.input_layernorm "),
    "embedding row": (scale_an_embedding_row, r"row 777 of model\.embed_tokens\.weight is not Megatron's"),
    "output row": (scale_an_output_row, r"up to the final norm all agrees, so it is lm_head, most of all at id 778"),
    "epsilon": (change_epsilon, r"first module .* model\.layers\.0\.input_layernorm "),
    "not a number": (break_a_number, r"first module .* model\.layers\.0\.mlp "),
}
"""Damages that change what is computed."""
MISFITS: dict[str, tuple[Callable[[Weights, dict[str, Any]], None], str]] = {
    "missing": (leave_out_a_tensor, r"config\.json: model\.layers\.1\.mlp\.down_proj\.weight is missing"),
    "left over": (add_a_tensor, r"config\.json: model\.layers\.1\.mlp\.down_proj\.bias is left over"),
    "shape": (widen_a_tensor, r"model\.norm\.weight is \[96\], the configuration wants \[48\]"),
}
"""Damages with which nothing can be computed."""


def damage(export: Path, folder: Path, change: Callable[[Weights, dict[str, Any]], None]) -> Path:
    """Copy an export to `folder`, as one safetensors file, and damage it; return `folder`."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(export, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json", "SHA256SUMS"))
    weights = {name: tensor for path in export.glob("*.safetensors") for name, tensor in load_file(path).items()}
    config = json.loads((export / "config.json").read_text())
    change(weights, config)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


def run_program(*arguments: object) -> str:
    """Run this file as a program and return its standard output."""
    command = [sys.executable, str(Path(__file__)), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500, env=tool_environment())
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def compare_all(jobs: list[dict[str, Any]], scratch: Path) -> list[dict[str, Any]]:
    """Run `parity_compare.compare` on every job in one new process; return the reports in order."""
    path = scratch / "jobs.json"
    path.write_text(json.dumps(jobs, default=str))
    reports: list[dict[str, Any]] = json.loads(run_program("compare", path).splitlines()[-1])
    return reports


def _compare(path: str) -> None:
    from megatron_ledom.convert.parity_compare import compare
    from megatron_ledom.direction import Direction
    from megatron_ledom.errors import ParityError

    reports = []
    for job in json.loads(Path(path).read_text()):
        direction = {"direction": Direction(job.pop("direction"))} if "direction" in job else {}
        folders = [Path(job.pop(name)) for name in ("checkpoint_folder", "hf_folder")]
        try:
            reports.append(compare(*folders, **direction, **job))
        except ParityError as error:
            reports.append({"refusal": str(error)})
    print(json.dumps(reports))


def _compare_streamed(*saves: str) -> None:
    """Largest difference of the streamed model's logits, and which of its parameters still hold memory afterwards."""
    import torch

    from megatron_ledom.checkpoint import Checkpoint, streamed_model
    from megatron_ledom.checkpoint.model import load_megatron_model

    streamed_model.BLOCK_BYTES = 4 * 48 * 250  # blocks of 250 rows, the last one shorter
    ids = torch.randint(0, 1024, (2, 40), generator=torch.Generator().manual_seed(1))
    report = {}
    for save in saves:
        checkpoint = Checkpoint.open(save)
        with torch.no_grad():
            whole = load_megatron_model(checkpoint)(ids, torch.arange(40).expand_as(ids), None).float()
        num_read = []
        model = streamed_model.StreamedModel(checkpoint, on_read=num_read.append)
        blocks = [logits for _, logits in model.logit_blocks(model.hidden_states(ids))]
        report[Path(save).name] = {
            "difference": (torch.cat(blocks, -1) - whole).abs().max().item(),
            "blocks": len(blocks),
            "bytes": [sum(num_read), model.num_bytes],
            "held": [name for name, parameter in model._model.named_parameters() if not parameter.is_meta],
        }
    print(json.dumps(report))


def _build_deep(folder: str, tokenizer: str, *depths: str) -> None:
    from convert_cases import save_case

    from megatron_ledom.data.tokenizers import load_tokenizer
    from megatron_ledom.engine import cpu
    from megatron_ledom.engine.arguments import set_megatron_arguments

    cpu.install()
    named = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer]
    args = set_megatron_arguments(["--preset", "tiny", "--run-dir", f"{folder}/unused", "--mock-data", *named], "cpu")
    args.tokenizer_fingerprint = load_tokenizer("HuggingFaceTokenizer", Path(tokenizer)).fingerprint
    for depth in depths:
        vars(args).update(DEEP, num_layers=int(depth), direction="reverse", params_dtype="bfloat16")
        save_case(Path(folder) / depth, args, one_key_a_layer=False, std=0.02)


if __name__ == "__main__":  # the checkpoint writer starts processes that import this file
    {"compare": _compare, "deep": _build_deep, "streamed": _compare_streamed}[sys.argv[1]](*sys.argv[2:])
