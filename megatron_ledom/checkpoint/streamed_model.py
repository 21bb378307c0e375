"""Megatron's own `GPTModel` from a checkpoint, with one layer in memory at a time, on the CPU.

Megatron's modules compute, Megatron's `sharded_state_dict` and its factories say which part
of which stored tensor each parameter gets, and torch's reader reads it (`torch_reader`):
nothing here knows a key's meaning. The model stands on the meta
device; forward hooks fetch a module's weights before it runs and drop them afterwards:

    ids -> word embeddings -> layer 0 -> ... -> final norm -> hidden states -> output layer, block by block
           rows of these ids  all of it                                        all rows, a block at a time

The two tables of the vocabulary can be larger than everything else that is held (2 GB in
fp32 for a 7B), so they are asked for in blocks of rows, as tensor-parallel ranks would.
The whole model at once, for training or gradients, is `model.load_megatron_model`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from megatron_ledom.checkpoint.model import (
    build_megatron_model,
    refuse_what_megatron_cannot_load,
    sharding_metadata,
)
from megatron_ledom.checkpoint.torch_reader import TorchReader

if TYPE_CHECKING:
    import torch

    from megatron_ledom.checkpoint.reader import Checkpoint

BLOCK_BYTES = 2**29
"""Rows of a vocabulary table that are held at a time, in fp32. A block reads every chunk that it touches, whole."""

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"


class StreamedModel:
    """A checkpoint's model whose weights are in memory only while they are computed with.

    Args:
        checkpoint: finished, of any layout and dtype.
        weights_dtype: the dtype to which every weight is rounded before anything is computed.
        compute_dtype: the dtype in which it computes.
        on_read: told the number of bytes of weights after each piece that was read.

    Attributes:
        num_rows: rows of the vocabulary tables, padding included.
        num_bytes: of weights that one run reads, in the dtype of the weights; a tied table is read twice.
        stations: Megatron's name to the module, for every module whose output can be compared with another
            implementation's, in the order in which they run: embedding, norms, attention and feed-forward of each
            layer. Outputs are [S, B, hidden], or a tuple that begins with it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        weights_dtype: str = "float32",
        compute_dtype: str = "float32",
        on_read: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        self._checkpoint, self._on_read = checkpoint, on_read
        self._model = build_megatron_model(checkpoint.args, dtype=compute_dtype, on_meta=True).eval()
        import torch  # after the engine, which sets the environment first

        self._weights_dtype, self._compute_dtype = getattr(torch, weights_dtype), getattr(torch, compute_dtype)
        self._reader = TorchReader(checkpoint)
        self._metadata = sharding_metadata(checkpoint)
        tables = self._model.sharded_state_dict(metadata=self._metadata)
        self._embedding = tables[EMBEDDING]
        self._output = tables.get(OUTPUT, self._embedding)  # absent where it is tied to the embedding
        self.num_rows = int(self._embedding.global_shape[0])
        num_elements = sum(parameter.numel() for parameter in self._model.parameters())
        num_elements += self._model.share_embeddings_and_output_weights * math.prod(self._embedding.global_shape)
        self.num_bytes = num_elements * self._weights_dtype.itemsize
        decoder = self._model.decoder
        self.stations = {"embedding": self._model.embedding}
        for index, layer in enumerate(decoder.layers):
            self._fetch_around(layer, f"decoder.layers.{index}.")
            for name in ("input_layernorm", "self_attention", "pre_mlp_layernorm", "mlp"):
                self.stations[f"decoder.layers.{index}.{name}"] = getattr(layer, name)
        self._fetch_around(decoder.final_layernorm, "decoder.final_layernorm.")
        self.stations["decoder.final_layernorm"] = decoder.final_layernorm

    def hidden_states(
        self, ids_model: torch.Tensor, *, on_embedding: Callable[[int, torch.Tensor], None] | None = None
    ) -> torch.Tensor:
        """Run everything but the output layer.

        Args:
            ids_model: [B, S], in the model's order.
            on_embedding: called with the first id and the rows [n, hidden] of every block of the embedding.

        Returns:
            The hidden states after the final norm, [S, B, hidden], as Megatron's output layer takes them.

        Raises:
            CheckpointError: Megatron cannot load the weights.
        """
        import torch

        used, compact_ids = ids_model.unique(return_inverse=True)
        table = torch.empty(len(used), self._embedding.global_shape[1], dtype=self._compute_dtype)
        for start, rows in self._blocks(self._embedding):
            here = (used >= start) & (used < start + len(rows))
            table[here] = rows[used[here] - start].to(table.dtype)
            if on_embedding is not None:
                on_embedding(start, rows)
        # Only the rows that are looked up: a row's number in this table stands for its id.
        set_parameter(self._model.embedding.word_embeddings, "weight", table)
        positions = torch.arange(ids_model.shape[1]).expand_as(ids_model)
        with torch.no_grad():
            hidden: torch.Tensor = self._model(compact_ids, positions, None, output_processor=_hidden_states)
        set_parameter(self._model.embedding.word_embeddings, "weight", table.to("meta"))
        return hidden

    def logit_blocks(self, hidden: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Run the output layer on blocks of its rows.

        Args:
            hidden: what `hidden_states` returns.

        Yields:
            The first id of the block and its logits, fp32 [B, S, n]; all blocks together make `num_rows`.

        Raises:
            CheckpointError: Megatron cannot load the weights.
        """
        import torch

        layer = self._model.output_layer
        for start, rows in self._blocks(self._output):
            set_parameter(layer, "weight", rows.to(self._compute_dtype))
            with torch.no_grad():
                logits = layer(hidden)[0]
            set_parameter(layer, "weight", None)
            yield start, logits.transpose(0, 1).float()

    def _blocks(self, whole: Any) -> Iterator[tuple[int, torch.Tensor]]:
        """The rows of a vocabulary table, in blocks, in the dtype of the weights."""
        import torch

        num_rows, hidden = (int(n) for n in whole.global_shape)
        rows_per_block = max(BLOCK_BYTES // (4 * hidden), 1)
        for start in range(0, num_rows, rows_per_block):
            size = (min(rows_per_block, num_rows - start), hidden)
            rows = torch.empty(size, dtype=self._checkpoint.dtype(whole.key))
            self._reader.fill(rows, whole.key, whole.global_shape, (start, 0))
            self._on_read(rows.numel() * self._weights_dtype.itemsize)
            yield start, rows.to(self._weights_dtype)

    def _fetch_around(self, module: Any, prefix: str) -> None:
        """Give `module` its weights before it runs, and take them away afterwards."""
        module.register_forward_pre_hook(lambda *_: self._fetch(module, prefix))
        module.register_forward_hook(lambda *_: self._drop(module))

    def _fetch(self, module: Any, prefix: str) -> None:
        from megatron.core.dist_checkpointing.mapping import ShardedObject

        wanted = self._model.sharded_state_dict(metadata=self._metadata)
        for name, entry in wanted.items():
            if name.startswith(prefix) and not isinstance(entry, ShardedObject):  # the scales of 8-bit modules
                with refuse_what_megatron_cannot_load(self._checkpoint):
                    values = self._load(entry).to(self._weights_dtype)
                self._on_read(values.nbytes)
                set_parameter(module, name.removeprefix(prefix), values.to(self._compute_dtype))

    def _drop(self, module: Any) -> None:
        for name, parameter in list(module.named_parameters()):
            set_parameter(module, name, parameter.to("meta"))

    def _load(self, entry: Any) -> torch.Tensor:
        """Read what one entry of Megatron's sharded state stands for, through its factory where it has one."""
        from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
        from megatron.core.dist_checkpointing.mapping import (
            ShardedTensorFactory,
            apply_factories,
            apply_factory_merges,
        )

        state = {"entry": entry}
        apply_factories(state)
        loaded = dict_list_map_inplace(self._read, state)
        if isinstance(entry, ShardedTensorFactory):  # it split the parameter: put it together again
            loaded = apply_factory_merges(loaded, {"entry": entry})
        values: torch.Tensor = loaded["entry"]
        return values

    def _read(self, part: Any) -> torch.Tensor:
        """Read the box that one `ShardedTensor` stands for, in the dtype in which it is stored."""
        import torch

        values = torch.empty(tuple(part.local_shape), dtype=self._checkpoint.dtype(part.key))
        box = values.view((1,) * part.prepend_axis_num + tuple(part.local_shape))
        self._reader.fill(box, part.key, part.global_shape, part.global_offset)
        return values


def set_parameter(module: Any, name: str, values: torch.Tensor | None) -> None:
    """Put `values` in the place of the parameter `name` ("self_attn.q_proj.weight") of a module of torch.

    Args:
        module: holds it, itself or in a submodule.
        name: of the parameter, from `module` on.
        values: of any device and dtype; None leaves the place empty.
    """
    import torch

    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    setattr(owner, leaf, None if values is None else torch.nn.Parameter(values, requires_grad=False))


def _hidden_states(*, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
    """The `output_processor` that stops Megatron's forward before the output layer."""
    return hidden_states
