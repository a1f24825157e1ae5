"""Kernels of our own on Triton's interpreter, where there is no card to run them on."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch

from tuner.model import kernels

PROGRAM = """
import importlib, json, sys, torch
from tuner.model import kernels
module = importlib.import_module(sys.argv[1])
cpu = torch.device("cpu")
print(json.dumps([module.differences(cpu), kernels.problem_on(module, cpu)]))
"""


def proof_of(module: str) -> tuple[dict[str, float], str]:
    """Its `differences` and what keeps it from being used: on the card, or else on the interpreter. Skips where Triton is not installed."""
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds")
    if torch.cuda.is_available():
        found, device = importlib.import_module(module), torch.device("cuda")
        return found.differences(device), kernels.problem_on(found, device)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # read when the kernels are made
    done = subprocess.run([sys.executable, "-c", PROGRAM, module], env=environment, capture_output=True, text=True, check=True)
    differences, problem = json.loads(done.stdout.splitlines()[-1])
    return differences, problem
