"""Import what the project cannot do without; exit status 1 and the reason if something is missing or damaged."""

import importlib

MODULES = (
    *("torch", "transformers", "tokenizers", "safetensors.torch", "sentencepiece", "tensorboard", "matplotlib", "rich"),
    *("megatron.core.datasets.helpers_cpp", "megatron.training", "megatron_ledom", "pytest", "hypothesis"),
    *("math_verify", "reasoning_gym"),
    *("gigatoken", "zstandard", "pyarrow.parquet", "nltk.tokenize.punkt", "lm_eval", "pyte"),
)

if __name__ == "__main__":
    for name in MODULES:
        importlib.import_module(name)
    print(importlib.import_module("megatron_ledom.ops.kernels").describe_kernels())
