"""A Slurm of the tests' own: munged, slurmctld and slurmd on this machine, with their own ports, keys and folders.

One node with pretended CPUs, memory and GPUs, so that jobs of several tasks and the
scripts' own `--gpus-per-node` and `--mem` are accepted; the tasks share the real cores.
A system's Slurm, if there is one, is neither used nor touched.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from megatron_ledom.testing import REPOSITORY, tool_environment

DAEMONS = ("munged", "slurmctld", "slurmd")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}

CONFIGURATION = """\
ClusterName=ledom
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits for as long as a credential lives: two minutes if this is not set, or set to less.
AuthInfo=socket={folder}/munge.sock,cred_expire=10
CryptoType=crypto/munge
SlurmctldPort={controller_port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
MinJobAge=3600
KillWait=5
InactiveLimit=0
JobRequeue=1
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=16 Boards=1 SocketsPerBoard=1 CoresPerSocket=16 ThreadsPerCore=1 \
RealMemory=1000000 Gres=gpu:8 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1 GraceTime=300
PartitionName=urgent Nodes={host} MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=10
"""


def free_port() -> int:
    """A TCP port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class LocalSlurm:
    """A running Slurm; `stop()` ends its daemons by their pid files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = tool_environment({"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH})
        ensured = subprocess.run(
            [REPOSITORY / "scripts/ensure_slurm.sh"], capture_output=True, text=True, check=False, timeout=300
        )
        assert ensured.returncode == 0, f"the tests of examples/slurm need a Slurm:\n{ensured.stderr}"
        self._write_files()
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _write_files(self) -> None:
        for name in ("state", "spool", "munge"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "munge").chmod(0o700)
        key = self.folder / "munge/key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        text = CONFIGURATION.format(
            host=socket.gethostname().split(".")[0],
            folder=self.folder,
            controller_port=free_port(),
            node_port=free_port(),
        )
        (self.folder / "slurm.conf").write_text(text, encoding="utf-8")
        for index in range(8):  # Slurm wants a file for each GPU; nothing constrains access to it
            (self.folder / f"gpu{index}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n", encoding="utf-8")

    def _start(self) -> None:
        munge = self.folder / "munge"
        own = {"key-file": munge / "key", "socket": self.folder / "munge.sock", "seed-file": munge / "seed"}
        own |= {"pid-file": self.folder / "munged.pid", "log-file": munge / "log"}
        self.call("munged", "--force", *(f"--{name}={path}" for name, path in own.items()))
        self.call("slurmctld", "-f", self.folder / "slurm.conf")
        self.call("slurmd", "-f", self.folder / "slurm.conf")
        deadline = time.monotonic() + 60
        while (state := self.call("sinfo", "--noheader", "--format=%T", is_checked=False).strip()) != "idle":
            assert time.monotonic() < deadline, f"the node is {state!r}, not idle:\n{self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        """The ends of the daemons' logs, for a message."""
        texts = [(self.folder / f"{name}.log", name) for name in ("slurmctld", "slurmd")]
        return "\n".join(f"{name}: {path.read_text()[-2000:]}" for path, name in texts if path.exists())

    def stop(self) -> None:
        """End what still runs in jobs, then the daemons, the last one started first, and wait until they are gone."""
        self.call("scancel", "--user=root", is_checked=False)
        deadline = time.monotonic() + 30
        while self.call("squeue", "--noheader", is_checked=False).strip() and time.monotonic() < deadline:
            time.sleep(0.2)
        for name in sorted(DAEMONS, key=DAEMONS.index, reverse=True):
            path = self.folder / f"{name}.pid"
            if not path.is_file():
                continue
            process = int(path.read_text())
            try:
                os.kill(process, signal.SIGTERM)
                for _ in range(100):
                    os.kill(process, 0)
                    time.sleep(0.1)
            except ProcessLookupError:
                continue
            os.kill(process, signal.SIGKILL)

    def call(self, *words: object, env: Mapping[str, str] | None = None, is_checked: bool = True) -> str:
        """Run a program of Slurm and return its standard output."""
        done = subprocess.run(
            [*map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={**self.environment, **(env or {})},
            cwd=REPOSITORY,
        )
        if is_checked:
            assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(
        self, script: Path | str, *arguments: object, options: tuple[object, ...] = (), env: Mapping[str, str]
    ) -> int:
        """Submit a script of the repository and return the job's number."""
        answer = self.call("sbatch", "--parsable", *options, script, *arguments, env=env)
        return int(answer.split(";")[0])

    def field(self, job: int, name: str) -> str:
        """A field of `scontrol show job`, of the first task where the job is an array; "" where it has none."""
        shown = self.call("scontrol", "show", "job", "--oneliner", job)
        match = re.search(rf"\b{name}=(\S*)", shown)
        return match[1] if match else ""

    def states(self, job: int) -> list[str]:
        """The state of the job, or of each task of an array."""
        return re.findall(r"\bJobState=(\S+)", self.call("scontrol", "show", "job", "--oneliner", job))

    def start_now(self, job: int) -> None:
        """Start a requeued job soon; Slurm would wait until the credential of its last start has expired.

        The two seconds matter: a credential made in the second in which the old one was revoked counts as
        revoked, and the job fails with "Job credential revoked" without having run.
        """
        time.sleep(2)
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now", is_checked=False)

    def wait(self, job: int, timeout_s: float = 900) -> list[str]:
        """Wait until the job (every task of an array) has ended, through requeues, and return the states."""
        deadline = time.monotonic() + timeout_s
        while not ENDED.issuperset(states := self.states(job)):
            assert time.monotonic() < deadline, f"job {job} is {states}\n{self.logs()}"
            if "PENDING" in states and self.field(job, "Restarts") != "0":
                self.start_now(job)
            time.sleep(0.2)
        return states
