"""Text to ids and back, exactly as Megatron's tokenizer of the same name, without importing torch or transformers.

It owns which files make up a tokenizer, the end-of-document id, and the fingerprint that
says whether two tokenizers give the same ids. It does not own direction: ids are in
natural order here, always.

Documents get no special token: no beginning-of-sequence id, nothing from a
post-processor. The end-of-document id is the writer's business (`--append-eod`). Megatron's
`HuggingFaceTokenizer` adds what the post-processor asks for (a Llama tokenizer: `<s>`)
unless it is started with `--tokenizer-hf-no-include-special-tokens`; the ids here are
those with that flag.

numpy is imported where ids become arrays: a process that loads a tokenizer beside another does without it.
"""

from __future__ import annotations

import abc
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_ledom.data.fingerprints import canonical, fingerprint_of
from megatron_ledom.data.long_texts import PIECE_CHARS, Cutter
from megatron_ledom.errors import InputError, TokenizerMismatchError, UsageError

if TYPE_CHECKING:
    import numpy as np

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")
TOKENIZER_TYPES = ("HuggingFaceTokenizer", *SENTENCEPIECE_TYPES, "GPT2BPETokenizer")
PROBE_TEXTS = (
    "The year 1984 had 366 days, didn't it?  Two spaces,\ttab,\n\n    def indented(x): return x**2\n",
    " leading space, trailing space ",
    "naïve café, Größe, 東京, привет, 🙂, ½, \u00a0nbsp, e\u0301",
)


class Answer(Protocol):
    """What a tokenizer was asked ahead of time; called, it waits for the answer, and gives it or raises it."""

    def __call__(self) -> Any: ...  # noqa: D102

    def is_there(self) -> bool:
        """Whether it can be called without waiting for another process."""


