#!/usr/bin/env python3
"""Claim: converting a 7B takes at most 1.5 times `cp` of the same bytes, beside parity, in less than 3 GiB.

A Hugging Face folder of the preset's shape is filled with random bfloat16 weights. Then, in
turn: `cp` of the folder and the import without parity, repeated, then one import with parity;
and the same with `cp` of the checkpoint and the export. The baseline is `cp -r` followed by a `sync` of what it wrote,
because the tools do not return before their output is on disk; `cp` alone is reported beside it.
The page cache is emptied before every run where that is allowed. What comes out of the last
export is compared with the folder, bit for bit. It needs five times the weights' size on disk
(and leaves nothing there).

    python benchmarks/bench_convert.py --preset 7b --repeats 3 --work /scratch --output benchmarks/results/convert.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measuring import Run, run_measured, say, spread, write_record

from megatron_ledom.engine.presets import PRESETS
from megatron_ledom.errors import run_cli
from megatron_ledom.files import sync_folder
from megatron_ledom.log import Progress
from megatron_ledom.testing import REPOSITORY, tool_environment

MAX_RATIO, MAX_RSS_BYTES = 1.5, 3 * 2**30
VOCAB_SIZE = 64_256
TOKENIZER = REPOSITORY / "tests" / "assets" / "tokenizer"
COPY_AND_SYNC = """
import os, subprocess, sys, time
source, target = sys.argv[1:]
started = time.perf_counter()
subprocess.run(["cp", "-r", source, target], check=True)
print(time.perf_counter() - started)
for folder, _, files in os.walk(target):
    for name in files:
        descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
"""


def write_random_model(preset: str, folder: Path) -> int:
    """Fill `folder` with the preset's Llama in bfloat16; return the bytes of its weights."""
    import torch

    from megatron_ledom.convert.from_hf import build_arguments, expected_shapes
    from megatron_ledom.convert.llama_arguments import megatron_settings
    from megatron_ledom.convert.safetensors_file import INDEX_NAME, ShardWriter, plan_shards
    from megatron_ledom.direction import Direction

    settings = PRESETS[preset].settings
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": settings["hidden_size"],
        "intermediate_size": settings["ffn_hidden_size"],
        "num_hidden_layers": settings["num_layers"],
        "num_attention_heads": settings["num_attention_heads"],
        "num_key_value_heads": settings["num_query_groups"],
        "head_dim": settings.get("kv_channels") or settings["hidden_size"] // settings["num_attention_heads"],
        "max_position_embeddings": settings["max_position_embeddings"],
        "rms_norm_eps": settings["layernorm_epsilon"],
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": "bfloat16",
        "ledom": {"format_version": 1, "direction": "reverse"},
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for path in TOKENIZER.iterdir():
        shutil.copy(path, folder)
    known = megatron_settings(config, where=str(folder))
    args = build_arguments(known, config, direction=Direction.REVERSE, dtype="bfloat16", tokenizer=None, save=folder)
    plan = plan_shards(expected_shapes(args), dtype="bfloat16", max_shard_bytes=5 * 10**9)
    if (index := plan.index()) is not None:
        (folder / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
    progress, generator = Progress("random weights", plan.tensor_bytes / 1e6, "MB"), torch.Generator().manual_seed(0)
    with ShardWriter(folder, plan) as writer:
        for shard in plan.shards:
            for name, shape in shard.shapes.items():
                values = torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.035, 0.035, generator=generator)
                writer.write(name, values if len(shape) > 1 else 1 + values)
                progress.update(values.nbytes / 1e6)
    progress.close()
    return plan.tensor_bytes


