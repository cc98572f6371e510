"""Machines within this one: namespaces with an address, a host name, processes and shared memory of their own.

A switch joins them (a bridge, in a namespace too, where slurmctld and the test's commands run), so nothing of this
machine's own network is touched. A namespace ends with its last process; nothing needs to be cleaned up. What they
share is the disk, as nodes of a cluster do. Needs root, util-linux and iproute2.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

PROGRAMS = ("unshare", "nsenter", "ip", "tc", "mount", "hostname")
NETWORK = "10.213.77."  # in no routing table but the namespaces' own
OWN = ["--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
# the first process of a machine; bash, since it takes in what others leave behind. $1 name, $2 address, $3 hosts
BOOT = """
set -e
hostname "$1"
mount --bind "$3" /etc/hosts
mount -t tmpfs tmpfs /dev/shm
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip addr add "$2/24" dev eth0
ip link set lo up
ip link set eth0 up
shift 3
"$@" &
wait
"""


def problem() -> str | None:
    """Why there can be no machines here; None if they can be made."""
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    if os.geteuid() != 0 or lacking:
        return f"namespaces need root, and {', '.join(lacking)} of util-linux and iproute2" if lacking else \
            "namespaces need root"
    tried = subprocess.run(["unshare", *OWN, "bash", "-c", "mount -t tmpfs tmpfs /dev/shm && ip link add switch type "
                            "bridge && ip link add cable0 type veth peer name cable1"],
                           capture_output=True, text=True, check=False, timeout=60)
    return f"no namespaces here ({' '.join(tried.stderr.split())})" if tried.returncode else None


class Machines:
    """`names` and a head; `start` makes the network, `start_node` boots a machine, `stop` ends all."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.names = folder, [f"node{number + 1}" for number in range(count)]
        self.head_address = f"{NETWORK}1"
        self._head: subprocess.Popen | None = None
        self._nodes: dict[str, subprocess.Popen] = {}

    @property
    def on_head(self) -> list[str]:
        """Words that run a command on the head."""
        return ["nsenter", f"--net=/proc/{self._head.pid}/ns/net"]

    def address(self, node: str) -> str:
        return f"{NETWORK}{11 + self.names.index(node)}"

    def start(self) -> None:
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(
            f"{self.address(name)} {name}\n" for name in self.names))
        self._head = subprocess.Popen(["unshare", "--net", "sleep", "infinity"], start_new_session=True)
        self._has_own_network(self._head)
        for words in ("link add switch type bridge", f"addr add {self.head_address}/24 dev switch", "link set lo up",
                      "link set switch up"):
            self._ip(words)

    def start_node(self, node: str, program: list[str], environment: dict[str, str], log: Path) -> None:
        """Boot a machine that runs the program, until that ends."""
        with log.open("a") as output:
            process = subprocess.Popen(
                ["unshare", *OWN, "bash", "-c", BOOT, "boot", node, self.address(node), str(self.folder / "hosts"),
                 *program], env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        self._nodes[node] = process
        self._has_own_network(process)
        self._ip(f"link add to-{node} type veth peer name eth0 netns {process.pid}")
        self._ip(f"link set to-{node} master switch up")

    def limit(self, node: str, rate: str) -> str | None:
        """No more than `rate` (as tc has it: 80mbit) to this machine and from it; why, where the kernel cannot."""
        for inside, device in self._ends(node):
            done = subprocess.run([*inside, "tc", "qdisc", "replace", "dev", device, "root", "tbf", "rate", rate,
                                   "burst", "128kb", "latency", "200ms"], capture_output=True, text=True, check=False)
            if done.returncode:
                return f"tc cannot limit a link here ({' '.join(done.stderr.split())})"
        return None

    def remove_limit(self, node: str) -> None:
        for inside, device in self._ends(node):
            subprocess.run([*inside, "tc", "qdisc", "del", "dev", device, "root"], check=True)

    def _ends(self, node: str) -> list[tuple[list[str], str]]:
        """Of its cable: (words that run a command there, the device's name)."""
        inside = ["nsenter", f"--net=/proc/{self._nodes[node].pid}/ns/net"]
        return [(self.on_head, f"to-{node}"), (inside, "eth0")]

    def power_off(self, node: str) -> None:
        """Cut its link, then end all its processes at once: nobody is told that a connection has ended."""
        self._ip(f"link set to-{node} down")
        process = self._nodes.pop(node)
        process.kill()  # the kernel then ends the machine's first process (--kill-child), and with it all others
        process.wait()
        self._ip(f"link del to-{node}")  # connections that could not be closed keep the namespace for minutes

    def stop(self) -> None:
        for node in list(self._nodes):
            process = self._nodes.pop(node)
            process.kill()
            process.wait()
        if self._head:
            self._head.send_signal(signal.SIGKILL)
            self._head.wait()

    def _ip(self, words: str) -> None:
        done = subprocess.run([*self.on_head, "ip", *words.split()], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"ip {words}: {done.stderr}"

    @staticmethod
    def _has_own_network(process: subprocess.Popen) -> None:
        deadline = time.monotonic() + 20
        while os.readlink(f"/proc/{process.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
            assert process.poll() is None and time.monotonic() < deadline, "no namespace was made"
            time.sleep(0.02)
