"""A real SLURM for a test: munged, one slurmctld and two slurmd on this machine, their files in a folder of the test.

Debian's packages slurm-wlm and munge have the programs; where they are absent, `slurm_is_missing()` says so.  There is
no accounting: ask `squeue` and `scontrol`.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")
NODES = ("n1", "n2")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def slurm_is_missing() -> str:
    """What a real SLURM lacks here, for a skipped test; "" if nothing."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if absent:
        return f"no {', '.join(absent)} (Debian: apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "slurmd starts jobs as root only"


class Slurm:
    """A running SLURM."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": _PATH,
        }

    def run(self, *command: object, **options: object) -> str:
        """Standard output of a client program, which has to succeed."""
        done = subprocess.run(
            [str(word) for word in command],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            **options,  # type: ignore[call-overload]
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{self.logs()}"
        return str(done.stdout)

    def submit(self, *arguments: object, cwd: Path) -> int:
        """`sbatch --parsable arguments`: the number of the job."""
        return int(self.run("sbatch", "--parsable", *arguments, cwd=cwd).strip().partition(";")[0])

    def waiting(self) -> list[str]:
        """Lines "job state reason" of what waits or runs; array tasks one by one ("7_0 RUNNING None")."""
        return self.run("squeue", "--noheader", "--array", "--format=%i %T %r").splitlines()

    def tasks(self, job: int) -> dict[str, dict[str, str]]:
        """{number of an array task: fields of `scontrol show job`}, as long as the controller remembers the job."""
        found = {}
        for line in self.run("scontrol", "--oneliner", "show", "job", job).splitlines():
            fields = dict(re.findall(r"(\S+?)=(\S*)", line))
            found[fields.get("ArrayTaskId", "0")] = fields
        return found

    def requeue(self, task: str) -> None:
        """Kill a running task, "7_0", and let it begin again at once; SLURM alone would wait for two minutes."""
        self.run("scontrol", "requeue", task)
        self.until(lambda: any(line.startswith(f"{task} PENDING") for line in self.waiting()))
        self.run("scontrol", "update", f"JobId={task}", "StartTime=now")

    def requeue_after_grace(self, job: str) -> None:
        """`scontrol requeue`: the controller sends SIGTERM, waits for KillWait seconds, kills, and queues again."""
        self.run("scontrol", "requeue", job)

    def until(self, what: Callable[[], object], seconds: float = 60) -> None:
        """Wait until `what()` is true; the daemons' logs if that does not come."""
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, f"nothing came: {self.waiting()}\n{self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        """The ends of what the daemons say."""
        return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(self.folder.glob("*.log")))


@contextmanager
def running_slurm(folder: Path, *, kill_wait: int = 2) -> Iterator[Slurm]:
    """Start the daemons, their files in `folder` (made), and end them and their jobs.

    kill_wait: seconds that a job which is cancelled or queued again has between SIGTERM and SIGKILL.
    """
    folder.mkdir(parents=True)
    slurm = Slurm(folder)
    ports = _free_ports(1 + len(NODES))
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o600)
    (folder / "slurm.conf").write_text(_configuration(folder, ports, kill_wait))
    for name in ("state", *NODES):
        (folder / name).mkdir()
    daemons: list[subprocess.Popen[bytes]] = []

    def start(name: str, *command: object) -> None:
        with open(folder / f"{name}.out.log", "wb") as log:
            words = [str(word) for word in command]
            daemons.append(subprocess.Popen(words, env=slurm.environment, stdout=log, stderr=log))

    try:
        files = {name: folder / f"munged.{name}" for name in ("pid", "seed")}
        # --force: as root, and in a folder that others could enter
        start(
            "munged",
            *("munged", "--foreground", "--force", f"--socket={folder / 'munge.socket'}"),
            *(f"--key-file={folder / 'munge.key'}", f"--pid-file={files['pid']}", f"--seed-file={files['seed']}"),
        )
        slurm.until((folder / "munge.socket").exists)
        start("slurmctld", "slurmctld", "-D", "-c")
        for node in NODES:
            start(node, "slurmd", "-D", "-c", "-N", node)
        slurm.until(lambda: _idle(slurm))
        yield slurm
    finally:
        if len(daemons) > 1:
            kill = ["scancel", "--user=root", "--full", "--signal=KILL"]
            subprocess.run(kill, env=slurm.environment, check=False, timeout=20)
            _let_jobs_end(slurm)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(daemons):
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _let_jobs_end(slurm: Slurm, seconds: float = 20) -> None:
    """Wait until no job is left: what a node's daemon has started would outlive it, and wait for it for ever."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = subprocess.run(
            ["squeue", "--noheader"], env=slurm.environment, capture_output=True, text=True, check=False
        )
        if found.returncode or not found.stdout.strip():
            return
        time.sleep(0.1)


def _idle(slurm: Slurm) -> bool:
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%T"],
        env=slurm.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.split() == ["idle"] * len(NODES)


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _configuration(folder: Path, ports: list[int], kill_wait: int) -> str:
    processors = max(2, os.cpu_count() or 1)
    lines = [
        "ClusterName=test",
        "SlurmctldHost=localhost",
        f"SlurmctldPort={ports[0]}",
        "SlurmUser=root",
        "SlurmdUser=root",
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder / 'munge.socket'}",
        "CredType=cred/munge",
        f"StateSaveLocation={folder / 'state'}",
        f"SlurmdSpoolDir={folder}/%n",
        f"SlurmctldPidFile={folder / 'slurmctld.pid'}",
        f"SlurmdPidFile={folder}/%n.pid",
        f"SlurmctldLogFile={folder / 'slurmctld.log'}",
        f"SlurmdLogFile={folder}/%n.log",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SwitchType=switch/none",
        "MpiDefault=none",
        "JobAcctGatherType=jobacct_gather/none",
        "AccountingStorageType=accounting_storage/none",
        "SchedulerType=sched/backfill",
        "SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,requeue_delay=0",
        "SelectType=select/linear",
        "ReturnToService=2",
        f"KillWait={kill_wait}",
        "MinJobAge=600",
    ]
    for node, port in zip(NODES, ports[1:], strict=True):
        lines.append(
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={processors} RealMemory=4000 "
            "State=UNKNOWN"
        )
    lines.append(f"PartitionName=all Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP")
    return "\n".join(lines) + "\n"
