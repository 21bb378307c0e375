"""The tokenizer of an exported folder: found, identified by its fingerprint, copied, and tried.

`AutoTokenizer` of plain transformers must give the ids that the model was trained on, so
the copied folder is loaded with it and compared with the project's own tokenizer before
it counts as done. It does not own what a fingerprint is (`data.tokenizers`).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from megatron_ledom.convert.hf_weights import check_inside
from megatron_ledom.convert.sentencepiece_json import build_backend
from megatron_ledom.data.tokenizers import SENTENCEPIECE_TYPES, Tokenizer, load_tokenizer
from megatron_ledom.errors import InputError, TokenizerMismatchError
from megatron_ledom.log import get_logger

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "LICENSE", "NOTICE"),
)
"""What belongs to a Hugging Face tokenizer; other files of its folder (weights, configuration) are left there."""

TRIAL_TEXTS = (
    "The year 1984 had 366 days, didn't it?  Two spaces,\ttab,\n\n    def f(x): return x**2\n",
    " leading and trailing space ",
    "na\u00efve caf\u00e9, \u6771\u4eac, \u043f\u0440\u0438\u0432\u0435\u0442, \U0001f642, \u00bd",
)


def find_tokenizer(args: argparse.Namespace, checkpoint_folder: Path, asked: Path | None) -> Tokenizer:
    """Load the tokenizer that belongs to a checkpoint.

    Looked for in this order: `asked` (`--tokenizer`), the copy that an import left in
    CHECKPOINT/tokenizer, the one that training left in RUN/tokenizer beside RUN/checkpoints,
    the checkpoint's own `tokenizer_model`.

    Args:
        args: the checkpoint's arguments.
        checkpoint_folder: the `iter_NNNNNNN` folder.
        asked: a folder or file, or None.

    Raises:
        InputError: there is none in any of these places, or it cannot be read.
        TokenizerMismatchError: it is not the one that the weights were trained with.
    """
    places = _places(args, checkpoint_folder, asked)
    place = next((path for path in places if path.exists()), None)
    if place is None:
        looked = ", ".join(map(str, places)) or "nowhere: the checkpoint names none"
        raise InputError(f"no tokenizer for {checkpoint_folder} (looked at {looked}); name its folder with --tokenizer")
    tokenizer = _load(args, place)
    _check_identity(args, tokenizer, checkpoint_folder)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write the tokenizer's files into `folder` and try them with `AutoTokenizer`.

    Args:
        tokenizer: from `find_tokenizer`.
        args: the checkpoint's arguments (GPT-2's two files are named there).
        folder: exists; receives the files.

    Returns:
        `bos_token_id` and `pad_token_id` as transformers understands the folder; None where there is none.

    Raises:
        TokenizerMismatchError: transformers gives other ids from these files.
        CheckpointError: one of the files is a link to something outside its folder.
    """
    source = Path(tokenizer.model)
    if tokenizer.type == "GPT2BPETokenizer":
        shutil.copyfile(source, folder / "vocab.json")
        shutil.copyfile(_gpt2_merges(args, source), folder / "merges.txt")
        _write_config(folder, {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"})
    elif tokenizer.type in SENTENCEPIECE_TYPES:
        _write_sentencepiece(source, folder)
    else:
        copy_tokenizer_files(source, folder)
    return _try_tokenizer(tokenizer, folder)


def copy_tokenizer_files(source: Path, target: Path) -> None:
    """Copy what belongs to a Hugging Face tokenizer from folder to folder, but no mention of code, which is not copied.

    Raises:
        CheckpointError: one of the files is a link to something outside its folder.
    """
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            check_inside(source / name)
            shutil.copyfile(source / name, target / name)
    path = target / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "auto_map" in config:
        del config["auto_map"]
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def num_table_rows(args: argparse.Namespace, tokenizer: Tokenizer) -> int:
    """The rows of the exported tables: those that an imported model came with, else the tokenizer's ids.

    Padding for tensor parallelism is neither.
    """
    return int((getattr(args, "hf_origin", None) or {}).get("vocab_size") or tokenizer.vocab_size)


def special_ids(args: argparse.Namespace, *, bos_token_id: int | None, eod_id: int) -> dict[str, Any]:
    """`bos_token_id` and `eos_token_id` of config.json: an imported model's own, as long as they fit the tokenizer.

    Args:
        args: the checkpoint's arguments.
        bos_token_id: the tokenizer's.
        eod_id: the tokenizer's end-of-document id, with which training closes every document.
    """
    origin = getattr(args, "hf_origin", None) or {}
    eos = origin.get("eos_token_id")
    has_eod = eod_id in eos if isinstance(eos, list) else eod_id == eos
    return {"bos_token_id": origin.get("bos_token_id", bos_token_id), "eos_token_id": eos if has_eod else eod_id}


def _places(args: argparse.Namespace, checkpoint_folder: Path, asked: Path | None) -> list[Path]:
    if asked is not None:
        return [asked]
    named = getattr(args, "tokenizer_model", None) or getattr(args, "vocab_file", None)
    folder = checkpoint_folder.resolve()
    copies = [folder.parent / "tokenizer", folder.parent.parent / "tokenizer"]
    return [*copies, *([Path(named)] if named else [])]


def _load(args: argparse.Namespace, place: Path) -> Tokenizer:
    kind = getattr(args, "tokenizer_type", None)
    if kind == "GPT2BPETokenizer":
        vocab = place / "vocab.json" if place.is_dir() else place
        return load_tokenizer(kind, vocab_file=vocab, merge_file=_gpt2_merges(args, vocab))
    if kind in (None, "NullTokenizer"):  # trained on mock data: the files say what they are
        kind = "HuggingFaceTokenizer" if (place / "tokenizer.json").is_file() else "SentencePieceTokenizer"
    return load_tokenizer(kind, place)


def _gpt2_merges(args: argparse.Namespace, vocab_file: Path) -> Path:
    beside = vocab_file.with_name("merges.txt")
    return beside if beside.is_file() else Path(getattr(args, "merge_file", None) or beside)


def _check_identity(args: argparse.Namespace, tokenizer: Tokenizer, checkpoint_folder: Path) -> None:
    trained_with = getattr(args, "tokenizer_fingerprint", None)
    if trained_with is None:
        get_logger(__name__).warning(
            "%s does not say which tokenizer its weights were trained with; taking %s unchecked",
            checkpoint_folder,
            tokenizer.model,
        )
    elif trained_with != tokenizer.fingerprint:
        raise TokenizerMismatchError(
            f"{checkpoint_folder} was trained with tokenizer {trained_with}, {tokenizer.model} is "
            f"{tokenizer.fingerprint}; name the right folder with --tokenizer"
        )
    padded = getattr(args, "padded_vocab_size", None)
    if padded is not None and padded < tokenizer.vocab_size:
        raise TokenizerMismatchError(
            f"{checkpoint_folder} has {padded} rows of embeddings, {tokenizer.model} has {tokenizer.vocab_size} ids"
        )


def _write_sentencepiece(source: Path, folder: Path) -> None:
    """The model itself, for readers of SentencePiece, and the same as tokenizer.json, for transformers.

    llama.cpp puts a first id and a first space before every text unless tokenizer_config.json says otherwise.
    """
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    shutil.copyfile(source, folder / "tokenizer.model")
    build_backend(source).save(str(folder / "tokenizer.json"))
    pieces = SentencePieceProcessor(model_file=str(source))
    ids = {"bos": pieces.bos_id(), "eos": pieces.eos_id(), "unk": pieces.unk_id(), "pad": pieces.pad_id()}
    tokens = {f"{name}_token": pieces.id_to_piece(i) for name, i in ids.items() if i >= 0}
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(source.read_bytes())
    added = {"add_bos_token": False, "add_eos_token": False, "add_prefix_space": proto.normalizer_spec.add_dummy_prefix}
    _write_config(folder, {"tokenizer_class": "PreTrainedTokenizerFast", **tokens, **added})


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    content = config | {"clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _try_tokenizer(tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises nearly anything
        raise InputError(f"AutoTokenizer cannot load the files of {tokenizer.model}: {error}") from error
    for text in TRIAL_TEXTS:
        expected = tokenizer.encode(text).tolist()
        found = theirs(text, add_special_tokens=False)["input_ids"]
        if found != expected:
            raise TokenizerMismatchError(
                f"transformers gives other ids from the files of {tokenizer.model} than in training: for {text!r} "
                f"{found[:12]}..., expected {expected[:12]}..."
            )
    return {"bos_token_id": theirs.bos_token_id, "pad_token_id": theirs.pad_token_id}
