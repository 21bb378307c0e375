"""A loaded language model that knows which way it runs.

Owns what lies between texts and the model's ids: tokenisation, the order of the ids
(through `megatron_ledom.direction`), the boundary id and the context length.
`scoring.py` computes the log-probabilities, `writing.py` generates.

Tokenisation rule: two texts that follow each other are tokenised separately,
without special tokens, and their ids are put side by side. So log P(x given y)
scores exactly the tokens of x, wherever the seam falls, and a candidate's tokens
don't depend on the question before it. (A tokenizer that saw both texts at once
could merge across the seam.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from megatron_ledom.direction import ConditionedIds, Direction, condition, to_model_order, to_natural_order
from megatron_ledom.engine.device import resolve_device
from megatron_ledom.errors import InputError
from megatron_ledom.inference import DEFAULT_BATCH_TOKENS
from megatron_ledom.inference.cpu_kernels import use_cpu_kernels
from megatron_ledom.inference.folder import FolderRecord, check_direction, load_record
from megatron_ledom.inference.sampling import Sampling, WrittenText
from megatron_ledom.inference.scoring import TokenScorer
from megatron_ledom.inference.windows import cut_windows
from megatron_ledom.inference.writing import write_ids


@dataclass(frozen=True)
class Score:
    """The log-probability of one text given another.

    Attributes:
        logprob: total, natural logarithm.
        token_logprobs: one per scored token, in natural order.
        num_windows: in how many pieces the text was read; more than 1 only where that was asked for.
        is_greedy: whether writing without chance would have given these tokens.
    """

    logprob: float
    token_logprobs: tuple[float, ...]
    num_windows: int = 1
    is_greedy: bool = False

    @property
    def num_tokens(self) -> int:
        """How many tokens were scored."""
        return len(self.token_logprobs)


class DirectedLM:
    """A causal language model, its tokenizer and its direction; use `ForwardLM` or `ReverseLM`.

    Args:
        record: of the folder that the model came from.
        model: the `transformers` causal LM, in evaluation mode, on its device.
        tokenizer: the `transformers` tokenizer.
    """

    direction: ClassVar[Direction]

    def __init__(self, record: FolderRecord, model: Any, tokenizer: Any) -> None:
        use_cpu_kernels(model)
        self.record = record
        self.model = model
        self.tokenizer = tokenizer
        self.boundary_id = _find_boundary_id(record, tokenizer, self.direction)
        self.context_tokens: int | None = getattr(model.config, "max_position_embeddings", None)
        self._scorer = TokenScorer(model)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: str = "auto",
        dtype: torch.dtype | None = None,
        assume_direction: Direction | str | None = None,
    ) -> Self:
        """Load a Hugging Face causal LM folder, or a checkpoint of tools/pretrain.py as it is.

        Args:
            folder: RUN/checkpoints, or written by tools/convert_to_hf.py, or any other that `AutoModelForCausalLM`
                loads.
            device: "auto", "cpu" or "cuda".
            dtype: of the weights; by default float32 on a CPU (bfloat16 runs an order of
                magnitude slower there) and the saved dtype on a GPU.
            assume_direction: the direction of a model whose `config.json` doesn't say one;
                without it such a model counts as forward.

        Raises:
            InputError: the folder is missing, incomplete, or doesn't load.
            CheckpointError: a checkpoint that is unfinished, damaged, or no Llama.
            DirectionError: the model runs the other way, or doesn't say that it is a reverse model.
        """
        record = load_record(folder)
        assumed = None if assume_direction is None else Direction.parse(assume_direction, where="assume_direction")
        check_direction(record, cls.direction, assumed)
        target = resolve_device(device)
        wanted = dtype if dtype is not None else (torch.float32 if target == "cpu" else "auto")
        if record.is_checkpoint:
            from megatron_ledom.convert.in_memory import load_llama

            config, model, tokenizer = load_llama(record.folder, dtype=_stored_dtype(wanted))
            model = model.to(target, dtype=None if wanted == "auto" else wanted)
            return cls(replace(record, config=config), model, tokenizer)
        model, tokenizer = _load_transformers(record.folder, wanted)
        return cls(record, model.to(target).eval(), tokenizer)

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text in natural order, without special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def decode(self, ids_nat: Sequence[int]) -> str:
        """Return the text of ids in natural order; bytes that form no character become U+FFFD."""
        return str(self.tokenizer.decode(list(ids_nat), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def arrange(
        self, target: str, given: str, *, closed: bool = False, windowed: bool = False, what: str = "the texts"
    ) -> ConditionedIds:
        """Tokenise two texts and lay them out for log P(target given the other).

        Args:
            target: the text to be scored.
            given: the text conditioned on: what precedes (forward) or follows (reverse) the target.
            closed: also score the boundary beyond the target.
            windowed: take texts that are longer than the context, to be read in overlapping windows.
            what: names the texts in an error.

        Raises:
            InputError: the target has no token, or the texts are longer than the context and not `windowed`.
        """
        target_ids = self.encode(target)
        if not target_ids and not closed:
            raise InputError(f"{what}: the text to be scored has no token. Remove it")
        layout = condition(target_ids, self.encode(given), self.direction, boundary_id=self.boundary_id, closed=closed)
        if not windowed:
            self.check_length(len(layout.ids) - 1, what)
        return layout

    def check_length(self, num_tokens: int, what: str) -> None:
        """Refuse more tokens than the model can read at once: nothing is ever cut silently.

        Raises:
            InputError: `num_tokens`, boundary included, exceeds the context.
        """
        if self.context_tokens is not None and num_tokens > self.context_tokens:
            raise InputError(
                f"{what}: {num_tokens} tokens with the boundary, but {self.record.folder} reads at most "
                f"{self.context_tokens}. Shorten the text, or use a model with a longer context"
            )

    def score(
        self,
        layouts: Sequence[ConditionedIds],
        *,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[Score]:
        """Score sequences laid out by `arrange`; longer ones than the context in windows of half its stride.

        Args:
            layouts: what to score.
            batch_tokens: most tokens in a batch, padding included. In float32 it changes a
                token's score by less than 1e-5 nats and a total by less than a millionth of it
                (other shapes, other rounding).
            on_batch: called after each batch with the number of sequences that it settled.

        Returns:
            One `Score` per layout, in the order given.

        Raises:
            InputError: the model gives no number for a text.
        """
        pieces = [self._windows(layout) for layout in layouts]
        scored = iter(
            self._scorer.score([w for each in pieces for w in each], batch_tokens=batch_tokens, on_batch=on_batch)
        )
        scores = []
        for windows in pieces:
            found = [next(scored) for _ in windows]
            values = to_natural_order([value for each in found for value in each.logprobs], self.direction)
            total = sum(values)
            if not math.isfinite(total):
                raise InputError(
                    f"{self.record.folder} gives {total} as a log-probability in {self.model.dtype}: a number "
                    "overflowed, or its weights are damaged. Compute in float32 or bfloat16, or see "
                    "tools/inspect_checkpoint.py"
                )
            scores.append(Score(total, tuple(values), len(windows), all(each.is_greedy for each in found)))
        return scores

    def _windows(self, layout: ConditionedIds) -> list[ConditionedIds]:
        context = self.context_tokens
        if context is None or len(layout.ids) - 1 <= context:
            return [layout]
        return list(cut_windows(layout.ids, context, max(1, context // 2), target_start=layout.target_start))

    def logprobs(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        closed: bool = False,
        windowed: bool = False,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
    ) -> list[Score]:
        """Score many (target, given) pairs; see `logprob` for one.

        Raises:
            InputError: an empty target or a pair longer than the context; the message names its index.
        """
        layouts = [
            self.arrange(target, given, closed=closed, windowed=windowed, what=f"pair {i}")
            for i, (target, given) in enumerate(pairs)
        ]
        return self.score(layouts, batch_tokens=batch_tokens)

    def _logprob(self, target: str, given: str, closed: bool, windowed: bool) -> Score:
        return self.score([self.arrange(target, given, closed=closed, windowed=windowed)])[0]


class ForwardLM(DirectedLM):
    """An ordinary causal language model: it reads what comes before and scores what comes after."""

    direction = Direction.FORWARD

    def logprob(self, later: str, given_earlier: str, *, closed: bool = False, windowed: bool = False) -> Score:
        """Score log P(later given the earlier text); with `closed`, also that the document ends there.

        Raises:
            InputError: `later` has no token, or the texts are longer than the context and not `windowed`.
        """
        return self._logprob(later, given_earlier, closed, windowed)


class ReverseLM(DirectedLM):
    """A reverse language model: it reads what comes after and scores or writes what comes before."""

    direction = Direction.REVERSE

    def logprob(self, earlier: str, later: str, *, closed: bool = False, windowed: bool = False) -> Score:
        """Score log P(earlier given the later text); with `closed`, also that the document begins there.

        Raises:
            InputError: `earlier` has no token, or the texts are longer than the context and not `windowed`.
        """
        return self._logprob(earlier, later, closed, windowed)

    def write_before(
        self,
        text: str,
        *,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        num_samples: int = 1,
        greedy: bool = False,
    ) -> list[str]:
        """Write texts that precede `text`; see `write` for the arguments and for more than the text alone.

        Returns:
            `num_samples` texts in natural order, without `text` itself.
        """
        sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed, num_samples, greedy, min_p)
        return [written.earlier for written in self.write(text, sampling)]

    def write(
        self,
        text: str,
        sampling: Sampling,
        *,
        on_step: Callable[[list[WrittenText]], None] | None = None,
        stop_when: Callable[[str], bool] | None = None,
    ) -> list[WrittenText]:
        """Write texts that precede `text`, leftwards, until the document's beginning or the token limit.

        Args:
            text: what comes after; the document ends with it. May be empty: then whole documents are written.
            sampling: how to choose tokens.
            on_step: called after each token with what every sample is so far.
            stop_when: asked after each token about the earlier text of a sample, which ends there if so.

        Returns:
            One result per sample. The same seed, model, text, device and settings give the same samples.

        Raises:
            InputError: `text` and the tokens asked for do not fit into the context.
        """
        later_nat = self.encode(text)
        self.check_length(1 + len(later_nat) + sampling.max_new_tokens, "the text and the new tokens asked for")
        # What the model reads first: the boundary, then the later text from its end.
        prompt = [self.boundary_id, *to_model_order(later_nat, self.direction)]

        def as_text(ids_rev: list[int], finished: bool) -> WrittenText:
            earlier_nat = to_natural_order(ids_rev, self.direction)
            # Decoded together: at the seam a tokenizer may put a space, or join bytes into a character.
            whole = self.decode([*earlier_nat, *later_nat])
            earlier = whole.removesuffix(text) if whole.endswith(text) else self.decode(earlier_nat)
            return WrittenText(earlier, whole, len(ids_rev), finished)

        def look(grown: list[tuple[list[int], bool]]) -> list[bool]:
            samples = [as_text(*each) for each in grown]
            if on_step is not None:
                on_step(samples)
            return [stop_when is not None and stop_when(sample.earlier) for sample in samples]

        is_watched = on_step is not None or stop_when is not None
        grown = write_ids(self.model, prompt, sampling, self._stop_ids(), look=look if is_watched else None)
        return [as_text(*each) for each in grown]

    def _stop_ids(self) -> list[int]:
        """Ids that mean the document's beginning: the boundary, and a start-of-text id of others' models."""
        start_id = self.tokenizer.bos_token_id
        return sorted({self.boundary_id} | ({start_id} if start_id is not None else set()))


def load_lm(
    folder: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    assume_direction: Direction | None = None,
) -> DirectedLM:
    """Load a model in the direction that its `config.json` says; where it says nothing in the one assumed, or forward.

    Raises:
        InputError: the folder is missing, incomplete, or doesn't load.
    """
    record = load_record(folder)
    direction = record.direction or assume_direction or Direction.FORWARD
    kind = ReverseLM if direction is Direction.REVERSE else ForwardLM
    return kind.load(record.folder, device=device, dtype=dtype, assume_direction=direction)


def _stored_dtype(wanted: torch.dtype | str) -> str:
    """The dtype to read a checkpoint in: one that it can be stored in, before it becomes what was asked for."""
    if wanted == "auto":
        return "checkpoint"
    return "float32" if wanted is torch.float64 else str(wanted).removeprefix("torch.")


def _find_boundary_id(record: FolderRecord, tokenizer: Any, direction: Direction) -> int:
    """The id that a model reads before anything else.

    In models made here it is the end-of-document id, in both directions. The
    tokenizer of another forward model knows what it puts before a text (Llama's
    `<s>`); where it puts nothing, and in every reverse model, it is the end-of-text id,
    since a reverse model enters a document at its end.
    """
    if direction is Direction.FORWARD and record.direction is None:
        ids = tokenizer.encode("a", add_special_tokens=True)
        if ids and ids[0] == tokenizer.bos_token_id:
            return int(ids[0])
    for boundary_id in (tokenizer.eos_token_id, record.config.get("eos_token_id")):
        if isinstance(boundary_id, int):
            return boundary_id
    raise InputError(
        f"{record.folder}: neither the tokenizer (eos_token) nor config.json (eos_token_id) names an end-of-text "
        "token, which stands between documents. Add it to tokenizer_config.json"
    )


def _load_transformers(folder: Path, dtype: torch.dtype | str) -> tuple[Any, Any]:
    """Load model and tokenizer, and refuse weights that don't fill the model."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise InputError(f"model folder {folder} does not load with transformers: {first_line}") from error
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        raise InputError(
            f"model folder {folder}: {len(missing)} weights are missing or of another shape, the first {missing[0]}; "
            "they would be random. Export the model again"
        )
    return model, tokenizer
