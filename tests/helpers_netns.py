"""Two "hosts" on this machine: network namespaces with names and addresses of their own, and a link between them."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def netns_is_missing() -> str:
    """What two network namespaces lack here, for a skipped test; "" if nothing."""
    absent = [name for name in ("ip", "unshare", "hostname", "setsid") if shutil.which(name) is None]
    if absent:
        return f"no {', '.join(absent)} (Debian: apt-get install iproute2 util-linux hostname)"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    name = f"try{uuid.uuid4().hex[:8]}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"network namespaces cannot be made here ({made.stderr.strip()})"
    subprocess.run(["ip", "netns", "del", name], check=False)
    return ""


class Hosts:
    """`names` and `addresses` of both; `remote`: a program that runs a command on one, as ssh does."""

    def __init__(self, folder: Path) -> None:
        mark = uuid.uuid4().hex[:6]
        self.names = [f"sta{mark}", f"stb{mark}"]
        self.addresses = ["10.231.77.1", "10.231.77.2"]
        self.links = [f"va{mark}", f"vb{mark}"]
        self.remote = folder / "remote"
        self.remote.write_text(
            "#!/bin/sh\n# HOST COMMAND: in the host's network, under its name\n"
            # which interface leads to the other: gloo would take the one that this machine's name resolves to
            "export GLOO_SOCKET_IFNAME=net0\n"
            'exec ip netns exec "$1" unshare --uts sh -c \'hostname "$0" && exec bash -c "$1"\' "$1" "$2"\n'
        )
        self.remote.chmod(0o755)

    def link(self, state: str) -> None:
        """`up` or `down`: the link between the two, as a cable that is pulled out on both sides."""
        for name in self.names:
            self._ip("-n", name, "link", "set", "net0", state)

    def drop(self, on: bool) -> None:
        """Packets are lost on the way, and nobody is told: the link is up, as behind a firewall or a broken switch.

        The neighbour's address leads to a card that nobody has; `iptables -j DROP` does the same where it is there.
        """
        for name, other in zip(self.names, reversed(self.addresses), strict=True):
            if on:
                lost = ("lladdr", "02:00:00:00:00:99", "dev", "net0", "nud", "permanent")
                self._ip("-n", name, "neigh", "replace", other, *lost)
            else:
                self._ip("-n", name, "neigh", "del", other, "dev", "net0")

    def make(self) -> None:
        for name in self.names:
            self._ip("netns", "add", name)
            self._ip("-n", name, "link", "set", "lo", "up")
        self._ip("link", "add", self.links[0], "type", "veth", "peer", "name", self.links[1])
        for name, link, address in zip(self.names, self.links, self.addresses, strict=True):
            self._ip("link", "set", link, "netns", name)
            self._ip("-n", name, "link", "set", link, "name", "net0")
            self._ip("-n", name, "addr", "add", f"{address}/24", "dev", "net0")
        self.link("up")

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    @staticmethod
    def _ip(*words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    hosts = Hosts(folder)
    try:
        hosts.make()
        yield hosts
    finally:
        hosts.remove()
