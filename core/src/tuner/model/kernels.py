"""Kernels of our own for CUDA devices, which have to show on the very device that they compute their formulas before they are used."""

from __future__ import annotations

import functools
import importlib
import logging
import subprocess
from types import ModuleType

import torch

log = logging.getLogger(__name__)


@functools.cache
def proven(module: str, index: int) -> ModuleType | None:
    """The kernels in `module` if CUDA device `index` computes with them what it should; else None, and that is said once.

    The module has `differences(device)`: kernel -> relative distance to its formula; and `LIMIT`, which all stay below. It is asked for in
    the first steps of a run, before any graph is captured.
    """
    try:
        kernels = importlib.import_module(module)
    except ImportError as error:
        log.info("%s is not used: %s", module, error)
        return None
    problem = problem_on(kernels, torch.device("cuda", index))
    if problem:
        log.warning("%s is not used, so steps take longer: %s", module, problem)
        return None
    return kernels


def problem_on(kernels: ModuleType, device: torch.device) -> str:
    """What keeps the kernels from being used on `device`; empty: they compute their formulas there."""
    try:
        # Asked from inside a step, whatever mode that is in.
        with torch.inference_mode(False), torch.enable_grad():
            wrong = [name for name, error in kernels.differences(device).items() if not error <= kernels.LIMIT]
    except _faults() as error:
        return f"the kernels cannot be built here: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return f"the kernels compute something else here: {', '.join(wrong)}" if wrong else ""


def _faults() -> tuple[type[Exception], ...]:
    """What a compiler, its tool chain or a driver may raise."""
    common = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, OSError, subprocess.SubprocessError)
    try:
        from triton.errors import TritonError
    except ImportError:
        return common
    return (*common, TritonError)
