"""What the onnxruntime engines share: one session on one provider, verified, and the run.

It loads bytes, never a path, so that what was hash-checked is what runs. onnxruntime would step
down to the CPU in silence, once when a session is made and again when a run fails: both are
switched off here. It does not know what the options of a provider mean.
"""

import contextlib
import ctypes
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.engines import cudart
from runtime.engines.engine import (
    PROVIDER_TITLES,
    Engine,
    Outputs,
    Provider,
    Tensor,
    UInt8,
    input_shape,
    one_line,
    refuse_compiled_code,
)
from runtime.errors import EngineError, EngineFault

_PROVIDERS: Mapping[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_OUTPUTS = list(Outputs._fields)
_DTYPES = {"tensor(uint8)": "uint8", "tensor(float)": "float32"}
_DISABLED_OPTIMIZERS = ["WeightBiasQuantization"]
"""It quantizes a float bias in steps of activation scale times weight scale. Where a channel's
weights are nearly dead that overflows int32, and the channel is wrong by its whole bias (seen in
1.24 to 1.32). Without it Q/DQ graphs mean what they say, and run no slower."""

_PROVIDER_DID_NOT_LOAD = ("assigned to the default CPU EP", "Please install TensorRT")
"""What onnxruntime raises after it tried to load a provider; why that failed, it only prints."""

_FAULTS: Mapping[Provider, EngineFault] = {
    "cpu": "refused artifact",  # it runs every graph that is one
    "cuda": "failed",
    "tensorrt": "not built",
}


class SessionEngine(Engine):
    """An onnxruntime session: ``image`` in, ``logits`` and ``features`` out.

    ``settings`` are the options of the one ``provider``; ``threads`` is the number of CPU threads
    of one call, and ``spinning`` lets idle ones burn CPU.

    Raises EngineError if the bytes are no such graph, or if the provider cannot run all of it.
    """

    def __init__(
        self,
        model: bytes,
        *,
        form: str,
        provider: Provider,
        settings: Mapping[str, str],
        threads: int,
        spinning: bool = False,
        max_batch: int | None = None,
    ) -> None:
        refuse_compiled_code(model)
        onnxruntime = load_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what goes wrong is raised, not printed as well
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        if provider != "cpu":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            # Releases before 1.23 print where they should raise; stdout is for results.
            with contextlib.redirect_stdout(sys.stderr):
                session = onnxruntime.InferenceSession(
                    model,
                    options,
                    providers=[(_PROVIDERS[provider], dict(settings))],
                    disabled_optimizers=_DISABLED_OPTIMIZERS,
                    enable_fallback=0,
                )
        except Exception as error:  # onnxruntime's own types share no other base
            raise _not_loaded(onnxruntime, provider, form, len(model), error) from error
        session.disable_fallback()  # or a run that fails would begin anew on the CPU
        used = session.get_providers()[0]
        if used != _PROVIDERS[provider]:
            raise EngineError(
                f"onnxruntime: expected {_PROVIDERS[provider]}, got {used} instead; check the GPU "
                "driver and CUDA libraries, or choose the cpu provider"
            )
        super().__init__(
            name="onnxruntime",
            version=onnxruntime.__version__,
            provider=provider,
            form=form,
            shape=input_shape(
                form, _tensors(session.get_inputs()), _tensors(session.get_outputs())
            ),
            max_batch=max_batch,
        )
        self._session: Any = session

    def _infer(self, images: UInt8) -> Outputs:
        try:
            logits, features = self._session.run(_OUTPUTS, {"image": images})
        except Exception as error:
            raise EngineError(f"{self}: the run failed: {one_line(error)}") from error
        return Outputs(logits, features)

    def _close(self) -> None:
        self._session = None


def load_onnxruntime() -> Any:
    """The library, or EngineError if it cannot be imported."""
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            f"onnxruntime cannot be imported: {error}; pip install onnxruntime", "missing library"
        ) from error
    return onnxruntime


def require_gpu(provider: Provider, device: int) -> cudart.Device:
    """GPU ``device``, once onnxruntime was built for ``provider`` and CUDA answers.

    What onnxruntime lists it may not be able to open, and it says so late and in many lines. So
    CUDA is asked first. Raises EngineError with the reason.
    """
    onnxruntime = load_onnxruntime()
    title = f"onnxruntime {PROVIDER_TITLES[provider]}"
    available = onnxruntime.get_available_providers()
    if _PROVIDERS[provider] not in available:
        raise EngineError(
            f"{title}: expected an onnxruntime with {_PROVIDERS[provider]}, got one with only "
            f"{', '.join(available)}; install onnxruntime-gpu in its place, on a Jetson the build "
            "for its JetPack",
            "missing library",
        )
    try:
        cudart.load()
    except EngineError as error:
        raise EngineError(f"{title}: {error}", "missing library") from error
    found = cudart.probe(device)
    if isinstance(found, str):
        raise EngineError(f"{title}: no GPU: {found}", "no device")
    if hasattr(onnxruntime, "preload_dlls"):  # from 1.21 on
        # CUDA that pip installed is not where the loader looks. What is not found it prints; what
        # of that is needed, the provider's own library says.
        with contextlib.redirect_stdout(io.StringIO()):
            onnxruntime.preload_dlls()
    return found


def _not_loaded(
    onnxruntime: Any, provider: Provider, form: str, size: int, error: Exception
) -> EngineError:
    title = f"onnxruntime {PROVIDER_TITLES[provider]}"
    if provider != "cpu" and any(words in str(error) for words in _PROVIDER_DID_NOT_LOAD):
        missing = _missing_library(onnxruntime, provider)
        if missing:
            return EngineError(
                f"{title}: {missing}; install what this onnxruntime {onnxruntime.__version__} was "
                "built for, and put its folder into LD_LIBRARY_PATH",
                "missing library",
            )
    words = f"{title}, {form}: cannot load the model of {size:,} bytes: {one_line(error)}"
    return EngineError(words, _FAULTS[provider])


def _missing_library(onnxruntime: Any, provider: Provider) -> str:
    """Why the loader refuses the provider's library; empty if it does not.

    To be asked only after onnxruntime tried: the library must not come before its host.
    """
    folder = Path(onnxruntime.__file__).parent / "capi"
    try:
        ctypes.CDLL(str(folder / f"libonnxruntime_providers_{provider}.so"))
    except OSError as error:
        return str(error)
    return ""


def _tensors(arguments: Any) -> list[Tensor]:
    """onnxruntime names dynamic dimensions."""
    return [
        (
            argument.name,
            _DTYPES.get(argument.type, argument.type),
            [side if isinstance(side, int) else None for side in argument.shape],
        )
        for argument in arguments
    ]
