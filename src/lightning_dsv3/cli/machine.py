"""What this machine can do, asked one question at a time: a question that fails is an answer, never an error.

Everything here is plain data for JSON. torch is imported; the optional libraries are when they are asked for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lightning_dsv3 import __version__
from lightning_dsv3.config import KERNELS, ConfigError, RunConfig
from lightning_dsv3.ops.backends import Case, decide, forced_kernels
from lightning_dsv3.ops.libraries import LIBRARIES, gpu_reason, library

Answer = dict[str, Any]

_PACKAGES = ("lightning", "pytorch-lightning", "transformers", "lm-eval", "omegaconf", "numpy", "matplotlib")
_DTYPES = (torch.float32, torch.bfloat16)
# Computed in float32 in every precision.
_FLOAT32_OPS = ("router",)
# FP8 tensor cores came with Ada; block scaling is Hopper's and later.
_FP8_CAPABILITY = (8, 9)
_GIB = 1 << 30


def examine(run: RunConfig, *, compile_kernels: bool = False) -> Answer:
    """Return all that is known of this machine, for a run with this configuration.

    Args:
        run: Its model and kernels.
        compile_kernels: Compile every Triton kernel ahead of time, for Hopper where there is no GPU.

    Returns:
        ``versions``, ``processor``, ``devices``, ``abilities`` (name, yes or no, and a word on it) and ``kernels``: for
        each operation and dtype the implementation, or why none can be had, and what was passed over. ``compiled`` as
        well if that was asked for.
    """
    report: Answer = {
        "format": 1,
        "versions": versions(),
        "processor": processor(),
        "devices": devices(),
        "abilities": abilities(),
        "kernels": kernels(run),
    }
    if compile_kernels:
        report["compiled"] = list(compiled_kernels())
    return report


def versions() -> Answer:
    """Return the version of everything that matters, or why there is none."""
    found: Answer = {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "lightning-dsv3": __version__,
        "torch": f"{torch.__version__}, {_ask(_torch_build)}",
    }
    packages = {**dict.fromkeys(_PACKAGES), **{recipe.package: recipe.install for recipe in LIBRARIES.values()}}
    for package, install in packages.items():
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed" + (f" ({install})" if install else "")
        except Exception as error:  # a broken .dist-info
            found[package] = _failure(error)
    driver = Path("/proc/driver/nvidia/version")
    if driver.exists():
        found["nvidia driver"] = _ask(lambda: " ".join(driver.read_text().splitlines()[0].split()))
    return found


def _torch_build() -> str:
    if torch.version.hip:
        return f"built for ROCm {torch.version.hip}"
    if not torch.version.cuda:
        return "built without CUDA"
    return f"built for CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"


def processor() -> Answer:
    """Return name, cores, threads and memory."""
    return {
        "name": _ask(_processor_name),
        "cores": _ask(_num_cores),
        "threads": _ask(torch.get_num_threads),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "instructions": _ask(torch.backends.cpu.get_cpu_capability),
        "bfloat16": _ask(_bfloat16_instructions),
        "memory_gib": _ask(lambda: round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB, 1)),
        "shared_memory_gib": _ask(lambda: round(shutil.disk_usage("/dev/shm").total / _GIB, 2)),
    }


def _processor_name() -> str:
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _bfloat16_instructions() -> list[str]:
    flags = next((line.partition(":")[2].split() for line in _cpuinfo() if line.startswith(("flags", "Features"))), [])
    return [flag for flag in ("avx512_bf16", "amx_bf16", "bf16") if flag in flags]


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def devices() -> list[Answer]:
    """Return every GPU with its capability and memory."""
    count = _ask(torch.cuda.device_count) if gpu_reason() is None else 0
    return [_device(index) for index in range(count)] if isinstance(count, int) else [{"name": count}]


def _device(index: int) -> Answer:
    try:
        properties = torch.cuda.get_device_properties(index)
        return {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / _GIB, 1),
            "processors": properties.multi_processor_count,
        }
    except Exception as error:
        return {"name": f"cuda:{index}: {_failure(error)}"}


def abilities() -> list[Answer]:
    """Return what works here, or why not."""
    questions: dict[str, Callable[[], tuple[bool, str]]] = {
        "CUDA": _cuda,
        "BF16 tensor cores": lambda: _capability((8, 0)),
        "FP8 tensor cores": lambda: _capability(_FP8_CAPABILITY),
        "FP8 products by Transformer Engine, scaled by block": lambda: _library("transformer_engine"),
        "FP8 products, emulated": lambda: (True, "on any device: the numbers of FP8, not its speed"),
        "Triton kernels": _triton,
        "FlashAttention 3": lambda: _library("flash_attn_3"),
        "liger-kernel": lambda: _library("liger_kernel"),
        "torch.compile on the processor": _cpp_compiler,
        "NCCL, between GPUs": _nccl,
        "gloo, between processes": _gloo,
    }
    answers = []
    for name, question in questions.items():
        try:
            works, detail = question()
        except Exception as error:
            works, detail = False, _failure(error)
        answers.append({"name": name, "works": works, "detail": detail})
    return answers


def _cuda() -> tuple[bool, str]:
    if (reason := gpu_reason()) is None:
        return True, f"{torch.cuda.device_count()} GPUs" if torch.cuda.device_count() > 1 else "1 GPU"
    if torch.version.cuda:
        torch.cuda.init()  # says more than is_available(), which swallows the driver's complaint
    return False, reason


def _capability(needed: tuple[int, int]) -> tuple[bool, str]:
    if (reason := gpu_reason()) is not None:
        return False, reason
    found = torch.cuda.get_device_capability()
    return found >= needed, f"capability {found[0]}.{found[1]}, of {needed[0]}.{needed[1]} or more"


def _library(name: str) -> tuple[bool, str]:
    reason = library(name).reason
    return reason is None, reason or "loaded"


def _triton() -> tuple[bool, str]:
    loads, detail = _library("triton")
    if not loads:
        return False, detail
    reason = gpu_reason()
    return reason is None, reason or "loaded"


def _cpp_compiler() -> tuple[bool, str]:
    name = os.environ.get("CXX", "g++")
    found = shutil.which(name)
    return found is not None, found or f"there is no {name}"


def _nccl() -> tuple[bool, str]:
    if not (torch.distributed.is_available() and torch.distributed.is_nccl_available()):
        return False, "this torch is built without it"
    version = ".".join(map(str, torch.cuda.nccl.version()))
    return gpu_reason() is None, f"{version}" if gpu_reason() is None else f"{version}, but {gpu_reason()}"


def _gloo() -> tuple[bool, str]:
    there = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    return there, "in this torch" if there else "this torch is built without it"


def kernels(run: RunConfig) -> list[Answer]:
    """Return which implementation each operation of a training pass would take on the device of a Trainer.

    ``dtype`` is that of the pass: float32 for ``32-true``, bfloat16 for ``bf16-mixed`` and ``bf16-true``.
    """
    device = training_device()
    rows = []
    with forced_kernels(**asdict(run.kernels)):
        for op in KERNELS:
            for dtype in _DTYPES:
                row: Answer = {"op": op, "device": device, "dtype": str(dtype).removeprefix("torch.")}
                operands = torch.float32 if op in _FLOAT32_OPS else dtype
                try:
                    choice = decide(op, Case(device, operands, True, tuple(sizes(op, run).items())))
                    row |= {"chosen": choice.name, "forced": choice.forced, "passed_over": dict(choice.passed_over)}
                except ConfigError as error:
                    row |= {"chosen": None, "error": str(error)}
                except Exception as error:
                    row |= {"chosen": None, "error": _failure(error)}
                rows.append(row)
    return rows


def training_device() -> str:
    """Return the type of the device that a Trainer takes by default."""
    if gpu_reason() is None:
        return "cuda"
    return "mps" if _ask(torch.backends.mps.is_available) is True else "cpu"


def sizes(op: str, run: RunConfig) -> Mapping[str, int | bool]:
    """Return what an operation tells of itself beside device and dtype, in a training pass of a run's model."""
    model = run.model
    told: dict[str, dict[str, int | bool]] = {
        "attention": {
            "packed": run.data.document_mask,
            "qk_head_dim": model.qk_nope_head_dim + model.qk_rope_head_dim,
            "v_head_dim": model.v_head_dim,
        },
        "router": {"experts": model.n_routed_experts},
        "grouped_matmul": {
            "mixed": False,
            "a_width": model.hidden_size,
            "b_width": model.hidden_size,
            "b_rows": model.moe_intermediate_size,
        },
        "quantize": {"rows": 1, "columns": 128},  # activations
    }
    return told.get(op, {})


