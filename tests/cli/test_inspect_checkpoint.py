"""tools/inspect_checkpoint.py: what it shows of either kind of weights, which faults it finds, which differences."""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from convert_cases import ITERATION
from in_process import run_in_process
from random_models import edit_config
from safetensors.torch import load_file, save_file

from megatron_ledom.checkpoint import Checkpoint
from megatron_ledom.checkpoint.integrity import LIST_NAME, write_checksums
from megatron_ledom.checkpoint.unpickle import SavedValue
from megatron_ledom.checkpoint.writer import CheckpointWriter
from megatron_ledom.convert.hf import ExportOptions, export_checkpoint
from megatron_ledom.testing import run_tool

TOOL = "inspect_checkpoint.py"
TRACKER = "latest_checkpointed_iteration.txt"
NORM, STACK = "decoder.final_layernorm.weight", "decoder.layers.mlp.linear_fc2.weight"
Change = Callable[[str, torch.Tensor], torch.Tensor | None]


def inspect(*arguments: object) -> CompletedProcess[str]:
    return run_in_process(TOOL, *arguments)


def strict_json(done: CompletedProcess[str]) -> dict[str, Any]:
    """Standard output as one JSON object, without the words for infinity and NaN that JSON does not have."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    found = json.loads(done.stdout, parse_constant=refuse)
    assert isinstance(found, dict)
    return found


def rewrite(source: Path, save: Path, change: Change = lambda _, values: values, **arguments: Any) -> Path:
    """Write a `--save` folder with the tensors of another, one chunk each, changed or (None) left out; with checksums.

    Arguments that are notes of Megatron's classes are left out: only Megatron could pickle them.
    """
    checkpoint, folder = Checkpoint.open(source), save / f"iter_{ITERATION:07d}"
    folder.mkdir(parents=True)
    kept = {name: value for name, value in vars(checkpoint.args).items() if not isinstance(value, SavedValue)}
    with CheckpointWriter(folder) as writer:
        for name in checkpoint.tensor_names():
            values = change(name, checkpoint.read(name))
            if values is not None:
                writer.write_chunk(name, values, shape=values.shape, offsets=(0,) * values.dim())
        writer.write_common(argparse.Namespace(**kept | arguments), iteration=ITERATION)
    (save / TRACKER).write_text(str(ITERATION))
    write_checksums(folder, writer.hashes)
    return save


@pytest.fixture(scope="module")
def megatron(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `--save` folder with checksums."""
    return rewrite(cases / "gqa_padded", tmp_path_factory.mktemp("inspect") / "megatron")


