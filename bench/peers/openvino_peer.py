"""OpenVINO: MatMul by a 4-bit constant that is converted, shifted and scaled, as its weight compression writes it."""

from __future__ import annotations

import sys

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from problems import Array, Matmul
from protocol import Bind, Bound, serve

_KEPT: list[Array] = []


def bits_per_weight(problem: Matmul) -> float:
    return 4 + 16 / problem.group_size


def _u4(codes: Array) -> ov.Node:
    pairs = codes.reshape(-1, 2)
    packed = np.ascontiguousarray(pairs[:, 0] | pairs[:, 1] << 4)
    _KEPT.append(packed)  # the constant only points to it
    return ops.constant(ov.Tensor(packed, codes.shape, ov.Type.u4))


def _model(problem: Matmul, copies: int) -> ov.Model:
    """One graph with a product per copy, all of the same activations."""
    groups = problem.in_features // problem.group_size
    codes = np.ascontiguousarray(problem.codes.T).reshape(problem.out_features, groups, problem.group_size)
    scales = problem.scales.T.astype(np.float16)[..., None]
    x = ops.parameter([-1, problem.in_features], np.float32, name="x")
    products = []
    for copy in range(copies):
        # Rolled, so that no optimisation finds equal constants.
        code = ops.convert(_u4(np.roll(codes, 16 * copy, axis=0)), np.float16)
        zero = ops.convert(_u4(np.full((problem.out_features, groups, 1), 8, np.uint8)), np.float16)
        scale = ops.constant(np.ascontiguousarray(np.roll(scales, 16 * copy, axis=0)))
        weight = ops.multiply(ops.subtract(code, zero), scale)
        flat = ops.reshape(weight, np.array([problem.out_features, problem.in_features]), False)
        products.append(ops.matmul(x, ops.convert(flat, np.float32), False, True))
    return ov.Model(products, [x], "products")


def load(problem: Matmul, copies: int) -> Bind:
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    _KEPT.clear()
    compiled = ov.Core().compile_model(_model(problem, copies), "CPU", options)

    def bind(activations: Array) -> Bound:
        request = compiled.create_infer_request()
        request.set_input_tensor(ov.Tensor(activations))
        return Bound(request.infer, lambda: request.get_output_tensor(0).data)

    return bind


if __name__ == "__main__":
    threads = int(sys.argv[1])
    serve(ov.__version__.split("-")[0], load, bits_per_weight)
