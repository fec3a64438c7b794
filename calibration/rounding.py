"""Choose int8 weights by what they do to a layer's output, not by what is nearest.

It does not know where a layer's inputs come from: it gets their covariance and answers in weights.

The output error of a rounded row is ``d H d'``, where ``d`` are the errors of its weights and ``H``
the covariance of its inputs; the mean of the error is left out, because the bias takes it back
(`calibration.bias`). Rounding one weight after the other and moving what is left of its error
onto weights that are not rounded yet makes it several times smaller than rounding each by itself,
at no cost in speed. (Frantar et al. 2022, arXiv:2210.17323, after Hassibi and Stork 1993; that
calibration data may choose roundings: Hubara et al. 2020, arXiv:2006.10518.) Scales a little
smaller than the largest weight asks for are tried too, and what is worse than nearest is not used.
"""

import dataclasses
from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import onnx

from calibration.executor import Array, Executor, groups
from calibration.graph import Conv, Graph, Layer, attributes
from calibration.quantize import Float32, weight_scales
from runtime.preprocess import UInt8

Float64 = npt.NDArray[np.float64]

MAX_INPUTS = 2304
"""Products per output value (256 channels of 3x3) up to which a layer's weights are chosen: memory
grows with their square and time with their cube. At 4,608 one layer would take 170 MB and half a
minute, and in so long a sum nearest rounding averages out anyway."""

DAMPING = 0.01
"""Share of the mean variance that is added to every input's (as in the paper's code)."""

BLOCK = 64
"""Weights of a row that are rounded before what they left is moved onto all later ones."""

FACTORS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85)
"""Scales that are tried, in parts of the scale that reaches the largest weight."""


@dataclasses.dataclass
class Moments:
    """Sums over a layer's input patches ``x``, ``[G, K]`` each: G groups of K products."""

    count: int
    sums: Float64
    """``[G, K]``."""
    products: Float64
    """``[G, K, K]``."""

    @property
    def covariance(self) -> Float64:
        """``E[x x'] - E[x] E[x]'``, ``[G, K, K]``."""
        mean = self.sums / self.count
        return np.asarray(self.products / self.count - mean[:, :, None] * mean[:, None, :])


def measure_moments(
    graph: onnx.ModelProto, layers: Collection[str], images: UInt8
) -> dict[str, Moments]:
    """Moments of the inputs of ``layers`` in the float ``graph`` over ``images``.

    Memory does not grow with the number of images. Layers with more than MAX_INPUTS products, or
    whose padding is not written down, are left out.
    """
    index = Graph(graph)
    readers: dict[str, list[Layer]] = {}
    for layer in index.layers():
        if layer.name in layers and _can_choose(index, layer):
            readers.setdefault(layer.input, []).append(layer)
    found: dict[str, Moments] = {}

    def visit(tensor: str, live: dict[str, Array]) -> None:
        for layer in readers[tensor]:
            x = patches(live[tensor], index.nodes[layer.name], layer)
            count, sums = x.shape[2], x.sum(axis=2, dtype=np.float64)
            products = (x @ x.transpose(0, 2, 1)).astype(np.float64)
            if layer.name in found:
                found[layer.name].count += count
                found[layer.name].sums += sums
                found[layer.name].products += products
            else:
                found[layer.name] = Moments(count, sums, products)

    executor = Executor(graph, stops=readers)
    for group in groups(images):
        executor.run({graph.graph.input[0].name: group}, visit)
    return found


def _can_choose(graph: Graph, layer: Layer) -> bool:
    auto_pad = attributes(graph.nodes[layer.name]).get("auto_pad", b"NOTSET")
    return bool(layer.rows[0].size <= MAX_INPUTS and auto_pad == b"NOTSET")


def patches(values: Float32, node: onnx.NodeProto, layer: Layer) -> Float32:
    """What ``layer``, ``node`` in its graph, multiplies its rows with: ``[G, K, positions]``.

    ``values`` are its input: ``[N, C, ...]`` for a convolution, else ``[N, ..., C]``. K runs as in
    ``layer.rows``: input channel first, then the kernel.
    """
    if not isinstance(layer, Conv):
        return np.ascontiguousarray(values.reshape(1, -1, values.shape[-1]).transpose(0, 2, 1))
    kernel, found = layer.rows.shape[2:], attributes(node)
    dims = len(kernel)
    strides, dilations = (found.get(name, [1] * dims) for name in ("strides", "dilations"))
    pads = found.get("pads", [0] * 2 * dims)
    padded = np.pad(values, [(0, 0), (0, 0), *zip(pads[:dims], pads[dims:], strict=True)])
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    axes = tuple(range(2, 2 + dims))
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=axes)
    steps = [slice(None, None, step) for step in (1, 1, *strides, *dilations)]
    kernel_first = windows[tuple(steps)].transpose(1, *range(2 + dims, 2 + 2 * dims), 0, *axes)
    return kernel_first.reshape(layer.groups, layer.rows[0].size, -1)


