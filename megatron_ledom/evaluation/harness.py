"""A reverse model inside lm-evaluation-harness: its requests, answered in the direction in which the model runs.

The harness asks for log P(continuation | context), and the context stands before the continuation. A reverse model
gives log P(earlier | later), so what is computed is chosen by `reading`:

    joint      log P(context + continuation), the whole in reading order, as two reverse scores that add up:
               log P(continuation) + log P(context | continuation). For the options of one question it is
               log P(continuation | context) plus one and the same number, so that accuracies of multiple choice
               are those of the conditional. Perplexities, and accuracies normalised by length, are not; nor are
               those of tasks whose options are contexts of one continuation, as winogrande's.
    context    log P(context | continuation): the paper's reward, and how Reversal Blessing (arXiv 2502.18435)
               ranks options.
    reversed   for tasks written for reverse models: the continuation stands BEFORE the context, so that
               log P(continuation | context) is what the model gives, and generation writes leftwards.

Under the first two nobody knows whether the model would write the continuation: metrics that ask that are left out.

A forward model answers as the harness asks. Texts are tokenised as everywhere here, apart and without special tokens.
Source: `lm_eval.api.model.LM`, whose contract this class fulfils.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM

from megatron_ledom.direction import Direction, condition
from megatron_ledom.errors import InputError, UsageError
from megatron_ledom.inference import DEFAULT_BATCH_TOKENS
from megatron_ledom.inference.model import DirectedLM, ReverseLM, Score, load_lm
from megatron_ledom.inference.sampling import Sampling
from megatron_ledom.log import Progress

READINGS = ("joint", "context", "reversed")
GREEDY_METRICS = {"loglikelihood": "acc", "multiple_choice": "exact_match"}
"""The metric, by a task's output type, that asks whether greedy writing gives the continuation."""


