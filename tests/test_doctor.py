"""The doctor: real processes that open, crash, hang or lie, and all that deserves a look."""

import datetime
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from runtime import doctor, machine, trials
from runtime.diagnosis import (
    Cache,
    Cuda,
    Gpu,
    Library,
    Look,
    OnnxRuntime,
    Provider,
    Report,
    what_to_look_at,
)
from runtime.engines import cudart, library_trial
from tests.standin_tensorrt import compile_cudart

MACHINES = Path(__file__).parent / "machines"

ONNXRUNTIME = '''
"""An onnxruntime whose providers go wrong, each in its way."""
import os
import sys
import time

import numpy as np

__version__ = "1.23.0"


def get_available_providers():
    return {providers!r}


class SessionOptions:
    def add_session_config_entry(self, name, value):
        pass


class InferenceSession:
    def __init__(self, model, options, providers):
        (self.name,) = providers
        if self.name == "CrashExecutionProvider":
            print("terminate called without an active exception", file=sys.stderr, flush=True)
            os.abort()
        if self.name == "HangExecutionProvider":
            time.sleep(600)
        if self.name == "CUDAExecutionProvider":
            print(
                "\\x1b[1;31m2026-11-25 09:00:00.1 [E:onnxruntime:Default, "
                "provider_bridge_ort.cc:2251 TryGetProviderInfo_CUDA] "
                "/onnxruntime/core/session/provider_bridge_ort.cc:1844 Failed to load library "
                "libonnxruntime_providers_cuda.so with error: libcublasLt.so.12: cannot open "
                "shared object file\\x1b[m",
                file=sys.stderr,
            )
            self.name = "CPUExecutionProvider"
        if self.name == "TensorrtExecutionProvider":
            raise RuntimeError("fallback to CPU EP has been explicitly disabled by the user")

    def get_providers(self):
        return [self.name]

    def run(self, names, inputs):
        wrong = self.name == "WrongExecutionProvider"
        return [np.full((1, 1, 1, 1), 35.0 if wrong else inputs["x"].sum())]
'''


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIELDFIT_CACHE", str(tmp_path / "cache"))


