"""The story of an import: a Hugging Face Llama folder becomes a checkpoint from which training continues.

    read config -> direction -> plan: every tensor in its place -> write beside the target -> compare -> rename

Tensors go one at a time from safetensors files into a `torch_dist` checkpoint of Megatron's
"release" kind: weights without optimizer state, iteration 0, loaded at any layout.

    CHECKPOINT/
      latest_checkpointed_iteration.txt   "release"
      release/                            the checkpoint
      tokenizer/                          the folder's tokenizer, where it has one
      parity.json                         the comparison with the folder's own logits
      import.json                         where the weights came from

Nothing in the folder is executed: JSON and raw tensors are all that is read.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ledom import __version__
from megatron_ledom.checkpoint.integrity import write_checksums
from megatron_ledom.checkpoint.locate import RELEASE, TRACKER
from megatron_ledom.checkpoint.writer import CheckpointWriter
from megatron_ledom.convert import names, tensors
from megatron_ledom.convert.hf_weights import HfWeights, check_inside
from megatron_ledom.convert.llama_arguments import megatron_settings, model_direction, read_config
from megatron_ledom.convert.llama_config import CONFIG_NAME, attention_shape, is_tied
from megatron_ledom.convert.parity import REPORT_NAME, check_parity
from megatron_ledom.convert.safetensors_file import ITEM_BYTES
from megatron_ledom.convert.tokenizer_files import copy_tokenizer_files
from megatron_ledom.data.tokenizers import Tokenizer, load_tokenizer
from megatron_ledom.direction import Direction
from megatron_ledom.errors import CheckpointError, OutputExistsError, TokenizerMismatchError, UsageError
from megatron_ledom.files import folder_beside, one_ahead
from megatron_ledom.log import Progress, get_logger

if TYPE_CHECKING:
    import torch

RECORD_NAME = "import.json"
RECORD_FORMAT_VERSION = 1
WITH_EXTRA_STATE = (
    *("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"),
    "self_attention.core_attention",
)
"""Modules for which Megatron looks up an extra state at load (FP8 scales with Transformer Engine; here none)."""
_SPARE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class ImportOptions:
    """What can be chosen about an import.

    Attributes:
        direction: in which the model reads; None where the folder says so itself.
        dtype: "float32", "bfloat16", "float16", or "folder" for what is stored.
        tokenizer: a tokenizer's folder or file, or None for the folder's own.
        parity: compare Megatron's logits with transformers' before the checkpoint gets its name.
        overwrite: replace an earlier import of the same name.
    """

    direction: Direction | None = None
    dtype: str = "folder"
    tokenizer: Path | None = None
    parity: bool = True
    overwrite: bool = False


@dataclass(frozen=True)
class ImportResult:
    """What was made: the checkpoint, parameters, direction, stored dtype, and the parity report (None: not made)."""

    folder: Path
    num_parameters: int
    direction: str
    dtype: str
    parity: dict[str, Any] | None


@dataclass(frozen=True)
class Place:
    """Where one Hugging Face tensor, or a pack of them, goes.

    Attributes:
        hf: the tensors that are read, in packing order.
        megatron: the key that is written.
        shape: of the whole tensor under that key, layers stacked on the leading axis.
        layer: the index on that axis, or None outside the layers.
        packing: see `names.Rule`.
    """

    hf: tuple[str, ...]
    megatron: str
    shape: tuple[int, ...]
    layer: int | None
    packing: names.Packing


def import_folder(load: Path, save: Path, *, options: ImportOptions | None = None) -> ImportResult:
    """Convert a Hugging Face Llama folder into a Megatron checkpoint.

    Args:
        load: holds config.json and safetensors, sharded or not.
        save: the folder to make; what `tools/pretrain.py --pretrained-checkpoint` takes.
        options: see `ImportOptions`.

    Raises:
        CheckpointError: the folder is damaged, incomplete or no Llama that Megatron can express.
        UsageError, DirectionError: nobody says which way the model reads, or two say different things.
        TokenizerMismatchError: the tokenizer has more ids than the model, or is not the one on record.
        OutputExistsError: `save` is there already.
        OutputError: the checkpoint cannot be made there, or there is not enough space.
        ParityError: Megatron's logits differ from transformers'.
    """
    options = options or ImportOptions()
    config, where = read_config(load), str(load / CONFIG_NAME)
    settings = megatron_settings(config, where=where)
    direction = model_direction(config, options.direction, where=where)
    weights = HfWeights.open(load)
    dtype = _output_dtype(weights, options.dtype, load)
    tokenizer = _find_tokenizer(load, options.tokenizer, config)
    args = build_arguments(settings, config, direction=direction, dtype=dtype, tokenizer=tokenizer, save=save)
    places = plan_import(weights, args, where=str(load))
    num_parameters = sum(_num_elements(weights, place) for place in places)
    num_bytes = num_parameters * ITEM_BYTES[dtype]

    def check_save() -> None:
        check_target(save, overwrite=options.overwrite)

    needed_bytes = num_bytes + _SPARE_BYTES
    with folder_beside(
        save, flag="--save", kind="import", needed_bytes=needed_bytes, check_target=check_save
    ) as folder:
        write_checkpoint(weights, places, args, folder / RELEASE, dtype=dtype, num_bytes=num_bytes)
        (folder / TRACKER).write_text(RELEASE, encoding="utf-8")
        if tokenizer is not None:
            _copy_tokenizer(tokenizer, folder / "tokenizer")
        report = None
        if options.parity:
            report = check_parity(folder / RELEASE, load, direction=direction, dtype=dtype)
            _write_json(folder / REPORT_NAME, report)
        else:
            get_logger(__name__).warning("--no-parity: NOTHING WAS CHECKED. %s was never compared with %s", save, load)
        _write_json(folder / RECORD_NAME, _record(load, config, direction, dtype, num_parameters, weights))
    return ImportResult(save, num_parameters, str(direction), dtype, report)


def check_target(save: Path, *, overwrite: bool) -> None:
    """Refuse to write over anything, except over an earlier import, not trained on, when asked to.

    Raises:
        OutputExistsError: `save` is there.
    """
    if not save.exists() or (save.is_dir() and not any(save.iterdir())):
        return
    if not overwrite:
        raise OutputExistsError(f"--save {save} exists; choose another name, or replace it with --overwrite")
    if not (save / RECORD_NAME).is_file():
        raise OutputExistsError(
            f"--save {save} is not an earlier import (no {RECORD_NAME}): not even --overwrite removes it"
        )
    trained = sorted(path.name for path in save.glob("iter_*"))
    if trained:
        raise OutputExistsError(
            f"--save {save} holds {trained[-1]}, trained weights: not even --overwrite removes them"
        )


def build_arguments(
    settings: dict[str, Any],
    config: dict[str, Any],
    *,
    direction: Direction,
    dtype: str,
    tokenizer: Tokenizer | None,
    save: Path,
) -> argparse.Namespace:
    """Build the arguments that the checkpoint carries: Megatron's, with ours among them.

    `hf_origin` keeps what an export cannot find out from weights and tokenizer: the rows of the
    tables and the special ids of config.json. Training hands it on from checkpoint to checkpoint.
    """
    import torch

    from megatron_ledom.engine.arguments import build_saved_arguments

    origin = {name: config.get(name) for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    ours = {
        "preset": None,
        "direction": str(direction),
        "device": "cpu",
        "run_dir": None,
        "tokenizer_type": None if tokenizer is None else tokenizer.type,
        "tokenizer_model": None if tokenizer is None else str((save / "tokenizer").absolute()),
        "tokenizer_fingerprint": None if tokenizer is None else tokenizer.fingerprint,
        "hf_origin": origin,
    }
    precision = {"params_dtype": getattr(torch, dtype), "bf16": dtype == "bfloat16", "fp16": dtype == "float16"}
    sizes = {"padded_vocab_size": config["vocab_size"], "vocab_size": config["vocab_size"]}
    format_ = {"ckpt_format": "torch_dist", "transformer_impl": "local"}
    return build_saved_arguments(settings | ours | precision | sizes | format_)


def plan_import(weights: HfWeights, args: argparse.Namespace, *, where: str) -> list[Place]:
    """Give every tensor of the folder its place, without reading one.

    Raises:
        CheckpointError: a tensor is missing, has no place, or has not the shape that config.json gives.
    """
    num_layers, expected = args.num_layers, expected_shapes(args)
    found = set(weights.names())
    left_over = found - set(expected)
    if is_tied(args):
        left_over -= _tied_copy(weights, found, where)
    left_over -= {name for name in left_over if name.endswith(".rotary_emb.inv_freq")}  # old files; follows from config
    missing = [name for name in expected if name not in found]
    if missing or left_over:
        parts = [f"lacks {_some(missing)}"] if missing else []
        parts += (
            [f"holds {_some(sorted(left_over))}, which have no place in a Llama without biases"] if left_over else []
        )
        raise CheckpointError(f"{where} {' and '.join(parts)}. Nothing is left out silently")
    wrong = [
        f"{name} is {list(weights.shape(name))}, {CONFIG_NAME} gives {list(shape)}"
        for name, shape in expected.items()
        if tuple(weights.shape(name)) != shape
    ]
    if wrong:
        raise CheckpointError(f"{where}: {'; '.join(wrong[:4])}{f' and {len(wrong) - 4} more' if wrong[4:] else ''}")
    return list(_places(num_layers, expected, args))


def expected_shapes(args: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of the model that `args` describes, in the order of an export, with its shape."""
    shape, hidden, ffn = attention_shape(args), args.hidden_size, args.ffn_hidden_size
    query, key_value = shape.num_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
    by_ending = {
        "embed_tokens.weight": (args.padded_vocab_size, hidden),
        "lm_head.weight": (args.padded_vocab_size, hidden),
        "norm.weight": (hidden,),
        "q_proj.weight": (query, hidden),
        "k_proj.weight": (key_value, hidden),
        "v_proj.weight": (key_value, hidden),
        "o_proj.weight": (hidden, query),
        "gate_proj.weight": (ffn, hidden),
        "up_proj.weight": (ffn, hidden),
        "down_proj.weight": (hidden, ffn),
    }
    return {
        name: next(size for ending, size in by_ending.items() if name.endswith(ending))
        for name in names.hf_names(args.num_layers, tied=is_tied(args))
    }


