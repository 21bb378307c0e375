"""megatron_ledom: train, convert and use LEDOM reverse language models on megatron-core.

Importing the package does no work and pulls in no heavy library; every room
(`data`, `engine`, `model`, `train`, ...) is imported where it is needed.
"""

__version__ = "0.1.0"
