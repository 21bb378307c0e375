"""tools/pretrain.py that makes one channel of one layer's activations far larger than the rest at a certain step.

A torchrun target. Before step PLANT_AT the weight of a norm is multiplied by FACTOR in one channel, and the column of
the matrix that reads it divided by the same: the function stays what it was, in BF16 too, as FACTOR is a power of two.
"""

from __future__ import annotations

import os
from typing import Any

from megatron_ledom.errors import run_cli
from megatron_ledom.train import pretrain as story

FACTOR, CHANNEL = 2.0**20, 3


def build_planting_step(*shadow: object) -> story.ForwardStep:
    import torch
    from megatron.training import get_args

    step = build_forward_step(*shadow)
    planted = []

    def forward_step(data_iterator: Any, model: Any) -> tuple[Any, Any]:
        if model.training and not planted and get_args().curr_iteration + 1 == int(os.environ["PLANT_AT"]):
            planted.append(True)
            layer = {name: module for name, module in model.named_modules() if name.endswith("layers.1")}.popitem()[1]
            with torch.no_grad():
                layer.pre_mlp_layernorm.weight[CHANNEL] *= FACTOR
                layer.mlp.linear_fc1.weight[:, CHANNEL] /= FACTOR
        return step(data_iterator, model)

    return forward_step


build_forward_step = story.build_forward_step
story.build_forward_step = build_planting_step

if __name__ == "__main__":
    run_cli(story.main)