def compiled_kernels() -> Iterator[Answer]:
    """Compile every Triton kernel in every setting, for this GPU or else for Hopper; yield how each went."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    capability = torch.cuda.get_device_capability() if gpu_reason() is None else (9, 0)
    target = capability[0] * 10 + capability[1]
    try:
        from lightning_dsv3.ops.triton.common import compile_ahead, kernel_modules

        names = kernel_modules()
    except Exception as error:
        yield {"kernel": "all", "target": f"sm_{target}", "error": _failure(error)}
        return
    for name in names:
        try:
            cases = importlib.import_module(f"lightning_dsv3.ops.triton.{name}").COMPILED
        except Exception as error:
            yield {"kernel": name, "target": f"sm_{target}", "error": _failure(error)}
            continue
        for case in cases:
            start = time.perf_counter()
            answer: Answer = {"kernel": f"{name}: {case.name}", "target": f"sm_{target}"}
            try:
                answer["shared_memory"] = compile_ahead(case, target).metadata.shared
            except Exception as error:
                answer["error"] = _failure(error)
            yield {**answer, "seconds": round(time.perf_counter() - start, 2)}


def _ask(question: Callable[[], Any]) -> Any:
    """Return the answer, or in words why there is none."""
    try:
        return question()
    except Exception as error:
        return _failure(error)


def _failure(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
