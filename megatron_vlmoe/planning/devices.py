"""Devices to train on: the one table of their rates, and how fast a step may count on running."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megatron_vlmoe.config.errors import ConfigError, unknown_name
from megatron_vlmoe.config.schema import Precision

RESERVED = 0.10
"""Share of the memory that is left to the CUDA context, NCCL's buffers and fragmentation."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device.

    Args:
        part: what its name has in torch (`torch.cuda.get_device_name`); empty for one that is not a GPU model.
        peaks: FLOP/s of dense matrix products by precision.
        memory: bytes.
        memory_bandwidth: bytes per second.
        link: bytes per second in each direction to the other devices of its node (NVLink, or PCIe where there is none).
        watts: power of the board under load.
        operator_seconds: time of the host to start one operator; it passes while a GPU works.
        latency: seconds that a collective of two ranks takes at least.
        measured: whether the rates are what was reached on it, and not what the vendor's data sheet says.
        is_gpu: whether it computes while it sends, and while its host goes on.
    """

    part: str = ""
    peaks: Mapping[Precision, float]
    memory: float
    memory_bandwidth: float
    link: float
    watts: float
    operator_seconds: float = 6e-6
    latency: float = 10e-6
    measured: bool = False
    is_gpu: bool = True

    @property
    def usable_memory(self) -> float:
        """Bytes that a plan may fill."""
        return self.memory * (1.0 - RESERVED)

    def peak(self, precision: Precision) -> float:
        """FLOP/s. Raises ConfigError if it has no units for the precision."""
        if precision not in self.peaks:
            formats = ", ".join(self.peaks)
            raise ConfigError(f"train.precision={precision}: this device computes in {formats}")
        return self.peaks[precision]


def _gpu(
    part: str,
    half: float,
    single: float,
    gigabytes: float,
    bandwidth: float,
    link: float,
    watts: float,
    bf16: bool = True,
) -> Device:
    """A row of a data sheet: TFLOP/s in 16 bits and in fp32, GB, GB/s of memory, GB/s of links, W."""
    peaks: dict[Precision, float] = {"fp16": half * 1e12, "fp32": single * 1e12}
    if bf16:
        peaks["bf16"] = half * 1e12
    return Device(
        part=part,
        peaks=peaks,
        memory=gigabytes * 1e9,
        memory_bandwidth=bandwidth * 1e9,
        link=link * 1e9,
        watts=watts,
    )


# NVIDIA's data sheets, without sparsity; links in one direction. A name that holds another one stands before it.
DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        "v100": _gpu("V100", 125, 15.7, 32, 900, 150, 300, bf16=False),
        "a100-40": _gpu("A100-SXM4-40GB", 312, 19.5, 40, 1555, 300, 400),
        "a100-80": _gpu("A100", 312, 19.5, 80, 2039, 300, 400),
        "a40": _gpu("A40", 149.7, 37.4, 48, 696, 32, 300),
        "l40s": _gpu("L40S", 362, 91.6, 48, 864, 32, 350),
        "l40": _gpu("L40", 181, 90.5, 48, 864, 32, 300),
        "rtx-4090": _gpu("RTX 4090", 165.2, 82.6, 24, 1008, 32, 450),
        "h100-pcie": _gpu("H100 PCIe", 756, 51, 80, 2000, 64, 350),
        "h100": _gpu("H100", 989, 67, 80, 3350, 450, 700),
        "h200": _gpu("H200", 989, 67, 141, 4800, 450, 700),
        "b200": _gpu("B200", 2250, 80, 180, 7700, 900, 1000),
    }
)


def find_device(name: str) -> Device:
    """The device of a name in `DEVICES`. Raises ConfigError if there is none."""
    if name not in DEVICES:
        raise ConfigError(f"--gpu {name}: {unknown_name(name, (*DEVICES, 'custom', 'this'))}")
    return DEVICES[name]


def named_device(torch_name: str) -> Device | None:
    """The device that torch calls so; None if it is not in the table."""
    # As whole words: an RTX A4000 is no A40.
    found = (d for d in DEVICES.values() if re.search(rf"\b{re.escape(d.part)}\b", torch_name))
    return next(found, None)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a step runs at: FLOP/s, bytes per second and seconds, as in `Device`; `network` leaves the node."""

    compute: float
    memory: float
    link: float
    network: float
    operator_seconds: float
    latency: float


# Shares of a data sheet's rates that training reaches at best; public runs of transformers on these GPUs reach 35 to
# 60 % of the peak over a whole step. Of rates that were measured with large operators, steps on CPUs reach 0.45 to 0.9
# (docs/planning.md).
_SHEET = {"compute": 0.70, "memory": 0.85, "link": 0.80, "network": 0.85}
_MEASURED = dict.fromkeys(_SHEET, 0.90)
SLOWER = 2.0
"""How much slower every single rate of the slow case is."""


def rates(device: Device, precision: Precision, network: float, slow: bool) -> Rates:
    """The rates of the fast case, from which a step's lower bound follows, or of the slow one.

    Args:
        network: bytes per second of one device's share of its node's network.
    """
    shares = _MEASURED if device.measured else _SHEET
    slower = SLOWER if slow else 1.0
    # The times of the table are those of the fast case; a measured one is a rate like the others.
    waiting = slower / (shares["compute"] if device.measured else 1.0)
    return Rates(
        compute=device.peak(precision) * shares["compute"] / slower,
        memory=device.memory_bandwidth * shares["memory"] / slower,
        link=device.link * shares["link"] / slower,
        network=network * shares["network"] / slower,
        operator_seconds=device.operator_seconds * waiting,
        latency=device.latency * waiting,
    )
