"""Small float graphs of the kind that export writes, drawn with seeded random weights.

They do not come from a trained network; ``draw_images`` gives them something to look at.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper
from PIL import Image

from calibration.ranges import measure
from calibration.table import Table, table_key
from runtime.dataset import Example
from runtime.preprocess import InputSpec, UInt8
from runtime.recipe import CalibrationSettings

SIZE = 16


class Network:
    """Adds one layer a call; ``tensor`` is the newest, ``channels`` its width."""

    def __init__(
        self, *, channels: int = 1, mean: int = 128, std: float = 128.0, seed: int = 0
    ) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.image_channels = self.channels = channels
        self.flat = False
        self.node("Cast", ["image"], "cast", to=onnx.TensorProto.FLOAT)
        self.node("Transpose", ["cast"], "planes", perm=[0, 3, 1, 2])
        self.node("Mul", ["planes", self.constant("factor", np.float32(1 / std))], "scaled")
        self.node("Add", ["scaled", self.constant("shift", np.float32(-mean / std))], "normal")

    def constant(self, name: str, value: Any) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], f"{op}_{output}", **attributes))
        self.tensor = output
        return output

    def next(self) -> str:
        return f"t{len(self.nodes)}"

    def conv(
        self,
        out_channels: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 1,
        bias: bool = True,
        weight: npt.NDArray[np.float32] | None = None,
    ) -> str:
        name, fan_in = self.next(), self.channels // groups * kernel * kernel
        if weight is None:
            shape = (out_channels, self.channels // groups, kernel, kernel)
            weight = self.random.normal(0, 1.4 / np.sqrt(fan_in), shape).astype(np.float32)
        inputs = [self.tensor, self.constant(f"{name}_weight", weight)]
        if bias:
            values = self.random.normal(0, 0.2, out_channels).astype(np.float32)
            inputs.append(self.constant(f"{name}_bias", values))
        self.channels = out_channels
        return self.node(
            "Conv",
            inputs,
            name,
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[kernel // 2] * 4,
            group=groups,
        )

    def relu6(self) -> str:
        low, high = f"{self.next()}_low", f"{self.next()}_high"
        bounds = [self.constant(low, np.float32(0)), self.constant(high, np.float32(6))]
        return self.node("Clip", [self.tensor, *bounds], self.next())

    def activate(self, op: str) -> str:
        if op == "Clip":
            return self.relu6()
        if op == "Silu":
            before = self.tensor
            gate = self.node("Sigmoid", [before], self.next())
            return self.node("Mul", [before, gate], self.next())
        return self.node(op, [self.tensor], self.next()) if op != "none" else self.tensor

    def depthwise(self, **options: Any) -> str:
        return self.conv(self.channels, groups=self.channels, **options)

    def residual(self, activation: str = "Relu") -> str:
        """Add what two convolutions make of the tensor to the tensor itself."""
        before, channels = self.tensor, self.channels
        self.depthwise()
        self.activate(activation)
        self.conv(channels, kernel=1)
        return self.node("Add", [self.tensor, before], self.next())

    def squeeze_excite(self, gate: str = "Sigmoid", *, mean: bool = True) -> str:
        before, channels = self.tensor, self.channels
        if mean:
            axes = self.constant(f"{self.next()}_axes", np.array([2, 3], dtype=np.int64))
            self.node("ReduceMean", [before, axes], self.next(), keepdims=1)
        else:
            self.node("GlobalAveragePool", [before], self.next())
        self.conv(4, kernel=1)
        self.activate("Relu")
        self.conv(channels, kernel=1)
        self.activate(gate)
        return self.node("Mul", [self.tensor, before], self.next())

    def concat(self) -> str:
        before, channels = self.tensor, self.channels
        self.conv(channels, kernel=1)
        self.activate("Relu")
        self.channels *= 2
        return self.node("Concat", [before, self.tensor], self.next(), axis=1)

    def shuffle(self) -> str:
        """ShuffleNet's: split, convolve one half, join, interleave the channels."""
        half, tensor, name = self.channels // 2, self.tensor, self.next()
        sizes = self.constant(f"{name}_sizes", np.array([half, half], dtype=np.int64))
        left, right = f"{name}_left", f"{name}_right"
        self.nodes.append(
            helper.make_node("Split", [tensor, sizes], [left, right], f"Split_{name}", axis=1)
        )
        self.tensor, self.channels = right, half
        self.conv(half, kernel=1)
        self.activate("Relu")
        side = self.side()
        joined = self.node("Concat", [left, self.tensor], self.next(), axis=1)
        self.channels = 2 * half
        for label, shape in (("a", [0, 2, half, side, side]), ("b", [0, 2 * half, side, side])):
            target = self.constant(f"{name}_{label}", np.array(shape, dtype=np.int64))
            joined = self.node("Reshape", [joined, target], self.next())
            if label == "a":
                joined = self.node("Transpose", [joined], self.next(), perm=[0, 2, 1, 3, 4])
        return joined

    def transformer_block(self, *, bias: bool = False) -> str:
        """ConvNeXt's: depthwise convolution, then LayerNorm and two linear layers by pixel."""
        before, channels, name = self.tensor, self.channels, self.next()
        self.depthwise(kernel=7)
        self.node("Transpose", [self.tensor], self.next(), perm=[0, 2, 3, 1])
        ones = self.constant(f"{name}_gain", np.ones(channels, np.float32))
        self.node("LayerNormalization", [self.tensor, ones], self.next(), axis=-1)
        self.matmul(2 * channels, bias=bias)
        self.node("Gelu", [self.tensor], self.next())
        self.matmul(channels, bias=bias)
        self.node("Transpose", [self.tensor], self.next(), perm=[0, 3, 1, 2])
        return self.node("Add", [self.tensor, before], self.next())

    def matmul(self, out_channels: int, *, bias: bool = False) -> str:
        """A linear layer over the last axis, its bias in an Add as exporters write it."""
        name, weight = self.next(), self._matrix(self.channels, out_channels)
        self.channels = out_channels
        self.node("MatMul", [self.tensor, self.constant(f"{name}_matrix", weight)], name)
        if bias:
            values = self.random.normal(0, 0.2, out_channels).astype(np.float32)
            self.node("Add", [name, self.constant(f"{name}_bias", values)], self.next())
        return self.tensor

    def gemm(self, out_channels: int, *, bias: bool = True, transposed: bool = True) -> str:
        """A linear layer over ``[N, D]``."""
        name, weight = self.next(), self._matrix(self.channels, out_channels)
        stored = np.ascontiguousarray(weight.T) if transposed else weight
        inputs = [self.tensor, self.constant(f"{name}_matrix", stored)]
        if bias:
            values = self.random.normal(0, 0.2, out_channels).astype(np.float32)
            inputs.append(self.constant(f"{name}_bias", values))
        self.channels = out_channels
        return self.node("Gemm", inputs, name, transB=int(transposed))

    def _matrix(self, inputs: int, outputs: int) -> npt.NDArray[np.float32]:
        return self.random.normal(0, 1.4 * inputs**-0.5, (inputs, outputs)).astype(np.float32)

    def attention(self) -> str:
        """One head of self-attention over the pixels of ``[N, C, H, W]``."""
        channels, side, name = self.channels, self.side(), self.next()
        before = self.tensor
        flat = self.constant(f"{name}_flat", np.array([0, channels, side * side], np.int64))
        self.node("Reshape", [before, flat], self.next())
        tokens = self.node("Transpose", [self.tensor], self.next(), perm=[0, 2, 1])
        made = []
        for _ in range(3):
            self.tensor = tokens
            made.append(self.matmul(channels))
        query, key, value = made
        turned = self.node("Transpose", [key], self.next(), perm=[0, 2, 1])
        self.node("MatMul", [query, turned], self.next())
        weights = self.node("Softmax", [self.tensor], self.next(), axis=-1)
        self.node("MatMul", [weights, value], self.next())
        self.node("Transpose", [self.tensor], self.next(), perm=[0, 2, 1])
        square = self.constant(f"{name}_square", np.array([0, channels, side, side], np.int64))
        return self.node("Reshape", [self.tensor, square], self.next())

    def flatten(self) -> str:
        """Pool ``[N, C, H, W]`` to ``[N, C]``, for linear layers before the features."""
        self.node("GlobalAveragePool", [self.tensor], self.next())
        self.flat = True
        return self.node("Flatten", [self.tensor], self.next(), axis=1)

    def max_pool(self) -> str:
        return self.node("MaxPool", [self.tensor], self.next(), kernel_shape=[2, 2], strides=[2, 2])

    def side(self) -> int:
        """Height and width of the newest tensor."""
        side = SIZE
        for node in self.nodes:
            strides = next((list(a.ints) for a in node.attribute if a.name == "strides"), [1])
            side = -(-side // strides[0])
        return side

    def finish(self, classes: int = 3) -> onnx.ModelProto:
        if self.flat:
            self.node("Identity", [self.tensor], "features")
        else:
            self.node("GlobalAveragePool", [self.tensor], "pooled")
            self.node("Flatten", ["pooled"], "features", axis=1)
        weight = self.random.normal(0, 1, (classes, self.channels)).astype(np.float32)
        head = [
            self.constant("head_weight", weight),
            self.constant("head_bias", np.zeros(classes, np.float32)),
        ]
        self.node("Gemm", ["features", *head], "logits", transB=1)
        return make_model(
            self.nodes,
            self.initializers,
            image=["N", SIZE, SIZE, self.image_channels],
            outputs={"logits": ["N", classes], "features": ["N", self.channels]},
        )


def make_model(
    nodes: list[onnx.NodeProto],
    initializers: list[onnx.TensorProto],
    *,
    image: list[str | int],
    outputs: dict[str, list[str | int]],
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("image", onnx.TensorProto.UINT8, image)],
        [
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
            for name, shape in outputs.items()
        ],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {"labels": "a,b,c"})
    onnx.checker.check_model(model, full_check=True)
    return model


