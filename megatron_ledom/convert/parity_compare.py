"""The comparison itself: both sides compute, one after the other, and a report says how far they are apart.

    transformers    fp32 -> gradients -> saved dtype      logits, module outputs and gradients to files
    Megatron        fp32 -> saved dtype -> gradients      compared with the files as they come

Bounds are here, and what a report says when one is exceeded. What is read is `parity_probe`,
how distance is measured `parity_measure`; why, and in which process, `parity`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ledom.convert.parity_probe import Probe, build_probe
from megatron_ledom.direction import Direction
from megatron_ledom.errors import ParityError
from megatron_ledom.log import Progress

if TYPE_CHECKING:
    import torch

    from megatron_ledom.checkpoint import Checkpoint
    from megatron_ledom.convert.parity_measure import RowComparison, Trace

DTYPES = ("float32", "bfloat16", "float16")
GRADIENTS_NAME = "gradients.safetensors"
RELATIVE_TOLERANCE = 1e-4
"""Largest |difference| of two logits over the largest |logit|. fp32 sums in another order stay below 1e-5; a wrong
row, a wrong rotary base or a swapped pair gives 1e-2 and more (a base of 10,500 for 10,000: 0.16)."""
LOGPROB_TOLERANCE = 1e-3
"""Largest difference of a token's log-probability, and of a sentence's mean loss, in nats: the first bound times
logits of up to ten."""
ROW_TOLERANCE = 1e-5
"""Largest difference of an embedding row's product with a random direction, over the largest such product."""
SHORT_POSITIONS = 16
"""Positions of each row that are also computed in the saved dtype."""
ERROR_FACTOR = 2.0
"""How many times Megatron's own error in the saved dtype the folder's may be, beside a quarter of that dtype's epsilon
(one rounding of the result)."""
MAX_GRADIENT_PARAMETERS = 150_000_000
"""Up to here gradients are compared: 1.2 GB a side for weights and gradients."""
PROGRESS = "parity"
"""Every line of progress begins with it; the parent passes those lines on, and keeps the rest for a failure."""


@dataclass(frozen=True)
class Subject:
    """What is compared.

    Attributes:
        checkpoint: on Megatron's side.
        hf_folder: on transformers' side.
        direction: of the model.
        dtype: of the conversion's output, to which both sides' weights are rounded.
        vocab_size: rows of the folder's tables, without Megatron's padding.
        scratch: a folder for what one side leaves for the other.
        max_gradient_parameters: the largest model whose gradients are compared.
    """

    checkpoint: Checkpoint
    hf_folder: Path
    direction: Direction
    dtype: str
    vocab_size: int
    scratch: Path
    max_gradient_parameters: int = MAX_GRADIENT_PARAMETERS


def compare(
    checkpoint_folder: Path,
    hf_folder: Path,
    *,
    direction: Direction | None = None,
    dtype: str | None = None,
    max_gradient_parameters: int = MAX_GRADIENT_PARAMETERS,
) -> dict[str, Any]:
    """Compare in this process, which keeps the CPU engine's patches afterwards.

    Args:
        checkpoint_folder: as for `check_parity`, like the next three.
        hf_folder: likewise.
        direction: likewise.
        dtype: likewise.
        max_gradient_parameters: the largest model whose gradients are compared.

    Returns:
        The report, with `passed` and, where it is false, `problems` in words.

    Raises:
        LedomError: they could not be compared.
    """
    from megatron_ledom.checkpoint import Checkpoint

    config = _read_config(hf_folder)
    if direction is None:
        direction = Direction.parse(_recorded_direction(config, hf_folder), where=f"{hf_folder}/config.json")
    dtype = dtype or config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise ParityError(f"{hf_folder}/config.json says dtype {dtype!r}; known are {', '.join(DTYPES)}")
    probe = build_probe(
        hf_folder,
        vocab_size=config["vocab_size"],
        max_length=config["max_position_embeddings"],
        direction=direction,
    )
    if probe.why_no_sentences:
        print(f"{PROGRESS}: on random ids only, {probe.why_no_sentences}", file=sys.stderr, flush=True)
    checkpoint = Checkpoint.open(checkpoint_folder)
    with tempfile.TemporaryDirectory(prefix="parity-") as scratch:
        subject = Subject(
            checkpoint, hf_folder, direction, dtype, config["vocab_size"], Path(scratch), max_gradient_parameters
        )
        return _compare(subject, probe)


