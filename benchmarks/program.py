"""What the programs of this folder begin with: their command line, the device, and what a figure must be read with."""

from __future__ import annotations

import argparse
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

GIB = 1024**3


def parser_of(doc: str | None, *, sized: bool = True) -> argparse.ArgumentParser:
    """One with --json, and --size where the program has sizes. `doc`: its docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if sized:
        parser.add_argument("--size", choices=("real", "tiny"), default="real")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser


def find_device() -> torch.device:
    """The GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def begin(size: str = "tiny") -> tuple[torch.device, dict[str, str]]:
    """The device and what describes it, which is printed. Ends the program, with 3, where real size is asked for on a CPU."""
    device = find_device()
    if size == "real" and device.type == "cpu":
        print("--size real needs a GPU; --size tiny runs here", file=sys.stderr)
        raise SystemExit(3)
    facts = {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "python": platform.python_version()}
    facts["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        facts["cuda"] = str(torch.version.cuda)
        facts["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    facts |= {name: version(name) for name in ("torch", "diffusers", "peft", "transformers")}
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
    return device, facts


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
