"""The CUDA shim: its error paths for real, its good paths on a library that keeps host memory."""

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from runtime.engines import cudart
from runtime.errors import EngineError
from tests.standin_tensorrt import compile_cudart

HERE = Path(__file__).parent
DEVICE = cudart.probe()


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """tests/fake_cudart.c, compiled, as the only CUDA runtime library."""
    path = compile_cudart(tmp_path / "libcudart.so.12")
    monkeypatch.setattr(cudart, "_candidates", lambda: iter([str(path)]))
    monkeypatch.setattr(cudart, "_loaded", None)
    return ctypes.CDLL(str(path))


def compile_changed(path: Path, old: str, new: str) -> Path:
    """The stand-in with one piece of its source replaced; after ``compile_cudart``, so cc is."""
    source = (HERE / "fake_cudart.c").read_text()
    assert old in source
    changed = path.with_suffix(".c")
    changed.write_text(source.replace(old, new))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", path, changed], check=True)
    return path


def test_without_a_library_the_reason_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudart, "_SONAMES", ("libcudart.so.does-not-exist",))
    monkeypatch.setattr(cudart, "_loaded", None)
    reason = cudart.probe()
    assert isinstance(reason, str)
    assert reason.startswith("no CUDA runtime library: expected one of libcudart.so.does-not")
    with pytest.raises(EngineError, match="use an onnxruntime engine on the CPU") as missing:
        cudart.load()
    assert missing.value.fault == "missing library"


