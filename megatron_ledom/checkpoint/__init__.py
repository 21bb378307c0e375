"""Reading `torch_dist` checkpoints without process group, GPU or model, and building Megatron's model from one."""

from megatron_ledom.checkpoint.reader import Checkpoint

__all__ = ["Checkpoint"]