def empty_page_cache() -> bool:
    """Make the next reads come from the disk; return whether that was possible (it needs root)."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")
    except OSError:
        return False
    return True


@contextmanager
def removed_after(path: Path) -> Iterator[Path]:
    """Give a path whose content is gone afterwards."""
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        sync_folder(path.parent)


def copy(source: Path, target: Path) -> tuple[Run, float]:
    """Measure `cp -r` and the sync after it; return the run and the seconds of `cp` alone."""
    run = run_measured([sys.executable, "-c", COPY_AND_SYNC, str(source), str(target)], os.environ)
    return run, float(run.stdout)


def convert(tool: str, *arguments: object) -> Run:
    """Measure one of our tools, with the threads that a user gets."""
    environment = tool_environment()
    del environment["OMP_NUM_THREADS"]
    return run_measured([sys.executable, str(REPOSITORY / "tools" / tool), *map(str, arguments)], environment)


def measure(work: Path, source: Path, repeats: int) -> tuple[dict[str, list[Any]], bool]:
    """Take all measurements in turn; return them by name, and whether the page cache was emptied before each."""
    found: dict[str, list[Any]] = defaultdict(list)
    is_cold = True
    steps = (("import", "convert_from_hf.py", "--save"), ("export", "convert_to_hf.py", "--output"))
    checkpoint = work / "checkpoint"
    for name, tool, flag in steps:
        load = source if name == "import" else checkpoint
        kept = checkpoint if name == "import" else work / "back"
        for _ in range(repeats):
            is_cold &= empty_page_cache()
            with removed_after(work / "copy") as target:
                run, cp_s = copy(load, target)
                found[f"cp before {name}"].append(run)
                found[f"cp before {name}, without sync"].append(cp_s)
            is_cold &= empty_page_cache()
            with removed_after(work / "converted") as target:
                found[name].append(convert(tool, "--load", load, flag, target, "--no-parity"))
            ratio = found[name][-1].wall_s / run.wall_s
            say(f"{name}: {found[name][-1].wall_s:.1f} s, cp {run.wall_s:.1f} s, ratio {ratio:.2f}")
        is_cold &= empty_page_cache()
        found[f"{name} with parity"].append(convert(tool, "--load", load, flag, kept))
        say(f"{name} with parity: {found[f'{name} with parity'][-1].wall_s:.1f} s")
    return found, is_cold


def is_equal(first: Path, second: Path) -> bool:
    """Whether the tensors of two folders are equal bit for bit, by our own tool."""
    command = [sys.executable, str(REPOSITORY / "tools" / "inspect_checkpoint.py"), str(first)]
    done = subprocess.run([*command, "--diff", str(second), "--json"], capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{command} ended with status {done.returncode}: {done.stderr[-2000:]}")
    diff = json.loads(done.stdout)["diff"]
    named = diff["only_first"] or diff["only_second"] or diff["shapes"] or diff["dtypes"]
    return not named and all(value["bitwise_equal"] for value in diff["values"].values())


def main(argv: list[str]) -> int:
    """Measure, print a table, write the results; status 1 if the claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="7b", choices=sorted(PRESETS), help="shape of the model (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of cp and conversion (%(default)s)")
    parser.add_argument("--work", type=Path, help="where to put the files (default: the system's temporary folder)")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    args = parser.parse_args(argv)
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="bench-convert-", dir=args.work) as folder:
        work = Path(folder)
        num_bytes = write_random_model(args.preset, work / "hf")
        found, is_cold = measure(work, work / "hf", args.repeats)
        is_same = is_equal(work / "hf", work / "back")
    results: dict[str, Any] = {}
    for name, runs in found.items():
        walls = [run.wall_s if isinstance(run, Run) else run for run in runs]
        results[name] = {"wall_s": spread(walls, 1), "GB_per_s": round(num_bytes / 1e9 / spread(walls)["median"], 2)}
        if not name.startswith(
            "cp"
        ):  # a child's peak is never below its parent's size, which is all that cp's would say
            peak = max(run.peak_rss_bytes for run in runs)
            results[name] |= {"cpu_s": spread([run.cpu_s for run in runs], 1), "peak_rss_GiB": round(peak / 2**30, 2)}
    for name in ("import", "export"):
        pairs = zip(found[name], found[f"cp before {name}"], strict=True)
        results[name]["ratio_to_cp"] = spread([ours.wall_s / theirs.wall_s for ours, theirs in pairs], 2)
    for name, row in results.items():
        rest = f"   {row['peak_rss_GiB']} GiB" if "peak_rss_GiB" in row else ""
        rest += f"   {row['ratio_to_cp']['median']} x cp" if "ratio_to_cp" in row else ""
        print(f"{name:32} {row['wall_s']['median']:8.1f} s   {row['GB_per_s']} GB/s{rest}")
    tools = [row for name, row in results.items() if not name.startswith("cp")]
    holds = all(row["peak_rss_GiB"] * 2**30 < MAX_RSS_BYTES for row in tools) and is_same
    holds &= all(results[name]["ratio_to_cp"]["median"] <= MAX_RATIO for name in ("import", "export"))
    print(f"at most {MAX_RATIO} x cp and {MAX_RSS_BYTES / 2**30:.0f} GiB: {'yes' if holds else 'NO'}")
    print(f"what came back is the original, bit for bit: {is_same}")
    write_record(
        args.output,
        f"conversion of {args.preset} within {MAX_RATIO} x cp beside parity, in {MAX_RSS_BYTES / 2**30:.0f} GiB",
        holds,
        f"python benchmarks/bench_convert.py --preset {args.preset} --repeats {args.repeats}",
        load_before,
        weights_bytes=num_bytes,
        page_cache_emptied=is_cold,
        comes_back_bit_for_bit=is_same,
        results=results,
    )
    return 0 if holds else 1


if __name__ == "__main__":
    run_cli(main)
