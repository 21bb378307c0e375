"""Word problems solved by a reverse model that writes upwards, with the paper's reversed prompt.

In reading order, the part above the line is what the model writes, from its end to its beginning:

    {answer} is the answer of the following question.
    {chain of thought}
    ---------------------------------------------------
    The above is the thought chain.
    Question: {question}

    {a demonstration: the four parts, filled in}
    {another}

So the model has read the demonstrations and the question when it begins with the end of the chain. It has said its
answer when something stands before `... is the answer of the following question.` and a line or the document begins
there.
Source: the paper's prompt for GSM8K (arXiv 2507.01335, its authors' site).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ledom.direction import Direction
from megatron_ledom.errors import InputError, UsageError
from megatron_ledom.inference.files import check_output, open_output, read_records, read_text_field
from megatron_ledom.inference.folder import check_direction, load_record
from megatron_ledom.inference.sampling import Sampling
from megatron_ledom.log import Progress

if TYPE_CHECKING:  # torch comes with it, and costs seconds that a refusal should not take
    from megatron_ledom.inference.model import ReverseLM

ANSWER_LINE = " is the answer of the following question."
BELOW_CHAIN = "The above is the thought chain."
BETWEEN = "\n\n"
_SAID = re.compile(r"(?:^|\n)([^\n]*?\S) is the answer of the following question\.")


@dataclass(frozen=True)
class Problem:
    """A question with its answer and, of a demonstration, the chain of thought between them."""

    question: str
    answer: str
    chain: str = ""


@dataclass(frozen=True)
class FewShotSettings:
    """How problems are put and answered.

    Attributes:
        model: folder of a reverse model.
        num_shots: demonstrations behind each question, the first ones of their file.
        max_new_tokens: most tokens to write of chain and answer.
        device: "auto", "cpu" or "cuda".
        assume_reverse: take a model that does not say its direction.
    """

    model: Path
    num_shots: int = 4
    max_new_tokens: int = 256
    device: str = "auto"
    assume_reverse: bool = False


def question_prompt(question: str, demonstrations: Sequence[Problem]) -> str:
    """What the model is given: everything below the chain that it is to write."""
    parts = [f"\n{BELOW_CHAIN}\nQuestion: {question}", *map(format_demonstration, demonstrations)]
    return BETWEEN.join(parts)


def format_demonstration(problem: Problem) -> str:
    """The four parts of a solved problem, in reading order."""
    return f"{problem.answer}{ANSWER_LINE}\n{problem.chain}\n{BELOW_CHAIN}\nQuestion: {problem.question}"


def read_answer(earlier: str, *, is_complete: bool) -> str | None:
    r"""Find the answer in what was written above a question.

    Args:
        earlier: so far, in reading order.
        is_complete: nothing will be written before it, so that a line begins with its first character.

    Returns:
        The answer nearest to the question; None where there is none yet.

    >>> read_answer("one.\n12 is the answer of the following question.\n7 + 5 = 12", is_complete=False)
    '12'
    """
    found = None
    for match in _SAID.finditer(earlier):
        if match.start() > 0 or earlier.startswith("\n") or is_complete:
            found = match[1].strip()
    return found


def is_same_answer(found: str | None, right: str) -> bool:
    """Compare two answers: as numbers where both are, else as texts without case and spaces.

    >>> is_same_answer("$1,200.0", "1200"), is_same_answer("Paris ", "paris"), is_same_answer(None, "1")
    (True, True, False)
    """
    if found is None:
        return False
    first, second = _as_number(found), _as_number(right)
    if first is not None and second is not None:
        return math.isclose(first, second, rel_tol=1e-9)
    return "".join(found.split()).casefold() == "".join(right.split()).casefold()


def _as_number(text: str) -> float | None:
    try:
        return float(text.strip().rstrip(".%").lstrip("$").replace(",", ""))
    except ValueError:
        return None


def read_problems(path: Path, *, with_chain: bool) -> list[Problem]:
    """Read {"question", "answer"} lines, of demonstrations with "chain".

    Raises:
        InputError: a line lacks a field, or there is none.
    """
    problems = []
    for number, record in read_records(path):
        where = f"{path}, line {number}"
        fields = {key: read_text_field(record, key, where) for key in ("question", "answer", *["chain"] * with_chain)}
        problems.append(Problem(**{key: text.strip() for key, text in fields.items()}))
    if not problems:
        raise InputError(f"{path} has no problem. One JSON object a line is needed, see docs/scoring.md")
    return problems


def solve(lm: ReverseLM, problem: Problem, demonstrations: Sequence[Problem], max_new_tokens: int) -> dict[str, Any]:
    """Let the model answer one problem; greedy.

    Returns:
        `found` (None where it said no answer), `is_right`, and what it wrote.

    Raises:
        InputError: the prompt and the new tokens do not fit into the context.
    """
    prompt = question_prompt(problem.question, demonstrations)
    (written,) = lm.write(
        prompt,
        Sampling(max_new_tokens=max_new_tokens, greedy=True),
        stop_when=lambda earlier: read_answer(earlier, is_complete=False) is not None,
    )
    found = read_answer(written.earlier, is_complete=written.reached_beginning)
    return {"found": found, "is_right": is_same_answer(found, problem.answer), "written": written.earlier}


def evaluate_few_shot(
    source: Path, demonstrations: Path | None, output: Path, settings: FewShotSettings, *, overwrite: bool = False
) -> dict[str, Any]:
    """Answer the problems of a JSONL file and write what was said, a line a problem.

    Args:
        source: problems.
        demonstrations: problems with chains; may be None where `num_shots` is 0.
        output: the lines of `source` with `found`, `is_right`, `written`; appears when it is complete.
        settings: model and options.
        overwrite: replace an output that exists.

    Returns:
        `problems`, `answered`, `right`, `accuracy` and the ends of its 95 % Wilson interval.

    Raises:
        InputError: a malformed line, a folder that is not a model, a prompt that is too long.
        UsageError: fewer demonstrations than asked for.
        DirectionError: a forward model.
        OutputExistsError: the output exists and `overwrite` is not set.
    """
    check_output(output, overwrite=overwrite)
    assumed = Direction.REVERSE if settings.assume_reverse else None
    check_direction(load_record(settings.model), Direction.REVERSE, assumed)
    problems = read_problems(source, with_chain=False)
    shown = [] if demonstrations is None else read_problems(demonstrations, with_chain=True)
    if settings.num_shots < 0 or len(shown) < settings.num_shots:
        raise UsageError(f"--num-shots {settings.num_shots}: {len(shown)} demonstrations were given")
    shown = shown[: settings.num_shots]
    from megatron_ledom.inference.model import ReverseLM

    lm = ReverseLM.load(settings.model, device=settings.device, assume_direction=assumed)
    for number, problem in enumerate(problems, start=1):
        num_tokens = 1 + len(lm.encode(question_prompt(problem.question, shown))) + settings.max_new_tokens
        lm.check_length(num_tokens, f"{source}, problem {number} with {len(shown)} demonstrations and the new tokens")
    counts = {"problems": len(problems), "answered": 0, "right": 0}
    progress = Progress("solve", len(problems), "problems")
    with open_output(output) as file:
        for problem, (_, record) in zip(problems, read_records(source), strict=True):
            result = solve(lm, problem, shown, settings.max_new_tokens)
            counts["answered"] += result["found"] is not None
            counts["right"] += result["is_right"]
            file.write(json.dumps({**record, **result}, ensure_ascii=False) + "\n")
            progress.update(1)
    progress.close()
    low, high = wilson_interval(counts["right"], counts["problems"])
    return {**counts, "accuracy": counts["right"] / counts["problems"], "low": low, "high": high}


def wilson_interval(num_right: int, num_all: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a proportion; z = 1.96 is 95 %.

    >>> [round(end, 3) for end in wilson_interval(0, 10)]
    [0.0, 0.278]
    """
    share, square = num_right / num_all, z * z / num_all
    middle = (share + square / 2) / (1 + square)
    half = z * math.sqrt(share * (1 - share) / num_all + square / (4 * num_all)) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)
