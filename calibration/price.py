"""What leaving layers of a quantized form float costs in speed, estimated from shapes alone.

It does not know what is gained by it (calibration/sensitivity), nor any clock: a form must come out
the same on every machine.
"""

import math
from collections.abc import Collection

from calibration.graph import Graph, channel_axis

CONVERSION = 75
"""Multiplications that cost as much in float, over what they cost in 8 bits, as turning one value
from 8 bits to float or back, its way through memory included.

Measured: EfficientNet-Lite0 at 160 px, batches of 16, onnxruntime 1.32 on one core with AMX. From
six choices of one to three float layers it follows as 52 to 104; the second layer alone, 1 % of the
multiplications, took 16 % more time. Not measured on a GPU, where values that
leave 8 bits are memory traffic as well."""


class Price:
    """How much slower a form becomes if layers of it stay float."""

    def __init__(self, graph: Graph, quantized: Collection[str]) -> None:
        """``quantized`` names the layers of ``graph`` that are 8-bit in the form."""
        self._products = multiplications(graph)
        self._all = max(sum(self._products.values()), 1)
        self.layers = tuple(layer.name for layer in graph.layers() if layer.name in quantized)
        """In graph order: what a run of neighbours is."""
        self._never = frozenset(self._products) - set(quantized)
        self._values: list[tuple[str, frozenset[str], int]] = []
        """Who makes a tensor, who reads it, and how many values it has in one image."""
        makers = {graph.behind(layer.output): layer.name for layer in graph.layers()}
        first = graph.preprocessing().output  # turned into floats, or not, at the same cost
        inputs = {layer.input for layer in graph.layers()} - {first}
        for tensor in {**dict.fromkeys(makers), **dict.fromkeys(sorted(inputs))}:
            readers = frozenset(node.name for node in graph.consumers(tensor))
            count = math.prod(side or 1 for side in (graph.shape(tensor) or ())[1:])
            self._values.append((makers.get(tensor, ""), readers, count))

    def share(self, float_layers: Collection[str]) -> float:
        """What ``float_layers`` add to the time of the form, as a share of it."""
        kept = self._never.union(float_layers)
        products = sum(self._products.get(name, 0) for name in kept - self._never)
        conversions = self._conversions(kept) - self._conversions(self._never)
        return (products + CONVERSION * conversions) / self._all

    def _conversions(self, kept: frozenset[str]) -> int:
        """Values that one layer makes in 8 bits and another reads in float, or the reverse."""
        return sum(
            count
            for maker, readers, count in self._values
            if (readers - kept if maker in kept else readers & kept)
        )


def multiplications(graph: Graph) -> dict[str, int]:
    """Multiplications per image of every layer whose output has a known shape."""
    counts = {}
    for layer in graph.layers():
        shape = graph.shape(layer.output)
        if shape is None:
            continue
        axis = channel_axis(layer.op_type) % len(shape)
        places = [side or 1 for at, side in enumerate(shape) if at not in (0, axis)]
        counts[layer.name] = layer.weight.size * math.prod(places)
    return counts
