"""What `tuner doctor` finds of the machine: torch and its devices, memory, disk, codecs, the model hub.

Special here: what the driver knows is asked of `nvidia-smi`, so that a card which torch cannot use is seen all the same.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

from tuner.doctor.findings import Row
from tuner.doctor.software import CORE_DISTRIBUTION, installed_version, needs
from tuner.model.host import GROUP, free_host_memory, memory_limit

GIB = 2**30
SHARED = Path("/dev/shm")
LITTLE_MEMORY = 8 * GIB
"""Of the host: below it even encoders that are streamed will hardly fit."""
LITTLE_SHARED = GIB
NO_DISK, LITTLE_DISK = GIB, 50 * GIB
"""A checkpoint of an adapter needs less than the first; large models are downloaded as 40 GB and more."""
PINNED = 64 * 2**20
"""Bytes that are page-locked for a try."""
PATIENCE = 10.0
"""Seconds that the hub has to answer."""
FP8_KERNELS = "tuner.model.fp8_kernels"
KERNELS = ("tuner.model.fused_kernels", "tuner.builtins.row_scale", FP8_KERNELS)
BF16 = (8, 0)
"""Compute capability from which on products are computed in bfloat16."""
DECODERS: Mapping[str, tuple[str, ...]] = {
    "h264": ("h264",), "hevc": ("hevc",), "vp9": ("vp9", "libvpx-vp9"), "av1": ("libdav1d", "libaom-av1"), "prores": ("prores",),
    "aac": ("aac",), "mp3": ("mp3", "mp3float"), "flac": ("flac",), "opus": ("opus", "libopus"), "vorbis": ("vorbis",),
}  # fmt: skip
"""Codec -> decoders in software, any of which does."""


# --- torch and its devices ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Card:
    """A GPU as its driver sees it."""

    name: str
    driver: str
    memory: int
    """Bytes; 0: not known."""


def driver_cards() -> list[Card]:
    """Whatever torch can do with them. Empty where there is no NVIDIA driver."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return [Card("an NVIDIA GPU", "", 0) for _ in Path("/proc/driver/nvidia/gpus").glob("*")]
    return [card for line in done.stdout.splitlines() if (card := _card(line)) is not None]


def _card(line: str) -> Card | None:
    cells = [cell.strip() for cell in line.rsplit(",", 2)]
    if len(cells) != 3:
        return None
    return Card(cells[0], cells[1], int(cells[2]) * 2**20 if cells[2].isdigit() else 0)


def torch_rows() -> Iterator[Row]:
    """The library and what it was built for."""
    wanted = next(need for need in needs(CORE_DISTRIBUTION) if need.requirement.name == "torch")
    try:
        import torch
    except (ImportError, OSError) as error:
        remedy = wanted.pip.replace("install", "install --force-reinstall")
        yield Row("torch", "torch", "problem", f"cannot be imported: {' '.join(str(error).split())}", remedy)
        return
    found = f"{torch.__version__}, {built_for(torch.version.cuda, torch.version.hip)}"
    if wanted.met:
        yield Row("torch", "torch", "ok", found)
    else:
        yield Row("torch", "torch", "problem", f"{found}; {wanted.requirement.specifier} is needed", wanted.pip)
    yield from device_rows(torch, wanted.pip)


def built_for(cuda: str | None, hip: str | None) -> str:
    """In words."""
    return f"built for CUDA {cuda}" if cuda else f"built for ROCm {hip}" if hip else "built for the processor alone"


def device_rows(torch: Any, pip: str) -> Iterator[Row]:
    """Each GPU, or why there is none; `pip`: what installs torch."""
    cards = driver_cards()
    if not torch.cuda.is_available():
        yield unused_row(cards, torch.version.cuda, os.environ.get("CUDA_VISIBLE_DEVICES"), pip)
        return
    driver = f", driver {cards[0].driver}" if cards and cards[0].driver else ""
    for index in range(torch.cuda.device_count()):
        yield _gpu_row(torch, index, driver)
    yield from _cuda_rows(torch)


def unused_row(cards: list[Card], cuda: str | None, visible: str | None, pip: str) -> Row:
    """Why there is no GPU to train on. `visible`: CUDA_VISIBLE_DEVICES; `pip`: what installs torch."""
    if not cards:
        return Row("gpu", "gpu", "note", "none: training runs on the processor, which is for small models and for trying things out")
    there = f"{cards[0].name} is there, but "
    if visible is not None and (not visible or visible.startswith("-")):
        return Row("gpu", "gpu", "note", f"{there}CUDA_VISIBLE_DEVICES={visible!r} hides it", "unset CUDA_VISIBLE_DEVICES")
    if cuda is None:
        remedy = pip.replace("install", "install --force-reinstall") + " (with the index that your platform's CUDA build comes from)"
        return Row("gpu", "gpu", "problem", f"{there}this build of torch is for the processor alone", remedy)
    driver = f"its driver {cards[0].driver}" if cards[0].driver else "its driver"
    remedy = "update the driver, or install a torch that is built for an older CUDA"
    return Row("gpu", "gpu", "problem", f"{there}torch cannot use it: {driver} may be too old for CUDA {cuda}", remedy)


