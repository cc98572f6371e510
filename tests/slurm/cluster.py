"""A real Slurm: munged, slurmctld and one slurmd a node, as the user who runs the test.

The nodes are on loopback, or machines of their own (machines.py) with an address and a name each.

Everything lives in one folder with its own key, sockets, ports and state, so a cluster that
this machine may belong to is neither used nor disturbed. Needs Debian's slurm-wlm and munge.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from machines import Machines

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
PACKAGES = ("slurm-wlm", "munge")
SEARCH_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

CONFIG = """\
ClusterName=loopback
SlurmctldHost={host}({address})
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# cred_expire (at least 5) is also how long a requeued job waits before it may start again
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=12
SlurmdTimeout={lost_seconds}
PropagateResourceLimits=NONE
{node_lines}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE OverSubscribe=FORCE:4 State=UP
"""


def missing() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCH_PATH) is None]


def install() -> str | None:
    """Install Slurm if it is not there; returns the reason when that is not possible."""
    if not missing():
        return None
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return f"Slurm is not installed ({', '.join(missing())}), and installing it needs root and apt-get"
    options = ["-y", "-q", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=120"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    said = ""
    for command in (["apt-get", "install", *options, *PACKAGES], ["apt-get", "update", "-q"],
                    ["apt-get", "install", *options, *PACKAGES]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=400)
        said = (done.stderr or done.stdout).strip()
        if not missing():
            return None
    return f"Slurm is not installed and apt-get could not install it: {said.splitlines()[-1] if said else 'no output'}"


def free_ports(count: int) -> list[int]:
    """Consecutive free ports below those the kernel hands out by itself."""
    for first in range(20000 + os.getpid() % 5000, 32000, count):
        ports = list(range(first, first + count))
        if all(_is_free(port) for port in ports):
            return ports
    raise RuntimeError("no free ports between 20000 and 32000")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _program(name: str) -> str:
    return shutil.which(name, path=SEARCH_PATH) or name


class Cluster:
    """Started by `start`, ended by `stop`; in between it takes jobs."""

    def __init__(self, folder: Path, nodes: int = 1, machines: Machines | None = None):
        """machines: where the daemons run, started already; without, on loopback."""
        self.folder, self.machines = folder, machines
        self.nodes = machines.names if machines else [f"node{n + 1}" for n in range(nodes)]
        self.environment = {**os.environ, "PATH": SEARCH_PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        self.folder.chmod(0o755)  # munged wants its socket to be reachable by everybody
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        (self.folder / "slurm.conf").write_text(self._configuration())
        files = [f"--{name}={self.folder / ('munge.' + end)}" for name, end in (
            ("key-file", "key"), ("socket", "socket"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"))]
        self._daemon("munged", "--foreground", "--force", "--num-threads=2", *files)
        self._wait(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D", "-c")
        for node in self.nodes:
            self.start_node(node)
        self.wait_for_nodes(self.nodes)

    def start_node(self, node: str) -> None:
        if self.machines:
            self.machines.start_node(node, [_program("slurmd"), "-D", "-N", node], self.environment,
                                     self.folder / f"{node}.out.log")
        else:
            self._daemon("slurmd", "-D", "-N", node)

    def wait_for_nodes(self, nodes: list[str], state: str = "State=IDLE ") -> None:
        self._wait(lambda: all(f"NodeName={node} " in (text := self.ask("scontrol", "show", "node", node, "-o"))
                               and state in text for node in nodes), f"nodes {nodes}")

    def _configuration(self) -> str:
        host = socket.gethostname().split(".")[0]
        ports = free_ports(1 + len(self.nodes))
        if self.machines:
            address = self.machines.head_address
            lines = [f"NodeName={node} NodeHostname={node} NodeAddr={self.machines.address(node)} Port={ports[1]}"
                     for node in self.nodes]
        else:
            address = "127.0.0.1"
            lines = [f"NodeName=node[1-{len(self.nodes)}] NodeHostname={host} NodeAddr={address} "
                     f"Port={ports[1]}-{ports[-1]}"]
        return CONFIG.format(host=host, address=address, user=getpass.getuser(), folder=self.folder, ports=ports,
                             lost_seconds=15 if self.machines else 300,
                             node_lines="\n".join(f"{line} CPUs={os.cpu_count()} State=UNKNOWN" for line in lines))

    def stop(self) -> None:
        """End what runs, then the daemons, the last one first."""
        if len(self._daemons) > 1:
            for options in (["--signal=KILL"], ["--full", "--signal=KILL"], []):  # steps, scripts, what is queued
                self.ask("scancel", "--user", getpass.getuser(), *options)
            deadline = time.monotonic() + 20
            while self.ask("squeue", "--noheader") and time.monotonic() < deadline:
                time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def ask(self, *command: str, environment: dict[str, str] | None = None, folder: Path | None = None,
            check: bool = False) -> str:
        """What a Slurm command prints; with check a failure is an AssertionError."""
        done = subprocess.run([*self._prefix, *command], env={**self.environment, **(environment or {})}, cwd=folder,
                              check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              timeout=60)
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}"
        return done.stdout

    def job(self, number: int) -> dict[str, str]:
        """scontrol's fields of a job: JobState, ExitCode, Restarts, Reason, ..."""
        fields = self.ask("scontrol", "show", "job", str(number), "-o").split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    @property
    def _prefix(self) -> list[str]:
        """What runs a program on the machine of slurmctld."""
        return self.machines.on_head if self.machines else []

    def logs(self) -> str:
        """The last lines of every daemon, for a failure's message."""
        return "\n".join(f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-25:])
                         for path in sorted(self.folder.glob("*.log")))

    def _daemon(self, program: str, *arguments: str) -> None:
        with (self.folder / f"{program}{len(self._daemons)}.out.log").open("w") as output:
            self._daemons.append(subprocess.Popen(
                [*self._prefix, _program(program), *arguments], env=self.environment, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True))

    def _wait(self, ready: Callable[[], bool], what: str, seconds: float = 40) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            dead = [daemon.args[0] for daemon in self._daemons if daemon.poll() is not None]
            assert not dead and time.monotonic() < deadline, f"{what} did not start (ended: {dead})\n{self.logs()}"
            time.sleep(0.1)
