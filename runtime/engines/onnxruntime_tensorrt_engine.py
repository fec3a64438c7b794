"""Run the ONNX model with TensorRT inside onnxruntime; only for who asks for it.

Our own TensorRT engine checks the digest of a plan before it is loaded, shows progress and says
why a build failed; here onnxruntime does what it does. For comparison, and where the onnxruntime
of a board has TensorRT and Python has not. It does not know how a session is made and verified.
What no GPU was at hand for is on benchmarks/gpu.md.
"""

import hashlib
import stat
from pathlib import Path

from runtime.engines.onnxruntime_session import SessionEngine, load_onnxruntime, require_gpu
from runtime.engines.tensorrt_build import workspace_for
from runtime.errors import EngineError


class OnnxRuntimeTensorRTEngine(SessionEngine):
    """onnxruntime's TensorRT provider; opening it builds an engine, for minutes on a small board.

    ``shape`` is height, width and channels of one picture. ``batch`` is the smallest, usual and
    largest number of pictures in one call: for more, onnxruntime would build again in the middle
    of a run. ``device`` is the ordinal of the GPU. ``cache`` is a folder for engines and timings,
    None to build at every opening.

    The graph's own types are obeyed: with all precision flags off the network is strongly typed
    (onnxruntime 1.18 with TensorRT 10 or newer: microsoft/onnxruntime#18707).

    Raises EngineError if onnxruntime, TensorRT or a GPU are missing, if TensorRT does not take the
    whole graph, and if others may write to ``cache``.
    (https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html)
    """

    def __init__(
        self,
        model: bytes,
        *,
        form: str,
        shape: tuple[int, int, int],
        batch: tuple[int, int, int] = (1, 1, 16),
        device: int = 0,
        cache: Path | None = None,
    ) -> None:
        gpu = require_gpu("tensorrt", device)
        settings = profile(shape, batch) | {
            "device_id": str(device),
            "trt_max_workspace_size": str(workspace_for(gpu)[0]),
        }
        if cache is not None:
            settings |= caching(engine_folder(cache, model, batch))
        super().__init__(
            model,
            form=form,
            provider="tensorrt",
            settings=settings,
            threads=1,
            max_batch=batch[2],
        )


def profile(shape: tuple[int, int, int], batch: tuple[int, int, int]) -> dict[str, str]:
    """The optimization profile as onnxruntime wants it: ``image:1x160x160x1``."""
    names = ("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes")
    return {
        name: "image:" + "x".join(str(side) for side in (count, *shape))
        for name, count in zip(names, batch, strict=True)
    }


def caching(folder: Path) -> dict[str, str]:
    """Keep engines and timings in ``folder``."""
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
    }


def engine_folder(cache: Path, model: bytes, batch: tuple[int, int, int]) -> Path:
    """A private folder for this model alone.

    onnxruntime names an engine by the shape of its graph: a model that was trained again would be
    given the weights of the old one. And it loads what it finds, though an engine is native code.
    """
    key = hashlib.sha256(model)
    key.update(f"{load_onnxruntime().__version__} {batch}".encode())
    folder = cache / f"onnxruntime-{key.hexdigest()[:32]}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise EngineError(
            f"{folder}: no folder for engines: {error.strerror}; choose another cache, or none"
        ) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise EngineError(
            f"{folder}: expected a folder that only its owner may write to, got mode "
            f"{stat.filemode(status.st_mode)}: engines are executable code; remove it",
            "refused artifact",
        )
    return folder
