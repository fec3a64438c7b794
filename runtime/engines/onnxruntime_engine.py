"""Run the ONNX model with onnxruntime on the CPU, which is everywhere.

It knows the CPU's options; the session is shared with the other onnxruntime engines.
"""

import os

from runtime.engines.onnxruntime_session import SessionEngine


class OnnxRuntimeEngine(SessionEngine):
    """onnxruntime's CPU provider; it runs every form, TensorRT's slowly.

    ``threads`` is the number of CPU threads of one call, by default the cores this process may
    use. ``spinning`` lets idle threads burn CPU for a little latency; other processes on a device
    (camera, encoder, network) pay for it, so it is off.

    Raises EngineError if onnxruntime is missing, or if the bytes are no graph of the contract.
    """

    def __init__(
        self, model: bytes, *, form: str, threads: int | None = None, spinning: bool = False
    ) -> None:
        super().__init__(
            model,
            form=form,
            provider="cpu",
            settings={},
            threads=threads or len(os.sched_getaffinity(0)),
            spinning=spinning,
        )
