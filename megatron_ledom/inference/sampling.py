"""The settings of writing and what it returns; free of torch, so that bad settings are refused at once."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ledom.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How new tokens are chosen.

    Attributes:
        max_new_tokens: most tokens to write per sample, 1 or more.
        temperature: above 0; lower is more certain.
        top_k: keep the k likeliest tokens only; 0 keeps all.
        top_p: keep the likeliest tokens that reach this share of probability; in (0, 1].
        seed: of the random draw; samples of one call share it and differ.
        num_samples: how many texts to write.
        greedy: always take the likeliest token; then a single sample only.
        min_p: drop tokens with less than this share of the likeliest one's probability; in [0, 1), 0 keeps all.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    num_samples: int = 1
    greedy: bool = False
    min_p: float = 0.0

    def __post_init__(self) -> None:
        rules = [
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature > 0, "above 0 (for the likeliest token each time, use greedy)"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p < 1, "0 (all tokens) or more, and below 1"),
            ("seed", 0 <= self.seed < 2**63, "0 or more"),
            ("num_samples", self.num_samples >= 1, "1 or more"),
            ("num_samples", self.num_samples == 1 or not self.greedy, "1 with greedy: all samples would be the same"),
        ]
        for name, holds, needed in rules:
            if not holds:
                raise UsageError(f"{name} is {getattr(self, name)}, it must be {needed}")


@dataclass(frozen=True)
class WrittenText:
    """One text written before another.

    Attributes:
        earlier: what was written, natural order, without the text that it precedes.
        whole: both texts together.
        num_tokens: how many tokens were written.
        reached_beginning: the model wrote the document's beginning; otherwise the token limit cut it off.
    """

    earlier: str
    whole: str
    num_tokens: int
    reached_beginning: bool