def write_checkpoint(
    weights: HfWeights, places: list[Place], args: argparse.Namespace, folder: Path, *, dtype: str, num_bytes: int
) -> None:
    """Stream every weight into the new checkpoint `folder`; three packed tensors at most are in memory."""
    folder.mkdir()
    progress = Progress("import", num_bytes / 1e6, "MB")
    with CheckpointWriter(folder) as writer:
        chunks = ((place, *chunk) for place in places for chunk in _packed(weights, place, args, dtype))
        for place, values, offsets in one_ahead(chunks):
            writer.write_chunk(place.megatron, values, shape=place.shape, offsets=offsets)
            progress.update(values.nbytes / 1e6)
        for module in WITH_EXTRA_STATE:
            for layer in range(args.num_layers):
                name = f"{names.MEGATRON_LAYERS}{module}._extra_state/shard_{layer}_{args.num_layers}"
                writer.write_object(name, None)
        writer.write_common(args, iteration=0)
    progress.close()
    write_checksums(folder, writer.hashes)


def _places(num_layers: int, expected: dict[str, tuple[int, ...]], args: argparse.Namespace) -> Iterator[Place]:
    """The places in the order in which an export writes the tensors."""

    def place(rule: names.Rule, layer: int | None) -> Place:
        prefix, key = ("", "") if layer is None else (f"{names.HF_LAYERS}{layer}.", names.MEGATRON_LAYERS)
        hf = tuple(prefix + name for name in rule.hf)
        rows = sum(expected[name][0] for name in hf)
        stack = () if layer is None else (num_layers,)
        return Place(hf, key + rule.megatron[0], (*stack, rows, *expected[hf[0]][1:]), layer, rule.packing)

    yield place(names.EMBEDDING, None)
    for layer in range(num_layers):
        for rule in names.LAYER_RULES:
            yield place(rule, layer)
    yield place(names.FINAL_NORM, None)
    if not is_tied(args):
        yield place(names.OUTPUT, None)


