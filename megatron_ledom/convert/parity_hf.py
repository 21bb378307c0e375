"""The Hugging Face side of a parity check: transformers' own Llama, with one layer in memory at a time.

`transformers` builds the model from the folder's configuration on the meta device and
computes; hooks read a module's tensors from the folder's safetensors before it runs and
drop them afterwards. What `from_pretrained` would do silently is refused here: a tensor
that is missing, left over, or of another shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ledom.checkpoint.streamed_model import BLOCK_BYTES, set_parameter
from megatron_ledom.convert.hf_weights import HfWeights
from megatron_ledom.errors import ParityError

if TYPE_CHECKING:
    import torch

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"


class StreamedLlama:
    """A folder's model whose weights are in memory only while they are computed with.

    Args:
        folder: configuration and safetensors.
        weights_dtype: the dtype to which every weight is rounded before anything is computed.
        compute_dtype: the dtype in which it computes.
        on_read: told the number of bytes of weights after each piece that was read.

    Attributes:
        model: the `LlamaForCausalLM`, on the meta device.
        num_parameters: elements of all its parameters; tied ones count once.
        stations: name to module, for every module whose output can be compared with another
            implementation's, in the order in which they run. Outputs are [B, S, hidden], or a tuple that
            begins with it.

    Raises:
        ParityError: the folder's tensors are not those of its configuration.
    """

    def __init__(
        self,
        folder: Path,
        *,
        weights_dtype: str = "float32",
        compute_dtype: str = "float32",
        on_read: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        import torch

        self._folder, self._on_read = folder, on_read
        self._weights_dtype, self._compute_dtype = getattr(torch, weights_dtype), getattr(torch, compute_dtype)
        self._weights = HfWeights.open(folder)
        self.model = _build_on_meta(folder, self._compute_dtype)
        self._is_tied = bool(self.model.config.tie_word_embeddings)
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self._check_tensors()
        llama = self.model.model
        # Looked up in the stored dtype, then widened: the same numbers, for a half or a quarter of the memory.
        llama.embed_tokens.register_forward_hook(
            lambda _, __, output: output.to(self._weights_dtype).to(self._compute_dtype)
        )
        self.stations = {"model.embed_tokens": llama.embed_tokens}
        for index, layer in enumerate(llama.layers):
            self._fetch_around(layer, f"model.layers.{index}.")
            for name in ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"):
                self.stations[f"model.layers.{index}.{name}"] = getattr(layer, name)
        self._fetch_around(llama.norm, "model.norm.")
        self.stations["model.norm"] = llama.norm

    def hidden_states(
        self, ids_model: torch.Tensor, *, on_embedding: Callable[[int, torch.Tensor], None] | None = None
    ) -> torch.Tensor:
        """Run everything but the output layer.

        Args:
            ids_model: [B, S], in the model's order.
            on_embedding: called with the first id and the rows [n, hidden] of every block of the embedding.

        Returns:
            The hidden states after the final norm, [B, S, hidden].
        """
        import torch

        table = self._read(EMBEDDING)
        if on_embedding is not None:
            for start, rows in self._blocks(table):
                on_embedding(start, rows)
        embedding = self.model.model.embed_tokens
        set_parameter(embedding, "weight", table)
        with torch.no_grad():
            # Called on word vectors and not on ids, so that the table is gone while the layers run.
            vectors = embedding(ids_model)
            set_parameter(embedding, "weight", table.to("meta"))
            del table
            hidden: torch.Tensor = self.model.model(inputs_embeds=vectors, use_cache=False).last_hidden_state
        return hidden

    def logit_blocks(self, hidden: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Run the output layer on blocks of its rows.

        Args:
            hidden: what `hidden_states` returns.

        Yields:
            The first id of the block and its logits, fp32 [B, S, n].
        """
        import torch

        # A folder with tied embeddings may hold a copy; one that is no copy then shows in the logits.
        table = self._read(OUTPUT if OUTPUT in self._weights.names() else EMBEDDING)
        for start, rows in self._blocks(table):
            set_parameter(self.model.lm_head, "weight", rows.to(self._compute_dtype))
            with torch.no_grad():
                logits = self.model.lm_head(hidden).float()
            set_parameter(self.model.lm_head, "weight", rows.to("meta"))
            yield start, logits

    def load_all(self) -> Any:
        """Return the whole model with trainable weights in memory, for gradients; this object is of no use afterwards.

        A model of its own, without the hooks that drop weights.
        """
        model = _build_on_meta(self._folder, self._compute_dtype)
        for name, _ in list(model.named_parameters()):
            set_parameter(model, name, self._weights.read(name).to(self._weights_dtype).to(self._compute_dtype))
        if self._is_tied:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model.requires_grad_(True)

    @property
    def num_bytes(self) -> int:
        """Bytes of weights that one run reads, in the dtype of the weights."""
        table = self.model.config.vocab_size * self.model.config.hidden_size
        again = table if self._is_tied else 0  # a tied table is read twice
        return (self.num_parameters + again) * self._weights_dtype.itemsize

    def _check_tensors(self) -> None:
        """Refuse a folder whose tensors are not exactly those that the model wants."""
        wanted = {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}
        if self._is_tied:
            wanted.pop(OUTPUT, None)
        found = {name: tuple(self._weights.shape(name)) for name in self._weights.names()}
        problems = [f"{name} is missing" for name in wanted if name not in found]
        problems += [f"{name} is left over" for name in found if name not in wanted and not self._is_known_extra(name)]
        problems += [
            f"{name} is {list(found[name])}, the configuration wants {list(shape)}"
            for name, shape in wanted.items()
            if name in found and found[name] != shape
        ]
        if problems:
            rest = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
            raise ParityError(
                f"{self._folder} does not hold the model of its config.json: {'; '.join(problems[:6])}{rest}"
            )

    def _is_known_extra(self, name: str) -> bool:
        """What transformers passes over: a copy of a tied table, and what older versions stored of the rotation."""
        return (self._is_tied and name == OUTPUT) or name.endswith(".rotary_emb.inv_freq")

    def _blocks(self, table: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """The rows of a vocabulary table, in blocks, in the dtype of the weights."""
        rows_per_block = max(BLOCK_BYTES // (4 * table.shape[1]), 1)
        for start in range(0, len(table), rows_per_block):
            yield start, table[start : start + rows_per_block].to(self._weights_dtype)

    def _fetch_around(self, module: Any, prefix: str) -> None:
        """Give `module` its weights before it runs, and take them away afterwards."""

        def fetch(*_: Any) -> None:
            for name, _parameter in list(module.named_parameters()):
                values = self._read(prefix + name).to(self._weights_dtype).to(self._compute_dtype)
                set_parameter(module, name, values)

        def drop(*_: Any) -> None:
            for name, parameter in list(module.named_parameters()):
                set_parameter(module, name, parameter.to("meta"))

        module.register_forward_pre_hook(fetch)
        module.register_forward_hook(drop)

    def _read(self, name: str) -> torch.Tensor:
        values = self._weights.read(name)
        self._on_read(values.numel() * self._weights_dtype.itemsize)
        return values


def _build_on_meta(folder: Path, dtype: torch.dtype) -> Any:
    """Build transformers' model of a folder's configuration without weights.

    Raises:
        ParityError: it is not a Llama, or a part of it stayed without values.
    """
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.model_type != "llama":
        raise ParityError(f"{folder}: config.json describes a {config.model_type!r} model, not a Llama")
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(dtype).eval()
    # What is computed from the configuration, and not stored, must be computed where numbers exist.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.tie_weights()
    unset = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if unset:
        raise ParityError(f"{folder}: transformers' model has buffers that nothing here sets: {', '.join(unset)}")
    return model
