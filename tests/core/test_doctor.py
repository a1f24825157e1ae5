"""`tuner doctor`: rows from real checks, isolated failures, requirements from metadata, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tuner.cli.main import run
from tuner.component import Component
from tuner.config.options import Options
from tuner.doctor import machine, software
from tuner.doctor.findings import Check, Row, examine, exit_code
from tuner.errors import EnvironmentProblem
from tuner.hookspecs import hookimpl
from tuner.plugins.loader import load_plugins

Capture = pytest.CaptureFixture[str]


def distribution(folder: Path, name: str, number: str = "1.0", requires: tuple[str, ...] = (), extras: tuple[str, ...] = ()) -> None:
    """An installed distribution as far as its metadata goes."""
    info = folder / f"{name.replace('-', '_')}-{number}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {number}", *(f"Provides-Extra: {extra}" for extra in extras),
             *(f"Requires-Dist: {line}" for line in requires)]  # fmt: skip
    (info / "METADATA").write_text("\n".join(lines) + "\n")


def rows_of(capsys: Capture, *arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit code of `tuner doctor --json`, and its rows by name."""
    code = run(["doctor", "--json", *arguments])
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is (code == 0)
    assert sum(answer["counts"].values()) == len(answer["rows"])
    return code, {row["name"]: row for row in answer["rows"]}


@pytest.fixture(autouse=True)
def quiet_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No configuration, and no token of whoever runs this."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)


# --- the whole -------------------------------------------------------------------------------------------------------
def test_this_installation_can_train(capsys: Capture) -> None:
    code, rows = rows_of(capsys)
    assert code == 0
    assert rows["torch"]["found"].startswith(torch.__version__)
    assert f"pluggy {version('pluggy')}" in rows[f"tuner-framework {version('tuner-framework')}"]["found"]
    assert rows["ltxvideo2"]["found"].startswith("family ltxvideo2")
    assert "h264" in rows["reads"]["found"] and rows["writes"]["found"] == "mp4 with h264 and sound"
    assert rows["token"]["verdict"] == "note" and "HF_TOKEN" in rows["token"]["remedy"]
    assert "answer" not in rows, "the hub is asked only with --online"
    assert {"cores", "memory", "locked memory", "output_dir", "cache_dir", "hub cache"} <= set(rows)


def test_the_table_ends_with_the_sum(capsys: Capture) -> None:
    assert run(["doctor"]) == 0
    *table, _, end = capsys.readouterr().out.splitlines()
    assert end.startswith("training would work here: 0 problems, ")
    assert {line.split(" ")[0] for line in table if line[0] != " "} <= {"ok", "note"}


def test_help_costs_no_torch() -> None:
    names = "('doctor', 'configure')"
    program = f"import sys; from tuner.cli.main import run; [run([name, '-h']) for name in {names}]; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_check_that_fails_is_a_row_and_the_others_go_on() -> None:
    def breaks():
        yield Row("host", "first", "ok", "there")
        raise ZeroDivisionError("by zero")

    def mends():
        raise EnvironmentProblem("is missing", where="thing", value=3, remedy="install it")

    rows = examine([Check("host", "a", breaks), Check("host", "b", mends), Check("host", "c", lambda: [Row("host", "c", "ok", "fine")])])
    assert [(row.name, row.verdict) for row in rows] == [("first", "ok"), ("a", "note"), ("b", "problem"), ("c", "ok")]
    assert rows[1].found == "could not be looked at: ZeroDivisionError: by zero"
    assert (rows[2].found, rows[2].remedy) == ("thing: is missing (got 3)", "install it")


@pytest.mark.parametrize(("codes", "expected"), [([], 0), ([2], 2), ([2, 3], 3), ([8, 2], 8)])
def test_exit_codes(codes: list[int], expected: int) -> None:
    rows = [Row("x", "x", "note", ""), *(Row("x", "x", "problem", "", exit_code=code) for code in codes)]
    assert exit_code(rows) == expected


