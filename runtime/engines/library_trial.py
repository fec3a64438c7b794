"""Runs in a process of its own: import a library or open an onnxruntime provider, and say so.

Usage: ``python -c TEXT_OF_THIS_FILE import MODULE | providers | open PROVIDER``. The answer is one
line of JSON; a failure is an exception. It knows nothing of fieldfit, so that what it finds is due
to the library alone. ``runtime.trials`` is the other side.
"""

import base64
import importlib
import json
import sys

MODEL = base64.b64decode(
    "CAg6gwEKDwoBeAoBdxIBeSIEQ29udhIBZyozCAEIAQgDCAMQASIkAACAPwAAgD8AAIA/AACAPwAAgD8AAIA/AACAPw"
    "AAgD8AAIA/QgF3WhsKAXgSFgoUCAESEAoCCAEKAggBCgIIAwoCCANiGwoBeRIWChQIARIQCgIIAQoCCAEKAggBCgII"
    "AUIECgAQDQ=="
)
"""One convolution: the sum of ``x``, float32 [1, 1, 3, 3]; ``y`` is [1, 1, 1, 1]. Convolutions need
what a provider may lack although it loads, such as cuDNN."""

FALLBACK = "fallback to CPU EP has been explicitly disabled"


def main(action: str, name: str = "") -> dict[str, object]:
    """What the library answers; raises whatever it raises."""
    if action == "import":
        return {"version": importlib.import_module(name).__version__}
    import numpy as np
    import onnxruntime

    if action == "providers":
        return {
            "version": onnxruntime.__version__,
            "numpy": np.__version__,
            "providers": onnxruntime.get_available_providers(),
        }
    options = onnxruntime.SessionOptions()
    if name != "CPUExecutionProvider":
        # A provider that opens and leaves every node to the CPU is of no use.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = onnxruntime.InferenceSession(MODEL, options, providers=[name])
    except Exception as error:
        if FALLBACK not in str(error):
            raise
        raise RuntimeError("a convolution falls to the CPU") from None
    used = session.get_providers()[0]
    if used != name:
        raise RuntimeError(f"{used} opened instead")
    x = np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3)
    total = session.run(None, {"x": x})[0].item()
    if total != 36.0:
        raise RuntimeError(f"expected a convolution to give 36, got {total}")
    return {"opened": used}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
