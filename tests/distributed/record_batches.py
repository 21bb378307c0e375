"""tools/pretrain.py that also keeps what it reads: RECORD_TO/rank-N.jsonl, one {"step", "tokens"} a micro-batch.

A torchrun target. The first pipeline stage's first tensor-parallel rank writes, once for each data-parallel
rank; everything else is the tool's own.
"""

from __future__ import annotations

import json
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
        output, loss_function = step(data_iterator, model)
        is_first = parallel_state.is_pipeline_first_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
        if model.training and is_first:
            record = {"step": get_args().curr_iteration + 1, "tokens": batches[-1]["tokens"].tolist()}
            path = Path(os.environ["RECORD_TO"], f"rank-{parallel_state.get_data_parallel_rank()}.jsonl")
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        batches.clear()
        return output, loss_function

    story.next_batch = keep_batch
    return forward_step


build_forward_step, next_batch = story.build_forward_step, story.next_batch
story.build_forward_step = build_recording_step

if __name__ == "__main__":
    run_cli(story.main)
