"""Figures of devices and their links, as their makers' data sheets state them: nothing here was measured.

Every figure is a peak, so that times made of them are lower bounds. The table is the only place that holds them.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator, and a node of them as its maker sells it."""

    name: str
    kind: str
    """"cuda" or "cpu"."""
    memory: int
    """Bytes."""
    bf16: float
    """Operations a second of dense matrix products in bf16; 0 where not known."""
    fp32: float
    """The same for float32 tensors (TF32, PyTorch's default for convolutions, where the device has it)."""
    memory_speed: float
    """Bytes a second between the device and its memory; 0 where not known."""
    link: float
    """Bytes a second that a device sends to others of its node, one direction; 0 where not known."""
    network: float
    """Bytes a second that a device of such a node sends to other nodes: the node's adapters, shared evenly."""
    host_link: float = 0.0
    """Bytes a second between the device and its host, one direction; 0 where they are one."""
    source: str = ""

    @property
    def usable(self) -> int:
        """Bytes that training may take: see ``RESERVED``. What is said of CPUs is what there is for training."""
        return self.memory if self.kind == "cpu" else int(self.memory * (1 - SHARE_RESERVED)) - RESERVED


SHARE_RESERVED = 0.02
"""Of a GPU's memory: what its driver and error correction keep. PyTorch's "total capacity" in public reports of memory
errors: V100-32 31.74 GiB, A100-40 39.50, A100-80 79.25, H100-80 79.11; of an H200 none was found."""
RESERVED = GIB
"""Bytes of a GPU that training does not get: the CUDA context, loaded kernels, and NCCL's channels."""


def _gpu(
    name: str, gib: int, bf16: float, fp32: float, tbps: float, link: float, net: float, host: float, source: str
) -> Device:
    return Device(
        name=name,
        kind="cuda",
        memory=gib * GIB,
        bf16=bf16 * 1e12,
        fp32=fp32 * 1e12,
        memory_speed=tbps * 1e12,
        link=link * 1e9,
        network=net * 1e9,
        host_link=host * 1e9,
        source=source,
    )


# name, GiB, bf16 and fp32/TF32 TFLOP/s (dense), memory TB/s, NVLink, network and PCIe in GB/s a GPU one way, source.
#
# Data sheets give links in both directions together and tensor cores with sparsity: both are halved here.
# V100: 32 GB, 15.7 TFLOP/s in fp32, 900 GB/s, NVLink 300 GB/s, PCIe 3.0 32 GB/s: "NVIDIA V100 Tensor Core GPU" data
#   sheet (SXM2), read in copies of its table only. DGX-2: 16 of them, 8 adapters of 100 Gbit/s (news of its release,
#   pcper.com/2018/03/nvidia-announces-dgx-2-with-16-gv100s-8-100gb-nics).
# A100: 312 TFLOP/s in bf16, 156 in TF32, 1,555 (40 GB) and 2,039 GB/s (80 GB), NVLink 600 GB/s, PCIe Gen4 64 GB/s:
#   nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf, as glennklockwood.com/garden/processors/A100 quotes it, and the
#   measured node of upb-pc2.atlassian.net/wiki/spaces/PC2DOK/pages/1900609. DGX A100: 8 of them, 8 single-port adapters
#   of 200 Gbit/s (developer.nvidia.com/blog/defining-ai-innovation-with-dgx-a100); a node of JUWELS Booster, where the
#   published networks were trained, has 4 of each.
# H100 SXM5: 1,979 TFLOP/s in bf16 and 989 in TF32 with sparsity, 3.35 TB/s, NVLink 900 GB/s, PCIe Gen5 128 GB/s: H100
#   data sheet (resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet) and the dense 989.4 and 494.7
#   of the Hopper white paper, both as glennklockwood.com/garden/processors/h100 quotes them. DGX H100 and H200: 8 of
#   them, 8 single-port adapters of 400 Gbit/s (docs.nvidia.com/dgx-basepod, "Core Components").
# H200: as H100, with 141 GB and 4.8 TB/s (aiwiki.ai/wiki/nvidia_h200, which cites the data sheet; DGX H200 has 1,128 GB
#   by docs.nvidia.com/dgx-basepod).
DEVICES = {
    device.name: device
    for device in (
        _gpu("v100-32", 32, 15.7, 15.7, 0.9, 150, 6.25, 16, "NVIDIA V100 (SXM2, no bf16 units) and DGX-2 data sheets"),
        _gpu("a100-40", 40, 312, 156, 1.555, 300, 25, 32, "NVIDIA A100 (SXM4) and DGX A100 data sheets"),
        _gpu("a100-80", 80, 312, 156, 2.039, 300, 25, 32, "NVIDIA A100 (SXM4) and DGX A100 data sheets"),
        _gpu("h100-80", 80, 989.5, 494.7, 3.35, 450, 50, 64, "NVIDIA H100 (SXM5) and DGX H100 data sheets"),
        _gpu("h200-141", 141, 989.5, 494.7, 4.8, 450, 50, 64, "NVIDIA H200 (SXM5) and DGX H200 data sheets"),
    )
}
NO_BF16 = ("v100-32",)
"""Without units for bf16, which is slower there than float32."""


def find_device(text: str, network_gbit: float | None = None, gpus_per_node: int = 1) -> Device:
    """The device that ``--gpu`` names.

    Args:
        text: a name of ``DEVICES``, or ``cpu:GIB`` for a rank on a CPU that may take so much memory.
        network_gbit: Gbit/s that a node sends, shared by its ``gpus_per_node``; None: the table's.

    Raises:
        ValueError: another text.
    """
    kind, _, size = text.lower().partition(":")
    if kind == "cpu":
        try:
            gib = float(size)
        except ValueError:
            gib = 0.0
        if not 0 < gib < float("inf"):
            raise ValueError(f"--gpu {text}: write cpu:GIB with the GiB of memory a rank may take, such as cpu:12")
        memory = int(gib * GIB)
        found = Device(
            name=f"cpu:{gib:g}", kind="cpu", memory=memory, bf16=0, fp32=0, memory_speed=0, link=0, network=0
        )
    elif text.lower() in DEVICES:
        found = DEVICES[text.lower()]
    else:
        raise ValueError(f"--gpu {text}: there are {', '.join(DEVICES)} and cpu:GIB")
    if network_gbit is None:
        return found
    if not 0 < network_gbit < float("inf"):
        raise ValueError(f"--network {network_gbit:g}: must be the Gbit/s of a node, above 0")
    return Device(**{**vars(found), "network": network_gbit * 1e9 / 8 / gpus_per_node})
