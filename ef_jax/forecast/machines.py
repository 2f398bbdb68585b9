"""Machines known by name: published peaks times a stated share of them that programs reach."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ef_jax.errors import InputError
from ef_jax.forecast.machine import Machine
from ef_jax.forecast.profile import read_profile

# JAX takes 75 % of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise (docs.jax.dev,
# "GPU memory allocation").
_JAX_SHARE = 0.75
# Of the peak bandwidth of device memory, what kernels that stream weights reach: STREAM-like figures of H100 and A100
# are 85 to 92 %, small matrices reach less.
_MEMORY_SHARE = 0.8
# Of the peak of 16-bit products, what grouped products of prompts reach; expert groups are ragged.
_FLOPS_SHARE = 0.4
# Of the raw rate of a PCI Express link (x16: 15.75, 31.5 and 63 GB/s for generations 3, 4 and 5), what copies from
# pinned memory reach after packet headers.
_LINK_SHARE = 0.8

_GPU: dict[str, Any] = {
    "platform": "gpu",
    "link_latency": 10e-6,  # of an asynchronous copy: some microseconds to issue, some to begin
    "block_seconds": 5e-6,  # one array of a call that copies several
    "dispatch_seconds": 60e-6,  # our Python on two slow Xeon cores takes 37 to 69 us (bench/results/overhead.json)
    "kernel_seconds": 60e-6,  # about 20 kernels a layer, 3 us each from launch to end when there is little to do
    "miss_seconds": 40e-6,  # routes read back over the link, then looked up: 30 us of host work and a round trip
    "row_seconds": 0.0,
    "doubt": 0.25,
}


def _gpu(
    name: str,
    source: str,
    *,
    memory_gb: float,
    bandwidth: float,
    flops: float,
    link: float,
    host_gib: int,
    disk: float,
    host_bandwidth: float,
    host_flops: float,
) -> Machine:
    return Machine(
        name=name,
        source=source,
        device_memory=int(memory_gb * _JAX_SHARE * 1e9),
        host_memory=host_gib << 30,
        device_bandwidth=_MEMORY_SHARE * bandwidth,
        device_flops=_FLOPS_SHARE * flops,
        link_bandwidth=_LINK_SHARE * link,
        # A block that has crossed is read and written once more on the device.
        insert_bandwidth=_MEMORY_SHARE * bandwidth / 2,
        disk_bandwidth=disk,
        host_bandwidth=host_bandwidth,
        host_flops=host_flops,
        **_GPU,
    )


MACHINES: Mapping[str, Machine] = MappingProxyType(
    {
        machine.name: machine
        for machine in (
            _gpu(
                "h100-sxm-pcie5",
                "NVIDIA H100 data sheet: 80 GB HBM3 at 3.35 TB/s, 989 TFLOPS dense bf16; PCIe 5.0 x16",
                memory_gb=80,
                bandwidth=3.35e12,
                flops=989e12,
                link=63e9,
                host_gib=256,  # an eighth of a DGX H100's 2 TB
                disk=12e9,  # two PCIe 4.0 NVMe drives side by side
                host_bandwidth=150e9,  # an eighth of two sockets of eight DDR5-4800 channels
                host_flops=2e12,
            ),
            _gpu(
                "a100-pcie4",
                "NVIDIA A100 PCIe data sheet: 80 GB HBM2e at 1.935 TB/s, 312 TFLOPS dense bf16; PCIe 4.0 x16",
                memory_gb=80,
                bandwidth=1.935e12,
                flops=312e12,
                link=31.5e9,
                host_gib=256,
                disk=6e9,  # a PCIe 4.0 NVMe drive is sold as 7 GB/s
                host_bandwidth=100e9,  # eight channels of DDR4-3200 give 205 at the peak
                host_flops=1e12,
            ),
            _gpu(
                "rtx4090-pcie4",
                "NVIDIA Ada whitepaper: 24 GB GDDR6X at 1,008 GB/s, 165 TFLOPS dense bf16; PCIe 4.0 x16",
                memory_gb=24,
                bandwidth=1.008e12,
                flops=165e12,
                link=31.5e9,
                host_gib=128,
                disk=6e9,
                host_bandwidth=60e9,  # two channels of DDR5-5600 give 90 at the peak
                host_flops=1e12,
            ),
            _gpu(
                "rtx3090-pcie3",
                "NVIDIA Ampere GA102 whitepaper: 24 GB GDDR6X at 936 GB/s, 71 TFLOPS dense bf16; PCIe 3.0 x16",
                memory_gb=24,
                bandwidth=0.936e12,
                flops=71e12,
                link=15.75e9,
                host_gib=64,
                disk=3e9,  # a PCIe 3.0 NVMe drive is sold as 3.5 GB/s
                host_bandwidth=35e9,  # two channels of DDR4-3200 give 51 at the peak
                host_flops=0.5e12,
            ),
            # Two Xeon cores, so that whole runs can be checked against forecasts (bench/forecast.py). Two all-resident
            # runs give bandwidth and fixed time of a layer: 2.29 ms a step for 6.1 MB in 9 programs (offload.json) and
            # 41.0 ms for 254 MB in 9 (overhead.json, "single").
            Machine(
                name="cpu-emulated-pcie3",
                platform="cpu",
                device_memory=16 << 30,
                host_memory=24 << 30,
                device_bandwidth=6.4e9,
                device_flops=100e9,  # of 168 that a plain product reaches (kernels_cpu.json)
                link_bandwidth=_LINK_SHARE * 15.75e9,
                link_latency=10e-6,
                insert_bandwidth=12e9,  # 12.7 measured with small blocks (offload.json), 11.6 with 3 MB (SlotPool)
                block_seconds=10e-6,  # with the next, from lru at 12.5 and 50 % in offload.json
                dispatch_seconds=40e-6,  # of 148 us: 37 are host work (overhead.json)
                kernel_seconds=108e-6,
                miss_seconds=50e-6,
                row_seconds=70e-6,  # all resident, batched, 4.8 wide in throughput_engine.json
                disk_bandwidth=1e9,
                host_bandwidth=8e9,
                host_flops=80e9,
                doubt=0.15,
                source="two cores of a Xeon, measured (bench/results), with an emulated PCIe 3.0 x16 link",
            ),
        )
    }
)
"""By name. Host memories are what such machines often have: give your own."""


def find_machine(text: str) -> Machine:
    """The machine called `text`, or of the profile in that file.

    Raises:
      InputError: neither a name nor a profile that can be read; the known names are listed.
    """
    if text in MACHINES:
        return MACHINES[text]
    path = Path(text)
    try:
        is_file = bool(text) and path.is_file()
    except (OSError, ValueError):
        is_file = False
    if not is_file:
        raise InputError(
            f"machine {text!r:.80} is neither known nor a profile that ef-jax doctor wrote: the known ones are "
            f"{', '.join(MACHINES)}"
        )
    return read_profile(path).machine
