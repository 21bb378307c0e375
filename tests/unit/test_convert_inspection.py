"""Which arguments make another function of the same weights."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_ledom.checkpoint.describe import BESIDE, MEANING
from megatron_ledom.convert.inspection import meaning_differs
from megatron_ledom.convert.llama_config import NUMBERS, REQUIREMENTS

RUN: dict[str, Any] = {
    **{name: values[0] for name, values, _ in REQUIREMENTS},
    "num_layers": 2,
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "direction": "reverse",
}


@pytest.mark.parametrize("name", [name for name, _, _ in REQUIREMENTS])
def test_every_argument_in_which_a_model_can_differ_from_a_llama_counts(name: str) -> None:
    """An export refuses it by this list: then two checkpoints that differ in it are not equal, either."""
    assert meaning_differs(RUN, RUN | {name: "something else"})
    assert meaning_differs(RUN | {name: "something else"}, RUN)


@pytest.mark.parametrize("name", REQUIREMENTS[:1] + REQUIREMENTS[12:13])
def test_an_argument_that_a_version_lacks_has_the_value_of_a_llama(name: tuple[str, Any, str]) -> None:
    older = {key: value for key, value in RUN.items() if key != name[0]}
    assert not meaning_differs(older, RUN) and meaning_differs(older, RUN | {name[0]: "something else"})


@pytest.mark.parametrize("name", BESIDE)
def test_what_belongs_to_another_argument_counts_beside_it(name: str) -> None:
    one, other = RUN | {name: 1}, RUN | {name: 2}
    assert not meaning_differs(one, other)
    assert meaning_differs(one | {BESIDE[name]: True}, other | {BESIDE[name]: True})


def test_what_a_llama_config_says_of_the_function_counts_and_a_run_s_own_does_not() -> None:
    assert set(NUMBERS) - {"init_method_std"} <= set(MEANING)
    assert not meaning_differs(RUN, RUN | {"init_method_std": 1.0, "attention_dropout": 0.1, "save": "elsewhere"})
    assert meaning_differs(RUN, RUN | {"direction": "forward"})