# --- requirements ----------------------------------------------------------------------------------------------------
def test_requirements_come_from_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = f"python_version >= '{sys.version_info.major}.{sys.version_info.minor}'"
    distribution(tmp_path, "made-up-plugin", requires=(
        "pluggy>=0.1", "click>=99", f"made-up-library[fast]>=1.2; {here}", "never-here; sys_platform == 'plan9'",
        "made-up-extra>=2; extra == 'more'", "made-up-plugin[more]; extra == 'all'",
    ), extras=("more", "all"))  # fmt: skip
    distribution(tmp_path, "made-up-extra", "1.5")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {need.requirement.name: need for need in software.needs("made-up-plugin")}
    assert {name: need.met for name, need in found.items()} == {"pluggy": True, "click": False, "made-up-library": False}
    assert found["click"].words == f"click {version('click')}, and >=99 is needed"
    assert found["click"].pip == 'pip install "click>=99"'
    assert found["made-up-library"].pip == 'pip install "made-up-library[fast]>=1.2"'
    for extra in ("more", "all"):
        (need,) = software.needs("made-up-plugin", extra)
        assert (need.words, need.met) == ("made-up-extra 1.5, and >=2 is needed", False)
    assert software.extras_of("made-up-plugin") == ["more", "all"]


def test_what_is_missing_names_its_features_and_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """A plugin installed without its extra, and one whose library is too old."""
    distribution(tmp_path, "tuner-frail", requires=("made-up-absent>=1; extra == 'frail'", "click>=99"), extras=("frail",))
    (tmp_path / "tuner_frail-1.0.dist-info" / "entry_points.txt").write_text("[tuner]\nfrail = frail_plugin\n")
    (tmp_path / "frail_plugin.py").write_text(
        "from tuner.component import Component\nfrom tuner.config.options import Options\nfrom tuner.hookspecs import hookimpl\n"
        "@hookimpl\ndef tuner_register_quantizers():\n"
        "    return [Component('two-bits', 'few', Options, 'frail_plugin:nothing', extra='frail')]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    code, rows = rows_of(capsys)
    assert code == 3
    assert (rows["tuner-frail 1.0"]["verdict"], rows["tuner-frail 1.0"]["remedy"]) == ("problem", 'pip install "click>=99"')
    extra = rows["tuner-frail[frail]"]
    assert extra["verdict"] == "note" and extra["found"] == "made-up-absent is not installed (for quantizer two-bits)"
    assert extra["remedy"] == 'pip install "tuner-frail[frail]"'
    Path("own.json").write_text('{"model_family": "ltxvideo2", "base_model_precision": "two-bits", "max_train_steps": 1}')
    rows = rows_of(capsys, "--config", "own.json")[1]
    assert rows["base_model_precision"]["found"] == "quantizer two-bits: made-up-absent is not installed"
    assert rows["base_model_precision"]["remedy"] == 'pip install "tuner-frail[frail]"'


def test_a_plugin_that_fails_is_a_note_and_no_family_a_problem(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("TUNER_PLUGINS", "absent")
    code, rows = rows_of(capsys)
    assert code == 3
    assert rows["absent"]["verdict"] == "note" and "not installed" in rows["absent"]["found"]
    assert rows["families"]["found"] == "no plugin offers a model family"
    assert rows["ltxvideo2"]["found"] == "disabled: not among TUNER_PLUGINS"


# --- a configuration -------------------------------------------------------------------------------------------------
def test_what_a_configuration_asks_for(capsys: Capture) -> None:
    Path("config").mkdir()
    Path("config/config.json").write_text(json.dumps({
        "model_family": "ltxvideo2", "optimizer": "adamw8bit", "base_model_precision": "int8-torchao", "enable_group_offload": True,
        "max_train_steps": 3, "output_dir": "deep/run", "cache_dir": "store/{model_family}",
    }))  # fmt: skip
    code, rows = rows_of(capsys)
    assert code == 0
    assert rows["optimizer"]["found"] == f"optimizer adamw8bit (torchao {version('torchao')})"
    assert rows["base_model_precision"]["found"].startswith("quantizer int8-torchao (torchao ")
    assert rows["memory strategy"]["found"] == "memory strategy group_offload"
    assert rows["output_dir"]["found"].startswith("deep/run: ") and rows["cache_dir"]["found"].startswith("store: ")


def test_what_a_configuration_cannot_have(capsys: Capture) -> None:
    asked = {"model_family": "ltxvideo3", "optimizer": "adamw9", "report_to": "carrier-pigeon", "push_to_hub": True}
    Path("own.json").write_text(json.dumps(asked))
    code, rows = rows_of(capsys, "--config", "own.json")
    assert code == 2
    problems = {name: row["remedy"] for name, row in rows.items() if row["verdict"] == "problem"}
    assert set(problems) == {"model_family", "optimizer", "report_to", "push_to_hub"} and rows["max_train_steps"]["verdict"] == "note"
    assert "did you mean ltxvideo2?" in problems["model_family"] and "hf auth login" in problems["push_to_hub"]
    Path("own.json").write_text('{"train_batch_size": 0, "lerning_rate": 1}')
    code, rows = rows_of(capsys, "--config", "own.json")
    assert code == 2 and "torch" in rows, "the rest is looked at all the same"
    assert "train_batch_size: must be at least 1" in rows["own.json"]["found"] and "learning_rate" in rows["own.json"]["found"]


# --- the machine -----------------------------------------------------------------------------------------------------
def test_a_gpu_that_is_not_used_is_explained() -> None:
    cards, pip = [machine.Card("RTX", "525.1", 24 * 2**30)], 'pip install "torch>=2"'
    say = lambda *arguments: machine.unused_row(*arguments, pip)
    assert say([], None, None).verdict == "note"
    assert (say(cards, None, None).verdict, say(cards, "12.8", None).verdict) == ("problem", "problem")
    assert "for the processor alone" in say(cards, None, None).found
    assert 'install --force-reinstall "torch>=2"' in say(cards, None, None).remedy
    assert "driver 525.1 may be too old for CUDA 12.8" in say(cards, "12.8", None).found
    assert [say(cards, "12.8", hidden).verdict for hidden in ("", "-1", "0")] == ["note", "note", "problem"]


class Device:
    """`torch` as far as a GPU is looked at, with one of 10 GiB."""

    def __init__(self, capability: tuple[int, int] = (9, 0), free: float = 9.5, kernels: str = "sm_90") -> None:
        self.version = SimpleNamespace(cuda="13.0", hip=None)
        self.uint8 = torch.uint8
        self.cuda = SimpleNamespace(
            is_available=lambda: True, device_count=lambda: 1, mem_get_info=lambda index: (int(free * 2**30), 10 * 2**30),
            get_device_properties=lambda index: SimpleNamespace(name="H200", major=capability[0], minor=capability[1]),
            get_arch_list=lambda: [kernels],
        )  # fmt: skip

    def empty(self, size: int, dtype: torch.dtype, pin_memory: bool) -> None:
        raise RuntimeError("CUDA error: out of memory\nmore about it")


@pytest.mark.parametrize(
    ("device", "verdict", "words"),
    [(Device(), "ok", "H200, 10.0 GiB, 9.5 GiB free, compute capability 9.0, bf16, driver 570.1"),
     (Device(free=2), "note", "8.0 GiB are taken"), (Device((7, 5), kernels="sm_75"), "note", "compute capability 7.5, no bf16"),
     (Device(kernels="sm_80"), "problem", "this build of torch has no kernels for it")],
)  # fmt: skip
def test_a_gpu_in_use(device: Device, verdict: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "driver_cards", lambda: [machine.Card("H200", "570.1", 10 * 2**30)])
    monkeypatch.setattr(machine, "kernel_row", lambda index, capability: Row("torch", "own kernels", "ok", ""))
    gpu, triton, *_, pinned = machine.device_rows(device, "pip install torch")
    assert (gpu.name, gpu.verdict) == ("gpu 0", verdict) and words in gpu.found
    assert triton.name == "triton" and pinned.found == "64 MiB cannot be locked: CUDA error: out of memory"


def test_the_drivers_program_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H200, NVL, 570.86.10, 143771'\necho 'Odd, 570.86.10, [N/A]'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert machine.driver_cards() == [machine.Card("NVIDIA H200, NVL", "570.86.10", 143771 * 2**20), machine.Card("Odd", "570.86.10", 0)]
    program.write_text("#!/bin/sh\necho no driver\nexit 9\n")
    assert machine.driver_cards() == [machine.Card("an NVIDIA GPU", "", 0) for _ in Path("/proc/driver/nvidia/gpus").glob("*")]


@pytest.mark.parametrize(
    ("capability", "architectures", "fits"),
    [((9, 0), ["sm_80", "sm_90"], True), ((8, 9), ["sm_80"], True), ((9, 0), ["sm_80"], False), ((9, 0), ["sm_80", "compute_80"], True),
     ((7, 0), ["sm_75", "sm_80", "compute_80"], False), ((10, 0), ["sm_90", "sm_100"], True), ((6, 1), [], True)],
)  # fmt: skip
def test_kernels_for_a_gpu(capability: tuple[int, int], architectures: list[str], fits: bool) -> None:
    assert machine.has_kernels(capability, architectures) is fits


@pytest.mark.parametrize(("problem", "verdict", "words"), [
    ("", "ok", "compute what they should"),
    ("the kernels cannot be built here: OSError: no compiler", "note", "install a C compiler"),
    ("the kernels compute something else here: norm", "note", "report it"),
])  # fmt: skip
def test_our_own_kernels_are_tried(problem: str, verdict: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds")
    tried: list[str] = []
    monkeypatch.setattr("tuner.model.kernels.problem_on", lambda module, device: tried.append(module.__name__) or problem)
    for capability, names in (((8, 6), machine.KERNELS[:2]), ((9, 0), machine.KERNELS)):
        tried.clear()
        row = machine.kernel_row(0, capability)
        assert tuple(tried) == names and row.verdict == verdict and words in row.found + row.remedy


def refused(*_: object, **__: object) -> None:
    raise PermissionError("planned")


def test_a_disk_that_is_full_or_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = lambda free: lambda path: type("Usage", (), {"free": free, "total": free})()
    monkeypatch.setattr(machine.shutil, "disk_usage", usage(100 * 2**30))
    assert machine.disk_row("output_dir", tmp_path / "not" / "yet").verdict == "ok"
    (tmp_path / "file").write_text("")
    assert "is a file, no folder" in machine.disk_row("output_dir", tmp_path / "file" / "run").found
    assert not list((tmp_path).glob("tmp*"))
    monkeypatch.setattr(machine, "TemporaryFile", refused)
    assert machine.disk_row("output_dir", tmp_path).found == f"{tmp_path}: {tmp_path} cannot be written"
    monkeypatch.undo()
    for free, verdict in ((2**29, "problem"), (20 * 2**30, "note")):
        monkeypatch.setattr(machine.shutil, "disk_usage", usage(free))
        row = machine.disk_row("output_dir", tmp_path)
        assert (row.verdict, row.exit_code if verdict == "problem" else 3) == (verdict, 9 if verdict == "problem" else 3)


def test_a_containers_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (machine, sys.modules["tuner.model.host"]):
        monkeypatch.setattr(module, "GROUP", tmp_path)
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    (tmp_path / "memory.current").write_text(f"{2**29}\n")
    (tmp_path / "memory.stat").write_text("active_file 0\n")
    (cores,), (memory,) = machine.core_rows(), machine.memory_rows()
    assert "a container's share of 1.5" in cores.found and cores.verdict == "note"
    assert "a container's limit of 1.0 GiB, 0.5 GiB free" in memory.found and memory.verdict == "note"
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert "share" not in next(iter(machine.core_rows())).found


def test_codecs_are_really_looked_for() -> None:
    assert machine.has_codec("h264", "r") and machine.has_codec("aac", "w") and not machine.has_codec("h26x", "r")


# --- the hub ---------------------------------------------------------------------------------------------------------
def test_the_token_is_never_shown(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_verysecretindeed000000")
    assert run(["doctor"]) == 0
    out = "".join(capsys.readouterr())
    assert "there is one" in out and "verysecret" not in out


def test_online(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        def whoami(self) -> dict[str, str]:
            return {"name": "ann"}

    class Session:
        def head(self, address: str, timeout: float) -> None:
            if self.broken:
                raise ConnectionError("no way")

        broken = True

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.utils.get_session", Session)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    (_, row) = machine.hub_rows(online=True)
    assert (row.verdict, row.found) == ("note", "it cannot be reached (ConnectionError)") and "HTTPS_PROXY" in row.remedy
    monkeypatch.setattr(Session, "broken", False)
    assert [row.found for row in machine.hub_rows(online=True)][1] == "it answers"
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    assert [row.found for row in machine.hub_rows(online=True)] == ["there is one", "it answers, and knows your token as ann's"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert [row.name for row in machine.hub_rows(online=True)] == ["token", "mode"]


def test_extras_are_declared_by_components() -> None:
    registry = load_plugins({"TUNER_PLUGINS": "builtins"})
    declared = {component.extra for kind in ("quantizer", "optimizer", "tracker") for component in registry.components(kind)} - {""}
    project = tomllib.loads((Path(__file__).parents[2] / "core" / "pyproject.toml").read_text())["project"]
    assert {"torchao", "quanto"} <= declared <= set(project["optional-dependencies"])


class Nothing(Options):
    """No keys."""


def test_a_component_that_cannot_be_imported_is_a_problem() -> None:
    @hookimpl
    def tuner_register_optimizers() -> list[Component]:
        return [Component("broken", "b", Nothing, "not_there:At")]

    plugin = type("Plugin", (), {"tuner_register_optimizers": staticmethod(tuner_register_optimizers)})
    registry = load_plugins({"TUNER_PLUGINS": "own"}, [("own", plugin)])
    row = software.component_row(registry, "optimizer", "optimizer", registry.component("optimizer", "broken"))
    assert row.verdict == "problem" and "cannot be imported" in row.found and row.exit_code == 10
