"""tools/pretrain.py that also keeps what it computes: per step the tokens, the labels and the loss of every token.

A torchrun target. The last pipeline stage writes RECORD_TO/step.pt ([{"tokens", "labels", "losses"}, ...] each
[B, S]) in training; everything else is the tool's own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron_ledom.errors import run_cli
from megatron_ledom.train import pretrain as story


def build_recording_step(*shadow: object) -> story.ForwardStep:
    from megatron.core import parallel_state
    from megatron.training import get_args

    step, read, batches = build_forward_step(*shadow), next_batch, []

    def keep_batch(data_iterator: Any) -> dict[str, Any]:
        batches.append(read(data_iterator))
        return batches[-1]

    def forward_step(data_iterator: Any, model: Any) -> tuple[Any, Any]:
        import torch

        output, loss_function = step(data_iterator, model)
        is_last = parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
        if model.training and is_last:
            path = Path(os.environ["RECORD_TO"]) / f"{get_args().curr_iteration}.pt"
            kept = torch.load(path) if path.exists() else []
            batch = {key: batches[-1][key] for key in ("tokens", "labels")}
            torch.save([*kept, batch | {"losses": output.detach().clone()}], path)
        return output, loss_function

    story.next_batch = keep_batch
    return forward_step


build_forward_step, next_batch = story.build_forward_step, story.next_batch
story.build_forward_step = build_recording_step

if __name__ == "__main__":
    run_cli(story.main)