class HarnessLM(LM):
    """Answers the requests of lm-evaluation-harness with a model of either direction.

    Args:
        lm: the model.
        reading: of a reverse model, one of `READINGS`; a forward model has one reading only.
        batch_tokens: most tokens in a batch.

    Raises:
        UsageError: an unknown reading.
    """

    def __init__(self, lm: DirectedLM, *, reading: str = "joint", batch_tokens: int = DEFAULT_BATCH_TOKENS) -> None:
        super().__init__()
        if reading not in READINGS:
            raise UsageError(f"--reading {reading}: known are {', '.join(READINGS)}")
        self.lm, self.reading, self.batch_tokens = lm, reading, batch_tokens

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Answer (context, continuation) requests with (log-probability, whether it would be written greedily).

        The second is known where the continuation is what the model writes: False under `joint` and `context`.

        Raises:
            InputError: a continuation without a token, or a request longer than the model's context.
        """
        pairs = [request.args for request in requests]
        if self.lm.direction is Direction.FORWARD or self.reading == "reversed":
            scores = self._score([(continuation, context) for context, continuation in pairs])
            return [(score.logprob, score.is_greedy) for score in scores]
        given_continuation = self._score(
            [(context, continuation) for context, continuation in pairs], may_be_empty=True
        )
        if self.reading == "context":
            return [(score.logprob, False) for score in given_continuation]
        alone = self._score([(continuation, "") for _, continuation in pairs])
        return [(a.logprob + b.logprob, False) for a, b in zip(alone, given_continuation, strict=True)]

    def _score(self, pairs: Sequence[tuple[str, str]], *, may_be_empty: bool = False) -> list[Score]:
        """Score (target, given) pairs; an empty target is certain where that is allowed."""
        places = [i for i, (target, _) in enumerate(pairs) if not may_be_empty or self.lm.encode(target)]
        layouts = [self.lm.arrange(*pairs[i], what=f"request {i} of the harness") for i in places]
        progress = Progress("score", len(layouts), "requests")
        found = self.lm.score(layouts, batch_tokens=self.batch_tokens, on_batch=progress.update)
        progress.close()
        scores = [Score(0.0, ())] * len(pairs)
        for i, score in zip(places, found, strict=True):
            scores[i] = score
        return scores

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Answer (text,) requests with the log-probability of the whole text, read in windows where it is long.

        In both directions it is the same text's, so that bits per byte can stand side by side.
        """
        layouts = []
        for number, request in enumerate(requests):
            ids_nat = self.lm.encode(request.args[0])
            if not ids_nat:
                raise InputError(f"request {number} of the harness: a text without a token")
            layouts.append(condition(ids_nat, [], self.lm.direction, boundary_id=self.lm.boundary_id))
        return [score.logprob for score in self.lm.score(layouts, batch_tokens=self.batch_tokens)]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Write what precedes each context, greedily, back to the nearest of its `until` texts; `reversed` only.

        Raises:
            UsageError: the model is a forward one, or the reading another: an ordinary task wants what comes after.
        """
        if not isinstance(self.lm, ReverseLM) or self.reading != "reversed":
            raise UsageError(
                f"this task generates text after a context, which a {self.lm.direction} model under --reading "
                f"{self.reading} does not do here. Choose a task of loglikelihood requests, or one written for reverse "
                "models with --reading reversed"
            )
        written = []
        progress = Progress("write", len(requests), "requests")
        for request in requests:
            context, options = request.args
            until = options.get("until") or []
            stops = [until] if isinstance(until, str) else list(until)
            sampling = Sampling(max_new_tokens=int(options.get("max_gen_toks", 128)), greedy=True)

            def has_stop(text: str, stops: Sequence[str] = stops) -> bool:
                return any(stop in text for stop in stops)

            (found,) = self.lm.write(context, sampling, stop_when=has_stop)
            cut = max((found.earlier.rfind(stop) + len(stop) for stop in stops if stop in found.earlier), default=0)
            written.append(found.earlier[cut:])
            progress.update(1)
        progress.close()
        return written


def run_harness(
    model: Path,
    tasks: Sequence[str],
    *,
    reading: str = "joint",
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    assume_direction: Direction | None = None,
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness.

    Args:
        model: folder of a model of either direction; it says which.
        tasks: their names.
        reading: see the module.
        include_path: a folder of task descriptions (YAML) beside the harness's own.
        num_fewshot: demonstrations, or None for what each task says.
        limit: examples of each task, or None for all.
        device: "auto", "cpu" or "cuda".
        batch_tokens: most tokens in a batch.
        assume_direction: of a model whose `config.json` does not say one; forward by default.

    Returns:
        The harness's `results` and `n-samples`, how they were computed, and `left_out`: task -> the metric of
        `GREEDY_METRICS` that the reading has no answer for.

    Raises:
        InputError: a folder that is not a model, an unknown task.
        UsageError: a task or reading that does not fit.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise InputError(f"the harness knows no task {', '.join(unknown)}. Name its folder with --include-path")
    loaded = load_lm(model, device=device, assume_direction=assume_direction)
    lm = HarnessLM(loaded, reading=reading, batch_tokens=batch_tokens)
    found = lm_eval.simple_evaluate(
        lm,
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        bootstrap_iters=1000,
        log_samples=False,
    )
    direction = lm.lm.direction
    has_greedy = direction is Direction.FORWARD or reading == "reversed"
    return {
        "model": str(model),
        "direction": str(direction),
        "reading": reading if direction is Direction.REVERSE else "forward",
        "results": found["results"],
        "n-samples": found["n-samples"],
        "left_out": {} if has_greedy else _leave_out_greedy(found["results"], found["configs"]),
    }


def _leave_out_greedy(results: dict[str, Any], configs: dict[str, Any]) -> dict[str, str]:
    """Remove the metrics that rest on greedy writing; returns the metric of each task that had one."""
    left_out = {}
    for task, metrics in results.items():
        metric = GREEDY_METRICS.get(str(configs.get(task, {}).get("output_type")))
        names = [name for name in metrics if name.partition(",")[0] in (metric, f"{metric}_stderr")]
        for name in names:
            del metrics[name]
        if metric is not None and names:
            left_out[task] = metric
    return left_out


def format_results(results: dict[str, Any]) -> str:
    """Write what `run_harness` returns as an aligned table, a metric a row."""
    rows = [("task", "metric", "value", "stderr")]
    for task, metrics in results["results"].items():
        for name, value in metrics.items():
            metric, _, kind = name.partition(",")
            if metric == "alias" or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            rows.append((task, metric, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else "-"))
    rows += [(task, metric, "unknown under this reading", "-") for task, metric in results["left_out"].items()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    head = f"{results['model']}: {results['direction']} model, reading {results['reading']}"
    return "\n".join([head, *lines])
