"""The story of an export: a checkpoint becomes a folder that plain transformers loads.

    open -> check it is a Llama -> find its tokenizer -> plan -> write beside the target -> compare -> rename

Tensors go one at a time from the checkpoint to safetensors files, the next one being read
while one is written. Everything goes to a hidden folder next to the target (`export_folder`),
which takes the target's name when all of it is there and the logits agree with Megatron's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ledom import __version__
from megatron_ledom.checkpoint import Checkpoint
from megatron_ledom.checkpoint.integrity import verifying_checksums
from megatron_ledom.checkpoint.locate import INDEX
from megatron_ledom.convert import names, tensors
from megatron_ledom.convert.export_folder import ExportFolder, export_folder
from megatron_ledom.convert.llama_config import (
    CONFIG_NAME,
    LEDOM_FORMAT_VERSION,
    AttentionShape,
    attention_shape,
    check_is_llama,
    is_tied,
    llama_config,
)
from megatron_ledom.convert.model_card import model_card
from megatron_ledom.convert.parity import REPORT_NAME, check_parity
from megatron_ledom.convert.safetensors_file import (
    DTYPE_CODES,
    INDEX_NAME,
    ITEM_BYTES,
    ShardPlan,
    ShardWriter,
    header_bytes,
    plan_shards,
)
from megatron_ledom.convert.tokenizer_files import find_tokenizer, num_table_rows, special_ids, write_tokenizer
from megatron_ledom.data.tokenizers import Tokenizer
from megatron_ledom.direction import describe_direction
from megatron_ledom.errors import CheckpointError, OutputExistsError, UsageError
from megatron_ledom.files import one_ahead
from megatron_ledom.log import Progress, get_logger

if TYPE_CHECKING:
    import torch

_SPARE_BYTES = 64 * 2**20  # what is not a tensor: tokenizer, card, headers


@dataclass(frozen=True)
class ExportOptions:
    """What can be chosen about an export.

    Attributes:
        dtype: "float32", "bfloat16", "float16", or "checkpoint" for what is stored.
        max_shard_bytes: the largest safetensors file.
        tokenizer: a tokenizer's folder or file, or None to find it.
        parity: compare with Megatron's model before the folder gets its name.
        overwrite: replace an earlier export of the same name.
    """

    dtype: str = "checkpoint"
    max_shard_bytes: int = 5 * 10**9
    tokenizer: Path | None = None
    parity: bool = True
    overwrite: bool = False


@dataclass(frozen=True)
class ExportResult:
    """What was made: the folder, its weights' files, parameters, direction, and the parity report (None: not made)."""

    folder: Path
    shards: tuple[str, ...]
    num_parameters: int
    direction: str
    parity: dict[str, Any] | None


