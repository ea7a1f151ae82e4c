"""The machines that `plan` compiles for without having them, and the compilers that do it.

TPU slices are compiled by libtpu (extra `tpu`), GPUs by XLA's CUDA compiler (extra `cuda13` or `cuda12`); neither needs
the device. Where no CUDA compiler is installed, XLA's CPU compiler stands in with simulated devices.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from softprompt_jax.config import UserError, nearest, read

GIB = 2**30
_MOST_DEVICES = 2**16
# Stack of the threads that compile: with the default of 64 KiB libtpu 0.0.42 overflows it on wide layers.
LARGER_STACK = "--fibers_default_thread_stack_size=4194304"
# Without a device nothing can be timed: XLA takes its default algorithms, and cuBLAS for every product.
_NOTHING_TIMED = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
_LEAST_CUDNN = ("9", "10", "1")  # that JAX takes
_FRACTION = 0.75  # of a GPU's memory, which JAX takes unless XLA_CLIENT_MEM_FRACTION says otherwise


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA's compiler has to know of a GPU, from NVIDIA's data sheets."""

    name: str
    capability: str  # of compute, e.g. "9.0"
    cores: int  # streaming multiprocessors
    shared_kib: int  # shared memory of a core
    l2_mib: int
    clock_ghz: float
    bandwidth_gb_s: int  # of its memory
    threads: int = 2048  # of a core
    fpus: int = 128  # of a core


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX sees it, from the vendors' data sheets."""

    memory_gib: float | int
    tflops: float | int  # of dense products in bfloat16
    accelerator_type: str | None = None  # libtpu's name of a slice; None: not a TPU
    gpu: Gpu | None = None

    def target(self, cuda: int) -> str:
        """Return XLA's GpuTargetConfig, in text form, of a GPU under this CUDA and the cuDNN that is installed."""
        gpu = self.gpu
        assert gpu is not None
        major, minor = gpu.capability.split(".")
        try:
            cudnn = importlib.metadata.version(f"nvidia-cudnn-cu{cuda}").split(".")
        except importlib.metadata.PackageNotFoundError:  # the machine's own
            cudnn = _LEAST_CUDNN
        device = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "threads_per_core_limit": gpu.threads,
            "shared_memory_per_block": 48 << 10,
            "shared_memory_per_block_optin": (gpu.shared_kib - 1) << 10,
            "shared_memory_per_core": gpu.shared_kib << 10,
            "core_count": gpu.cores,
            "fpus_per_core": gpu.fpus,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 2**16 - 1,
            "block_dim_limit_z": 2**16 - 1,
            "registers_per_core_limit": 2**16,
            "registers_per_block_limit": 2**16,
            "memory_bandwidth": gpu.bandwidth_gb_s * 10**9,
            "l2_cache_size": gpu.l2_mib << 20,
            "clock_rate_ghz": gpu.clock_ghz,
            "device_memory_size": int(self.memory_gib * GIB),
        }
        numbers = " ".join(f"{name}: {value}" for name, value in device.items())
        return (
            f"gpu_device_info {{ {numbers} cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
            f'platform_name: "CUDA" device_description_str: "{gpu.name}" runtime_version {{ major: {cuda} }} '
            f"dnn_version_info {{ major: {cudnn[0]} minor: {cudnn[1]} patch: {cudnn[2]} }}"
        )


def _chip(gpu: dict[str, Any] | None = None, **about: Any) -> Chip:
    return Chip(**about, gpu=None if gpu is None else Gpu(**gpu))


CHIPS = {name: _chip(**about) for name, about in read(Path(__file__).with_name("chips.yaml")).items()}


