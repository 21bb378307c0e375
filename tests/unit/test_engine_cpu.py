"""The CPU engine: patches only when asked, all of them taken back, and one only on a CUDA run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_ledom.engine.adam import TorchAdam
from megatron_ledom.engine.device import resolve_device
from megatron_ledom.errors import UsageError
from megatron_ledom.testing import tool_environment

SNAPSHOT = """
import importlib, pkgutil
import torch, torch._dynamo
import megatron.core, megatron.training.training
import megatron.core.datasets.utils, megatron.core.tensor_parallel.random
import megatron.core.optimizer.distrib_optimizer
import megatron_ledom

WATCHED = [torch, torch.cuda, torch.cuda.random, torch.cuda.nvtx, torch.Tensor, torch.nn.Module,
           megatron.core.optimizer, megatron.core.optimizer.distrib_optimizer, megatron.training.training,
           megatron.core.datasets.utils, megatron.core.tensor_parallel.random]

def snapshot():
    # modules that are imported lazily show up as new attributes of their package: they are no patches
    return [{k: id(v) for k, v in vars(o).items() if type(v).__name__ != "module" and k != "_is_in_bad_fork"}
            for o in WATCHED]

def changed(before, after):
    return sorted({f"{getattr(o, '__name__', o)}.{k}" for o, b, a in zip(WATCHED, before, after)
                   for k in b.keys() | a.keys() if b.get(k) != a.get(k)})
"""


def run_script(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SNAPSHOT + script], capture_output=True, text=True, env=tool_environment(), check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_importing_patches_nothing_and_restore_takes_everything_back() -> None:
    out = run_script("""
before = snapshot()
for module in pkgutil.walk_packages(megatron_ledom.__path__, "megatron_ledom."):
    importlib.import_module(module.name)
assert changed(before, snapshot()) == [], changed(before, snapshot())

from megatron_ledom.engine import cpu
cpu.install()
patched = changed(before, snapshot())
assert cpu.is_installed() and len(patched) > 50, patched
again = snapshot()
cpu.install()
assert changed(again, snapshot()) == [], "a second install must do nothing"
assert torch.zeros(2, device="cuda").device.type == "cpu"
cpu.restore()
assert not cpu.is_installed()
assert changed(before, snapshot()) == [], changed(before, snapshot())
print(len(patched), "patched and taken back")
""")
    assert "patched and taken back" in out


def test_other_libraries_work_beside_the_engine(tmp_path: Path, tokenizer_folder: Path) -> None:
    from random_models import save_random_model

    folder = save_random_model(tmp_path / "model", tokenizer_folder, "reverse")
    out = run_script(f"""
from megatron_ledom.engine import cpu
cpu.install()
with torch.device("meta"):
    assert torch.zeros(2).device.type == "meta", "torch.device as a context no longer works"
from transformers import AutoModelForCausalLM
ids = torch.arange(40)[None]
patched = AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype=torch.float32)(ids).logits
cpu.restore()
plain = AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype=torch.float32)(ids).logits
assert torch.equal(patched, plain), (patched - plain).abs().max()
print("equal")
""")
    assert "equal" in out


def test_a_cuda_run_has_only_the_patches_of_every_device(tmp_path: Path) -> None:
    # torch is told that there is a GPU; the run then goes as far as it can without one.
    out = run_script(f"""
before = snapshot()
original = torch.cuda.is_available
torch.cuda.is_available = lambda: True
from megatron_ledom.engine import cpu
from megatron_ledom.train import pretrain
argv = ["--preset", "tiny", "--run-dir", {str(tmp_path)!r}, "--mock-data", "--tokenizer-type", "NullTokenizer",
        "--vocab-size", "500", "--transformer-impl", "local", "--no-persist-layer-norm",
        "--no-gradient-accumulation-fusion"]
import sys; sys.argv = ["pretrain.py"]
try:
    pretrain.main(argv)
except Exception as error:
    print("stopped by", type(error).__name__, str(error)[:200])