def export_checkpoint(
    load: Path, output: Path, *, step: int | None = None, options: ExportOptions | None = None
) -> ExportResult:
    """Convert a Megatron checkpoint into a Hugging Face folder.

    Args:
        load: Megatron's `--save` folder, or an `iter_NNNNNNN` folder.
        output: the folder to make.
        step: an iteration, or None for the last finished one.
        options: see `ExportOptions`.

    Raises:
        CheckpointError: the checkpoint is absent, unfinished or damaged, not the one that was saved, or is no Llama.
        OutputExistsError: `output` is there already.
        InputError, TokenizerMismatchError: no tokenizer, or not the one of the weights.
        ParityError: the logits differ from Megatron's.
        UsageError: an option that does not fit.
        OutputError: the folder cannot be made there, or there is not enough space.
    """
    options = options or ExportOptions()

    def check_target() -> None:
        check_output(output, overwrite=options.overwrite)

    check_target()
    checkpoint = Checkpoint.open(load, step)
    direction, where = checkpoint.direction, str(checkpoint.folder)
    check_is_llama(checkpoint.args, where=where)
    tokenizer = find_tokenizer(checkpoint.args, checkpoint.folder, options.tokenizer)
    vocab_size = num_table_rows(checkpoint.args, tokenizer)
    items, plan = plan_weights(checkpoint, vocab_size=vocab_size, options=options)
    num_parameters = plan.tensor_bytes // ITEM_BYTES[plan.dtype]
    with (
        export_folder(
            output,
            identity=weights_identity(checkpoint, plan),
            needed_bytes=plan.tensor_bytes + _SPARE_BYTES,
            check_target=check_target,
        ) as target,
        verifying_checksums(checkpoint.folder) as check_checksums,
    ):
        folder = target.path
        config = write_configuration(checkpoint, tokenizer, folder, vocab_size=vocab_size, dtype=plan.dtype)
        write_weights(checkpoint, items, plan, target, vocab_size=vocab_size)
        check_checksums()
        report = None
        if options.parity:
            report = check_parity(checkpoint.folder, folder)
            _write_json(folder / REPORT_NAME, report)
        else:
            get_logger(__name__).warning(
                "--no-parity: NOTHING WAS CHECKED. %s has never been compared with the checkpoint's own logits", output
            )
        card = model_card(
            checkpoint.args,
            config,
            direction=direction,
            iteration=checkpoint.iteration,
            num_parameters=num_parameters,
            parity=report,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    return ExportResult(output, tuple(s.file_name for s in plan.shards), num_parameters, str(direction), report)


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse to write over anything, except over an earlier export when asked to.

    Raises:
        OutputExistsError: `output` exists.
    """
    if not output.exists():
        return
    if not overwrite:
        raise OutputExistsError(f"--output {output} exists; choose another name, or replace it with --overwrite")
    if not _is_export(output) and not (output.is_dir() and not any(output.iterdir())):
        raise OutputExistsError(
            f"--output {output} is not an earlier export (its {CONFIG_NAME} has no 'ledom' entry): "
            "not even --overwrite removes it"
        )


def plan_weights(
    checkpoint: Checkpoint, *, vocab_size: int, options: ExportOptions
) -> tuple[list[names.Item], ShardPlan]:
    """Decide what every weight becomes and in which file it goes, without reading one.

    Raises:
        CheckpointError: a weight is missing, unknown, or of a shape that the arguments do not give.
        UsageError: the stored dtypes do not say what `dtype="checkpoint"` means.
    """
    where = str(checkpoint.folder)
    shapes = {name: checkpoint.shape(name) for name in checkpoint.tensor_names()}
    items = names.plan_export(shapes, num_layers=checkpoint.args.num_layers, tied=is_tied(checkpoint.args), where=where)
    dtype = options.dtype
    if dtype == "checkpoint":
        stored = {str(checkpoint.dtype(item.megatron)).removeprefix("torch.") for item in items}
        if len(stored) != 1 or not stored <= set(DTYPE_CODES):
            raise UsageError(f"{where} stores its weights as {', '.join(sorted(stored))}; choose one with --dtype")
        dtype = stored.pop()
    out: dict[str, tuple[int, ...]] = {}
    shape = attention_shape(checkpoint.args)
    for item in items:
        stored_shape = shapes[item.megatron] if item.layer is None else shapes[item.megatron][1:]
        out |= dict(zip(item.hf, _unpacked_shapes(item, stored_shape, shape, vocab_size, where), strict=True))
    return items, plan_shards(out, dtype=dtype, max_shard_bytes=options.max_shard_bytes)


def write_configuration(
    checkpoint: Checkpoint, tokenizer: Tokenizer, folder: Path, *, vocab_size: int, dtype: str
) -> dict[str, Any]:
    """Write the tokenizer's files, config.json and generation_config.json; return config.json's content."""
    special = write_tokenizer(tokenizer, checkpoint.args, folder)
    tokens = special_ids(checkpoint.args, bos_token_id=special["bos_token_id"], eod_id=tokenizer.eod_id)
    config = llama_config(checkpoint.args, vocab_size=vocab_size, dtype=dtype, **tokens)
    config["ledom"] = {
        "format_version": LEDOM_FORMAT_VERSION,
        **describe_direction(checkpoint.direction),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "iteration": checkpoint.iteration,
        "megatron_ledom_version": __version__,
    }
    _write_json(folder / CONFIG_NAME, config)
    pad = special["pad_token_id"]
    generation = tokens | {"pad_token_id": tokenizer.eod_id if pad is None else pad}
    _write_json(folder / "generation_config.json", generation)
    return config


def weights_identity(checkpoint: Checkpoint, plan: ShardPlan) -> dict[str, Any]:
    """What the bytes of an export's weights depend on; one that was interrupted is continued where this is equal."""
    heads = hashlib.sha256()
    for shard in plan.shards:
        heads.update(shard.file_name.encode() + header_bytes(shard, plan.dtype))
    sources = {path.name: path.stat() for path in (*checkpoint.folder.glob("*.distcp"), checkpoint.folder / INDEX)}
    return {
        "checkpoint": str(checkpoint.folder.resolve()),
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in sorted(sources.items())},
        "headers_sha256": heads.hexdigest(),
        "megatron_ledom_version": __version__,
    }


