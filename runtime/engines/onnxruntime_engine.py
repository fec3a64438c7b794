"""Run the ONNX model with onnxruntime: on the CPU everywhere, on CUDA where that is installed.

It loads bytes, never a path, so that what was hash-checked is what runs. It knows one provider at
a time: onnxruntime would step down to the CPU in silence, so the provider is verified afterwards.
"""

import os
from typing import Any, Literal

from runtime.engines.engine import Engine, Outputs, UInt8
from runtime.errors import EngineError

Provider = Literal["cpu", "cuda"]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_OUTPUTS = ["logits", "features"]
_DISABLED_OPTIMIZERS = ["WeightBiasQuantization"]
"""It quantizes a float bias in steps of activation scale times weight scale. Where a channel's
weights are nearly dead that overflows int32, and the channel is wrong by its whole bias (seen in
1.24 to 1.32). Without it Q/DQ graphs mean what they say, and run no slower."""


class OnnxRuntimeEngine(Engine):
    """An onnxruntime session: ``image`` in, ``logits`` and ``features`` out.

    ``threads`` is the number of CPU threads of one call, by default the cores this process may
    use. ``spinning`` lets idle threads burn CPU for a little latency; other processes on a device
    (camera, encoder, network) pay for it, so it is off. ``device`` is the CUDA device's index.

    Raises EngineError if the bytes are no such graph, or if the provider cannot run it here.
    """

    def __init__(
        self,
        model: bytes,
        *,
        form: str,
        provider: Provider = "cpu",
        threads: int | None = None,
        spinning: bool = False,
        device: int = 0,
    ) -> None:
        import onnxruntime

        _refuse(model, form, provider, onnxruntime.get_available_providers())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what goes wrong is raised, not printed as well
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        settings: dict[str, str] = {}
        if provider == "cuda":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            settings["device_id"] = str(device)
        try:
            session = onnxruntime.InferenceSession(
                model,
                options,
                providers=[(_PROVIDERS[provider], settings)],
                disabled_optimizers=_DISABLED_OPTIMIZERS,
            )
        except Exception as error:  # onnxruntime's own types share no other base
            raise EngineError(
                f"onnxruntime {provider.upper()}, {form}: cannot load the model of "
                f"{len(model):,} bytes: {_one_line(error)}"
            ) from error
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
            shape=_contract(session, form),
        )
        self._session: Any = session

    def _infer(self, images: UInt8) -> Outputs:
        try:
            logits, features = self._session.run(_OUTPUTS, {"image": images})
        except Exception as error:
            raise EngineError(f"{self}: the run failed: {_one_line(error)}") from error
        return Outputs(logits, features)

    def _close(self) -> None:
        self._session = None


def _refuse(model: bytes, form: str, provider: str, available: list[str]) -> None:
    """Raise EngineError for what must not, or need not, reach onnxruntime."""
    if b"EPContext" in model:
        # Such a file embeds a compiled engine: native code in a model's clothes.
        raise EngineError(
            f"{form}: expected a plain ONNX graph, got one with EPContext nodes, which carry "
            "compiled code; export the bundle again without them"
        )
    if provider == "cpu":
        return
    if b"DequantizeLinear" in model or form.startswith("int8"):
        raise EngineError(
            f"onnxruntime CUDA: expected fp32 or fp16, got {form}: this provider has no INT8 "
            "convolution kernels and would run it slower than fp32"
        )
    if _PROVIDERS[provider] not in available:
        raise EngineError(
            f"onnxruntime: expected {_PROVIDERS[provider]}, got only {', '.join(available)}; "
            "install an onnxruntime built for CUDA, or choose the cpu provider"
        )


def _contract(session: Any, form: str) -> tuple[int, int, int]:
    """Height, width and channels of ``image``, once the graph is known to keep the contract."""
    inputs = [(tensor.name, tensor.type, len(tensor.shape)) for tensor in session.get_inputs()]
    outputs = {tensor.name: (tensor.type, len(tensor.shape)) for tensor in session.get_outputs()}
    if inputs != [("image", "tensor(uint8)", 4)]:
        raise EngineError(f"{form}: expected one input image, uint8 [N, H, W, C], got {inputs}")
    if any(outputs.get(name) != ("tensor(float)", 2) for name in _OUTPUTS):
        raise EngineError(
            f"{form}: expected outputs logits and features, float32 of two axes, got {outputs}"
        )
    _, height, width, channels = session.get_inputs()[0].shape
    if not all(isinstance(side, int) for side in (height, width, channels)):
        raise EngineError(
            f"{form}: expected fixed height, width and channels, got "
            f"{[height, width, channels]}; only the batch axis may be dynamic"
        )
    return height, width, channels


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
