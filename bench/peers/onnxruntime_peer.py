"""ONNX Runtime: MatMulNBits with int8 activations (accuracy_level 4)."""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper
from problems import Array, Matmul
from protocol import Bind, Bound, serve


def bits_per_weight(problem: Matmul) -> float:
    return 4 + 32 / problem.group_size


def _model(problem: Matmul, copies: int) -> bytes:
    """One graph with a product per copy, all of the same activations."""
    size, groups = problem.group_size, problem.in_features // problem.group_size
    codes = problem.codes.T.reshape(problem.out_features, groups, size)
    packed, scales = codes[..., ::2] | codes[..., 1::2] << 4, np.ascontiguousarray(problem.scales.T)
    nodes, initializers, outputs = [], [], []
    for copy in range(copies):
        # Rolled, so that no optimisation finds equal constants.
        data = np.roll(packed, 16 * copy, axis=0)
        scale = np.roll(scales, 16 * copy, axis=0)
        initializers += [
            helper.make_tensor(f"b{copy}", TensorProto.UINT8, data.shape, data.tobytes(), raw=True),
            helper.make_tensor(f"s{copy}", TensorProto.FLOAT, [scale.size], scale.tobytes(), raw=True),
        ]
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                ["x", f"b{copy}", f"s{copy}"],
                [f"y{copy}"],
                domain="com.microsoft",
                K=problem.in_features,
                N=problem.out_features,
                bits=4,
                block_size=size,
                accuracy_level=4,
            )
        )
        outputs.append(helper.make_tensor_value_info(f"y{copy}", TensorProto.FLOAT, ["rows", problem.out_features]))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", problem.in_features])]
    graph = helper.make_graph(nodes, "products", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def load(problem: Matmul, copies: int) -> Bind:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(_model(problem, copies), options, providers=["CPUExecutionProvider"])

    def bind(activations: Array) -> Bound:
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(activations))
        outputs = [np.empty((len(activations), problem.out_features), np.float32) for _ in range(copies)]
        for copy, output in enumerate(outputs):
            binding.bind_ortvalue_output(f"y{copy}", ort.OrtValue.ortvalue_from_numpy(output))
        return Bound(lambda: session.run_with_iobinding(binding), lambda: binding.get_outputs()[0].numpy())

    return bind


if __name__ == "__main__":
    threads = int(sys.argv[1])
    serve(str(ort.__version__), load, bits_per_weight)