def write_weights(
    checkpoint: Checkpoint, items: list[names.Item], plan: ShardPlan, target: ExportFolder, *, vocab_size: int
) -> None:
    """Stream every weight that is not there yet into `target`; three stored tensors at most are in memory.

    Raises:
        CheckpointError: a chunk is damaged, or a weight is not finite in the output's dtype.
        OutputError: the file system refuses.
    """
    with ShardWriter(target.path, plan, finished=target.finished, on_finished=target.finish_file) as writer:
        wanted = set(writer.expected)
        progress = Progress("export", plan.num_bytes(wanted) / 1e6, "MB")
        parts = converted_parts(checkpoint, items, wanted, vocab_size=vocab_size, dtype=plan.dtype)
        for name, tensor in one_ahead(parts):
            writer.write(name, tensor)
            progress.update(tensor.nbytes / 1e6)
        progress.close()
    index = plan.index()
    if index is not None:
        _write_json(target.path / INDEX_NAME, index)


def converted_parts(
    checkpoint: Checkpoint, items: list[names.Item], wanted: set[str], *, vocab_size: int, dtype: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """Read the tensors of the names in `wanted`, in order, as the export stores them."""
    shape = attention_shape(checkpoint.args)
    for item in items:
        if not wanted.intersection(item.hf):
            continue
        if item.packing == "gate_up":
            parts = _read_halves(checkpoint, item)
        else:
            layer = item.layer
            stored = checkpoint.read(item.megatron) if layer is None else checkpoint.read_slice(item.megatron, layer)
            parts = iter(unpack(item, stored, shape, vocab_size))
            del stored
        for name, part in zip(item.hf, parts, strict=True):
            if name in wanted:
                yield name, _converted(name, part, dtype)


def _read_halves(checkpoint: Checkpoint, item: names.Item) -> Iterator[torch.Tensor]:
    """Read what `split_gate_up` takes apart as two boxes: Megatron stores the halves apart, so nothing is copied."""
    is_stacked = item.layer is not None
    rows, *rest = checkpoint.shape(item.megatron)[is_stacked:]
    stack = (item.layer,) if item.layer is not None else ()
    for start in (0, rows // 2):
        box = checkpoint.read_box(
            item.megatron, (*stack, start, *(0 for _ in rest)), (*(1,) * is_stacked, rows // 2, *rest)
        )
        yield box[0] if is_stacked else box


def _converted(name: str, part: torch.Tensor, dtype: str) -> torch.Tensor:
    remedy = "the checkpoint itself is not; take an earlier --step"
    return tensors.to_finite_dtype(part, dtype, name, remedy=remedy)


def unpack(item: names.Item, stored: torch.Tensor, shape: AttentionShape, vocab_size: int) -> tuple[torch.Tensor, ...]:
    """Take a stored tensor apart into the tensors that `item.hf` names, in that order."""
    if item.packing == "qkv":
        return tensors.split_qkv(
            stored, num_heads=shape.num_heads, num_query_groups=shape.num_query_groups, head_dim=shape.head_dim
        )
    if item.packing == "gate_up":
        return tensors.split_gate_up(stored)
    if item.packing == "vocabulary":
        return (tensors.remove_vocabulary_padding(stored, vocab_size),)
    return (stored,)


def _unpacked_shapes(
    item: names.Item, stored_shape: tuple[int, ...], shape: AttentionShape, vocab_size: int, where: str
) -> list[tuple[int, ...]]:
    """The shapes that `unpack` will give: found by unpacking a tensor without data."""
    import torch

    try:
        parts = unpack(item, torch.empty(stored_shape, device="meta"), shape, vocab_size)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {item.megatron}: {error}") from error
    return [tuple(part.shape) for part in parts]


def _is_export(folder: Path) -> bool:
    try:
        return "ledom" in json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
