"""Which peers there are, in which Python environment each lives, and how that is made."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A library to compare with. environment: folder of its own environment, "" is ours."""

    module: str
    packages: tuple[str, ...]
    environment: str = ""


PEERS = {
    "webdataset": Peer(module="webdataset", packages=("webdataset",)),
    "torchvision": Peer(module="torchvision", packages=("torchvision",)),
    "simplejpeg": Peer(module="simplejpeg", packages=("simplejpeg",)),
    "cv2": Peer(module="cv2", packages=("opencv-python-headless",)),
    "mosaicml-streaming": Peer(
        module="streaming", packages=("torch", "torchvision", "mosaicml-streaming"), environment="mds"
    ),
    "DALI": Peer(module="nvidia.dali", packages=("nvidia-dali-cuda120",), environment="dali"),
}


def python_of(name: str, folder: Path) -> str:
    """The interpreter that a peer runs in."""
    peer = PEERS[name]
    return str(folder.absolute() / peer.environment / "bin" / "python") if peer.environment else sys.executable


@cache
def missing(name: str, folder: Path) -> str:
    """What to do so that a peer is there; "" where it is."""
    python = python_of(name, folder)
    found = (
        Path(python).exists()
        and not subprocess.run(
            [
                python,
                "-c",
                f"import importlib.util, sys; sys.exit(not importlib.util.find_spec('{PEERS[name].module}'))",
            ],
            check=False,
            stderr=subprocess.DEVNULL,
        ).returncode
    )
    if found:
        return ""
    if PEERS[name].environment:
        return f"python tools/bench/loader.py --make-peers {folder}"
    return f"{Path(python).name} -m pip install {' '.join(PEERS[name].packages)}"


def make_peers(folder: Path, say: Callable[[str], None]) -> None:
    """Make the environments of all peers that need one.

    Raises:
        ValueError: pip could not install one; what it said is in a file that the sentence names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, peer in PEERS.items():
        if not peer.environment:
            continue
        home, log = folder / peer.environment, folder / f"{peer.environment}.log"
        say(f"{name}: {' '.join(peer.packages)} -> {home}")
        with open(log, "w") as file:
            commands = [[sys.executable, "-m", "venv", str(home)]]
            commands.append([str(home / "bin" / "python"), "-m", "pip", "install", *peer.packages])
            for command in commands:
                if subprocess.run(command, check=False, stdout=file, stderr=file).returncode:
                    raise ValueError(f"{name} could not be installed: see {log}, then give the same command again")
