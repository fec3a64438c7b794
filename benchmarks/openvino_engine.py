"""OpenVINO behind the seam of the runtime's engines, to be measured beside them.

Why it is not one of them: docs/decisions/0009-no-openvino.md. It does not know what is measured.
"""

import os
import sys
from typing import Any

from runtime.engines.engine import Engine, Outputs, UInt8, input_shape, one_line
from runtime.errors import EngineError


class OpenVinoEngine(Engine):
    """OpenVINO's CPU plugin; it runs every form, ``int8-cpu`` fastest.

    ``threads`` is the number of CPU threads of one call, by default the cores this process may
    use.

    Raises EngineError if OpenVINO is missing, or if the bytes are no graph of the contract.
    (https://docs.openvino.ai/2026/openvino-workflow/running-inference/inference-devices-and-modes/cpu-device.html)
    """

    def __init__(self, model: bytes, *, form: str, threads: int | None = None) -> None:
        openvino = _load_openvino()
        settings = {
            "INFERENCE_NUM_THREADS": threads or len(os.sched_getaffinity(0)),
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            # By default it would compute float layers in bfloat16 where the processor can, and
            # answer otherwise there than where the bundle was proven.
            "INFERENCE_PRECISION_HINT": "f32",
        }
        try:
            core = openvino.Core()
            compiled = core.compile_model(core.read_model(model), "CPU", settings)
        except RuntimeError as error:
            raise EngineError(
                f"openvino CPU, {form}: cannot load the model of {len(model):,} bytes: "
                f"{one_line(error)}",
                "refused artifact",
            ) from error
        shape = input_shape(
            form,
            [(port.any_name, *_described(port)) for port in compiled.inputs],
            [(port.any_name, *_described(port)) for port in compiled.outputs],
        )
        super().__init__(
            name="openvino",
            version=openvino.__version__,
            provider="cpu",
            form=form,
            shape=shape,
        )
        self._request: Any = compiled.create_infer_request()

    def _infer(self, images: UInt8) -> Outputs:
        request = self._request
        try:
            request.infer(images, share_inputs=True, share_outputs=True)
        except RuntimeError as error:
            raise EngineError(f"{self}: the run failed: {one_line(error)}") from error
        logits, features = (request.get_tensor(name).data.copy() for name in Outputs._fields)
        return Outputs(logits, features)

    def _close(self) -> None:
        self._request = None


def _load_openvino() -> Any:
    # Its import reports to an analytics service, and asks nobody. With this it has a stub for that.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        import openvino
    except ImportError as error:
        raise EngineError(
            f"openvino cannot be imported: {error}; pip install openvino",
            "missing library",
        ) from error
    return openvino


def _described(port: Any) -> tuple[str, list[int | None]]:
    """The dtype by NumPy's name, and the dimensions, None where they are dynamic."""
    dimensions = [None if side.is_dynamic else side.get_length() for side in port.partial_shape]
    return port.element_type.to_dtype().name, dimensions
