"""What every file layout of adapters has to keep to."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tuner.errors import CheckpointError
from tuner.interfaces.services import AdapterState, CheckpointFormat
from tuner.plugins.record import Kind
from tuner.testing.conformance import Conformance, check


class FormatConformance(Conformance):
    """Subclass it, and say where the format is and which modules it can name:

    class TestMine(FormatConformance):
        plugin = tuner_mine.plugin
        component = "mine"
        modules = ("transformer_blocks.0.attn.to_q", "proj_out")
    """

    kind: ClassVar[Kind] = "checkpoint_format"
    modules: ClassVar[tuple[str, ...]] = ("blocks.0.to_q", "blocks.1.to_v")
    """Names of linear layers of a model that the format is for."""

    def layout(self) -> CheckpointFormat:
        """The format, built as a run builds it."""
        built = self.record().load()()  # type: ignore[operator]
        assert isinstance(built, CheckpointFormat)
        return built

    def adapter(self) -> AdapterState:
        """Rank 4, alpha 6, in float32."""
        draws = torch.Generator().manual_seed(0)
        pairs = {name: (torch.randn(4, 12, generator=draws), torch.randn(10, 4, generator=draws)) for name in self.modules}
        return AdapterState(pairs, rank=4, alpha=6.0, targets=self.modules)

    def test_its_name_is_the_one_it_is_registered_with(self) -> None:
        name = self.layout().name
        check(name == self.component, f"the format's name is {name!r}, the component's {self.component!r}")

    def test_what_is_written_is_read_back(self) -> None:
        """By what the adapter does to each weight, B · A · alpha / rank: a format may fold the scale in."""
        with _folder() as folder:
            path, adapter = folder / "lora.safetensors", self.adapter()
            self.layout().write(path, adapter, {})
            back = self.layout().read(path)
        check(
            set(back.weights) == set(adapter.weights), f"modules come back as {sorted(back.weights)} instead of {sorted(adapter.weights)}"
        )
        for name in adapter.weights:
            check(
                torch.allclose(_product(back, name), _product(adapter, name), rtol=1e-5, atol=1e-6),
                f"{name}: B · A · alpha / rank is another one after reading: the adapter would act at another strength",
            )

    def test_numbers_keep_their_dtype(self) -> None:
        with _folder() as folder:
            path, adapter = folder / "lora.safetensors", self.adapter()
            halves = {name: (a.to(torch.bfloat16), b.to(torch.bfloat16)) for name, (a, b) in adapter.weights.items()}
            self.layout().write(path, replace(adapter, weights=halves), {})
            kinds = {tensor.dtype for pair in self.layout().read(path).weights.values() for tensor in pair}
        check(kinds == {torch.bfloat16}, f"an adapter in bfloat16 comes back as {kinds}: files would double in size or lose bits")

    def test_only_its_own_files_are_accepted(self) -> None:
        layout = self.layout()
        with _folder() as folder:
            own = folder / "lora.safetensors"
            layout.write(own, self.adapter(), {})
            check(layout.accepts(own), "it does not accept the file that it wrote")
            for name, path in _others(folder).items():
                check(not layout.accepts(path), f"it accepts {name}: `tuner export` would read that file with this layout")

    def test_damaged_files_are_errors_that_users_understand(self) -> None:
        with _folder() as folder:
            for name, path in _others(folder).items():
                try:
                    self.layout().read(path)
                except CheckpointError:
                    continue
                raise AssertionError(f"reading {name} raises no CheckpointError")
            whole = folder / "lora.safetensors"
            self.layout().write(whole, self.adapter(), {})
            with safe_open(whole, framework="pt") as file:
                kept = {key: file.get_tensor(key) for key in list(file.keys())[1:]}
                save_file(kept, folder / "half.safetensors", metadata=file.metadata())
            try:
                self.layout().read(folder / "half.safetensors")
            except CheckpointError:
                return
            raise AssertionError("a file that lost a tensor is read without a CheckpointError: half an adapter would be used")

    def test_the_file_says_no_more_than_it_was_told(self) -> None:
        with _folder() as folder:
            path = folder / "lora.safetensors"
            self.layout().write(path, self.adapter(), {"base_model": "org/model@0123"})
            content, left = path.read_bytes(), sorted(p.name for p in folder.iterdir())
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
        check(facts.get("base_model") == "org/model@0123", f"the facts that it was given are not in the metadata: {facts}")
        check(str(folder).encode() not in content, "the file holds the path that it was written to: people publish these files")
        check(left == ["lora.safetensors"], f"beside the file it left {left}")


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tuner-format-") as folder:
        yield Path(folder)


def _product(adapter: AdapterState, name: str) -> Tensor:
    down, up = adapter.weights[name]
    return up.double() @ down.double() * (adapter.alpha / adapter.rank)


def _others(folder: Path) -> dict[str, Path]:
    """Files that are no adapter."""
    text, other, cut = folder / "notes.safetensors", folder / "other.safetensors", folder / "cut.safetensors"
    text.write_text("no tensors", encoding="utf-8")
    save_file({"some.other.tensor": torch.zeros(2)}, other)
    cut.write_bytes(other.read_bytes()[:12])
    return {
        "a text file": text,
        "a file with other tensors": other,
        "a file that was cut short": cut,
        "a file that is missing": folder / "no",
    }