def _packed(
    weights: HfWeights, place: Place, args: argparse.Namespace, dtype: str
) -> Iterator[tuple[torch.Tensor, tuple[int, ...]]]:
    """The chunks of a place, each with its offsets in the whole tensor.

    Gate and up projection stay two chunks, as Megatron itself saves them, so that they are never in memory together.
    """
    parts: Iterator[torch.Tensor] = (_read(weights, name, dtype) for name in place.hf)
    if place.packing == "qkv":
        shape = attention_shape(args)
        sizes = {"num_heads": shape.num_heads, "num_query_groups": shape.num_query_groups, "head_dim": shape.head_dim}
        parts = iter([tensors.merge_qkv(*parts, **sizes)])
    row = 0
    for part in parts:
        stack = () if place.layer is None else (place.layer,)
        yield (part if place.layer is None else part.unsqueeze(0)), (*stack, row, *(0 for _ in part.shape[1:]))
        row += part.shape[0]


def _read(weights: HfWeights, name: str, dtype: str) -> torch.Tensor:
    return tensors.to_finite_dtype(
        weights.read(name), dtype, f"{weights.files[name]}: {name}", remedy="the folder is damaged, fetch it again"
    )


def _output_dtype(weights: HfWeights, asked: str, load: Path) -> str:
    if asked != "folder":
        return asked
    found = sorted({str(weights.dtype(name)).removeprefix("torch.") for name in weights.names()})
    if len(found) != 1 or found[0] not in ITEM_BYTES:
        raise UsageError(f"{load} stores its weights as {', '.join(found)}; choose one with --dtype")
    return found[0]