def install(folder: Path, packages: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let processes started from here import these modules first."""
    for name, source in packages.items():
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def onnxruntime(*providers: str) -> dict[str, str]:
    names = [f"{name}ExecutionProvider" for name in providers]
    return {"onnxruntime": ONNXRUNTIME.replace("{providers!r}", repr(names))}


def opened(name: str, timeout_s: float = 30.0) -> trials.Outcome:
    return trials.run_trials({"it": ("open", f"{name}ExecutionProvider")}, timeout_s)["it"]


def test_the_embedded_model_is_one_convolution() -> None:
    from onnx import TensorProto, checker, helper

    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 3, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 1, 1])],
        [helper.make_tensor("w", TensorProto.FLOAT, [1, 1, 3, 3], [1.0] * 9)],
    )
    opset = helper.make_opsetid("", 13)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
    checker.check_model(model, full_check=True)
    assert model.SerializeToString(deterministic=True) == library_trial.MODEL


def test_the_cpu_provider_of_the_real_onnxruntime_opens() -> None:
    assert opened("CPU").answer == {"opened": "CPUExecutionProvider"}


def test_a_provider_of_the_real_onnxruntime_that_computes_nothing_does_not_open() -> None:
    import onnxruntime

    if "AzureExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs an onnxruntime with the Azure provider")
    assert opened("Azure").reason == "a convolution falls to the CPU"


def test_a_crash_of_the_process_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, onnxruntime(), monkeypatch)
    assert opened("Crash").reason == (
        "its process crashed (SIGABRT): terminate called without an active exception"
    )


def test_a_process_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, onnxruntime(), monkeypatch)
    assert opened("Hang", timeout_s=1.0).reason == "no answer within 1 s"


def test_a_provider_that_silently_becomes_the_cpu_does_not_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, onnxruntime(), monkeypatch)
    assert opened("CUDA").reason == (
        "Failed to load library libonnxruntime_providers_cuda.so with error: libcublasLt.so.12: "
        "cannot open shared object file; CPUExecutionProvider opened instead"
    )
    assert opened("Tensorrt").reason == "a convolution falls to the CPU"


def test_a_provider_that_computes_nonsense_does_not_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, onnxruntime(), monkeypatch)
    assert opened("Wrong").reason == "expected a convolution to give 36, got 35.0"


def test_a_process_that_ends_without_a_word_gives_its_code() -> None:
    assert trials.failure(7, "") == "its process ended with code 7"
    assert trials.failure(-11, "") == "its process crashed (SIGSEGV)"


def test_the_current_folder_does_not_pass_for_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.version_info < (3, 11):
        pytest.skip("needs Python 3.11: PYTHONSAFEPATH")
    (tmp_path / "tensorrt.py").write_text("__version__ = '0'")
    monkeypatch.chdir(tmp_path)
    outcome = trials.run_trials({"it": ("import", "tensorrt")})["it"]
    assert outcome.answer != {"version": "0"}


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    """What the doctor says where onnxruntime and TensorRT are those above, and the GPU is one."""
    packages = {
        **onnxruntime("CUDA", "Crash", "CPU"),
        "tensorrt": "__version__ = '10.3.0'",
        "tensorrt_rtx": "raise OSError('libnvinfer.so.10: cannot open shared object file')",
        "tensorrt_lean": "import os; os.kill(os.getpid(), 11)",
    }
    install(tmp_path, packages, monkeypatch)
    library = compile_cudart(tmp_path / "libcudart.so.12")
    monkeypatch.setattr(cudart, "_candidates", lambda: iter([str(library)]))
    monkeypatch.setattr(cudart, "_loaded", None)
    return doctor.examine()


def test_every_section_is_read_from_what_is_there(broken: Report) -> None:
    assert broken.cuda.gpu == Gpu(
        compute_capability="8.7",
        integrated=True,
        free_bytes=5 * 2**30,
        total_bytes=8 * 2**30,
        cuda_runtime="12.6",
        cuda_driver="13.2",
    )
    assert broken.tensorrt == {
        "tensorrt": Library(version="10.3.0"),
        "tensorrt-rtx": Library(reason="libnvinfer.so.10: cannot open shared object file"),
        "tensorrt-lean": Library(reason="its process crashed (SIGSEGV)"),
        "tensorrt-dispatch": Library(reason="No module named 'tensorrt_dispatch'"),
    }
    cache = broken.cache
    assert cache.folder is not None
    assert (Path(cache.folder).name, cache.unwritable, cache.plans) == ("cache", "", 0)
    assert cache.free_bytes > 0
    assert broken.onnxruntime.library == Library(version="1.23.0")
    opens = {name: provider.opens for name, provider in broken.onnxruntime.providers.items()}
    assert opens == {
        "CUDAExecutionProvider": False,
        "CrashExecutionProvider": False,
        "CPUExecutionProvider": True,
    }
    assert {look.what for look in broken.look_at} >= {
        "CUDAExecutionProvider",
        "CrashExecutionProvider",
    }


def test_the_text_has_a_section_for_each_and_fits_into_a_ticket(broken: Report) -> None:
    bundle = {"bundle": "solar 1.0.0", "forms": ["fp32", "int8"], "engine": "none"}
    lines = doctor.text(broken, bundle).splitlines()
    # A path is not broken, however deep the folder of this test is.
    assert all(len(line) <= 100 or max(map(len, line.split())) > 50 for line in lines)
    titles = [line for line in lines if line and not line.startswith(" ")]
    assert titles == [
        "machine", "cuda", "tensorrt", "onnxruntime", "cache of engines", "bundle",
        "what to look at",
    ]  # fmt: skip
    words = " ".join(" ".join(lines).split())
    assert "device 0 compute capability 8.7, integrated" in words
    assert "gpu memory 5.0 of 8.0 GiB free" in words
    assert "cuda 12.6; the driver knows 13.2" in words
    assert "tensorrt 10.3.0, imports tensorrt-rtx no: libnvinfer.so.10" in words
    assert "CrashExecutionProvider listed, does not open: its process crashed (SIGABRT)" in words
    assert "CPUExecutionProvider opens, and computed a convolution" in words
    assert "forms fp32 int8 engine none" in words


def test_the_json_keys_are_those_that_are_documented(broken: Report) -> None:
    report = json.loads(msgspec.json.encode(broken))
    assert list(report) == [
        "fieldfit", "python", "packages", "machine", "cuda", "tensorrt", "onnxruntime", "cache",
        "look_at",
    ]  # fmt: skip
    assert list(report["machine"]) == [
        "kernel", "architecture", "distribution", "model", "l4t", "jetpack", "container", "cpu",
        "cores", "int8_instructions", "memory", "power_mode", "frequencies", "governor",
        "temperatures", "throttling", "overcurrent_events", "time", "clock_synchronised",
        "nvidia_driver", "gpus",
    ]  # fmt: skip
    assert report["onnxruntime"]["providers"]["CPUExecutionProvider"] == {
        "opens": True,
        "reason": "",
    }
    assert msgspec.convert(report, Report) == broken


def test_an_onnxruntime_built_for_numpy_1_is_seen_though_it_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = onnxruntime("CPU")
    # What NumPy 2 itself writes when it meets such a module.
    packages["onnxruntime"] += (
        'print("A module that was compiled using NumPy 1.x cannot be run in", file=sys.stderr)\n'
    )
    install(tmp_path, packages, monkeypatch)
    report = doctor.examine()
    assert report.onnxruntime.built_for_numpy_1
    numpy = report.onnxruntime.numpy
    reason = f"onnxruntime 1.23.0 was built for NumPy 1 and meets {numpy}: it may crash or not "
    assert Look(what="numpy", reason=f"{reason}import; pip install 'numpy<2'") in report.look_at


def test_a_cache_that_cannot_be_written_deserves_a_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FIELDFIT_CACHE", str(tmp_path / "file"))
    report = doctor.examine()
    reason = f"{tmp_path}/file: expected a folder, got a file"
    assert report.cache.unwritable == reason
    assert [look.reason for look in report.look_at if look.what == "cache of engines"] == [
        f"engines are built again at every start: {reason}"
    ]
    assert f"writable no: {reason}" in " ".join(doctor.text(report).split())


def test_an_onnxruntime_that_cannot_be_imported_lists_no_providers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, {"onnxruntime": "raise ImportError('no libstdc++ here')"}, monkeypatch)
    report = doctor.examine()
    assert report.onnxruntime.library == Library(reason="no libstdc++ here")
    assert report.onnxruntime.providers == {}
    assert [look.reason for look in report.look_at if look.what == "onnxruntime"] == [
        "it cannot be imported, so there is no CPU engine: no libstdc++ here"
    ]


HEALTHY_MACHINE = msgspec.structs.replace(
    machine.describe(MACHINES / "jetson_orin_nano"),
    power_mode=machine.PowerMode(
        name="MAXN_SUPER", offered=("15W", "25W", "MAXN_SUPER", "7W"), chosen=True
    ),
    throttling=(),
    time=datetime.datetime(2026, 11, 25, tzinfo=datetime.timezone.utc),
)
HEALTHY_GPU = Gpu(
    compute_capability="8.7",
    integrated=True,
    free_bytes=5 * 2**30,
    total_bytes=8 * 2**30,
    cuda_runtime="12.6",
    cuda_driver="12.6",
)
HEALTHY_ONNXRUNTIME = OnnxRuntime(
    library=Library(version="1.23.0"),
    numpy="1.26.4",
    packages={"onnxruntime-gpu": "1.23.0"},
    providers={"CPUExecutionProvider": Provider(opens=True)},
    built_for_numpy_1=False,
)
TENSORRT = {"tensorrt": Library(version="10.3.0"), "tensorrt-rtx": Library(reason="no module")}
CACHE = Cache(
    folder="/var/cache/fieldfit",
    unwritable="",
    free_bytes=20 * 2**30,
    plans=2,
    plans_bytes=3 * 2**20,
)


def looks(
    here: machine.Machine = HEALTHY_MACHINE,
    cuda: Cuda = Cuda(gpu=HEALTHY_GPU),  # noqa: B008 - frozen
    tensorrt: Mapping[str, Library] = TENSORRT,
    onnxruntime: OnnxRuntime = HEALTHY_ONNXRUNTIME,
    cache: Cache = CACHE,
) -> dict[str, str]:
    found = what_to_look_at(here, cuda, tensorrt, onnxruntime, cache)
    return {look.what: look.reason for look in found}


def other(name: str) -> machine.Machine:
    return machine.describe(MACHINES / name)


def test_a_healthy_jetson_needs_no_look() -> None:
    assert looks() == {}


def test_a_power_mode_below_the_fastest_deserves_a_look() -> None:
    thor = other("jetson_thor")
    assert looks(thor)["power mode"].startswith("120W, while this board also offers MAXN:")
    mode = machine.PowerMode(name="15W", offered=("15W", "7W"), chosen=True)
    assert looks(msgspec.structs.replace(HEALTHY_MACHINE, power_mode=mode)) == {}


def test_a_cpu_without_int8_instructions_deserves_a_look() -> None:
    reason = looks(other("raspberry_pi_3"), cuda=Cuda(reason="none"), tensorrt={})["int8 on cpu"]
    assert reason.startswith("Cortex-A53 has none of avx512_vnni, ")


def test_a_clock_in_the_past_deserves_a_look() -> None:
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
    found = looks(msgspec.structs.replace(HEALTHY_MACHINE, time=epoch))
    assert list(found) == ["clock"]
    assert found["clock"].startswith("it says 1970-01-01, which is long past")


def test_a_container_that_hides_the_release_of_l4t_deserves_a_look() -> None:
    hidden = msgspec.structs.replace(HEALTHY_MACHINE, l4t=None, jetpack=None)
    assert looks(hidden)["jetson"].startswith(
        "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super, but its L4T release "
        "cannot be read"
    )


def test_heat_that_slows_the_board_deserves_a_look() -> None:
    assert looks(other("jetson_orin_nano"))["heat"].startswith(
        "gpu-throttle-alert is active at 64 °C (tj-thermal)"
    )


def test_little_memory_deserves_a_look_only_where_the_gpu_shares_it() -> None:
    memory = machine.Memory(total=4 * 2**30, available=3 * 2**29, swap_total=0, swap_free=0)
    small = msgspec.structs.replace(HEALTHY_MACHINE, memory=memory)
    assert looks(small)["memory"].startswith("1.5 GiB available to CPU and GPU together, expected ")
    discrete = msgspec.structs.replace(HEALTHY_GPU, integrated=False)
    assert looks(small, cuda=Cuda(gpu=discrete)) == {}


def test_tensorrt_without_a_gpu_deserves_a_look() -> None:
    pc = msgspec.structs.replace(other("debian_pc"), int8_instructions=("avx_vnni",))
    assert looks(pc, cuda=Cuda(reason="no driver")) == {
        "gpu": "tensorrt is installed, but no GPU can be used: no driver; in Docker, was the "
        "NVIDIA runtime asked for?"
    }
    assert looks(pc, cuda=Cuda(reason="no driver"), tensorrt={}) == {}


def test_a_jetson_whose_gpu_cannot_be_used_deserves_a_look() -> None:
    assert looks(cuda=Cuda(reason="no library"), tensorrt={}) == {
        "gpu": "this is a Jetson, but its GPU cannot be used: no library"
    }


def test_a_listed_provider_that_does_not_open_deserves_a_look() -> None:
    providers = {
        "CUDAExecutionProvider": Provider(opens=False, reason="no cuDNN"),
        "AzureExecutionProvider": Provider(opens=False, reason="falls to the CPU"),
        "CPUExecutionProvider": Provider(opens=True),
    }
    found = looks(onnxruntime=msgspec.structs.replace(HEALTHY_ONNXRUNTIME, providers=providers))
    assert found == {
        "CUDAExecutionProvider": "onnxruntime lists it, but it does not open: no cuDNN"
    }


def test_two_onnxruntime_packages_deserve_a_look() -> None:
    packages = {"onnxruntime": "1.24.0", "onnxruntime-gpu": "1.23.0"}
    found = looks(onnxruntime=msgspec.structs.replace(HEALTHY_ONNXRUNTIME, packages=packages))
    assert list(found) == ["onnxruntime packages"]
    assert "pip uninstall onnxruntime onnxruntime-gpu, then" in found["onnxruntime packages"]


@pytest.mark.parametrize(
    ("numpy", "version", "complained", "deserves"),
    [
        ("2.0.0", "1.18.1", False, True),
        ("2.2.6", "1.23.0", True, True),
        ("2.2.6", "1.23.0", False, False),
        ("1.26.4", "1.18.1", False, False),
    ],
)
def test_numpy_2_with_an_onnxruntime_for_numpy_1_deserves_a_look(
    numpy: str, version: str, complained: bool, deserves: bool
) -> None:
    found = looks(
        onnxruntime=msgspec.structs.replace(
            HEALTHY_ONNXRUNTIME,
            numpy=numpy,
            library=Library(version=version),
            built_for_numpy_1=complained,
        )
    )
    assert list(found) == (["numpy"] if deserves else [])


def test_a_cache_that_is_full_deserves_a_look() -> None:
    full = msgspec.structs.replace(CACHE, free_bytes=2**28)
    assert looks(cache=full)["cache of engines"].startswith(
        "0.2 GiB left on the disk of /var/cache/fieldfit, expected 1.0"
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("jetson_orin_nano", "jetson L4T R36.4.3, JetPack 6.2+b77"),
        ("jetson_orin_nano", "power mode 15W; offered: 15W, 25W, MAXN_SUPER, 7W"),
        ("jetson_orin_nano", "over-current oc1 1, oc2 0, oc3 2 since the start"),
        ("jetson_thor", "power mode 120W, the default; offered: MAXN, 120W, 90W, 70W"),
        ("jetson_thor", "gpu-gpc-0 1575 MHz, pinned"),
        ("jetson_thor", "slowed by heat no over-current unknown"),
        ("jetson_thor", "shared with the GPU; no swap"),
        ("raspberry_pi_3", "model Raspberry Pi 3 Model B Rev 1.2 jetson no"),
        ("debian_pc", "driver 570.195.03 gpu NVIDIA RTX A2000 12GB cuda no: none"),
        (
            "debian_pc",
            "folder /var/cache/fieldfit writable yes, tried plans 2, 3.0 MiB disk 20.0 GiB free",
        ),
        ("debian_pc", "what to look at nothing that stands out"),
    ],
)
def test_another_machine_reads_well(name: str, expected: str) -> None:
    report = Report(
        fieldfit="0.1.0",
        python="3.10.12",
        packages={},
        machine=other(name),
        cuda=Cuda(reason="none"),
        tensorrt=TENSORRT,
        onnxruntime=HEALTHY_ONNXRUNTIME,
        cache=CACHE,
        look_at=(),
    )
    assert expected in " ".join(doctor.text(report).split())
