"""A run in emulated FP8 that meets an outlier, skips a step, evaluates, resumes: what it does, what is seen of it."""

from __future__ import annotations

import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from small_run import SMALL

from megatron_ledom.errors import InputError
from megatron_ledom.report.page import build_page
from megatron_ledom.report.run_facts import find_twin, read_facts
from megatron_ledom.testing import REPOSITORY, run_distributed
from megatron_ledom.train import events
from megatron_ledom.train.events import read_events
from megatron_ledom.train.metrics import TRAIN_LOSS, read_metrics, read_scalars

pytestmark = pytest.mark.distributed

PLANTER = str(REPOSITORY / "tests/distributed/plant_outlier.py")
SKIPPED, PLANTED, RESUMED, LAST = 3, 5, 6, 9
LENGTH = ["--num-layers", 2, "--train-iters", LAST, "--save-interval", RESUMED, "--eval-interval", 4]
WATCHED = [
    "--shadow-every",
    1,
    "--shadow-tolerance",
    0.03,
    "--shadow-policy",
    "switch",
    "--summary-every",
    0,
    "--peak-tflops",
    0.05,
]


@pytest.fixture(scope="module")
def launches(
    tmp_path_factory: pytest.TempPathFactory, data_arguments: list[object]
) -> list[subprocess.CompletedProcess[str]]:
    """The two launches of one run: to the step of a checkpoint, then to the end. `args[-1]` is the run directory."""
    run = tmp_path_factory.mktemp("watched") / "reverse"
    command = [*SMALL, *LENGTH, *WATCHED, *data_arguments, "--iterations-to-skip", SKIPPED]
    command += ["--precision", "fp8-tensorwise", "--no-first-last-layers-bf16"]
    done = []
    for flags in (["--exit-interval", RESUMED], []):
        env = {"PLANT_AT": str(PLANTED if flags else 0)}
        done.append(run_distributed(PLANTER, 1, *command, *flags, "--run-dir", run, env=env))
        assert done[-1].returncode == 0, done[-1].stderr[-5000:]
    return done


@pytest.fixture(scope="module")
def run(launches: list[subprocess.CompletedProcess[str]]) -> Path:
    return Path(launches[-1].args[-1])


def test_the_shadow_sees_the_outlier_and_the_run_goes_on_in_bf16(
    run: Path, launches: list[subprocess.CompletedProcess[str]]
) -> None:
    found = [e for e in read_events(run) if e.kind in {events.SHADOW, events.BREACH, events.SWITCH}]
    assert [(e.step, e.kind) for e in found] == [
        *[(step, events.SHADOW) for step in range(1, PLANTED) if step != SKIPPED],
        (PLANTED, events.BREACH),
        (PLANTED, events.SWITCH),
    ]
    quiet, breach = found[:-2], found[-2]
    print(
        f"\ngaps before {[round(e.fields['gap'], 4) for e in quiet]}, with the outlier {breach.fields['gap']:+.3f} nats"
    )
    assert max(abs(e.fields["gap"]) for e in quiet) < 0.015 < 0.03 < abs(breach.fields["gap"])
    assert breach.fields["worst_layer"].endswith("layers.1.mlp.linear_fc1")
    assert breach.fields["worst_layer_gap"] > 0.5 > max(e.fields["worst_layer_gap"] for e in quiet)
    assert f"this run has been in BF16 since step {PLANTED}" in launches[1].stderr


def test_the_emulation_changes_the_loss_and_the_shadow_does_not(run: Path) -> None:
    losses = read_scalars(run, TRAIN_LOSS)
    for e in read_events(run):
        if e.kind == events.SHADOW:
            assert e.fields["fp8_loss"] != e.fields["bf16_loss"]
    assert sorted(losses) == [step for step in range(1, LAST + 1) if step != SKIPPED]
    assert losses[LAST] < losses[1] - 0.3


def test_events_say_what_happened(run: Path) -> None:
    found = read_events(run)
    kinds = [(e.kind, e.step) for e in found if e.kind not in {events.SHADOW, events.BREACH, events.SWITCH}]
    assert kinds == [
        *((events.LAUNCH, 0), (events.BEGIN, 0), (events.SKIPPED, SKIPPED), (events.EVALUATION, 4)),
        *((events.SAVE, RESUMED), (events.END, RESUMED)),
        *((events.RESUME, RESUMED), (events.BEGIN, RESUMED), (events.EVALUATION, 8)),
        *((events.SAVE, LAST), (events.EVALUATION, LAST), (events.END, LAST)),
    ]
    validation = read_scalars(run, "lm loss validation")
    for e in found:
        if e.kind == events.EVALUATION:
            assert e.fields["loss"] == pytest.approx(validation[e.step], rel=1e-6)
    assert [e.time for e in found] == sorted(e.time for e in found)