def _gpu_row(torch: Any, index: int, driver: str) -> Row:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    free, total = torch.cuda.mem_get_info(index)
    name, bf16 = f"gpu {index}", "bf16" if capability >= BF16 or torch.version.hip else "no bf16"
    found = f"{properties.name}, {gib(total)}, {gib(free)} free, compute capability {capability[0]}.{capability[1]}, {bf16}{driver}"
    if not has_kernels(capability, torch.cuda.get_arch_list()):
        remedy = "install a build of torch for this GPU"
        return Row("gpu", name, "problem", f"{found}; this build of torch has no kernels for it", remedy)
    if bf16 == "no bf16":
        return Row("gpu", name, "note", found, "set mixed_precision to no, which takes twice the memory")
    if free < 0.9 * total:
        return Row("gpu", name, "note", f"{found}; {gib(total - free)} are taken", "`nvidia-smi` lists the programs that hold it")
    return Row("gpu", name, "ok", found)


def has_kernels(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether a build for these (`sm_90`, `compute_90`) runs there: machine code of the same generation, or code of an older one that the
    driver translates. True where the build does not say."""
    found = re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(architectures))
    versions = [(kind, (int(major), int(minor))) for kind, major, minor in found]
    fitting = (v <= capability and (kind == "compute" or v[0] == capability[0]) for kind, v in versions)
    return not versions or any(fitting)


def _cuda_rows(torch: Any) -> Iterator[Row]:
    """What beside a GPU matters only with one."""
    triton = installed_version("triton") or installed_version("pytorch-triton-rocm")
    if triton:
        yield Row("torch", "triton", "ok", triton)
        properties = torch.cuda.get_device_properties(0)
        yield kernel_row(0, (properties.major, properties.minor))
    else:
        yield Row("torch", "triton", "note", "not installed: steps take longer without its kernels", "pip install triton")
    try:
        torch.empty(PINNED, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        yield Row("host", "page-locked memory", "note", f"{gib(PINNED)} cannot be locked: {reason}", "raise `ulimit -l`; in a container, "
                  "start it with --ulimit memlock=-1")  # fmt: skip


def kernel_row(index: int, capability: tuple[int, int]) -> Row:
    """Whether our own kernels can be built for GPU `index`, and compute what they should there."""
    import torch

    from tuner.model import fp8, kernels

    device = torch.device("cuda", index)
    tried = [name for name in KERNELS if capability >= fp8.CAPABILITY or name != FP8_KERNELS]
    problems = dict.fromkeys(filter(None, (kernels.problem_on(importlib.import_module(name), device) for name in tried)))
    if not problems:
        return Row("torch", "own kernels", "ok", "built here, and compute what they should")
    remedy = "install a C compiler, such as gcc" if any("cannot be built" in problem for problem in problems) else "report it, with the GPU"
    return Row("torch", "own kernels", "note", f"steps take longer without them: {'; '.join(problems)}", remedy)


def gib(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.0f} MiB"


# --- the host ----------------------------------------------------------------------------------------------------
def core_rows() -> Iterator[Row]:
    """Processors that this process may use."""
    there, quota = os.cpu_count() or 1, _quota()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else there
    limit = f", a container's share of {quota:g}" if quota else ""
    few = min(usable, quota or usable) < 2
    yield Row("host", "cores", "note" if few else "ok", f"{usable} of {there}{limit}" + (": decoding clips will be slow" if few else ""))


def _quota() -> float:
    """Processors that a container, a version 2 control group, may use; 0: no limit."""
    with contextlib.suppress(OSError, ValueError):
        used, period = (GROUP / "cpu.max").read_text().split()
        return int(used) / int(period)
    return 0.0


def memory_rows() -> Iterator[Row]:
    """Host memory: there, allowed, free."""
    import psutil  # type: ignore[import-untyped]

    total, free, limit = psutil.virtual_memory().total, free_host_memory(), memory_limit()
    least = f", a container's limit of {gib(limit)}" if 0 < limit < total else ""
    found = f"{gib(total)}{least}, {gib(free)} free"
    if free < LITTLE_MEMORY:
        yield Row("host", "memory", "note", f"{found}: little for large models", "end other programs, or raise the container's limit")
    else:
        yield Row("host", "memory", "ok", found)


def locked_rows() -> Iterator[Row]:
    """What may be page-locked."""
    import resource

    allowed, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "unlimited" if allowed == resource.RLIM_INFINITY else f"{gib(allowed)}; what a GPU's driver locks does not count"
    yield Row("host", "locked memory", "ok", f"{limit} (ulimit -l)")


def shared_rows() -> Iterator[Row]:
    """Several processes of a machine exchange their gradients through it."""
    if not SHARED.is_dir():
        return
    size = shutil.disk_usage(SHARED).total
    if size < LITTLE_SHARED:
        remedy = "start the container with --shm-size 8g if you train on several GPUs"
        yield Row("host", str(SHARED), "note", f"{gib(size)}: little for several GPUs", remedy)
    else:
        yield Row("host", str(SHARED), "ok", gib(size))


def disk_rows(folders: Mapping[str, Path]) -> Iterator[Row]:
    """`folders`: what it is for -> where it is, or will be made."""
    from huggingface_hub import constants

    for name, path in {**folders, "hub cache": Path(constants.HF_HUB_CACHE)}.items():
        yield disk_row(name, path)


def disk_row(name: str, path: Path) -> Row:
    """Whether a folder can be written, and how much."""
    there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if not there.is_dir():
        return Row("disk", name, "problem", f"{there} is a file, no folder", f"name another folder for {name}", 9)
    if not _takes_files(there):
        return Row("disk", name, "problem", f"{path}: {there} cannot be written", "allow writing there, or name another folder", 9)
    free = shutil.disk_usage(there).free
    found = f"{path}: {gib(free)} free"
    if free < NO_DISK:
        return Row("disk", name, "problem", found, "make room, or name a folder on another disk", 9)
    if free < LITTLE_DISK:
        return Row("disk", name, "note", f"{found}: large models are downloaded as 40 GB and more")
    return Row("disk", name, "ok", found)


def _takes_files(folder: Path) -> bool:
    """Tried out: root may do everything, and not everywhere."""
    try:
        with TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


# --- codecs ------------------------------------------------------------------------------------------------------
def media_rows() -> Iterator[Row]:
    """What clips can be read, and whether a sample can be written: one is."""
    import av

    missing = [codec for codec, names in DECODERS.items() if not any(has_codec(name, "r") for name in names)]
    library = f"PyAV {av.__version__}, FFmpeg {av.ffmpeg_version_info}"
    there = ", ".join(codec for codec in DECODERS if codec not in missing)
    remedy = 'pip install --force-reinstall "av"' if missing else ""
    lacking = f"; not {', '.join(missing)}" if missing else ""
    yield Row("media", "reads", "note" if missing else "ok", f"{there}{lacking} ({library})", remedy)
    with TemporaryDirectory() as folder:
        yield _written_row(Path(folder) / "try.mp4")


def has_codec(name: str, mode: str) -> bool:
    """`mode`: "r" for a decoder, "w" for an encoder."""
    import av.codec

    try:
        av.codec.Codec(name, mode)  # type: ignore[arg-type]
    except ValueError:
        return False
    return True


def _written_row(path: Path) -> Row:
    """Two grey frames with silence, written and read again."""
    import av
    import torch

    from tuner.data.media import probe, write_mp4
    from tuner.errors import TunerError
    from tuner.interfaces.encoders import AudioClip, VideoClip

    try:
        write_mp4(path, VideoClip(torch.full((2, 64, 64, 3), 128, dtype=torch.uint8), 25.0), AudioClip(torch.zeros(2, 4800), 48000, 4800))
        facts = probe(path)
    except (TunerError, av.FFmpegError, ValueError) as error:
        return Row("media", "writes", "note", f"no mp4: {error}", 'samples cannot be made; pip install --force-reinstall "av"')
    return Row("media", "writes", "ok", f"mp4 with {facts.codec} and sound")


# --- the model hub -----------------------------------------------------------------------------------------------
def hub_rows(online: bool) -> Iterator[Row]:
    """Token and mode; whether the hub answers only where that is asked."""
    from huggingface_hub import constants, get_token

    token = get_token()
    words = "there is one" if token else "none: enough for what is public, not for gated models and uploads"
    yield Row("hub", "token", "ok" if token else "note", words, "" if token else "run `hf auth login`, or set HF_TOKEN")
    if constants.HF_HUB_OFFLINE:
        yield Row("hub", "mode", "note", "offline (HF_HUB_OFFLINE): only what lies on this disk is used")
    elif online:
        yield _answer_row(bool(token))


def _answer_row(token: bool) -> Row:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    from tuner.model.licence import NETWORK_ERRORS

    remedy = "check the network and HTTPS_PROXY; without one, set HF_HUB_OFFLINE=1 and name files on this disk"
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)  # once: the client itself tries for half a minute
        known = f", and knows your token as {HfApi().whoami()['name']}'s" if token else ""
        return Row("hub", "answer", "ok", f"it answers{known}")
    except NETWORK_ERRORS as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            return Row("hub", "answer", "problem", "it does not accept the token", "run `hf auth login` again", 8)
        reason = f"status {status}" if status else type(error).__name__
        return Row("hub", "answer", "note", f"it cannot be reached ({reason})", remedy)