def _compare(subject: Subject, probe: Probe) -> dict[str, Any]:
    from megatron_ledom.convert.parity_measure import RowComparison, Trace

    rows, trace = RowComparison(), Trace(subject.scratch)
    # transformers first, so that no patch of the CPU engine can have a part in its answer
    hf_loss = _run_hf(subject, probe, rows, trace)
    gc.collect()
    report = _compare_fp32(subject, probe, rows, trace)
    report["saved_dtype"] = _compare_saved_dtype(subject, probe)
    report["gradients"] = _compare_gradients(subject, probe, hf_loss)
    problems = list(_problems(report))
    return {"passed": not problems, "problems": problems, **report}


def _run_hf(subject: Subject, probe: Probe, rows: RowComparison, trace: Trace) -> float | None:
    """Leave transformers' logits and module outputs in the scratch folder; return the loss of its gradients, if any."""
    from megatron_ledom.convert.parity_gradients import save_hf_gradients
    from megatron_ledom.convert.parity_hf import StreamedLlama

    with _progress("transformers", "float32") as on_read:
        llama = StreamedLlama(subject.hf_folder, weights_dtype=subject.dtype, on_read=on_read)
        on_read(0, total=llama.num_bytes)
        trace.record(llama.stations)
        hidden = llama.hidden_states(
            probe.ids_model, on_embedding=lambda _, block: rows.found.append(rows.project(block))
        )
        logits = _logit_file(subject, "float32", probe.ids_model)
        for _, block in llama.logit_blocks(hidden):
            logits.append(block)
    loss = None
    if llama.num_parameters <= subject.max_gradient_parameters:
        with _progress("transformers", "float32, gradients") as on_read:
            loss = save_hf_gradients(llama, _short(probe), subject.scratch / GRADIENTS_NAME)
            on_read(llama.num_bytes)
    if subject.dtype != "float32":
        short = _short(probe)
        with _progress("transformers", subject.dtype) as on_read:
            llama = StreamedLlama(
                subject.hf_folder, weights_dtype=subject.dtype, compute_dtype=subject.dtype, on_read=on_read
            )
            on_read(0, total=llama.num_bytes)
            logits = _logit_file(subject, subject.dtype, short)
            for _, block in llama.logit_blocks(llama.hidden_states(short)):
                logits.append(block)
    return loss


def _compare_fp32(subject: Subject, probe: Probe, rows: RowComparison, trace: Trace) -> dict[str, Any]:
    """Compute Megatron's logits in fp32 and compare them, block by block, with transformers'."""
    import torch

    from megatron_ledom.checkpoint.streamed_model import StreamedModel
    from megatron_ledom.convert.parity_measure import LogitComparison

    ids, vocab_size = probe.ids_model, subject.vocab_size
    logits, difference = _logit_file(subject, "float32", ids), LogitComparison(ids, vocab_size)
    reference = _logit_file(subject, "reference", _short(probe))
    with _progress("Megatron", "float32") as on_read:
        model = StreamedModel(subject.checkpoint, weights_dtype=subject.dtype, on_read=on_read)
        on_read(0, total=model.num_bytes)
        _check_same_shape(subject, model, trace)
        trace.compare(model.stations)
        hidden = model.hidden_states(ids, on_embedding=lambda _, block: rows.expected.append(rows.project(block)))
        for start, block in model.logit_blocks(hidden):
            stop = min(start + block.shape[-1], vocab_size)
            difference.add(start, logits.read(start, max(start, stop)), block)
            if subject.dtype != "float32" and start < stop:
                reference.append(block[:, :SHORT_POSITIONS, : stop - start])
    found, expected = difference.logprobs()
    row_difference, row_id = rows.result(vocab_size)
    return {
        "max_relative_difference": difference.relative_difference,
        "max_absolute_difference": difference.max_difference,
        "max_logprob_difference": _largest((found - expected).abs()),
        "mean_padding_probability": difference.padding_probability(),
        "mean_loss_megatron": -expected.mean().item(),
        "mean_loss_hf": -found.mean().item(),
        "sentences": _sentence_losses(probe, found, expected),
        "why_no_sentences": probe.why_no_sentences,
        "relative_tolerance": RELATIVE_TOLERANCE,
        "logprob_tolerance": LOGPROB_TOLERANCE,
        "positions": ids.numel(),
        "computed_in": "float32",
        "weights": subject.dtype,
        "direction": str(subject.direction),
        "checkpoint": subject.checkpoint.folder.name,
        "embedding_rows": {"max_relative_difference": row_difference, "id": row_id, "tolerance": ROW_TOLERANCE},
        "worst_logit": {"id": difference.worst_id, "row_and_position": difference.worst_place},
        "first_difference": trace.first_difference(RELATIVE_TOLERANCE),
        "torch": torch.__version__,
    }