@dataclasses.dataclass(frozen=True)
class Rounded:
    """The chosen weights of a layer, and what they gain."""

    scales: Float32
    """``[O]``."""
    weight: npt.NDArray[np.int8]
    """In the layer's own shape."""
    nearest_error: float
    """Mean square of the layer's output error with nearest rounding, its mean left out."""
    error: float
    """The same with the chosen weights; never more."""


def choose_weights(layer: Layer, covariance: Float64) -> Rounded:
    """The int8 weights of ``layer`` for inputs of ``covariance`` ``[G, K, K]``.

    For every output channel the better of nearest and error-compensating rounding, under the best
    of several scales.
    """
    grouped = layer.rows.reshape(layer.groups, -1, layer.rows[0].size).astype(np.float64)
    largest = (
        weight_scales(layer.weight, layer.axis).astype(np.float64).reshape(layer.groups, -1, 1)
    )
    nearest = _round(grouped / largest)
    before = best = _errors(nearest * largest - grouped, covariance)
    weight, scales = nearest, largest
    inverse = _inverse_root(covariance)
    for factor in FACTORS:
        scale = (largest * factor).astype(np.float32).astype(np.float64)
        tried = _compensate(grouped, scale, inverse)
        error = _errors(tried * scale - grouped, covariance)
        better = (error < best)[..., None]
        weight, scales = np.where(better, tried, weight), np.where(better, scale, scales)
        best = np.minimum(error, best)
    rows = weight.astype(np.int8).reshape(layer.rows.shape)
    return Rounded(
        scales=scales.reshape(-1).astype(np.float32),
        weight=np.moveaxis(rows, 0, layer.axis),
        nearest_error=float(before.mean()),
        error=float(best.mean()),
    )


def _round(steps: Float64) -> Float64:
    return np.asarray(np.clip(np.rint(steps), -127, 127))


def _errors(delta: Float64, covariance: Float64) -> Float64:
    """``d H d'`` of every row of ``delta`` ``[G, R, K]``: ``[G, R]``."""
    return np.asarray(((delta @ covariance) * delta).sum(axis=2))


def _inverse_root(covariance: Float64) -> Float64:
    """Upper triangular ``U`` with ``U' U`` the inverse of the damped covariance, ``[G, K, K]``."""
    side = covariance.shape[1]
    variance = np.trace(covariance, axis1=1, axis2=2) / side
    # A group whose input never changes may have any weights; 1 keeps the inverse finite.
    damping = np.where(variance > 0.0, DAMPING * variance, 1.0)
    while True:
        damped = covariance + damping[:, None, None] * np.eye(side)
        try:
            # Reversed, its lower root is the upper root that is inverted here.
            root = np.linalg.cholesky(damped[:, ::-1, ::-1])[:, ::-1, ::-1]
        except np.linalg.LinAlgError:
            # Inputs that vary little around a large mean: what is left of the subtraction is
            # rounding, and may be negative.
            damping = 10.0 * damping
            continue
        return np.asarray(np.linalg.inv(root))


def _compensate(weight: Float64, scale: Float64, inverse: Float64) -> Float64:
    """Round ``weight`` ``[G, R, K]`` column by column, moving errors to the right: integers."""
    left, result = weight.copy(), np.empty_like(weight)
    side = weight.shape[2]
    for start in range(0, side, BLOCK):
        end = min(start + BLOCK, side)
        errors = np.empty((*weight.shape[:2], end - start))
        for column in range(start, end):
            values = left[:, :, column]
            result[:, :, column] = _round(values / scale[:, :, 0])
            off = values - result[:, :, column] * scale[:, :, 0]
            errors[:, :, column - start] = off / inverse[:, column, column, None]
            later = slice(column + 1, end)
            left[:, :, later] -= (
                errors[:, :, column - start, None] * inverse[:, column, None, later]
            )
        left[:, :, end:] -= errors @ inverse[:, start:end, end:]
    return result
