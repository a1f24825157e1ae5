"""A working folder with clips, and runs in it: the whole way of `tuner train`, or step by step.

    project = TinyProject.make(tmp_path, my_plugin.plugin)
    project.train(my_weight=0.5, output_dir="run")       # the tiny family, in a tenth of a second
    trial = project.trial(my_weight=0.5)                 # the same objects, in the hands of the test
    trial.steps(3)

Keys are those of config.json. `DEFAULTS` makes runs small; any key can be given another value.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load, save
from torch import Tensor

from tuner.config.resolve import Settings, resolve
from tuner.config.settings import TrainSettings
from tuner.data.dataset import TrainingSet
from tuner.data.prefetch import Prefetcher
from tuner.interfaces.family import Batch, Noise
from tuner.plugins.loader import ONLY, load_plugins
from tuner.plugins.registry import Registry
from tuner.testing.clips import write_clip
from tuner.train.assemble import Assembly, assemble
from tuner.train.loop import Loop
from tuner.train.plan import Plan, with_manifest
from tuner.train.planning import make_plan
from tuner.train.saving.checkpoint import flatten_state
from tuner.train.saving.results import write_adapter_files
from tuner.train.session import Outcome, Silence, encode_dataset, train
from tuner.train.signals import StopRequests
from tuner.train.step import train_step

DEFAULTS: Mapping[str, object] = {
    "model_family": "tiny-mixing", "mixed_precision": "no", "lora_rank": 2, "lora_alpha": 4, "optimizer": "adamw", "learning_rate": 1e-2,
    "max_grad_norm": 0.0, "train_batch_size": 2, "max_train_steps": 8, "resolution": 64, "validation_disable": True,
}  # fmt: skip
"""Small runs in float32. Gradients are not clipped: their norm would couple what is trained apart."""
CLIPS: Mapping[str, tuple[int, bool]] = {"amber": (9, True), "birch": (9, True), "cedar": (13, True), "dusk": (13, False)}
"""Name -> frames, and whether it has sound: batches of two sizes, one with a silent clip."""


def registry(*plugins: ModuleType | object) -> Registry:
    """The built-ins, the tiny family and the given plugin modules; nothing else that is installed.

    A plugin may be any object with hook implementations as attributes.
    """
    named = [(getattr(plugin, "__name__", type(plugin).__name__) + f"-{index}", plugin) for index, plugin in enumerate(plugins)]
    found = load_plugins({ONLY: ",".join(["testing", *(name for name, _ in named)])}, named)
    broken = [record for record in found.plugins if record.status == "failed"]
    assert not broken, f"the plugin cannot be loaded: {broken[0].reason}"
    return found


@dataclass(frozen=True)
class TinyProject:
    """A folder with clips, a cache, and the plugins that runs in it know."""

    folder: Path
    registry: Registry

    @staticmethod
    def make(folder: Path, *plugins: ModuleType | object) -> TinyProject:
        """Writes the clips of `CLIPS` into `folder`/clips, unless they are there."""
        for name, (frames, sound) in CLIPS.items():
            if not (folder / "clips" / f"{name}.mp4").exists():
                write_clip(folder / "clips", name, frames=frames, sound=sound)
        return TinyProject(folder, registry(*plugins))

    def settings(self, **keys: object) -> Settings:
        """`DEFAULTS` with changes; a value of None takes a key out. Raises `ConfigError`."""
        places = {"data": str(self.folder / "clips"), "cache_dir": str(self.folder / "cache")}
        given = {**DEFAULTS, **places, **keys}
        given["output_dir"] = str(self.folder / str(keys.get("output_dir", "out")))
        flags = {key: value for key, value in given.items() if value is not None}
        return resolve(self.registry.option_types, config_file=None, flags=flags, environ={})

    def plan(self, **keys: object) -> Plan:
        """The plan of a run on the CPU. Raises what speaks against the run."""
        return make_plan(self.registry, self.settings(**keys), torch.device("cpu"))

    def train(self, **keys: object) -> Outcome:
        """The whole way, from plan to files, in `folder`/`output_dir`."""
        return train(self.registry, self.settings(**keys), Silence())

    def metrics(self, output_dir: str = "out") -> list[Mapping[str, float]]:
        """The rows of metrics.jsonl."""
        return [json.loads(line) for line in (self.folder / output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]

    def trial(self, **keys: object) -> Trial:
        """A run whose steps the test makes itself. Encodes what the cache lacks, loads the model, attaches everything."""
        plan = self.plan(**keys)
        summary = encode_dataset(plan, Silence())
        return Trial(with_manifest(plan, summary.manifest))


class Trial:
    """A run in the hands of a test: assembled as `tuner train` does it, nothing written."""

    def __init__(self, plan: Plan) -> None:
        train_settings = plan.settings.get(TrainSettings)
        self.plan = plan
        self.assembly: Assembly = assemble(plan, plan.context.device)
        self.rows: list[Mapping[str, float]] = []
        """Losses of each step, as metrics.jsonl has them."""
        dataset = TrainingSet(plan.manifest, plan.encoders, train_settings.train_batch_size, train_settings.seed)
        self._loop = Loop(plan, self.assembly, dataset, self._note, lambda step: None, StopRequests(lambda text: None))
        self._done = 0

    def _note(self, step: int, row: Mapping[str, float]) -> None:
        self.rows.append({name: value for name, value in row.items() if name not in ("seconds", "samples", "lr")})

    def steps(self, count: int = 1) -> None:
        """Optimizer steps, with everything that belongs to them. Raises `NumericError` for a loss that is not finite."""
        accumulation = self._loop.accumulation
        with Prefetcher(self._loop.prepare, self._done * accumulation, depth=0) as feed:
            for _ in range(count):
                self._loop.step(self._done, feed)
                self._done += 1
        self._loop.flush()

    def batch(self, index: int = 0) -> tuple[Batch, Noise]:
        """Batch number `index` of the run, with its draws."""
        item = self._loop.prepare(index)
        return item.batch, item.noise

    def loss(self, batch: Batch, noise: Noise) -> Tensor:
        """Forward pass and losses of one batch, without `begin_step`; shape (), with the graph."""
        return train_step(self.assembly.training, batch, noise, self._done).loss

    def tried(self, batch: Batch, noise: Noise) -> Tensor:
        """The loss of a batch, shape (), after a whole pass forward and back whose gradients are dropped."""
        loss = self.loss(batch, noise)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        self.drop_gradients()
        return loss.detach()

    def drop_gradients(self) -> None:
        """Leaves none, in the model or where the optimizer finds them."""
        self.assembly.masters.collect()
        for one in self.assembly.masters.optimized():
            one.grad = None

    def weights(self) -> dict[str, Tensor]:
        """Copies of the trained weights, modules of regularizers included."""
        return {name: tensor.clone() for name, tensor in self.assembly.masters.state().items()}

    def gradients(self) -> dict[str, Tensor]:
        """After one step with the default optimizer: its first moments, which are gradients times a constant."""
        return {name: tensor for name, tensor in load(self.state()).items() if name.endswith("exp_avg")}

    def frozen(self) -> dict[str, Tensor]:
        """Copies of the model's frozen weights, brought back from wherever they are kept."""
        self.assembly.session.materialize()
        named = self.assembly.training.model.named_parameters()
        return {name: parameter.detach().cpu().clone() for name, parameter in named if not parameter.requires_grad}

    def state(self) -> bytes:
        """What a checkpoint keeps, as bytes in its file format: weights, optimizer, regularizers."""
        optimizer, _ = flatten_state(self.assembly.optimizer.state_dict())
        parts = {"weights": self.assembly.masters.state(), "optimizer": optimizer}
        parts |= {f"regularizer-{r.name}": dict(r.state_dict()) for r in self.assembly.regularizers}
        named = {f"{part}/{name}": tensor.contiguous().clone() for part, held in parts.items() for name, tensor in held.items()}
        content: bytes = save(named)
        return content

    def go_on_from(self, other: Trial) -> None:
        """Takes over the state of another trial, through bytes, as a resumed run does; its next step is the other's next."""
        loaded = load(other.state())

        def part(wanted: str) -> dict[str, Tensor]:
            return {name.partition("/")[2]: tensor for name, tensor in loaded.items() if name.partition("/")[0] == wanted}

        self.assembly.masters.load_state(part("weights"))
        self.assembly.optimizer.load_state_dict(copy.deepcopy(other.assembly.optimizer.state_dict()))
        self.assembly.schedule.load_state_dict(other.assembly.schedule.state_dict())
        for regularizer in self.assembly.regularizers:
            regularizer.load_state_dict(part(f"regularizer-{regularizer.name}"))
        self._done = other._done

    def adapter_keys(self, folder: Path) -> Sequence[str]:
        """Names of the tensors in the adapter file that the run would leave, written into `folder`."""
        (path,) = write_adapter_files(self.plan, self.assembly, folder, formats=("peft",))
        return sorted(load(path.read_bytes()))

    def detach(self) -> None:
        """Takes everything off, as the end of a run does."""
        self.assembly.detach()