@functools.cache
def cuda_compiler() -> int | None:
    """Return the version of CUDA whose compiler is installed with JAX, 13 or 12; None if there is none."""
    return next((n for n in (13, 12) if importlib.util.find_spec(f"jax_cuda{n}_plugin") is not None), None)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A kind of chip and how many: `v5e:2x4`, `h200:8`."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def is_tpu(self) -> bool:
        """Whether libtpu compiles for it."""
        return self.chip.accelerator_type is not None

    @property
    def platform(self) -> str:
        """The kind of its devices."""
        return "tpu" if self.is_tpu else "gpu"

    @property
    def is_estimated(self) -> bool:
        """Whether another compiler stands in for that of its devices."""
        return not self.is_tpu and (self.chip.gpu is None or cuda_compiler() is None)

    @property
    def compiler(self) -> str:
        """What compiles for it."""
        if self.is_tpu:
            return "libtpu"
        return "XLA for CPUs" if self.is_estimated else f"XLA for CUDA {cuda_compiler()}"

    @property
    def limit(self) -> int:
        """Bytes of a device that a program may use. Of a GPU JAX leaves a quarter to others."""
        share = 1.0 if self.is_tpu else _memory_fraction()
        return int(self.chip.memory_gib * GIB * share)

    def environment(self) -> dict[str, str]:
        """Return what a process that compiles for it needs in its environment, before JAX starts."""
        found = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
        if self.chip.accelerator_type is not None:
            return found | {
                "LIBTPU_INIT_ARGS": f"{LARGER_STACK} {os.environ.get('LIBTPU_INIT_ARGS', '')}",
                "TPU_SKIP_MDS_QUERY": "1",
                "TPU_WORKER_HOSTNAMES": "localhost",
                "TPU_ACCELERATOR_TYPE": self.chip.accelerator_type,
                "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
            }
        theirs = os.environ.get("XLA_FLAGS", "")
        if self.is_estimated:
            return found | {"XLA_FLAGS": f"{theirs} --xla_force_host_platform_device_count={math.prod(self.shape)}"}
        return found | {
            "XLA_FLAGS": f"{theirs} {_NOTHING_TIMED}",
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # asks the driver
            "JAX_ENABLE_COMPILATION_CACHE": "false",  # programs for devices that are not here cannot be read from it
        }

    def devices(self) -> Sequence[Any]:
        """Return descriptions of the devices, which cannot run anything; in a process with such an `environment`."""
        if self.is_estimated:
            return jax.devices()
        count = math.prod(self.shape)
        kind: dict[str, Any]
        if self.is_tpu:
            library, extra = "libtpu", "tpu"
            kind = {"chips_per_host_bounds": (1, 1, 1)} if count == 1 else {}
        else:
            cuda = cuda_compiler()
            assert cuda is not None
            library, extra = "XLA's CUDA compiler", f"cuda{cuda}"
            host = self.shape[-1]  # its GPUs: h100:8 is one host, h100:2x8 are two
            kind = {"target_config": self.chip.target(cuda), "topology": f"1x{count // host}x{host}"}
        try:
            return topologies.get_topology_desc(
                platform="tpu" if self.is_tpu else "cuda", topology_name=self.name, **kind
            ).devices
        except Exception as error:  # a missing library and a wrong shape come as errors of many types
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{library} cannot describe it ({reason}); expected the extra `{extra}` and a shape that exists"
            ) from None


def _memory_fraction() -> float:
    told = os.environ.get("XLA_CLIENT_MEM_FRACTION") or os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or _FRACTION
    try:
        share = float(told)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise UserError(f"XLA_CLIENT_MEM_FRACTION: found {told}; expected a number over 0, 1 at most, such as 0.9")
    return share


def parse_topology(text: str) -> Topology:
    """Read `CHIP:SHAPE`, e.g. `v5e:2x4`, `v5p:4x4x4` or `h100:8`."""
    name, _, shape = text.partition(":")
    if name not in CHIPS:
        raise UserError(f"topology {text!r}: unknown chip; expected one of {', '.join(CHIPS)}{nearest(name, CHIPS)}")
    sizes = [int(size) for size in shape.split("x")] if re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,5}){0,2}", shape) else []
    if not 1 <= math.prod(sizes) * bool(sizes) <= _MOST_DEVICES:
        raise UserError(f"topology {text!r}: expected CHIP:SHAPE, such as v5e:2x4, v5p:2x2x1 or h100:8")
    return Topology(text, CHIPS[name], tuple(sizes))