def _tied_copy(weights: HfWeights, found: set[str], where: str) -> set[str]:
    """The copy of the embedding that some folders with tied embeddings hold as `lm_head.weight`; it must be equal."""
    copies = found & set(names.OUTPUT.hf)
    for name in copies:
        if not weights.read(name).equal(weights.read(names.EMBEDDING.hf[0])):
            raise CheckpointError(
                f"{where}: {CONFIG_NAME} says tie_word_embeddings, but {name} differs from {names.EMBEDDING.hf[0]}"
            )
    return copies


def _find_tokenizer(load: Path, asked: Path | None, config: dict[str, Any]) -> Tokenizer | None:
    place = asked or load
    if asked is None and not any((load / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        get_logger(__name__).warning("%s holds no tokenizer: the checkpoint gets none (--tokenizer names one)", load)
        return None
    is_sentencepiece = place.suffix == ".model" or not (place / "tokenizer.json").is_file()
    if is_sentencepiece and place.is_dir():
        place = place / "tokenizer.model"
    if asked is None:
        check_inside(place if place.is_file() else place / "tokenizer.json")
    tokenizer = load_tokenizer("SentencePieceTokenizer" if is_sentencepiece else "HuggingFaceTokenizer", place)
    if tokenizer.vocab_size > config["vocab_size"]:
        raise TokenizerMismatchError(
            f"{place} has {tokenizer.vocab_size} ids, {load / CONFIG_NAME} gives the model {config['vocab_size']} rows"
        )
    recorded = (config.get("ledom") or {}).get("tokenizer_fingerprint")
    if recorded is not None and recorded != tokenizer.fingerprint:
        raise TokenizerMismatchError(
            f"{load / CONFIG_NAME} says that the model was trained with tokenizer {recorded}, {place} is "
            f"{tokenizer.fingerprint}; name the right one with --tokenizer"
        )
    return tokenizer


def _copy_tokenizer(tokenizer: Tokenizer, target: Path) -> None:
    target.mkdir()
    source = Path(tokenizer.model)
    if source.is_file():
        shutil.copyfile(source, target / "tokenizer.model")
        return
    copy_tokenizer_files(source, target)


def _record(
    load: Path, config: dict[str, Any], direction: Direction, dtype: str, num_parameters: int, weights: HfWeights
) -> dict[str, Any]:
    return {
        "format_version": RECORD_FORMAT_VERSION,
        "source": str(load.absolute()),
        "source_bytes": weights.nbytes,
        "source_config": config,
        "direction": str(direction),
        "dtype": dtype,
        "num_parameters": num_parameters,
        "created_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "megatron_ledom_version": __version__,
    }


def _num_elements(weights: HfWeights, place: Place) -> int:
    return sum(math.prod(weights.shape(name)) for name in place.hf)


def _some(found: list[str], limit: int = 6) -> str:
    rest = f" and {len(found) - limit} more" if len(found) > limit else ""
    return ", ".join(found[:limit]) + rest


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