def _compare_saved_dtype(subject: Subject, probe: Probe) -> dict[str, Any]:
    """Compute Megatron's logits in the saved dtype; judge the folder's error against fp32 by Megatron's own."""
    import torch

    from megatron_ledom.checkpoint.streamed_model import StreamedModel
    from megatron_ledom.convert.parity_measure import ErrorSum

    if subject.dtype == "float32":
        return {"ran": False, "why": "the weights are float32: it is the comparison above"}
    short, hf_error, megatron_error = _short(probe), ErrorSum(), ErrorSum()
    logits, reference = _logit_file(subject, subject.dtype, short), _logit_file(subject, "reference", short)
    with _progress("Megatron", subject.dtype) as on_read:
        model = StreamedModel(
            subject.checkpoint, weights_dtype=subject.dtype, compute_dtype=subject.dtype, on_read=on_read
        )
        on_read(0, total=model.num_bytes)
        for start, block in model.logit_blocks(model.hidden_states(short)):
            stop = min(start + block.shape[-1], subject.vocab_size)
            if start < stop:
                exact = reference.read(start, stop)
                megatron_error.add(block[..., : stop - start], exact)
                hf_error.add(logits.read(start, stop), exact)
    limit = ERROR_FACTOR * megatron_error.relative + torch.finfo(getattr(torch, subject.dtype)).eps / 4
    return {
        "ran": True,
        "passed": hf_error.relative <= limit,  # false for NaN
        "dtype": subject.dtype,
        "positions": short.numel(),
        "relative_error_hf": hf_error.relative,
        "relative_error_megatron": megatron_error.relative,
        "limit": limit,
    }


