"""INT8 calibration: choose images, measure ranges once, write one graph for each dialect.

It works on ONNX graphs and arrays, and does not know torch, the checkpoint or the bundle.
"""

from calibration import onnxruntime_dialect, tensorrt_dialect
from calibration.images import Choice, choose_images
from calibration.kernels import check_kernels, count_kernels
from calibration.pipeline import Calibration, calibrate
from calibration.quantize import Emitted
from calibration.ranges import measure
from calibration.table import Table, read_table, write_table

__all__ = [
    "Calibration",
    "Choice",
    "Emitted",
    "Table",
    "calibrate",
    "check_kernels",
    "choose_images",
    "count_kernels",
    "measure",
    "onnxruntime_dialect",
    "read_table",
    "tensorrt_dialect",
    "write_table",
]
