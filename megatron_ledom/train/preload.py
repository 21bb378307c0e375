"""What a training rank imports, imported beforehand: forked ranks then start in a fraction of a second."""

from __future__ import annotations


def preload() -> None:
    """Activate the CPU engine and import Megatron's training code and ours; starts nothing."""
    from megatron_ledom.engine import cpu

    cpu.install()
    import megatron.training.training  # noqa: F401

    import megatron_ledom.train.pretrain  # noqa: F401