def test_a_library_that_is_not_cuda_is_passed_over(
    fake: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = list(cudart._candidates())
    monkeypatch.setattr(cudart, "_candidates", lambda: iter(["libc.so.6", *good]))
    assert cudart.load().device_count() == 1
    monkeypatch.setattr(cudart, "_loaded", None)
    monkeypatch.setattr(cudart, "_candidates", lambda: iter(["libc.so.6", "libm.so.6"]))
    with pytest.raises(EngineError, match=r"libc\.so\.6: expected the function cudaGetDeviceCount"):
        cudart.load()


def test_a_library_that_lacks_a_function_is_refused_by_its_name(
    fake: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = compile_changed(tmp_path / "older.so", "int cudaGraphLaunch(", "int olderGraphLaunch(")
    monkeypatch.setattr(cudart, "_candidates", lambda: iter([str(path)]))
    with pytest.raises(EngineError) as refused:
        cudart.load()
    assert f"{path}: expected the function cudaGraphLaunch, got none" in str(refused.value)
    assert refused.value.fault == "missing library"


@pytest.mark.skipif(not isinstance(DEVICE, str), reason="this machine has a GPU")
def test_the_real_library_without_a_driver_is_error_35(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudart, "_loaded", None)
    assert isinstance(DEVICE, str)
    if DEVICE.startswith("no CUDA runtime library"):
        pytest.skip("needs libcudart, e.g. from nvidia-cuda-runtime")
    assert "CUDA driver version is insufficient for CUDA runtime version" in DEVICE
    assert "cudaGetDeviceCount: CUDA error 35" in DEVICE
    assert "install one" in DEVICE
    cuda = cudart.load()
    calls: list[Callable[[], object]] = [
        cuda.stream,
        cuda.event,
        lambda: cuda.malloc(16),
        lambda: cuda.host_alloc(16, mapped=True),
        lambda: cuda.set_device(0),
        lambda: cuda.can_map_host_memory(0),
        lambda: cuda.capture(0, lambda: None),
        cudart.require,
    ]
    for call in calls:
        with pytest.raises(cudart.CudaError, match="CUDA error 35") as error:
            call()
        assert error.value.fault == "no device"


def test_probe_describes_the_device(fake: ctypes.CDLL) -> None:
    device = cudart.probe()
    assert device == cudart.Device(
        ordinal=0,
        compute_capability=(8, 7),
        integrated=True,
        free_bytes=5 << 30,
        total_bytes=8 << 30,
        runtime_version="12.6",
        driver_version="13.2",
    )
    assert cudart.require() == device
    assert cudart.probe(3) == "expected CUDA device 3, got devices 0 to 0"
    with pytest.raises(EngineError) as absent:
        cudart.require(3)
    assert absent.value.fault == "no device"


def test_bytes_travel_to_the_device_and_back(fake: ctypes.CDLL) -> None:
    cuda = cudart.load()
    sent = np.arange(100_000, dtype=np.float32)
    received = np.zeros_like(sent)
    stream, device = cuda.stream(), cuda.malloc(sent.nbytes)
    assert device > 2**32  # a 64-bit address must not be cut on its way through ctypes
    cuda.copy_to_device(device, sent.ctypes.data, sent.nbytes, stream)
    cuda.copy_to_host(received.ctypes.data, device, sent.nbytes, stream)
    cuda.synchronize(stream)
    np.testing.assert_array_equal(received, sent)
    start, end = cuda.event(), cuda.event()
    cuda.record(start, stream)
    cuda.record(end, stream)
    assert cuda.elapsed_ms(start, end) == 1.5
    pinned = cuda.host_alloc(64)
    cuda.free_host(pinned)
    for event in (start, end):
        cuda.destroy_event(event)
    cuda.free(device)
    cuda.destroy_stream(stream)
    assert fake.fakeLive() == 0


def copy_by_a_graph(cuda: cudart.Cudart) -> None:
    """Copy from one piece of pinned memory through the device to another, by a CUDA graph."""
    stream, device = cuda.stream(), cuda.malloc(8)
    sent, received = cuda.host_alloc(8), cuda.host_alloc(8)
    here, there = (ctypes.c_double.from_address(pointer) for pointer in (sent, received))
    here.value, there.value = 1, 0

    def copy() -> None:
        cuda.copy_to_device(device, sent, 8, stream)
        cuda.copy_to_host(received, device, 8, stream)

    graph = cuda.capture(stream, copy)
    cuda.synchronize(stream)
    assert there.value == 0  # a capture runs nothing
    for value in (2.0, 3.0):
        here.value = value
        cuda.launch(graph, stream)
        cuda.synchronize(stream)
        assert there.value == value
    cuda.destroy_graph(graph)
    cuda.free(device)
    cuda.free_host(sent)
    cuda.free_host(received)
    cuda.destroy_stream(stream)


def test_what_is_captured_runs_when_it_is_launched(fake: ctypes.CDLL) -> None:
    copy_by_a_graph(cudart.load())
    assert fake.fakeLaunches() == 2
    assert fake.fakeLive() == 0


@pytest.mark.gpu
@pytest.mark.skipif(isinstance(DEVICE, str), reason=f"needs a GPU: {DEVICE}")
def test_a_real_gpu_runs_what_was_captured() -> None:
    cuda = cudart.load()
    cuda.set_device(0)
    copy_by_a_graph(cuda)


def test_a_capture_that_fails_leaves_the_stream_as_it_was(
    fake: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = cudart.load()
    stream = cuda.stream()

    def wait() -> None:  # which must not happen in a capture
        cuda.synchronize(stream)

    def wait_unheard() -> None:
        with pytest.raises(cudart.CudaError):
            cuda.synchronize(stream)

    def fail() -> None:
        raise KeyError("ours")

    with pytest.raises(cudart.CudaError, match="cudaStreamSynchronize: CUDA error 900"):
        cuda.capture(stream, wait)
    with pytest.raises(cudart.CudaError, match="cudaStreamEndCapture: CUDA error 901: operation "):
        cuda.capture(stream, wait_unheard)
    with pytest.raises(KeyError, match="ours"):
        cuda.capture(stream, fail)
    monkeypatch.setenv("FAKE_CUDA_INSTANTIATE_ERROR", "2")
    with pytest.raises(cudart.CudaError, match="cudaGraphInstantiateWithFlags: CUDA error 2: out"):
        cuda.capture(stream, lambda: None)
    assert fake.fakeLive() == 1  # the stream
    cuda.synchronize(stream)
    cuda.destroy_stream(stream)


def test_only_mapped_memory_has_an_address_on_the_device(
    fake: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = cudart.load()
    mapped, pinned = cuda.host_alloc(64, mapped=True), cuda.host_alloc(64)
    assert cuda.device_pointer(mapped) > 2**32
    with pytest.raises(cudart.CudaError, match="cudaHostGetDevicePointer: CUDA error 1"):
        cuda.device_pointer(pinned)
    for pointer in (mapped, pinned):
        cuda.free_host(pointer)
    assert fake.fakeLive() == 0
    assert cuda.can_map_host_memory(0)
    monkeypatch.setenv("FAKE_CUDA_CAN_MAP", "0")
    assert not cuda.can_map_host_memory(0)


def test_an_error_is_raised_with_its_text_and_cleared(fake: ctypes.CDLL) -> None:
    cuda = cudart.load()
    with pytest.raises(cudart.CudaError, match=r"error 2: out of memory.*batches") as error:
        cuda.malloc(1 << 40)
    assert error.value.code == 2
    assert fake.fakeLastError() == 0


@pytest.mark.parametrize(
    ("code", "words"), [(35, "install one"), (100, "check nvidia-smi"), (999, "fake error")]
)
def test_probe_returns_the_reason(
    fake: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    monkeypatch.setenv("FAKE_CUDA_ERROR", str(code))
    reason = cudart.probe()
    assert isinstance(reason, str)
    assert f"CUDA error {code}" in reason
    assert words in reason


def test_a_library_newer_than_the_driver_is_passed_over(
    fake: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = 'setting("FAKE_CUDA_ERROR", 0)'
    path = compile_changed(tmp_path / "libcudart.so.13", answers, "35")
    candidates = [str(path), *cudart._candidates()]
    monkeypatch.setattr(cudart, "_candidates", lambda: iter(candidates))
    assert isinstance(cudart.probe(), cudart.Device)
    monkeypatch.setattr(cudart, "_loaded", None)
    monkeypatch.setattr(cudart, "_candidates", lambda: iter([str(path)]))
    assert "CUDA error 35: driver too old" in str(cudart.probe())
