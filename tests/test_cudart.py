"""The CUDA shim: its error paths for real, its good paths on a library that keeps host memory."""

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from runtime.engines import cudart
from runtime.errors import EngineError

HERE = Path(__file__).parent
DEVICE = cudart.probe()


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """tests/fake_cudart.c, compiled, as the only CUDA runtime library."""
    path = compile_fake(tmp_path / "libcudart.so.12")
    monkeypatch.setattr(cudart, "_candidates", lambda: iter([str(path)]))
    monkeypatch.setattr(cudart, "_loaded", None)
    return ctypes.CDLL(str(path))


def compile_fake(path: Path) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler: the stand-in for libcudart is compiled")
    source = HERE / "fake_cudart.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, source], check=True)
    return path


def test_without_a_library_the_reason_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudart, "_SONAMES", ("libcudart.so.does-not-exist",))
    monkeypatch.setattr(cudart, "_loaded", None)
    reason = cudart.probe()
    assert isinstance(reason, str)
    assert reason.startswith("no CUDA runtime library: expected one of libcudart.so.does-not")
    with pytest.raises(EngineError, match="use an onnxruntime engine on the CPU"):
        cudart.load()


def test_a_library_that_is_not_cuda_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudart, "_candidates", lambda: iter(["libc.so.6", "libm.so.6"]))
    monkeypatch.setattr(cudart, "_loaded", None)
    with pytest.raises(EngineError, match="no CUDA runtime library"):
        cudart.load()


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
    for call in (cuda.stream, cuda.event, lambda: cuda.malloc(16), lambda: cuda.set_device(0)):
        with pytest.raises(cudart.CudaError, match="CUDA error 35"):
            call()


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
    assert cudart.probe(3) == "expected CUDA device 3, got devices 0 to 0"


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
    source = (HERE / "fake_cudart.c").read_text()
    newer = tmp_path / "newer.c"
    newer.write_text(source.replace('setting("FAKE_CUDA_ERROR", 0)', "35"))
    path = tmp_path / "libcudart.so.13"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", path, newer], check=True)
    candidates = [str(path), *cudart._candidates()]
    monkeypatch.setattr(cudart, "_candidates", lambda: iter(candidates))
    assert isinstance(cudart.probe(), cudart.Device)
    monkeypatch.setattr(cudart, "_loaded", None)
    monkeypatch.setattr(cudart, "_candidates", lambda: iter([str(path)]))
    assert "CUDA error 35: driver too old" in str(cudart.probe())
