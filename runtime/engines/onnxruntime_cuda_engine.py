"""Run the ONNX model with onnxruntime on an NVIDIA GPU, for where TensorRT is not to be had.

It knows the options of onnxruntime's CUDA provider, not how a session is made and verified. What
no GPU was at hand for is on benchmarks/gpu.md.
"""

from runtime.engines.engine import has_node
from runtime.engines.onnxruntime_session import SessionEngine, require_gpu
from runtime.errors import EngineError


class OnnxRuntimeCudaEngine(SessionEngine):
    """onnxruntime's CUDA provider, for the float forms. ``device`` is the ordinal of the GPU.

    onnxruntime copies images and answers itself, from and to ordinary memory.

    Raises EngineError for a quantized form, which this provider has no convolution kernels for;
    if onnxruntime, its CUDA libraries or a GPU are missing; and if a node would run on the CPU.
    (https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html)
    """

    def __init__(self, model: bytes, *, form: str, device: int = 0) -> None:
        if has_node(model, "DequantizeLinear"):
            raise EngineError(
                f"onnxruntime CUDA: expected fp32 or fp16, got {form}: this provider has no INT8 "
                "convolution kernels and would run it slower than fp32",
                "refused artifact",
            )
        require_gpu("cuda", device)
        settings = {
            "device_id": str(device),
            # The default times every algorithm, again for each new batch size: a stall at the
            # first image, and at the last batch of a folder.
            "cudnn_conv_algo_search": "HEURISTIC",
            # The default takes the next power of two, from memory that a Jetson's CPU shares.
            "arena_extend_strategy": "kSameAsRequested",
        }
        super().__init__(model, form=form, provider="cuda", settings=settings, threads=1)
