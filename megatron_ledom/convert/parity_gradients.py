"""Gradients of a parity check: every parameter's, of one loss, on both sides, for models that fit in memory.

Logits tell that two models compute the same function at some inputs; gradients tell it of
every parameter at once. Each side needs its weights and gradients in fp32, one side after
the other. Which part of a packed gradient belongs to which Hugging Face tensor is the
export's own table (`names`, `tensors`): this is a second proof beside the logits, not an
independent one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ledom.convert import names
from megatron_ledom.convert.llama_config import attention_shape

if TYPE_CHECKING:
    import torch

    from megatron_ledom.checkpoint import Checkpoint
    from megatron_ledom.convert.parity_hf import StreamedLlama

GRADIENT_TOLERANCE = 1e-4
"""Largest |difference| over the largest element of the same gradient. Small models of the tests are below 3e-6, a
trained one of 134 M parameters is at 7e-6."""


def save_hf_gradients(llama: StreamedLlama, ids_model: torch.Tensor, path: Path) -> float:
    """Write every gradient of the Hugging Face model to a safetensors file; return the loss.

    Args:
        llama: computing in fp32.
        ids_model: int64 [B, S]; the loss is the mean over all predictions.
        path: of the file.
    """
    from safetensors.torch import save_file

    model = llama.load_all()
    loss = _loss(model(input_ids=ids_model, use_cache=False).logits, ids_model)
    loss.backward()
    save_file({name: parameter.grad for name, parameter in model.named_parameters()}, path)
    return loss.item()


def compare_gradients(
    checkpoint: Checkpoint, ids_model: torch.Tensor, path: Path, *, hf_loss: float, weights_dtype: str, vocab_size: int
) -> dict[str, Any]:
    """Compute Megatron's gradients and compare them with those in the file.

    Returns:
        The report: both losses, the largest relative difference and the tensor that has it.

    Raises:
        CheckpointError: a parameter of Megatron's model has no place in the table.
    """
    import torch
    from safetensors import safe_open

    from megatron_ledom.checkpoint.model import load_megatron_model

    model = load_megatron_model(checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, weights_dtype)))
    positions = torch.arange(ids_model.shape[1]).expand_as(ids_model)
    loss = _loss(model(ids_model, positions, None)[..., :vocab_size], ids_model)
    loss.backward()
    differences: dict[str, float] = {}
    with safe_open(path, "pt") as file:
        for name, expected in _unpacked(checkpoint, model, vocab_size):
            found = file.get_tensor(name)
            largest = expected.abs().max().clamp_min(1e-30)
            differences[name] = ((found - expected).abs().max() / largest).nan_to_num(nan=torch.inf).item()
        missing = sorted(set(file.keys()) - set(differences))
    worst = max(differences, key=lambda name: differences[name])
    return {
        "ran": True,
        "passed": not missing and differences[worst] <= GRADIENT_TOLERANCE,
        "tensors": len(differences),
        "without_counterpart": missing,
        "max_relative_difference": differences[worst],
        "tensor": worst,
        "tolerance": GRADIENT_TOLERANCE,
        "loss_megatron": loss.item(),
        "loss_hf": hf_loss,
    }


def _unpacked(checkpoint: Checkpoint, model: Any, vocab_size: int) -> Any:
    """Every gradient of Megatron's model, taken apart, under its Hugging Face names; each is freed when it is used."""
    from megatron_ledom.convert.hf import unpack  # which imports the check

    args, where = checkpoint.args, str(checkpoint.folder)
    parameters = dict(model.named_parameters())
    tied = names.OUTPUT.megatron[0] not in parameters
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    for item in names.plan_export(shapes, num_layers=args.num_layers, tied=tied, where=where):
        parameter = parameters.pop(item.megatron)
        yield from zip(item.hf, unpack(item, parameter.grad, attention_shape(args), vocab_size), strict=True)
        parameter.grad = None


def _loss(logits: torch.Tensor, ids_model: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids_model[:, 1:].flatten())