def small_cnn(seed: int = 0, *, mean: int = 128, std: float = 128.0) -> onnx.ModelProto:
    """Everything at once: stem, depthwise, residual, pooling, gate, concatenation, hard swish."""
    network = Network(mean=mean, std=std, seed=seed)
    network.conv(16, stride=2)
    network.activate("Clip")
    network.residual("Clip")
    network.max_pool()
    network.conv(16, kernel=1)
    network.activate("Relu")
    network.squeeze_excite()
    network.concat()
    network.conv(32, kernel=1)
    network.activate("HardSwish")
    network.conv(32)
    network.activate("Silu")
    network.conv(16, kernel=1)
    network.activate("Relu")
    return network.finish()


def draw_images(count: int, *, channels: int = 1, seed: int = 0) -> UInt8:
    """Smooth random pictures ``[count, SIZE, SIZE, channels]`` over most of the 8-bit range."""
    random = np.random.default_rng(seed)
    rough = random.uniform(0, 255, (count, SIZE // 4, SIZE // 4, channels))
    smooth = rough.repeat(4, axis=1).repeat(4, axis=2) + random.normal(
        0, 10, (count, SIZE, SIZE, channels)
    )
    return np.clip(smooth, 0, 255).astype(np.uint8)


def write_example(path: Path, picture: Image.Image, label: str) -> Example:
    """Save ``picture`` as an image of the field."""
    picture.save(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Example(path=str(path), sha256=digest, domain="target", label=label)


def write_examples(folder: Path, count: int = 20) -> list[Example]:
    """Gray pictures of the field in ``folder``, every second one ``bad``, the others ``good``."""
    return [
        write_example(
            folder / f"{number}.png", Image.fromarray(image[:, :, 0]), ("bad", "good")[number % 2]
        )
        for number, image in enumerate(draw_images(count, seed=7))
    ]


def make_table(
    model: onnx.ModelProto,
    images: UInt8,
    settings: CalibrationSettings | None = None,
    spec: InputSpec | None = None,
) -> Table:
    """A table measured on ``images``, in batches of eight."""
    settings = settings or CalibrationSettings()
    batches = [images[start : start + 8] for start in range(0, len(images), 8)]
    return Table(
        key=table_key(model, ["0" * 64] * len(images), spec or InputSpec(), settings),
        images=len(images),
        tensors=measure(model, batches, settings),
    )
