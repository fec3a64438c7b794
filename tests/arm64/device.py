"""What runs on the machine under test, and on this one for comparison: logits and facts.

It is a script that needs only fieldfit's base install; it judges nothing.
"""

import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

from runtime import Bundle
from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine

IMPORT_RUNTIME = """\
import sys
before = set(sys.modules)
import runtime
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*(name for name in loaded if getattr(sys.modules[name], "__spec__", None)))
"""
"""Modules without a spec are made in memory by extension modules (Cython does); no file is read."""


def main(bundle: str, out: str) -> None:
    """Write ``logits.npz`` and ``facts.json`` for ``bundle`` into the folder ``out``."""
    np.savez(Path(out) / "logits.npz", **logits(Bundle.open(bundle)))  # type: ignore[arg-type]
    facts = {
        "machine": platform.machine(),
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", platform.system()),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "loaded": loaded(),
        "bytes": installed_bytes(),
    }
    (Path(out) / "facts.json").write_text(json.dumps(facts))


def logits(bundle: Bundle) -> dict[str, npt.NDArray[np.float32]]:
    """For each form with golden logits: what the CPU answers to the golden images, ``[N, K]``.

    One image at a time on one thread, as the self-test does.
    """
    golden = bundle.golden()
    answers = {}
    for name in golden:
        if not name.startswith("logits."):
            continue
        form = name.removeprefix("logits.")
        with OnnxRuntimeEngine(bundle.model(form), form=form, threads=1) as engine:
            images = np.split(golden["images"], len(golden["images"]))
            answers[form] = np.concatenate([engine.infer(image).logits for image in images])
    return answers


def loaded() -> dict[str, str]:
    """Top-level modules that ``import runtime`` loads -> the distribution that each is from.

    The standard library is left out; a module that no distribution owns has an empty name.
    """
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_RUNTIME], capture_output=True, text=True, check=True
    )
    owners = metadata.packages_distributions()
    names = set(done.stdout.split()) - set(sys.stdlib_module_names)
    return {name: next(iter(owners.get(name, [])), "") for name in sorted(names)}


def installed_bytes() -> dict[str, int]:
    """Bytes on disk of each installed distribution, by the record that its installer kept."""
    sizes = {}
    for distribution in metadata.distributions():
        files = [Path(str(file.locate())) for file in distribution.files or ()]
        sizes[distribution.metadata["Name"].lower()] = sum(
            file.stat().st_size for file in files if file.is_file()
        )
    return sizes


if __name__ == "__main__":
    main(*sys.argv[1:])
