"""Where sentences end: NLTK's Punkt, with parameters learnt from the corpus or read from a file.

Nothing is downloaded and nothing is unpickled: parameters are JSON. This module owns
sentence bounds in characters and their translation to tokens; the order of sentences is turned in
`direction.py`.

    text         Dr. Who came.  He left.
    sentences    |------------||--------|        white space goes with the sentence behind it, since
    tokens       Dr . _Who _came .  _ _He        most tokenizers put a space into the word that follows

Tokens are those of the whole text, cut: a token belongs to the sentence in which it starts. So the ids
of a document are the same as without sentences, and the text comes back exactly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ledom.errors import InputError

SAMPLE_BYTES = 16 << 20  # text that the parameters are learnt from
_FIELDS = ("abbrev_types", "collocations", "sent_starters", "ortho_context")


class SentenceSplitter:
    """Punkt with fixed parameters.

    Attributes:
        parameters: JSON text, the same for the same parameters.
        sha256: its hash.
    """

    def __init__(self, parameters: str, where: str) -> None:
        punkt = _punkt()
        self.parameters = parameters
        self.sha256 = hashlib.sha256(parameters.encode("utf-8")).hexdigest()
        self._punkt = punkt.PunktSentenceTokenizer()
        try:
            fields = json.loads(parameters)
            learnt = punkt.PunktParameters()
            learnt.abbrev_types = set(map(str, fields["abbrev_types"]))
            learnt.collocations = {(str(a), str(b)) for a, b in fields["collocations"]}
            learnt.sent_starters = set(map(str, fields["sent_starters"]))
            learnt.ortho_context.update({str(k): int(v) for k, v in fields["ortho_context"].items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{where} holds no Punkt parameters as JSON ({', '.join(_FIELDS)}): {error!r}") from error
        self._punkt._params = learnt

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its parameters."""
        return SentenceSplitter, (self.parameters, "pickle")

    def starts(self, text: str) -> np.ndarray:
        """Return the character at which each sentence starts, the first one 0; int64 [sentences]."""
        ends = [end for _, end in self._punkt.span_tokenize(text)]
        return np.array([0, *ends[:-1]], dtype=np.int64)

    def token_counts(self, text: str, token_starts: np.ndarray) -> np.ndarray:
        """Return how many tokens each sentence has, in reading order; sentences without one are left out.

        Args:
            text: the whole document.
            token_starts: the character at which each token starts; [tokens].

        Returns:
            int32 [sentences], the sum being the number of tokens.
        """
        owner = np.searchsorted(self.starts(text), np.maximum.accumulate(token_starts), side="right")
        counts = np.bincount(owner) if len(owner) else np.empty(0, dtype=np.int64)
        return counts[counts > 0].astype(np.int32)


def load_splitter(path: Path) -> SentenceSplitter:
    """Read parameters from a JSON file, as `train_splitter` writes them.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--punkt {path}: {error}") from error
    return SentenceSplitter(text, str(path))


def train_splitter(texts: Iterable[str]) -> SentenceSplitter:
    """Learn parameters from the first `SAMPLE_BYTES` characters of `texts`; the same texts give the same ones."""
    trainer = _punkt().PunktTrainer()
    left = SAMPLE_BYTES
    for text in texts:
        trainer.train(text[:left], finalize=False)
        left -= len(text)
        if left <= 0:
            break
    trainer.finalize_training()
    learnt = trainer.get_params()
    fields: dict[str, Any] = {
        "abbrev_types": sorted(learnt.abbrev_types),
        "collocations": sorted(learnt.collocations),
        "sent_starters": sorted(learnt.sent_starters),
        "ortho_context": dict(sorted(learnt.ortho_context.items())),
    }
    return SentenceSplitter(json.dumps(fields, ensure_ascii=False, separators=(",", ":")) + "\n", "training")


def _punkt() -> Any:
    try:
        from nltk.tokenize import punkt
    except ImportError as error:
        raise InputError("--reverse-unit sentence needs the package nltk: pip install nltk") from error
    return punkt
