"""The story of a preflight: ranks look at themselves and their connections, rank 0 judges and looks at the run.

    health, limits, versions -> speed alone -> exchange -> collectives -> compare -> data, disk, configuration

It starts nothing and changes nothing but a probe file in the run directory, which it removes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ledom.cluster.findings import (
    Finding,
    Level,
    Measurement,
    bad_nodes,
    check_least,
    compare_with_peers,
    exit_status,
    name_differing,
)
from megatron_ledom.cluster.gpus import check_health, check_transformer_engine
from megatron_ledom.cluster.speed import measure_alone, measure_collectives
from megatron_ledom.cluster.storage import check_free_space, check_limits, measure_write
from megatron_ledom.cluster.together import Place, Team
from megatron_ledom.engine.device import resolve_device
from megatron_ledom.errors import LedomError

VERSIONS = ("torch", "megatron-core", "transformer-engine", "transformers", "megatron-ledom")
CHIP = {"GEMM", "memory"}  # these vary less between nodes than connections do
MOST_CLOCK_SKEW_S = 5.0
WRITE = "write to the run directory"


@dataclass(frozen=True)
class Options:
    """What to check.

    Attributes:
        device: auto, cpu or cuda.
        training: the flags that tools/pretrain.py will get; empty: the run is not looked at.
        tolerance: share by which a node may fall behind its peers; None: 0.1 on CUDA, 0.5 on the CPU.
        min_gemm_tflops: least speed of the matrix product, or None.
        timeout_s: for everything.
    """

    device: str = "auto"
    training: Sequence[str] = ()
    tolerance: float | None = None
    min_gemm_tflops: float | None = None
    timeout_s: float = 58.0


@dataclass
class Seen:
    """What one rank found out about itself."""

    node: str
    has_device: bool = True
    versions: str = ""
    data: str = ""
    clock_s: float = 0.0
    findings: list[Finding] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)


def run_preflight(options: Options, exclude_file: Path | None = None) -> int:
    """Check, print the report on rank 0, and return the exit status (`findings.exit_status`; 0 on other ranks).

    Args:
        options: what to check.
        exclude_file: gets the names of bad nodes, separated by commas; is removed where there are none.
    """
    place = Place.of_this_process()
    started = time.monotonic()

    def report_timeout(findings: list[Finding]) -> int:
        text = f"not finished within {options.timeout_s:g} s"
        return report([Finding("time", Level.UNKNOWN, text), *findings], place, started, exclude_file) or 2

    team = Team(place, options.timeout_s)
    team.watch(report_timeout)
    seen = look_at_self(options, place, team)
    team.reach("exchange")
    team.join()
    everyone: list[Seen] = team.gather(seen)
    team.reach("collectives")
    findings = [finding for each in everyone for finding in each.findings]
    measured = [m for each in everyone for m in each.measurements]
    if place.world_size > 1 and all(each.has_device for each in everyone):
        nodes = [each.node for each in everyone]
        for found in team.gather(measure_collectives(nodes, place.rank, device_of(seen, options))):
            measured += found
    elif place.world_size == 1:
        findings.append(
            Finding("collectives", Level.UNKNOWN, "one process: start it with srun or torchrun on all nodes")
        )
    team.reach("end")
    if place.rank != 0:
        return 0
    findings += judge(options, everyone, measured, device_of(seen, options)) + look_at_run(options)
    return report(findings, place, started, exclude_file)


def device_of(seen: Seen, options: Options) -> str:
    """The device of the measurements: what was asked for, or what is there."""
    return "cpu" if options.device == "cpu" or not seen.has_device else resolve_device(options.device)


def look_at_self(options: Options, place: Place, team: Team) -> Seen:
    """What this rank can find out without the others."""
    seen = Seen(place.node, versions=describe_versions())
    is_first = place.local_rank == 0
    team.reach("health")
    try:
        device = resolve_device(options.device)
    except LedomError as error:
        seen.has_device = False
        seen.findings.append(Finding("GPU", Level.BAD, str(error), place.node))
        return seen
    if device == "cuda":
        import torch

        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
        if is_first:
            seen.findings += check_health(place.node) + check_transformer_engine(place.node)
    elif place.rank == 0:
        text = (
            "no CUDA device in use: GPU health, Transformer Engine, FP8, NCCL and the speed of GPUs were not looked at"
        )
        seen.findings.append(Finding("GPUs", Level.UNKNOWN, text))
    if is_first:
        seen.findings += check_limits(place.node)
        run, prefixes = run_and_data(options.training)
        seen.data = describe_files(prefixes)
        if run is not None:
            try:
                run.mkdir(parents=True, exist_ok=True)
                seen.measurements.append(measure_write(run, place.node))
            except OSError as error:
                seen.findings.append(Finding(WRITE, Level.BAD, f"{run}: {error.strerror}", place.node))
    team.reach("alone")
    seen.measurements += measure_alone(place.node, device)
    seen.clock_s = time.time()
    return seen


def describe_versions() -> str:
    """Python, packages and CUDA of this rank, in one line."""
    import torch

    found = [f"python {platform.python_version()}"]
    for package in VERSIONS:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {package}")
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "not in use"
    return ", ".join([*found, f"CUDA {torch.version.cuda}, NCCL {nccl}"])


def run_and_data(training: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The run directory and the data prefixes that training flags name, without Megatron's parser."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--data-path", nargs="*", default=[])
    known, _ = parser.parse_known_args(list(training))
    words = known.data_path
    return known.run_dir, words if len(words) == 1 else words[1::2]


def describe_files(prefixes: Iterable[str]) -> str:
    """What this node sees of the data: bytes, or what is missing."""
    paths = [Path(f"{prefix}{suffix}") for prefix in prefixes for suffix in (".bin", ".idx")]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        return f"not there: {', '.join(missing)}"
    return f"{len(paths)} files of {sum(path.stat().st_size for path in paths):,} bytes"


def judge(options: Options, everyone: Sequence[Seen], measured: Sequence[Measurement], device: str) -> list[Finding]:
    """Compare the ranks with each other."""
    tolerance = options.tolerance if options.tolerance is not None else {"cuda": 0.1, "cpu": 0.5}[device]
    findings = name_differing("versions", [(each.node, each.versions) for each in everyone])
    firsts = [(each.node, each.data) for each in everyone if each.data]
    if run_and_data(options.training)[1]:
        findings += name_differing("data files", firsts)
    skew = max(each.clock_s for each in everyone) - min(each.clock_s for each in everyone)
    if skew > MOST_CLOCK_SKEW_S:
        findings.append(
            Finding("clocks", Level.NOTE, f"{skew:.1f} s between the first rank and the last to finish this")
        )
    findings += check_least(measured, "GEMM", options.min_gemm_tflops)
    findings += compare_with_peers([m for m in measured if m.check in CHIP], tolerance)
    connections = [m for m in measured if m.check not in CHIP | {WRITE}]
    findings += compare_with_peers(connections, min(2.5 * tolerance, 0.75))
    written = [m.value for m in measured if m.check == WRITE]
    if written:
        findings.append(Finding(WRITE, Level.OK, f"{min(written):,.0f} MB/s or more from every node, all at once"))
    return findings


def look_at_run(options: Options) -> list[Finding]:
    """Data, manifest, tokenizer, checkpoint, disk and arguments of the run, by the checks that the run itself makes."""
    if not options.training:
        return [Finding("run", Level.UNKNOWN, "no training flags given (after --): data, disk, configuration")]
    from megatron_ledom.engine import cpu
    from megatron_ledom.engine.arguments import parse_arguments
    from megatron_ledom.engine.validation import validate_arguments
    from megatron_ledom.train.guards import check_run
    from megatron_ledom.train.resume import prefer_own
    from megatron_ledom.train.starting_point import model_from_checkpoint

    device = resolve_device(options.device)
    if device == "cpu":
        cpu.install()
    findings = []
    try:
        training, _ = prefer_own(options.training)
        args = parse_arguments(training, device, model_from_checkpoint(training))
        args.verify_checkpoint = False  # one rank hashes 100 GB for minutes; all ranks of the run do it in shares
        facts = check_run(args)
        documents = sum(dataset.num_documents for dataset in facts.datasets.values())
        text = (
            f"{len(facts.datasets)} datasets, {documents:,} documents: whole, of this tokenizer; {args.direction} model"
        )
        findings.append(Finding("data", Level.OK, text))
        if facts.checkpoints:
            text = ", ".join(f"{flag} at step {c.iteration}" for flag, c in facts.checkpoints.items())
            findings.append(Finding("checkpoint", Level.OK, f"{text}; the run itself compares its checksums"))
        findings.append(check_free_space(Path(args.run_dir), args.preset))
        with contextlib.redirect_stdout(io.StringIO()):  # Megatron prints every argument
            validate_arguments(args)
        sizes = (args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.data_parallel_size)
        text = "TP {} x PP {} x DP {}; Megatron's validation passes".format(*sizes)
        findings.append(Finding("configuration", Level.OK, text))
    except LedomError as error:
        findings.append(Finding("run", Level.BAD, str(error)))
    return findings


def report(findings: Sequence[Finding], place: Place, started: float, exclude_file: Path | None) -> int:
    """Print all findings, the worst last, and what follows; return the exit status."""
    order = [Level.OK, Level.UNKNOWN, Level.NOTE, Level.BAD]
    for finding in sorted(findings, key=lambda f: order.index(f.level)):
        print(finding.line())
    nodes, status = bad_nodes(findings), exit_status(findings)
    seconds = time.monotonic() - started
    verdict = {0: "nothing speaks against starting", 2: "do not start: see above", 3: "start without the bad nodes"}[
        status
    ]
    print(f"preflight of {place.world_size} ranks in {seconds:.0f} s: {verdict}")
    if nodes:
        print(f"--exclude={','.join(nodes)}", flush=True)
    if exclude_file is not None:
        exclude_file.parent.mkdir(parents=True, exist_ok=True)
        exclude_file.unlink(missing_ok=True)
        if nodes:
            exclude_file.write_text(",".join(nodes) + "\n", encoding="utf-8")
    return status
