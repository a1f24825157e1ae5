"""The machine that a run is planned for: this one, or one of which only the memory is known.

Special here: what a card computes and moves in a second is looked up by its name, from its maker's data sheet and the share of it that
training reached on an H200; an unknown card is measured with one product and two copies.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from tuner.errors import EnvironmentProblem
from tuner.model.host import free_host_memory

GIB = 2**30
RESERVE = GIB // 2
"""Of the device's memory, for the driver and the kernels of its libraries, which torch does not count."""
SPARE = 0.03
"""Share of what is needed that lies between blocks of torch's allocator."""
REACHED = 0.79
"""Large bfloat16 products on an H200: 780 of the 989 TFLOP/s on its data sheet."""
PRODUCTS, ATTENTION, EIGHT_BITS = 0.89, 0.68, 1.5
"""How many times as fast as a large bfloat16 product a step's products, its attention, and its products in 8 bits are."""
START = 3.4e-6
"""Seconds that a kernel takes beside what it computes and moves, when a graph starts it."""
STREAMED = 0.65
"""Elementwise operations there: 3.1 of 4.8 TB/s."""
LAUNCH = 32e-6
"""Seconds that the processor takes for an operation in eager mode: 53,700 of them in 1.69 s beside an H200, 17,100 in 0.53 s."""


@dataclass(frozen=True)
class Card:
    """A data sheet: memory in GiB, dense bfloat16 TFLOP/s with float32 sums, GB/s of its memory, GB/s of copies from pinned memory."""

    name: str
    gib: int
    tflops: float
    memory: float
    link: float


CARDS = (
    Card("B200", 180, 2250, 8000, 53), Card("H200", 141, 989, 4800, 53), Card("H100 PCIe", 80, 756, 2000, 53),
    Card("H100", 80, 989, 3350, 53), Card("A100", 80, 312, 2000, 25), Card("L40S", 48, 362, 864, 25), Card("L40", 48, 181, 864, 25),
    Card("RTX 6000 Ada", 48, 364, 960, 25), Card("A6000", 48, 155, 768, 25), Card("A40", 48, 150, 696, 25),
    Card("RTX 5090", 32, 209, 1792, 53), Card("RTX 4090", 24, 165, 1008, 25), Card("RTX 3090", 24, 71, 936, 25),
    Card("A10", 24, 125, 600, 25), Card("L4", 24, 121, 300, 25), Card("RTX 5080", 16, 113, 960, 53), Card("RTX 4080", 16, 97, 717, 25),
    Card("RTX 4070", 12, 58, 504, 25), Card("RTX 3060", 12, 25, 360, 25),
)  # fmt: skip
"""Longer names before those they contain."""


@dataclass(frozen=True)
class Machine:
    """What a plan has to fit into, in bytes, and how fast it will be."""

    name: str
    memory: int
    """Of the device: all that this process may have."""
    host: int
    """Of the host that is free; 0: not known."""
    flops: float
    """A second, of products."""
    bandwidth: float
    """Bytes a second, of the device's own memory."""
    link: float
    """Bytes a second, from pinned host memory."""
    words: str
    """Where these numbers are from."""
    launch: float = LAUNCH
    """Seconds that the processor takes to start an operation."""
    taken: int = 0
    """Of the device's memory, by other programs; not part of `memory`."""

    @property
    def room(self) -> int:
        """Bytes that tensors may take."""
        return int((self.memory - RESERVE) / (1 + SPARE))


def find_machine(device: torch.device, memory: int = 0, host: int = 0) -> Machine:
    """`memory` and `host`: bytes to plan for in place of what is there. Raises `EnvironmentProblem` without a GPU and a size."""
    host = host or free_host_memory()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        taken = 0 if memory else taken_by_others(device)
        found = described(str(properties.name), (memory or int(properties.total_memory)) - taken, host, device)
        return replace(found, taken=taken)
    if not memory:
        raise EnvironmentProblem(
            "there is no GPU here whose memory could be planned for", where="gpu_memory", remedy="give a size, such as --gpu_memory 24GiB"
        )
    card = min(CARDS, key=lambda known: abs(known.gib - memory / GIB))
    return _of(card, memory, host, "a GPU", f"assumed as fast as a {card.name}")


def taken_by_others(device: torch.device) -> int:
    """Bytes of a CUDA device's memory that other programs hold, such as a desktop; 0 where it is next to nothing."""
    free, total = torch.cuda.mem_get_info(device)
    taken = int(total - free - torch.cuda.memory_reserved(device) - RESERVE)
    return taken if taken > RESERVE // 4 else 0


def described(name: str, memory: int, host: int, device: torch.device) -> Machine:
    """A device by its name, or measured."""
    known = next((card for card in CARDS if card.name.lower() in name.lower()), None)
    if known is not None:
        return _of(known, memory, host, name, f"speed by the data sheet of {known.name}")
    flops, bandwidth, link = measure_speed(device)
    return Machine(name, memory, host, flops, bandwidth, link, "speed measured")


def _of(card: Card, memory: int, host: int, name: str, words: str) -> Machine:
    return Machine(name, memory, host, card.tflops * 1e12 * REACHED, card.memory * 1e9 * STREAMED, card.link * 1e9, words)


def measure_speed(device: torch.device, size: int = 4096) -> tuple[float, float, float]:
    """(operations, bytes on the device, bytes to the device) a second: a product of two matrices of `size` rows, copies of one."""
    pinned = device.type == "cuda"
    left = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    there, here = torch.empty_like(left), torch.empty(size, size, dtype=torch.bfloat16, pin_memory=pinned)
    moved = left.numel() * left.element_size()
    return (
        2 * size**3 / _seconds(lambda: torch.mm(left, left, out=there), device),
        2 * moved / _seconds(lambda: there.copy_(left), device),
        moved / _seconds(lambda: there.copy_(here, non_blocking=True), device),
    )


def _seconds(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The least of some times, after one that warms up."""
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    found = []
    for _ in range(repeats + 1):
        wait()
        began = time.perf_counter()
        work()
        wait()
        found.append(time.perf_counter() - began)
    return max(min(found[1:]), 1e-9)