def test_metrics_and_tensorboard_hold_what_megatron_leaves_out(
    run: Path, launches: list[subprocess.CompletedProcess[str]]
) -> None:
    lines, losses = read_metrics(run), read_scalars(run, TRAIN_LOSS)
    assert [line["step"] for line in lines] == sorted(losses)
    for line in lines:
        assert line["loss"] == pytest.approx(losses[line["step"]], rel=1e-6)
        assert line["tokens_per_s"] == pytest.approx(8 * 64 / line["step_s"], rel=1e-3)
        assert line["mfu"] == pytest.approx(line["tflops_per_device"] / 0.05, rel=0.02, abs=1e-5)
        assert line["memory_peak_bytes"] > 2**27 and line["samples"] == 8 * line["step"]
        ((_, epochs),) = line["data_epochs"].items()
        assert epochs > 0
    first, last = (next(iter(line["data_epochs"].values())) for line in (lines[0], lines[-1]))
    assert last == pytest.approx(LAST * first, rel=1e-3)
    for tag, name in (("tokens-per-second", "tokens_per_s"), ("mfu", "mfu"), ("skipped-steps", "skipped_steps")):
        curve = read_scalars(run, tag)
        assert list(curve.values()) == pytest.approx([line[name] for line in lines], rel=1e-5), tag
    assert len(read_scalars(run, "data-epochs/reverse_text_document")) == len(lines)
    summaries = re.findall(r"^step .*", launches[1].stderr, re.M)
    assert re.match(r"step 9/9 \(100 %\), loss \d\.\d+, validation .* tokens/s, MFU .* epochs, .* left", summaries[-1])


class Page(HTMLParser):
    """What a browser would fetch, and the texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [str(value) for name, value in attrs if name in {"src", "href", "data"}]
        self.open += [tag] if tag != "meta" else []
        assert tag != "script"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [str(value) for name, value in attrs if name in {"src", "href"}]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}>"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_report_is_one_file_with_everything(run: Path) -> None:
    html = build_page([read_facts(run)])
    page = Page(html)
    assert page.fetched == [] and page.open == [] and "url(" not in html and "@import" not in html
    text = " ".join(page.texts)
    for title in ("Loss", "Gradient norm", "Learning rate", "Tokens per second", "MFU", "Peak memory", "Skipped steps"):
        assert title in page.texts, title
    for title in ("Epochs by source", "FP8 against BF16", "Where the time went", "Events", "Data", "Configuration"):
        assert title in page.texts, title
    assert html.count("<svg ") == 9
    assert f"{LAST} of {LAST}" in text and "reverse_text_document" in text and "--iterations-to-skip" in text
    for kind in ("launch", "skipped step", "evaluation", "shadow breach", "precision switch", "save", "resume", "end"):
        assert kind in page.texts, kind
    marks = re.findall(r"<line class=\"mark\".*?<title>(.*?)</title>", html)
    assert any(mark.startswith(f"skipped step at step {SKIPPED}") for mark in marks)
    assert any(mark.startswith(f"resume at step {RESUMED}") for mark in marks)
    assert "1 argument changed among launches" in text and "exit_interval" in text


def test_goodput_is_what_the_lines_add_up_to(run: Path) -> None:
    goodput = read_facts(run).goodput
    assert goodput is not None
    steps = sum(line["step_s"] * line["num_steps"] for line in read_metrics(run))
    assert goodput.seconds["steps that count"] == pytest.approx(steps)
    assert sum(goodput.seconds.values()) == pytest.approx(goodput.total_s)
    assert 0 < goodput.share < 1 and goodput.seconds["starting"] > 0 and goodput.seconds["saving"] > 0


def test_the_twin_beside_it_is_found_and_drawn(run: Path, tmp_path: Path) -> None:
    facts = read_facts(run)
    assert find_twin(facts) is None
    folder = tmp_path / "runs"
    for name, direction in (("a", "reverse"), ("b", "forward"), ("c", "forward")):
        copy_run(run, folder / name, direction, hidden_size=64 if name != "c" else 32)
    twin = find_twin(read_facts(folder / "a"))
    assert twin is not None and twin.folder.name == "b", "c has another shape"
    page = Page(build_page([read_facts(folder / "a"), twin]))
    assert "a: reverse model beside forward" in page.texts
    assert {"Events: reverse", "Events: forward", "Configuration: forward"} <= set(page.texts)
    copy_run(run, folder / "d", "forward", hidden_size=64)
    assert find_twin(read_facts(folder / "a")) is None, "two of them"


def copy_run(run: Path, target: Path, direction: str, hidden_size: int) -> None:
    """A run directory with the same numbers and another direction and width in its record."""
    target.mkdir(parents=True)
    (target / "tensorboard").symlink_to(run / "tensorboard")
    for name in ("events.jsonl", "metrics.jsonl"):
        (target / name).write_bytes((run / name).read_bytes())
    record = json.loads((run / "run.json").read_text())
    for launch in record["launches"]:
        launch["direction"] = direction
        launch["megatron_arguments"]["hidden_size"] = hidden_size
    (target / "run.json").write_text(json.dumps(record))


def test_a_folder_without_launches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run directory"):
        read_facts(tmp_path)
    (tmp_path / "run.json").write_text('{"format_version": 1, "launches": []}')
    with pytest.raises(InputError, match="names no launch"):
        read_facts(tmp_path)
