"""A SentencePiece model as a `tokenizer.json` that gives the same ids.

Why not leave it to transformers: from a bare `tokenizer.model`, transformers 5 builds a
`LlamaTokenizer` of its own that does not put the dummy prefix before a text that begins
with a space, so that " text" gets other ids than in training. Here the normalisation is
written down as SentencePiece does it, and the caller compares the ids afterwards. One difference
remains, in `tokenizers` itself: where a unigram model can cut a run such as `******` in
several ways of exactly equal score, the two libraries may choose different ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ledom.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "\u2581"
"""SentencePiece's mark for a space."""

_UNIGRAM, _BPE = 1, 2
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5


def build_backend(path: Path) -> Tokenizer:
    """Build a `tokenizers` backend from a SentencePiece `.model` file.

    Raises:
        InputError: the model is of a kind that `tokenizers` has no counterpart for.

    Source: `sentencepiece_model.proto`; the order of BPE merges is that of the merged pieces' scores.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, models

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    trainer = proto.trainer_spec
    model: Any
    if trainer.model_type == _BPE:
        vocab = {piece: i for i, (piece, _) in enumerate(pieces)}
        mergeable = {p.piece: p.score for p in proto.pieces if p.type not in (_CONTROL, _UNUSED)}
        model = models.BPE(
            vocab,
            bpe_merges(mergeable),
            unk_token=trainer.unk_piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    elif trainer.model_type == _UNIGRAM:
        model = models.Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    else:
        raise InputError(f"{path} is neither a BPE nor a unigram model, which is all that tokenizer.json can express")
    backend = Tokenizer(model)
    backend.normalizer = _normalizer(proto)
    backend.decoder = _decoder(proto)
    added = [p for p in proto.pieces if p.type in (_CONTROL, _USER_DEFINED)]
    backend.add_tokens([AddedToken(p.piece, normalized=False, special=p.type == _CONTROL) for p in added])
    return backend


def bpe_merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Recover the merges of a BPE vocabulary from the scores of its pieces.

    SentencePiece merges the neighbours whose union scores highest; `tokenizers` wants the
    pairs in that order. Every way to cut a piece into two others is a pair:

    >>> bpe_merges({"a": 0.0, "b": 0.0, "c": 0.0, "bc": -1.0, "ab": 0.0, "abc": -2.0})
    [('a', 'b'), ('b', 'c'), ('a', 'bc'), ('ab', 'c')]
    """
    ranked = sorted((piece for piece in scores if len(piece) > 1), key=lambda piece: -scores[piece])
    return [
        (piece[:cut], piece[cut:])
        for piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]


def _normalizer(proto: Any) -> Any:
    from tokenizers import Regex, normalizers

    spec = proto.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def _decoder(proto: Any) -> Any:
    from tokenizers import decoders

    strip: Sequence[Any] = [decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []
    return decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
