"""Faster forms of what quantization.py says in plain torch: on a CPU C, or torch's packed operators; on CUDA Triton.

Nothing is compiled or chosen at import. `cpu_backend` chooses at its first call and keeps that for the process;
CHATGLM_KERNELS=c, torch or none forces a choice, for tests and when something is wrong.
"""

import logging
import os
import threading

from . import cuda

__all__ = ["cpu_backend", "cpu_reason", "cuda"]

logger = logging.getLogger(__name__)

_lock = threading.Lock()
_chosen = None  # (backend or None, reason)


def cpu_backend():
    """What multiplies by quantised weights on a CPU, or None for plain torch.

    A `cpu.CpuKernels` or a `torch_packed.TorchPacked`; its `name` says what it is, its `reason` why it was taken.
    Raises ValueError if CHATGLM_KERNELS is wrong or names something that this machine cannot do.
    """
    return _choice()[0]


def cpu_reason() -> str:
    """Why `cpu_backend` is what it is, in one clause; also where it is None."""
    return _choice()[1]


def _choice():
    global _chosen
    if _chosen is None:
        with _lock:  # two threads must not compile at the same time
            if _chosen is None:
                _chosen = choose(os.environ.get("CHATGLM_KERNELS") or "auto")
                logger.info("CPU kernels: %s (%s)", getattr(_chosen[0], "name", "plain torch"), _chosen[1])
    return _chosen


def choose(setting: str):
    """The backend (None for plain torch) and the reason for it; setting as CHATGLM_KERNELS, see `cpu_backend`."""
    from . import cpu, torch_packed

    if setting not in ("auto", "c", "torch", "none"):
        raise ValueError(f"CHATGLM_KERNELS must be auto, c, torch or none, got {setting}")
    reason = f"CHATGLM_KERNELS={setting}"
    if setting in ("auto", "c"):
        try:
            backend = cpu.load()
            return backend, backend.reason
        except OSError as error:  # cpu.BuildError, or no space for temporary files
            if setting == "c":
                raise ValueError(f"CHATGLM_KERNELS=c is not possible here: {error}") from error
            reason = f"no C kernels: {error}"
    if setting in ("auto", "torch"):
        problem = torch_packed.problem()
        if problem is None:
            backend = torch_packed.TorchPacked(reason)
            return backend, backend.reason
        if setting == "torch":
            raise ValueError(f"CHATGLM_KERNELS=torch is not possible here: {problem}")
        reason = f"{reason}; {problem}"
    return None, reason