@pytest.fixture(scope="module")
def hf(megatron: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as a folder of several files, with SHA256SUMS."""
    folder = tmp_path_factory.mktemp("inspect_hf") / "hf"
    options = ExportOptions(parity=False, max_shard_bytes=200_000, tokenizer=tokenizer_folder)
    export_checkpoint(megatron, folder, options=options)
    return folder


@pytest.fixture
def copied(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the fixture of that name, to damage: the folder that holds the files."""

    def copy(kind: str) -> Path:
        folder = Path(shutil.copytree(request.getfixturevalue(kind), tmp_path / kind))
        return folder / f"iter_{ITERATION:07d}" if kind == "megatron" else folder

    return copy


def test_help_names_every_flag_and_status() -> None:
    done = run_tool(TOOL, "--help")
    assert done.returncode == 0
    for word in ("PATH", "--step", "--tensors", "--verify", "--diff", "--json", "Exit status: 0; 1 where"):
        assert word in done.stdout


@pytest.mark.distributed
def test_a_run_at_tp2_pp2_is_described_and_verified(run: Path) -> None:
    done = run_tool(TOOL, run / "checkpoints", "--tensors", "--verify")
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[0] == f"{run / 'checkpoints' / 'iter_0000004'}: megatron torch_dist checkpoint"
    for line in (
        *("step 4", "direction reverse", "preset tiny", "dtype float32", "parameters 295,488"),
        *("saved at TP 2 x PP 2 x DP 1 x CP 1", "format torch_dist 1", "padded_vocab_size 1152"),
        "weights 9 tensors, 295,488 elements, 1,181,952 bytes, float32",
        "optimizer 27 tensors, 886,464 elements, 3,545,856 bytes, float32",
        "checksums of 6 files; compare them with --verify",
        "decoder.layers.mlp.linear_fc1.weight [4, 256, 64] float32 262,144 16",  # 4 layers x 2 ranks x 2 halves
        "verify: every tensor can be read, every file is as it was saved",
    ):
        assert line in lines
    assert any(line.startswith("fingerprint sha256:") for line in lines)
    assert len([line for line in lines if line.startswith("optimizer.state.")]) == 27


@pytest.mark.distributed
def test_another_step_is_shown_and_compared_with_the_last(run: Path) -> None:
    checkpoints = run / "checkpoints"
    earlier = strict_json(inspect(checkpoints, "--step", 2, "--json"))
    assert (earlier["step"], Path(earlier["folder"]).name) == (2, "iter_0000002")
    done = inspect(checkpoints, "--step", 2, "--diff", checkpoints, "--json")
    diff = strict_json(done)["diff"]
    assert done.returncode == 1 and not diff["is_equal"]
    seen = diff["arguments"].pop("bad_numbers_losses")
    assert diff["arguments"] == {"consumed_train_samples": [8, 16], "curr_iteration": [1, 3]}
    logged = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(logged) == 4 and seen == [pytest.approx(logged[:2], rel=1e-6), pytest.approx(logged, rel=1e-6)]
    assert len(diff["values"]) == 36 and not any(value["bitwise_equal"] for value in diff["values"].values())
    assert inspect(checkpoints, "--diff", checkpoints / "iter_0000004").returncode == 0
    refused = inspect(checkpoints, "--step", 3)
    assert refused.returncode == 2 and "holds no step 3; finished steps: 2, 4" in refused.stderr


def test_a_checkpoint_as_json(megatron: Path) -> None:
    found = strict_json(inspect(megatron, "--json", "--tensors"))
    stored = Checkpoint.open(megatron)
    assert found["kind"] == "megatron torch_dist checkpoint" and found["folder"] == str(stored.folder)
    assert (found["step"], found["direction"], found["dtype"]) == (ITERATION, "reverse", "float32")
    assert found["tokenizer"]["fingerprint"] == stored.args.tokenizer_fingerprint
    assert found["model"]["hidden_size"] == 48 and found["layout"]["tensor_model_parallel_size"] == 1
    assert found["format"] == {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    assert found["num_parameters"] == sum(math.prod(stored.shape(name)) for name in stored.tensor_names())
    assert found["bytes_on_disk"] == sum(path.stat().st_size for path in stored.folder.iterdir())
    assert (found["num_files"], found["checksums"]) == (4, 3)
    row = next(row for row in found["tensors"] if row["name"] == STACK)
    size = {"shape": [2, 48, 80], "dtype": "float32", "bytes": 2 * 48 * 80 * 4, "chunks": 1}
    assert row == {"name": STACK, "group": "weights", **size}
    assert [row["name"] for row in found["tensors"]] == stored.tensor_names()
    assert "tensors" not in strict_json(inspect(megatron, "--json"))


def test_a_folder_as_json_and_as_text(hf: Path) -> None:
    found = strict_json(run_tool(TOOL, hf, "--json", "--tensors", "--verify"))
    weights = {key: value for path in hf.glob("*.safetensors") for key, value in load_file(path).items()}
    assert (found["kind"], found["step"], found["direction"]) == ("Hugging Face folder", ITERATION, "reverse")
    assert found["num_parameters"] == sum(value.numel() for value in weights.values())
    assert found["model"]["vocab_size"] == 1024 and "ledom" not in found["model"]
    assert {row["name"]: (row["shape"], row["dtype"], row["bytes"]) for row in found["tensors"]} == {
        name: (list(value.shape), "float32", value.nbytes) for name, value in weights.items()
    }
    assert found["num_files"] == len(list(hf.iterdir())) == found["checksums"] + 1
    assert found["verify"] == {"has_checksums": True, "faults": []}
    done = inspect(hf, "--tensors")
    assert done.returncode == 0 and done.stdout.startswith(f"{hf}: Hugging Face folder\n")
    for words in ("  direction    reverse\n", "  fingerprint  sha256:", "model.layers.1.self_attn.k_proj.weight"):
        assert words in done.stdout


def test_the_same_weights_under_arguments_of_another_function_are_a_difference(megatron: Path, tmp_path: Path) -> None:
    other = rewrite(megatron, tmp_path / "partly", rotary_percent=0.5)
    done = inspect(megatron, "--diff", other)
    assert done.returncode == 1 and "rotary_percent" in done.stdout and "equal, bit for bit" not in done.stdout
    unused = rewrite(megatron, tmp_path / "unused", rope_scaling_factor=4.0)  # without --use-rope-scaling
    done = inspect(megatron, "--diff", unused)
    assert done.returncode == 0, done.stdout


def test_numbers_that_json_does_not_have_are_words(cases: Path, hf: Path, tmp_path: Path) -> None:
    strange = {"layernorm_epsilon": math.inf, "rotary_base": math.nan, "a_set": {1}, "a_tuple": (1, math.inf)}
    zeroed = rewrite(cases / "gqa_padded", tmp_path / "a", lambda _, values: values.zero_(), **strange)
    other = rewrite(cases / "gqa_padded", tmp_path / "b", lambda _, values: values.fill_(math.nan))
    found = strict_json(inspect(zeroed, "--json", "--diff", other))
    assert (found["model"]["layernorm_epsilon"], found["model"]["rotary_base"]) == ("inf", "nan")
    assert found["diff"]["arguments"]["a_tuple"] == [[1, "inf"], None]
    assert found["diff"]["values"][NORM]["max_abs_difference"] == "nan"
    folder = Path(shutil.copytree(hf, tmp_path / "hf"))
    edit_config(folder, initializer_range=math.inf)
    assert strict_json(inspect(folder, "--json"))["model"]["initializer_range"] == "inf"


def test_a_name_does_not_steer_the_terminal(hf: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(hf, tmp_path / "hf"))
    edit_config(folder, **{"\x1b[2J": "\x07\r\n\ud800"})
    done = inspect(folder)
    assert done.returncode == 0 and r"\x1b[2J" in done.stdout and r"\x07\r\n\ud800" in done.stdout
    assert all(c.isprintable() or c == "\n" for c in done.stdout)


def test_arguments_that_never_end_are_cut(cases: Path, tmp_path: Path) -> None:
    """A list that holds itself fifty times, alone and in a record, and one that is deeper than any argument."""
    loop: list[Any] = []
    loop += [loop] * 50
    deep: list[Any] = []
    for _ in range(200):
        deep = [deep]
    strange = {"direction": loop, "preset": {1: argparse.Namespace(a=loop)}, "kv_channels": deep, "note": deep}
    save = rewrite(cases / "gqa_padded", tmp_path / "strange", **strange)
    for flags in ((), ("--json",), ("--diff", cases / "gqa_padded"), ("--json", "--diff", cases / "gqa_padded")):
        done = inspect(save, *flags)
        assert done.returncode == (1 if "--diff" in flags else 0) and "..." in done.stdout


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def add(path: Path) -> None:
    shutil.copy(path, path.with_stem("__9_0" if path.suffix == ".distcp" else "added"))


DISTCP, SHARD = "__0_0.distcp", "model-00002-of-00003.safetensors"
FAULTS: list[tuple[str, str, Callable[[Path], None], str]] = [
    ("megatron", DISTCP, flip, f"{DISTCP} has changed since it was saved: its SHA-256 is"),
    ("megatron", DISTCP, cut, f"{DISTCP} has "),
    ("megatron", DISTCP, Path.unlink, f"{DISTCP} is missing"),
    ("megatron", DISTCP, add, "__9_0.distcp was not there when the checkpoint was saved"),
    ("megatron", ".metadata", flip, ".metadata has changed since it was saved"),
    ("hf", SHARD, flip, f"{SHARD} has changed since it was written: another SHA-256"),
    ("hf", SHARD, cut, f"{SHARD} is truncated"),
    ("hf", SHARD, Path.unlink, f"{SHARD} cannot be read: No such file or directory"),
    ("hf", SHARD, add, "added.safetensors was not there when the folder was written"),
    ("hf", "tokenizer.json", flip, "tokenizer.json has changed since it was written"),
    ("hf", "config.json", cut, "config.json has changed since it was written"),
    ("hf", "tokenizer_config.json", Path.unlink, "tokenizer_config.json cannot be read"),
]


@pytest.mark.parametrize(("kind", "name", "damage", "words"), FAULTS)
def test_a_fault_is_named_and_gives_status_1(
    kind: str, name: str, damage: Callable[[Path], None], words: str, copied: Callable[[str], Path]
) -> None:
    folder = copied(kind)
    sound = inspect(folder, "--verify")
    assert sound.returncode == 0 and "every tensor can be read, every file is as it was saved" in sound.stdout
    damage(folder / name)
    done = inspect(folder, "--verify")
    assert done.returncode == 1 and "faults\n" in done.stdout and "is as it was saved" not in done.stdout
    assert any(str(folder / "") in line and words in line for line in done.stdout.splitlines()), done.stdout
    as_json = inspect(folder, "--verify", "--json", "--tensors")
    verify = strict_json(as_json)["verify"]
    assert as_json.returncode == 1 and verify["has_checksums"] and any(words in fault for fault in verify["faults"])


def test_a_fault_gives_status_1_also_on_the_command_line(copied: Callable[[str], Path]) -> None:
    folder = copied("megatron")
    flip(folder / DISTCP)
    done = run_tool(TOOL, folder.parent, "--verify")
    assert done.returncode == 1 and f"{DISTCP} has changed since it was saved" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", [".metadata", "metadata.json"])
def test_a_save_without_its_seal_is_refused_even_with_a_list(name: str, copied: Callable[[str], Path]) -> None:
    folder = copied("megatron")
    (folder / name).unlink()
    done = inspect(folder.parent, "--verify")
    assert done.returncode == 2 and f"not a finished checkpoint: {name} is missing" in done.stderr


@pytest.mark.parametrize(("kind", "listing", "damaged"), [("megatron", LIST_NAME, DISTCP), ("hf", "SHA256SUMS", SHARD)])
def test_without_checksums_everything_is_read_and_nothing_is_called_unchanged(
    kind: str, listing: str, damaged: str, copied: Callable[[str], Path]
) -> None:
    folder = copied(kind)
    (folder / listing).unlink()
    done = inspect(folder, "--verify")
    assert done.returncode == 0 and done.stdout.endswith("verify: every tensor can be read\n")
    assert "no checksums were written beside it" in done.stdout
    assert strict_json(inspect(folder, "--json"))["checksums"] is None
    cut(folder / damaged)
    done = inspect(folder, "--verify")
    assert done.returncode == 2 and f"{damaged} is truncated" in done.stderr


def test_a_tensor_that_cannot_be_read_is_a_fault_without_checksums(copied: Callable[[str], Path]) -> None:
    folder = copied("megatron")
    (folder / LIST_NAME).unlink()
    stored = Checkpoint.open(folder).tensors[NORM].chunks[0].stored
    with (folder / DISTCP).open("r+b") as file:
        file.seek(stored.start)
        file.write(bytes(stored.length))
    done = inspect(folder, "--verify", "--json")
    faults = strict_json(done)["verify"]["faults"]
    assert done.returncode == 1 and len(faults) == 1 and f"{NORM} at byte {stored.start} is damaged" in faults[0]


def test_a_data_file_that_must_not_be_read_is_named(
    copied: Callable[[str], Path], cases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where somebody else's files are closed to others; the index is not."""
    folder, path_open = copied("megatron"), Path.open

    def refuse(path: Path, *arguments: Any, **named: Any) -> Any:
        if path == folder / DISTCP:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return path_open(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", refuse)
    done = inspect(folder, "--verify")
    assert done.returncode == 1 and f"{folder / DISTCP} cannot be read" in done.stdout
    done = inspect(folder)
    assert done.returncode == 2 and f"error: {folder / DISTCP} cannot be read: Permission denied" in done.stderr


@pytest.mark.parametrize("kind", ["megatron", "hf"])
def test_a_copy_is_equal(kind: str, copied: Callable[[str], Path], request: pytest.FixtureRequest) -> None:
    original, folder = request.getfixturevalue(kind), copied(kind)
    done = inspect(original, "--diff", folder)
    assert done.returncode == 0 and f"compared with {folder}: equal, bit for bit" in done.stdout
    diff = strict_json(inspect(original, "--diff", folder, "--json"))["diff"]
    assert diff["is_equal"] and len(diff["values"]) == (9 if kind == "megatron" else 21)
    for nothing in ("only_first", "only_second", "shapes", "dtypes", "arguments"):
        assert not diff[nothing]


def test_how_a_tensor_is_cut_makes_no_difference(cases: Path, megatron: Path) -> None:
    """`cases` has two or four chunks where `megatron` has one; the arguments left out of it mean nothing."""
    for pair in ((cases / "gqa_padded", megatron), (megatron, cases / "gqa_padded")):
        done = inspect(pair[0], "--diff", pair[1])
        assert done.returncode == 0 and "tensors equal bit for bit: 9 of 9" in done.stdout


def nudge(name: str, values: torch.Tensor) -> torch.Tensor:
    if name == STACK:
        values[1, 3, 5] += 0.5
    return values


DIFFERENCES: dict[str, tuple[Change, dict[str, Any], str, str]] = {
    # what is changed, arguments that are changed, the section of the JSON, the line of text
    "one weight": (nudge, {}, "values", f"{STACK} 0.5 "),
    "one tensor less": (lambda n, v: None if n == NORM else v, {}, "only_first", f"only in the first: {NORM}"),
    "another dtype": (
        *(lambda n, v: v.bfloat16() if n == NORM else v, {}, "dtypes"),
        f"{NORM}: dtypes float32 and bfloat16",
    ),
    "another shape": (lambda n, v: v[:-1] if n == NORM else v, {}, "shapes", f"{NORM}: shapes [48] and [47]"),
    "an argument of the model": (
        *(lambda n, v: v, {"rotary_base": 500_000}, "arguments"),
        "rotary_base: 10000 | 500000",
    ),
    "the direction": (lambda n, v: v, {"direction": "forward"}, "arguments", "direction: reverse | forward"),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_a_difference_is_named_and_gives_status_1(case: str, megatron: Path, tmp_path: Path) -> None:
    change, arguments, section, line = DIFFERENCES[case]
    other = rewrite(megatron, tmp_path / "other", change, **arguments)
    done = inspect(megatron, "--diff", other)
    lines = [" ".join(each.split()) for each in done.stdout.splitlines()]
    assert done.returncode == 1 and any(each.startswith(line.rstrip()) for each in lines), done.stdout
    assert f"compared with {other / 'iter_0000007'}: DIFFERENT" in lines
    diff = strict_json(inspect(megatron, "--diff", other, "--json"))["diff"]
    name = {"an argument of the model": "rotary_base", "the direction": "direction"}.get(
        case, STACK if case == "one weight" else NORM
    )
    assert not diff["is_equal"] and name in diff[section]
    differing = {key for key, value in diff["values"].items() if not value["bitwise_equal"]}
    assert differing == ({STACK} if case == "one weight" else {NORM} if case == "another dtype" else set())
    if case == "one weight":
        assert diff["values"][STACK]["max_abs_difference"] == pytest.approx(0.5)
        assert 0 < diff["values"][STACK]["relative_frobenius"] < 0.1
    assert strict_json(inspect(other, "--diff", megatron, "--json"))["diff"]["is_equal"] is False


def test_an_argument_without_meaning_is_listed_and_gives_status_0(megatron: Path, tmp_path: Path) -> None:
    changes = {"run_dir": "/elsewhere" + "x" * 80, **{f"my_{i:02d}": i for i in range(50)}}
    other = rewrite(megatron, tmp_path / "other", **changes)
    done = inspect(megatron, "--diff", other)
    assert done.returncode == 0 and "equal, bit for bit" in done.stdout
    assert "arguments that differ: 51" in done.stdout and "my_00: None | 0\n" in done.stdout
    assert "and 11 more (--json lists all)" in done.stdout
    diff = strict_json(inspect(megatron, "--diff", other, "--json"))["diff"]
    assert len(diff["arguments"]) == 51 and diff["arguments"]["run_dir"][1] == "/elsewhere" + "x" * 80


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the first file of a folder, the one of the embedding; of a tensor that is gone, the index too."""
    path = folder / "model-00001-of-00003.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_folders_that_differ(hf: Path, copied: Callable[[str], Path]) -> None:
    folder, name = copied("hf"), "model.embed_tokens.weight"
    original = load_file(hf / "model-00001-of-00003.safetensors")[name]
    change_weights(folder, lambda weights: weights[name][0].add_(2.0))
    done = inspect(hf, "--diff", folder)
    assert done.returncode == 1 and "tensors equal bit for bit: 20 of 21" in done.stdout
    value = strict_json(inspect(hf, "--diff", folder, "--json"))["diff"]["values"][name]
    assert value["max_abs_difference"] == pytest.approx(2.0, rel=1e-6)
    assert value["relative_frobenius"] == pytest.approx(2 * 48**0.5 / original.norm().item(), rel=1e-5)
    change_weights(folder, lambda weights: weights.update({name: original.half()}))
    diff = strict_json(inspect(hf, "--diff", folder, "--json"))["diff"]
    assert diff["dtypes"] == {name: ["float32", "float16"]}
    change_weights(folder, lambda weights: weights.update({name: original}))
    assert inspect(hf, "--diff", folder).returncode == 0
    edit_config(folder, rms_norm_eps=1e-6)
    done = inspect(hf, "--diff", folder)
    assert done.returncode == 1 and "rms_norm_eps: 1e-05 | 1e-06" in done.stdout


def test_a_tensor_with_a_part_missing_is_not_called_equal(megatron: Path, cases: Path, tmp_path: Path) -> None:
    """The index lost one of the chunks of a stack: what is left of it equals the other checkpoint's."""
    import pickle

    damaged = Path(shutil.copytree(cases / "gqa_padded", tmp_path / "damaged"))
    path = damaged / f"iter_{ITERATION:07d}" / ".metadata"
    index = pickle.loads(path.read_bytes())
    index.state_dict_metadata[STACK].chunks.pop()
    path.write_bytes(pickle.dumps(index))
    for pair in ((damaged, megatron), (megatron, damaged)):
        done = inspect(pair[0], "--diff", pair[1])
        assert done.returncode == 2 and f"the chunks of {STACK} hold 3840 of the 7680" in done.stderr
    verified = inspect(damaged, "--verify")
    assert verified.returncode == 1 and f"the chunks of {STACK} hold 3840 of the 7680" in verified.stdout


def test_a_checkpoint_and_a_folder_are_not_compared(megatron: Path, hf: Path) -> None:
    for pair in ((megatron, hf), (hf, megatron)):
        done = inspect(pair[0], "--diff", pair[1])
        assert done.returncode == 2 and done.stdout == ""
        assert "one is a Megatron checkpoint and one a Hugging Face folder" in done.stderr


def test_what_cannot_be_opened_is_refused(megatron: Path, hf: Path, tmp_path: Path) -> None:
    for arguments, words in (
        ((tmp_path / "nowhere",), "no such folder"),
        ((tmp_path,), "holds no checkpoint"),
        ((hf, "--step", 7), "--step 7: "),
        ((megatron, "--diff", tmp_path / "nowhere"), "no such folder"),
    ):
        for flags in ((), ("--json",), ("--verify",)):
            done = inspect(*arguments, *flags)
            assert done.returncode == 2 and done.stdout == ""
            assert done.stderr.startswith("error: ") and words in done.stderr