torch.cuda.is_available = original
assert not cpu.is_installed()
found = [name for name in changed(before, snapshot()) if not name.endswith("._TRAIN_START_TIME")]  # pretrain()'s clock
adam = ("optimizer.Adam", "optimizer.USING_PYTORCH_OPTIMIZER", "optimizer.distrib_optimizer.Adam",
        "optimizer.distrib_optimizer.HAVE_APEX_OR_TE", "optimizer.distrib_optimizer.USING_APEX_OPTIMIZER")
rest = [name for name in found if name.removeprefix("megatron.core.") not in adam]  # where Apex is, Adam is Apex's
assert rest == ["megatron.core.datasets.utils.compile_helpers", "megatron.training.training.train_step"], found
from megatron.core.datasets.utils import compile_helpers
compile_helpers()  # Megatron's own would end the process: there is no Makefile in its wheel
from megatron.training import get_args
print("backend", get_args().distributed_backend, "device", get_args().device)
""")
    assert "stopped by" in out, "without a GPU it cannot have trained"
    assert "backend nccl device cuda" in out


def test_cuda_asked_for_without_a_gpu_is_refused() -> None:
    if torch.cuda.is_available():
        assert resolve_device("cuda") == "cuda"
        return
    assert resolve_device("auto") == "cpu"
    with pytest.raises(UsageError, match=r"--device cuda.*--device cpu"):
        resolve_device("cuda")


def train_steps(optimizer_class: type, steps: int, **settings: object) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(7, 5))
    optimizer = optimizer_class([weight], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, **settings)
    for _ in range(steps):
        weight.grad = torch.randn(7, 5)
        optimizer.step()
    return weight.detach(), optimizer


def test_torch_adam_is_torch_adamw() -> None:
    ours, optimizer = train_steps(TorchAdam, 10)
    theirs, _ = train_steps(torch.optim.AdamW, 10)
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    assert optimizer.param_groups[0]["step"] == 10, "one step count, in the group, where Megatron looks for it"


def test_torch_adam_continues_from_its_state() -> None:
    whole, _ = train_steps(TorchAdam, 6)
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(7, 5))
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = TorchAdam([weight], **settings)
    for step in range(6):
        if step == 3:
            state = optimizer.state_dict()
            optimizer = TorchAdam([weight], **settings)
            optimizer.load_state_dict(state)
        weight.grad = torch.randn(7, 5)
        optimizer.step()
    assert torch.equal(weight, whole)


@pytest.mark.parametrize("setting", [{"adam_w_mode": False}, {"capturable": True}])
def test_torch_adam_refuses_what_it_cannot_do(setting: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match="without Transformer Engine"):
        TorchAdam([torch.nn.Parameter(torch.zeros(1))], **setting)


def test_the_large_presets_pass_megatrons_own_validation_at_64_ranks() -> None:
    out = run_script("""
import contextlib, io, os, sys
from megatron_ledom.engine import cpu
from megatron_ledom.engine.arguments import parse_arguments, set_megatron_arguments
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
from megatron.training import global_vars
cpu.install()
os.environ["WORLD_SIZE"] = "64"
sys.argv = ["pretrain.py"]
for preset in ("2b", "7b"):
    argv = ["--preset", preset, "--run-dir", "RUN", "--mock-data", "--tokenizer-type", "NullTokenizer",
            "--vocab-size", "64256", "--tensorboard-dir", ""]
    with contextlib.redirect_stdout(io.StringIO()):
        parse_arguments(argv, "cpu")
        args = set_megatron_arguments(argv, "cpu")
    print(preset, args.data_parallel_size, args.params_dtype, args.padded_vocab_size)
    global_vars.destroy_global_vars()
    destroy_num_microbatches_calculator()
""")
    answers = [line for line in out.splitlines() if line.startswith(("2b ", "7b "))]
    assert answers == ["2b 64 torch.bfloat16 64256", "7b 32 torch.bfloat16 64256"]
