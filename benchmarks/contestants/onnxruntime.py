"""ONNX Runtime: one ``RNN`` node; inference only."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.cases import Case
from benchmarks.contestants.base import PlainContestant
from benchmarks.problem import Problem
from benchmarks.timing import Work


class ONNXRuntime(PlainContestant):
    """The CPU provider."""

    name = "onnxruntime"
    title = "ONNX Runtime"
    needs = ("onnxruntime", "onnx")

    def refuses(self, case: Case) -> str | None:
        return super().refuses(case) if case.mode == "forward" else "has no gradients"

    def prepare(self, problem: Problem) -> Work:
        """Write the model, open a session, and bind input and output so that nothing is copied."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Idle threads would spin into the next contestant's time; during a run they still spin.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = ort.InferenceSession(_model(problem), options, providers=["CPUExecutionProvider"])
        case = problem.case
        binding = session.io_binding()
        x = ort.OrtValue.ortvalue_from_numpy(problem.x.numpy())
        y = ort.OrtValue.ortvalue_from_shape_and_type((case.T, 1, case.B, case.H), np.float32)
        binding.bind_ortvalue_input("X", x)
        binding.bind_ortvalue_output("Y", y)
        return Work(
            lambda: session.run_with_iobinding(binding),
            lambda _: [torch.from_numpy(np.array(y.numpy())).squeeze(1)],
            runtime="onnxruntime",
        )


def _model(problem: Problem) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    case = problem.case
    W, U, b_ih, b_hh = (w.numpy() for w in problem.weights.values())
    tensors = {"W": W[None], "R": U[None], "B": np.concatenate([b_ih, b_hh])[None]}
    activations = [{"tanh": "Tanh", "relu": "Relu"}[case.nonlinearity]]
    node = helper.make_node(
        "RNN", ["X", "W", "R", "B"], ["Y"], hidden_size=case.H, activations=activations
    )
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in {"X": [case.T, case.B, case.I], "Y": [case.T, 1, case.B, case.H]}.items()
    )
    weights = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph([node], "elman", [x], [y], weights)
    # Versions that every runtime of the last years reads, not the newest that onnx can write.
    opset = helper.make_operatorsetid("", 17)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()


CONTESTANTS = (ONNXRuntime(),)
