"""Bytes of files arrive where they are wanted, however they are cut, and what goes wrong is said."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tuner.errors import CheckpointError
from tuner.model import reading
from tuner.model.reading import allocate, cast_empty, memory_for, read_into, staged
from tuner.model.stored import StoredTensor, read_header

CPU, META = torch.device("cpu"), torch.device("meta")
KINDS = (torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int16, torch.uint8, torch.bool)


@pytest.fixture(params=[64, 1 << 20], ids=["cut into pieces", "read at once"])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(reading, "PIECE", request.param)
    return int(request.param)


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """Every kind, large ones, single numbers and one without any."""
    draw = torch.Generator().manual_seed(0)
    random = {f"{kind}".partition(".")[2]: torch.randint(0, 2, (7, 33), generator=draw).to(kind) for kind in KINDS}
    return {**random, "one": torch.tensor(3.5), "none": torch.empty(0, 4), "large": torch.randn(300, 50, generator=draw)}


def stored(tensors: dict[str, Tensor], folder: Path) -> dict[str, StoredTensor]:
    """The tensors in two files."""
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"{number}.safetensors")
    return {key: found for number in (0, 1) for key, found in read_header(folder / f"{number}.safetensors").tensors.items()}


def room(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty_like(tensor) for name, tensor in tensors.items()}


def assert_equal(found: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        assert torch.equal(found[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name


def test_every_byte_arrives(piece: int, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    places, found = stored(tensors, tmp_path), room(tensors)
    read_into((places[name], found[name]) for name in tensors)
    assert_equal(found, tensors)


def test_neighbours_are_read_with_one_call(tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places, found, calls = stored(tensors, tmp_path), room(tensors), list[int]()
    preadv = os.preadv

    def counted(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        calls.append(len(buffers))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    read_into((places[name], found[name]) for name in tensors)
    assert len(calls) == 2
    assert sum(calls) == len(tensors) - 1


def test_a_file_system_may_bring_little_at_a_time(
    piece: int, tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places, found = stored(tensors, tmp_path), room(tensors)
    monkeypatch.setattr(os, "preadv", _seven_bytes)
    read_into((places[name], found[name]) for name in tensors)
    assert_equal(found, tensors)


def _seven_bytes(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
    content = os.pread(descriptor, min(7, len(buffers[0])), offset)
    buffers[0][: len(content)] = content
    return len(content)


def test_a_file_that_was_cut_short_is_named(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    places, found = stored(tensors, tmp_path), room(tensors)
    os.truncate(tmp_path / "1.safetensors", (tmp_path / "1.safetensors").stat().st_size - 3)
    with pytest.raises(CheckpointError, match=r"1\.safetensors: cannot be read: the file ended early"):
        read_into((places[name], found[name]) for name in tensors)


def test_memory_of_another_size_is_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="large: 60000 bytes are stored, 8 are asked for"):
        read_into([(stored(tensors, tmp_path)["large"], torch.empty(2))])


def test_a_file_may_be_longer_than_memory(tmp_path: Path) -> None:
    """Most of it is a hole, of which nothing is read and for which no address space is asked."""
    hole, path = 1 << 40, tmp_path / "long.safetensors"
    entries = {
        "hole": {"dtype": "U8", "shape": [hole], "data_offsets": [0, hole]},
        "end": {"dtype": "U8", "shape": [3], "data_offsets": [hole, hole + 3]},
    }
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.seek(hole, os.SEEK_CUR)
        file.write(b"end")
    target = torch.empty(3, dtype=torch.uint8)
    read_into([(read_header(path).tensors["end"], target)])
    assert bytes(target.tolist()) == b"end"


# --- through staging ---------------------------------------------------------------------------------------------
def test_what_goes_through_staging_is_the_same(piece: int, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    places, found = stored(tensors, tmp_path), room(tensors)
    pieces = list(reading._pieces([(places[name], found[name]) for name in tensors]))
    assert piece > 64 or len(pieces) > 4 * reading.THREADS  # every buffer is used several times
    with reading._Files() as files, ThreadPoolExecutor(reading.THREADS) as threads:
        staged(pieces, CPU, files.read, threads)
    assert_equal(found, tensors)


def test_a_buffer_is_read_into_only_when_it_has_been_copied(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each read is of a piece for which the one that was in its buffer before has been sent."""
    monkeypatch.setattr(reading, "PIECE", 64)
    places, found = stored(tensors, tmp_path), room(tensors)
    pieces = list(reading._pieces([(places[name], found[name]) for name in tensors]))
    sent, early = list[int](), list[int]()
    send = reading._Staging.send

    def noted(staging: reading._Staging, piece: reading.Piece) -> None:
        send(staging, piece)
        sent.append(_number(pieces, piece))

    monkeypatch.setattr(reading._Staging, "send", noted)
    with reading._Files() as files, ThreadPoolExecutor(reading.THREADS) as threads:

        def read(piece: reading.Piece, buffers: list[memoryview]) -> None:
            before = _number(pieces, piece) - 2 * reading.THREADS
            if before >= 0 and before not in sent:
                early.append(before)
            files.read(piece, buffers)

        staged(pieces, CPU, read, threads)
    assert sent == list(range(len(pieces)))
    assert not early


def _number(pieces: Sequence[reading.Piece], piece: reading.Piece) -> int:
    return next(number for number, each in enumerate(pieces) if each is piece)


def test_what_goes_wrong_in_a_thread_is_raised(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    places, found = stored(tensors, tmp_path), room(tensors)
    pieces = list(reading._pieces([(places[name], found[name]) for name in tensors]))
    os.truncate(tmp_path / "0.safetensors", 100)
    with pytest.raises(CheckpointError, match=r"0\.safetensors"), reading._Files() as files, ThreadPoolExecutor(2) as threads:
        staged(pieces, CPU, files.read, threads)


# --- modules without memory --------------------------------------------------------------------------------------
def empty() -> nn.Module:
    with META:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_only_what_has_no_memory_is_given_some() -> None:
    module = empty()
    weight = nn.Parameter(torch.ones(4, 3), requires_grad=False)
    module[0].weight = weight
    found = memory_for(module, module.state_dict(), lambda name: torch.bfloat16 if "weight" in name else torch.float64, CPU)
    assert found["0.weight"] is weight
    assert {name: tensor.dtype for name, tensor in found.items() if name != "0.weight"} == {
        name: torch.bfloat16 if "weight" in name else torch.float64 for name in module.state_dict() if name != "0.weight"
    }
    assert all(found[name].data_ptr() == tensor.data_ptr() for name, tensor in module.state_dict().items())
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_numbers_are_cast_and_counts_are_not() -> None:
    module = empty()
    cast_empty(module, torch.bfloat16)
    allocate(module, CPU)
    assert {tensor.dtype for name, tensor in module.state_dict().items() if "num_batches" not in name} == {torch.bfloat16}
    assert module[1].num_batches_tracked.dtype == torch.int64
    assert not any(tensor.is_meta for tensor in module.state_dict().values())
