"""Torch's own reader of `torch_dist` files, asked for boxes of global tensors.

Megatron's `dist_checkpointing.load` hands torch the tensors of a whole model, and on one
rank refuses a part of one (a layer of a stack, some rows of a table). This asks torch's
planner functions and file reader, which Megatron uses too, for exactly a part. The index
comes from `unpickle`, so that nothing in it can run; everything else is torch's. This
package's own reader (`reader`) has no part in it: a comparison with what that one read is
a comparison of two readers.

Source: `torch.distributed.checkpoint.state_dict_loader`, which calls the same four functions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_ledom.checkpoint.locate import INDEX
from megatron_ledom.checkpoint.unpickle import load_index
from megatron_ledom.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from megatron_ledom.checkpoint.reader import Checkpoint


class TorchReader:
    """Reads boxes of a checkpoint's tensors with `torch.distributed.checkpoint`.

    Args:
        checkpoint: open, so that the places that its index names are known to lie within it.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        from torch.distributed.checkpoint import FileSystemReader

        self._folder = checkpoint.folder
        self._index = load_index(checkpoint.folder / INDEX)
        self._reader = FileSystemReader(checkpoint.folder)
        self._reader.set_up_storage_reader(self._index, is_coordinator=True)

    def fill(self, target: torch.Tensor, name: str, shape: Sequence[int], offsets: Sequence[int]) -> None:
        """Fill `target` with the box of the tensor `name` that begins at `offsets`.

        One stored chunk is in memory at a time, whole.

        Args:
            target: contiguous, of any dtype, with as many axes as `shape`; the box's size is its shape.
            name: of a tensor of the checkpoint.
            shape: that the caller expects the whole tensor to have.
            offsets: of the box, an element for each axis.

        Raises:
            CheckpointError: there is no such tensor, its shape is another, or its chunks do not hold the box.
        """
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
        from torch.distributed.checkpoint.planner import LoadPlan
        from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

        stored = self._index.state_dict_metadata.get(name)
        if not isinstance(stored, TensorStorageMetadata) or tuple(stored.size) != tuple(shape):
            found = list(stored.size) if isinstance(stored, TensorStorageMetadata) else "no such tensor"
            raise CheckpointError(f"{self._folder}: Megatron's model wants {name} {list(shape)}, there is {found}")
        box = ChunkStorageMetadata(_size(offsets), target.shape)
        items = create_read_items_for_chunk_list(name, stored, [box])
        num_stored = sum(math.prod(item.lengths) for item in items)
        if num_stored != target.numel():
            raise CheckpointError(
                f"{self._folder}: the chunks of {name} hold {num_stored} of {target.numel()} elements"
            )
        try:
            plan = self._reader.prepare_local_plan(LoadPlan(items))
            self._reader.read_data(plan, _planner_class()(target)).wait()
        except Exception as error:  # a damaged file raises nearly anything
            raise CheckpointError(f"{self._folder}: {name} is damaged ({type(error).__name__}: {error})") from error


@functools.cache
def _planner_class() -> Any:
    """The class that tells torch's reader where what it reads belongs: into one tensor.

    Made once: a class for each read would keep its tensor until the next collection of cycles.
    """
    from torch.distributed.checkpoint import DefaultLoadPlanner

    class BoxPlanner(DefaultLoadPlanner):
        def __init__(self, target: torch.Tensor) -> None:
            super().__init__()
            self._target = target

        def lookup_tensor(self, index: Any) -> torch.Tensor:
            return self._target

    return BoxPlanner


def _size(numbers: Sequence[int]) -> Any:
    import torch

    return torch.Size(int(n) for n in numbers)