class Tokenizer(abc.ABC):
    """Text to ids in natural order, and back.

    Attributes:
        type: Megatron's `--tokenizer-type`.
        model: the folder or file it was loaded from, as given.
        files: all that was read.
        vocab_size: number of ids, before Megatron pads it.
        eod_id: the end-of-document id, Megatron's `tokenizer.eod`.
        fingerprint: "sha256:..." of all that decides ids, and of nothing else: two tokenizers with
            one fingerprint give the same ids for every text, wherever their files lie.
        library: the library that makes the ids; what it says is the truth that `backends.py` compares with.
    """

    library: str
    origin: tuple[Any, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as what it was loaded from, so that it is loaded anew in another process."""
        return _load_again, self.origin

    def __init__(self, *, type: str, model: str, files: Sequence[Path], vocab_size: int, eod_id: int) -> None:
        self.type, self.model, self.vocab_size, self.eod_id = type, model, vocab_size, eod_id
        self.files = list(files)

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str: ...  # noqa: D102

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, natural order, no special token added; int32 [n] each.

        Raises:
            TypeError: a text is no valid Unicode (it holds a lone surrogate).
        """

    @abc.abstractmethod
    def decode(self, ids_nat: Sequence[int] | np.ndarray) -> str:
        """Return the text of ids in natural order; special tokens are written out."""

    @abc.abstractmethod
    def encode_with_starts(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of one text and, for each, the character at which it starts; int32 [n] both."""

    @abc.abstractmethod
    def content(self) -> str | bytes:
        """Return the tokenizer itself: a `tokenizer.json` as text, or a SentencePiece model as bytes."""

    @abc.abstractmethod
    def special_texts(self) -> list[str]:
        """Return the tokens that a library may treat in a way of its own when they stand in a text."""

    @abc.abstractmethod
    def encode_short(self, texts: Sequence[str]) -> list[list[int]]:
        """Return what `encode_batch` returns, as lists; of texts of at most `PIECE_CHARS` characters."""

    def answer_probes(
        self, most: int, texts: Sequence[str]
    ) -> tuple[list[tuple[str, str, list[int]]], list[list[int]]]:
        """Give what other libraries are compared with.

        Args:
            most: special texts.
            texts: others; of at most `PIECE_CHARS` characters each.

        Returns:
            Each of the first `most` special texts, a text that holds it in several ways, and the ids of that; and the
            ids of `texts`.
        """
        tokens = self.special_texts()[:most]
        samples = [f"a{token}b {token} c\n{token}{token}" for token in tokens]
        return list(zip(tokens, samples, self.encode_short(samples), strict=True)), self.encode_short(texts)

    def here(self) -> Tokenizer:
        """Return a tokenizer of the same ids that is loaded in this process, and may be used in its forks."""
        return self

    def ask_ahead(self, name: str, *arguments: Any) -> Answer:
        """Return what gives the answer of a method, which another process may work on meanwhile; one at a time."""
        return _Unasked(partial(getattr(self, name), *arguments))

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of one text, natural order; int32 [n]."""
        return self.encode_batch([text])[0]


class _Unasked:
    """An answer that is worked out when it is wanted."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function

    def __call__(self) -> Any:
        return self._function()

    def is_there(self) -> bool:
        return True


class EngineTokenizer(Protocol):
    """What this module needs of Megatron's tokenizer."""

    @property
    def vocab_size(self) -> int: ...  # noqa: D102
    @property
    def eod(self) -> int: ...  # noqa: D102
    def tokenize(self, text: str) -> list[int]: ...  # noqa: D102


class _HuggingFace(Tokenizer):
    """A `tokenizers` backend, as `tokenizer.json` describes it."""

    library = "tokenizers"

    def __init__(self, backend: Any, **facts: Any) -> None:
        super().__init__(**facts)
        self._backend = backend

    @cached_property
    def _content(self) -> str:
        return self._backend.to_str()

    @cached_property
    def _cutter(self) -> Cutter:
        return Cutter(json.loads(self._content))

    @cached_property
    def fingerprint(self) -> str:
        content, split_special = canonical(json.loads(self._content)), self._backend.encode_special_tokens
        return fingerprint_of({"tokenizer": content, "eod_id": self.eod_id, "split_special": split_special})

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text; a long one is cut where that is exact, for the memory it takes."""
        import numpy as np

        def arrays(texts: Sequence[str]) -> list[np.ndarray]:
            return [np.array(e.ids, dtype=np.int32) for e in self._encode(texts)]

        if any(len(text) > PIECE_CHARS for text in texts):
            return [np.concatenate([arrays([piece])[0] for piece in self._cutter.cut(text)]) for text in texts]
        return arrays(texts)

    def encode_short(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._encode(texts)]

    def _encode(self, texts: Sequence[str]) -> list[Any]:
        return self._backend.encode_batch_fast(list(texts), add_special_tokens=False)

    def decode(self, ids_nat: Sequence[int] | np.ndarray) -> str:
        return self._backend.decode([int(i) for i in ids_nat], skip_special_tokens=False)

    def encode_with_starts(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and the characters at which they start; of a long text piece by piece."""
        import numpy as np

        ids, starts, before = [], [], 0
        for piece in self._cutter.cut(text):
            encoding = self._backend.encode(piece, add_special_tokens=False)
            ids.append(np.array(encoding.ids, np.int32))
            starts.append(np.array([start + before for start, _ in encoding.offsets], np.int32))
            before += len(piece)
        return np.concatenate(ids), np.concatenate(starts)

    def content(self) -> str:
        return self._content

    def special_texts(self) -> list[str]:
        return [token.content for token in self._backend.get_added_tokens_decoder().values()]


class _SentencePiece(Tokenizer):
    """A SentencePiece model."""

    library = "sentencepiece"

    def __init__(self, processor: Any, **facts: Any) -> None:
        super().__init__(**facts)
        self._processor = processor

    @cached_property
    def fingerprint(self) -> str:
        proto = hashlib.sha256(self._processor.serialized_model_proto()).hexdigest()
        return fingerprint_of({"sentencepiece": proto, "eod_id": self.eod_id})

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        import numpy as np

        arrays = self._processor.encode(list(texts), out_type="numpy", num_threads=1)
        return [np.asarray(a, dtype=np.int32) for a in arrays]

    def encode_short(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), out_type=int, num_threads=1)

    def decode(self, ids_nat: Sequence[int] | np.ndarray) -> str:
        return self._processor.decode([int(i) for i in ids_nat])

    def encode_with_starts(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and the characters at which they start; the library's offsets are bytes."""
        import numpy as np

        pieces = self._processor.encode(text, return_type="proto").pieces
        starts = np.array([p.begin for p in pieces], np.int32)
        if not text.isascii():  # the library counts bytes
            character = np.cumsum((np.frombuffer(text.encode("utf-8"), np.uint8) & 0xC0) != 0x80) - 1
            starts = character[np.minimum(starts, len(character) - 1)].astype(np.int32)
        return np.array([p.id for p in pieces], np.int32), starts

    def content(self) -> bytes:
        return self._processor.serialized_model_proto()

    def special_texts(self) -> list[str]:
        size = self._processor.get_piece_size()
        ids = [i for i in range(size) if self._processor.is_control(i) or self._processor.is_unknown(i)]
        return [self._processor.id_to_piece(i) for i in ids]


def load_tokenizer(
    tokenizer_type: str,
    model: str | Path | None = None,
    *,
    vocab_file: str | Path | None = None,
    merge_file: str | Path | None = None,
) -> Tokenizer:
    """Load a tokenizer by Megatron's name for its kind.

    Args:
        tokenizer_type: one of `TOKENIZER_TYPES`.
        model: `--tokenizer-model`: the folder that holds `tokenizer.json` (Hugging Face), or the
            `.model` file or a folder with one (SentencePiece).
        vocab_file: `--vocab-file`, for `GPT2BPETokenizer` alone.
        merge_file: `--merge-file`, for `GPT2BPETokenizer` alone.

    Raises:
        UsageError: an unknown type, or a flag that the type needs is missing.
        InputError: a file is missing or unreadable, or the tokenizer names no end-of-document token.

    Source: `megatron.core.tokenizers.utils.build_tokenizer.build_tokenizer`.
    """
    if tokenizer_type == "HuggingFaceTokenizer":
        tokenizer = _load_huggingface(_required(model, "--tokenizer-model", tokenizer_type))
    elif tokenizer_type in SENTENCEPIECE_TYPES:
        tokenizer = _load_sentencepiece(tokenizer_type, _required(model, "--tokenizer-model", tokenizer_type))
    elif tokenizer_type == "GPT2BPETokenizer":
        vocab = _required(vocab_file, "--vocab-file", tokenizer_type)
        tokenizer = _load_gpt2(vocab, _required(merge_file, "--merge-file", tokenizer_type))
    else:
        raise UsageError(f"--tokenizer-type {tokenizer_type} is not supported; use one of {', '.join(TOKENIZER_TYPES)}")
    tokenizer.origin = (tokenizer_type, model, vocab_file, merge_file)
    return tokenizer


def _load_again(kind: str, model: str | None, vocab_file: str | None, merge_file: str | None) -> Tokenizer:
    return load_tokenizer(kind, model, vocab_file=vocab_file, merge_file=merge_file)


def check_engine_tokenizer(tokenizer: Tokenizer, engine_tokenizer: EngineTokenizer) -> None:
    """Refuse a tokenizer that the training engine reads differently than the data was written.

    Compares size, end-of-document id and the ids of a few texts chosen for digits, spaces and accents;
    ids that the engine adds at either end (`<s>`) are allowed. What it catches in practice:
    a `tokenizer_class` in `tokenizer_config.json` for which transformers 5 rebuilds the tokenizer
    and ignores the pre-tokenizer written in `tokenizer.json`.

    Args:
        tokenizer: the one that wrote the data.
        engine_tokenizer: what `build_tokenizer(args)` of Megatron returned.

    Raises:
        TokenizerMismatchError: they differ; the message holds both values and the remedy.
    """
    ours, theirs = (tokenizer.vocab_size, tokenizer.eod_id), (engine_tokenizer.vocab_size, engine_tokenizer.eod)
    if ours != theirs:
        raise TokenizerMismatchError(
            f"{tokenizer.type} {tokenizer.model}: (vocabulary size, end-of-document id) is {ours} in preprocessing "
            f"but {theirs} in Megatron; see that tokenizer_config.json and tokenizer.json name the same tokens"
        )
    for text in PROBE_TEXTS:
        ids, engine_ids = tokenizer.encode(text).tolist(), list(engine_tokenizer.tokenize(text))
        num_added = len(engine_ids) - len(ids)
        if not any(engine_ids[i : i + len(ids)] == ids for i in range(min(num_added, 2) + 1)):
            raise TokenizerMismatchError(
                f"{tokenizer.type} {tokenizer.model} gives other ids in Megatron than its files say: for {text!r} "
                f"{engine_ids[:12]}..., expected {ids[:12]}... . If tokenizer_config.json names a specific "
                'tokenizer_class, set it to "PreTrainedTokenizerFast", so that tokenizer.json is taken as it is'
            )


def _required(value: str | Path | None, flag: str, tokenizer_type: str) -> Path:
    if value is None:
        raise UsageError(f"--tokenizer-type {tokenizer_type} needs {flag}")
    return Path(value)


def _load_huggingface(folder: Path) -> Tokenizer:
    if not folder.is_dir():
        raise InputError(
            f"--tokenizer-model {folder} is not a folder; HuggingFaceTokenizer needs a local folder with "
            "tokenizer.json and tokenizer_config.json (names on a hub are not looked up)"
        )
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"{folder} holds no tokenizer.json; write one with "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    config = _special_tokens(folder)
    backend = _read_backend(path)
    backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
    # Megatron takes the separator where no end of sequence is named
    eod_token = config.get("eos_token") or config.get("sep_token")
    if eod_token is None:
        raise InputError(
            f"{folder / 'tokenizer_config.json'} names no eos_token, so documents cannot be told apart; add it"
        )
    for key, token in _named_tokens(config):
        if backend.token_to_id(token) is None:
            raise InputError(
                f"{folder}: {key} is {token!r}, which tokenizer.json does not hold, so transformers would add it. "
                "Write the folder anew with AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
    files = [path, *(older for name in CONFIG_FILES if (older := folder / name).is_file())]
    return _wrap_backend(backend, "HuggingFaceTokenizer", folder, files, eod_token)


def _special_tokens(folder: Path) -> dict[str, Any]:
    """Return what the configuration says, tokens as plain strings; an older special_tokens_map.json comes first."""
    config, older = ({} if not p.is_file() else _read_json(p) for p in (folder / n for n in CONFIG_FILES))
    if "added_tokens_decoder" not in config:  # the rule of transformers' from_pretrained
        config |= older
    return {k: v["content"] if isinstance(v, dict) and "content" in v else v for k, v in config.items()}


def _named_tokens(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield every token that the configuration names, with its key."""
    for key, value in config.items():
        if key.endswith("_token") and isinstance(value, str):
            yield key, value
        elif key == "added_tokens_decoder":
            yield from ((key, token["content"]) for token in value.values())
        elif key.endswith("special_tokens") and isinstance(value, list):
            yield from ((key, t["content"] if isinstance(t, dict) else t) for t in value)


def _load_gpt2(vocab_file: Path, merge_file: Path) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    for flag, path in (("--vocab-file", vocab_file), ("--merge-file", merge_file)):
        if not path.is_file():
            raise InputError(f"{flag} {path}: no such file")
    try:
        backend = Tokenizer(models.BPE.from_file(str(vocab_file), str(merge_file)))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{vocab_file} and {merge_file} are no GPT-2 vocabulary and merges: {error}") from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    eod_token = "<|endoftext|>"
    if backend.token_to_id(eod_token) is None:
        raise InputError(f"{vocab_file} holds no {eod_token}, the end-of-document token of GPT2BPETokenizer")
    backend.add_special_tokens([AddedToken(eod_token, special=True, normalized=False)])
    return _wrap_backend(backend, "GPT2BPETokenizer", vocab_file, [vocab_file, merge_file], eod_token)


def _load_sentencepiece(tokenizer_type: str, path: Path) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor

    if path.is_dir():
        models = sorted(path.glob("*.model"))
        if len(models) != 1:
            raise InputError(f"--tokenizer-model {path}: a folder must hold one .model file, found {len(models)}")
        path = models[0]
    if not path.is_file():
        raise InputError(f"--tokenizer-model {path}: no such file; {tokenizer_type} needs a SentencePiece .model file")
    processor = SentencePieceProcessor()
    try:
        processor.Load(str(path))
    except (OSError, RuntimeError) as error:
        raise InputError(f"--tokenizer-model {path} is no SentencePiece model: {error}") from error
    eod_id = processor.eos_id()
    if eod_id < 0:
        raise InputError(f"{path} was trained without an end-of-sentence piece, so documents cannot be told apart")
    return _SentencePiece(
        processor,
        type=tokenizer_type,
        model=str(path),
        files=[path],
        vocab_size=processor.get_piece_size(),
        eod_id=eod_id,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


def _read_backend(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{path} is no tokenizer that `tokenizers` can read: {error}") from error


def _wrap_backend(backend: Any, tokenizer_type: str, model: Path, files: Sequence[Path], eod_token: str) -> Tokenizer:
    backend.no_truncation()
    backend.no_padding()
    if dropout := getattr(backend.model, "dropout", None):
        raise InputError(f"{model}: the tokenizer has BPE dropout {dropout}, so its ids are random; remove it")
    return _HuggingFace(
        backend,
        type=tokenizer_type,
        model=str(model),
        files=files,
        vocab_size=backend.get_vocab_size(with_added_tokens=True),
        eod_id=backend.token_to_id(eod_token),
    )