def _compare_gradients(subject: Subject, probe: Probe, hf_loss: float | None) -> dict[str, Any]:
    import torch

    from megatron_ledom.convert.parity_gradients import compare_gradients

    if hf_loss is None:
        return {"ran": False, "why": f"the model has more than {subject.max_gradient_parameters:,} parameters"}
    path = subject.scratch / GRADIENTS_NAME
    with _progress("Megatron", "float32, gradients") as on_read:
        report = compare_gradients(
            subject.checkpoint,
            _short(probe),
            path,
            hf_loss=hf_loss,
            weights_dtype=subject.dtype,
            vocab_size=subject.vocab_size,
        )
        on_read(path.stat().st_size * getattr(torch, subject.dtype).itemsize // 4)
    return report


def _problems(report: dict[str, Any]) -> Iterator[str]:
    """What is wrong, in words; comparisons are written so that NaN is wrong."""
    relative, logprob, rows = (
        report[k] for k in ("max_relative_difference", "max_logprob_difference", "embedding_rows")
    )
    if not (relative <= RELATIVE_TOLERANCE and logprob <= LOGPROB_TOLERANCE):
        yield (
            f"its logits differ from Megatron's: {relative:.3g} of the largest logit (at most {RELATIVE_TOLERANCE:g}), "
            f"{logprob:.3g} nats (at most {LOGPROB_TOLERANCE:g}), over {report['positions']} positions"
        )
        first = report["first_difference"]
        if first is None:
            yield f"up to the final norm all agrees, so it is lm_head, most of all at id {report['worst_logit']['id']}"
        else:
            yield (
                f"the first module that gives another result is {first['hf']} (Megatron's {first['megatron']}), "
                f"by {first['relative_difference']:.3g} of its largest element"
            )
    losses = [s for s in report["sentences"] if not abs(s["loss_hf"] - s["loss_megatron"]) <= LOGPROB_TOLERANCE]
    if losses:
        worst = losses[0]
        yield f"the loss of {worst['text']!r} is {worst['loss_hf']:.5f}, Megatron's {worst['loss_megatron']:.5f} nats"
    if not rows["max_relative_difference"] <= ROW_TOLERANCE:
        yield f"row {rows['id']} of model.embed_tokens.weight is not Megatron's"
    saved, gradients = report["saved_dtype"], report["gradients"]
    if saved["ran"] and not saved["passed"]:
        yield (
            f"computed in {saved['dtype']}, its logits are {saved['relative_error_hf']:.3g} of their size away from "
            f"fp32, Megatron's own {saved['relative_error_megatron']:.3g} (at most {saved['limit']:.3g})"
        )
    if gradients["ran"] and not gradients["passed"]:
        yield (
            f"the gradient of {gradients['tensor']} differs by {gradients['max_relative_difference']:.3g} of its "
            f"largest element (at most {gradients['tolerance']:g})"
        )


def _sentence_losses(probe: Probe, found: torch.Tensor, expected: torch.Tensor) -> list[dict[str, Any]]:
    """Both models' mean loss of each sentence, given what stands before it in its row."""
    return [
        {
            "text": span.text,
            "tokens": span.stop - span.start,
            "loss_megatron": -expected[0, max(span.start - 1, 0) : span.stop - 1].mean().item(),
            "loss_hf": -found[0, max(span.start - 1, 0) : span.stop - 1].mean().item(),
        }
        for span in probe.spans
        if span.stop >= 2  # the row's first token is predicted from nothing
    ]


def _check_same_shape(subject: Subject, model: Any, trace: Trace) -> None:
    if len(model.stations) != len(trace.names):
        raise ParityError(
            f"{subject.hf_folder} has {(len(trace.names) - 2) // 4} layers, "
            f"{subject.checkpoint.folder} {(len(model.stations) - 2) // 4}"
        )
    if model.num_rows < subject.vocab_size:
        raise ParityError(
            f"{subject.hf_folder} has {subject.vocab_size} rows in its vocabulary, "
            f"{subject.checkpoint.folder} {model.num_rows}"
        )


def _short(probe: Probe) -> torch.Tensor:
    return probe.ids_model[:, :SHORT_POSITIONS]


def _logit_file(subject: Subject, what: str, ids: torch.Tensor) -> Any:
    from megatron_ledom.convert.parity_measure import LogitFile

    return LogitFile(subject.scratch / f"logits-{what}.bin", (ids.shape[0], ids.shape[1]))


def _largest(values: torch.Tensor) -> float:
    import torch

    return values.nan_to_num(nan=torch.inf).max().item() if values.numel() else 0.0


@contextlib.contextmanager
def _progress(side: str, dtype: str) -> Iterator[Any]:
    """A progress line in MB of weights; gives a function of the bytes that were read, and of the total at first."""
    progress = Progress(f"{PROGRESS}: {side}, computing in {dtype}", None, "MB")

    def on_read(num_bytes: int, total: int | None = None) -> None:
        if total is not None:
            progress.total = total / 1e6
        progress.update(num_bytes / 1e6)

    yield on_read
    progress.close()


def _read_config(hf_folder: Path) -> dict[str, Any]:
    path = hf_folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return {"max_position_embeddings": 2048, **config, "vocab_size": int(config["vocab_size"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ParityError(f"{path} cannot be read: {error!r}") from error


def _recorded_direction(config: dict[str, Any], hf_folder: Path) -> str:
    try:
        return str(config["ledom"]["direction"])
    except (KeyError, TypeError):
        raise ParityError(f"{hf_folder}/config.json has no ledom entry: say the direction with --direction") from None
