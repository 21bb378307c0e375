"""The health of this node's GPUs as the driver reports it, and whether Transformer Engine and FP8 work on them."""

from __future__ import annotations

import csv
import importlib
import importlib.metadata
import io
import subprocess
from collections.abc import Sequence

from megatron_ledom.cluster.findings import Finding, Level

QUERY_TIMEOUT_S = 20
MOST_USED_MIB = 2048.0
NOTED = ("name", "driver_version", "temperature.gpu", "memory.used")
FAULTS: dict[str, tuple[tuple[str, ...], str]] = {
    # Field of `nvidia-smi --query-gpu` -> the good values in lower case, and what any other means.
    "ecc.errors.uncorrected.volatile.total": (("0",), "uncorrected memory errors since the last reset"),
    "remapped_rows.failure": (("no", "0"), "a memory row could not be remapped: the GPU has to be replaced"),
    "remapped_rows.pending": (("no", "0"), "a memory row waits to be remapped: the GPU needs a reset"),
    "clocks_throttle_reasons.hw_thermal_slowdown": (("not active",), "clocks halved because it is too hot"),
    "clocks_throttle_reasons.hw_power_brake_slowdown": (("not active",), "clocks halved by the power supply"),
    "compute_mode": (("default",), "it does not take several processes: nvidia-smi -c DEFAULT"),
}
NOT_KNOWN = {"[n/a]", "n/a", "[not supported]", ""}


def query(fields: Sequence[str]) -> list[dict[str, str]]:
    """Ask nvidia-smi: one dictionary a GPU.

    Raises:
        OSError, subprocess.SubprocessError: there is none, it fails (an unknown field, a lost GPU), or hangs.
    """
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=QUERY_TIMEOUT_S)
    return parse(fields, done.stdout)


def parse(fields: Sequence[str], answer: str) -> list[dict[str, str]]:
    """Read nvidia-smi's CSV."""
    rows = csv.reader(io.StringIO(answer), skipinitialspace=True)
    return [dict(zip(fields, map(str.strip, row), strict=True)) for row in rows if row]


def check_health(node: str) -> list[Finding]:
    """What the driver says of this node's GPUs; call it on one rank of a node."""
    try:
        gpus = query(NOTED)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stdout", None) or str(error)).strip()
        return [Finding("GPU health", Level.BAD, f"nvidia-smi does not answer: {said[:200]}", node)]
    values: dict[str, list[str]] = {}
    for field in FAULTS:
        try:
            values[field] = [gpu[field] for gpu in query([field])]
        except (OSError, subprocess.SubprocessError):  # a driver that does not know the field
            values[field] = []
    return judge_health(node, gpus, values)


def judge_health(node: str, gpus: Sequence[dict[str, str]], values: dict[str, list[str]]) -> list[Finding]:
    """Turn what the driver said into findings.

    Args:
        node: this node.
        gpus: `NOTED` of each GPU.
        values: for each field of `FAULTS` one value a GPU; none where the driver does not know the field.
    """
    findings, unknown = [], []
    for index, gpu in enumerate(gpus):
        used = gpu["memory.used"]
        if used.replace(".", "", 1).isdigit() and float(used) > MOST_USED_MIB:
            text = f"GPU {index}: {used} MiB in use before the job, so another process is on it"
            findings.append(Finding("GPU health", Level.BAD, text, node))
    for field, (good, meaning) in FAULTS.items():
        known = {i: v for i, v in enumerate(values[field]) if v.lower() not in NOT_KNOWN}
        if not known:
            unknown.append(field)
        for index, value in known.items():
            if value.lower() not in good:
                text = f"GPU {index}: {field} is {value}: {meaning}"
                findings.append(Finding("GPU health", Level.BAD, text, node))
    if not findings:
        hottest = max(gpu["temperature.gpu"] for gpu in gpus)
        text = f"{len(gpus)} x {gpus[0]['name']}, driver {gpus[0]['driver_version']}, {hottest} C at most; no fault"
        findings.append(Finding("GPU health", Level.OK, text, node))
    if unknown:
        text = f"{', '.join(unknown)}: not known to this driver or GPU"
        findings.append(Finding("GPU health", Level.UNKNOWN, text, node))
    return findings


def check_transformer_engine(node: str) -> list[Finding]:
    """Run one linear layer of Transformer Engine forward and backward in bf16, and in FP8 where the GPU has it."""
    import torch

    try:
        te = importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        text = f"cannot be imported ({reason}): training takes Megatron's local layers, without FP8"
        return [Finding("Transformer Engine", Level.NOTE, text, node)]
    layer = te.Linear(256, 256, bias=False, params_dtype=torch.bfloat16, device="cuda")
    given = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    try:
        layer(given).sum().backward()
        torch.cuda.synchronize()
    except RuntimeError as error:
        return [Finding("Transformer Engine", Level.BAD, f"a linear layer fails: {str(error)[:200]}", node)]
    version = importlib.metadata.version("transformer-engine")
    findings = [Finding("Transformer Engine", Level.OK, f"{version}: a linear layer ran forward and backward in bf16")]
    if torch.cuda.get_device_capability() < (8, 9):
        return [*findings, Finding("FP8", Level.NOTE, "this GPU has none (compute capability below 8.9)")]
    try:
        with te.fp8_autocast(enabled=True):
            layer(given).sum().backward()
        torch.cuda.synchronize()
    except (RuntimeError, AssertionError, ValueError, AttributeError) as error:
        return [
            *findings,
            Finding("FP8", Level.NOTE, f"the layer fails, as --fp8-format would: {str(error)[:200]}", node),
        ]
    return [*findings, Finding("FP8", Level.OK, "the layer ran forward and backward")]
