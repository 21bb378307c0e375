"""What decides the experiment with Reverse Reward."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What decides the experiment; written to settings.json, and a folder is only gone on with under the same.

    Attributes:
        num_training: problems that both twins read.
        num_tuning: further problems, on which the reverse scorer is fine-tuned.
        num_problems: unseen problems that are answered, those included that choose lambda.
        held_out_share: share of them that chooses lambda and normalisation.
        num_samples: N, the answers sampled to each of them.
        temperature: of the samples.
        answer_tokens: longest answer.
        largest_number: of a problem and its solution.
        longest_chars: of a problem with its solution.
        vocab_size: entries of the tokenizer.
        num_layers, hidden_size: of both twins.
        train_iters: iterations of both twins.
        tune_iters: iterations of the fine-tuning.
        batch: samples of an iteration.
    """

    num_training: int = 48_000
    num_tuning: int = 10_000
    num_problems: int = 1_250
    held_out_share: float = 0.2
    num_samples: int = 16
    temperature: float = 1.0
    answer_tokens: int = 128
    largest_number: int = 200
    longest_chars: int = 330
    vocab_size: int = 1024
    num_layers: int = 4
    hidden_size: int = 192
    train_iters: int = 2_000
    tune_iters: int = 900
    batch: int = 8

    def model_flags(self) -> list[object]:
        """The shape of a twin, beside what the preset `tiny` says of it."""
        heads = self.hidden_size // 32
        return [
            *("--num-layers", self.num_layers, "--hidden-size", self.hidden_size),
            *("--ffn-hidden-size", self.hidden_size * 8 // 3, "--num-attention-heads", heads),
            *("--num-query-groups", heads // 2),
            *("--init-method-std", 0.06),
        ]
