"""Logits: what a softmax or a sigmoid at the end of a network takes, compared beside what it gives.

    p = softmax(z)         where p is nearly 0 or 1, a wrong z moves it by next to nothing

Probabilities alone would let a file pass whose scores are wrong wherever it is sure of itself. Both are known where the
file's output is the result of such a node, and the original's of such an operation.
"""

from __future__ import annotations

import onnx

_NODES = ("Softmax", "LogSoftmax", "Sigmoid")
#: values are passed on by these as they are
_SAME = ("Identity", "Cast")


def logits_of(model: onnx.ModelProto) -> dict[str, str]:
    """By the name of an output the name of the value it is the softmax or sigmoid of; other outputs are left out.

    So are those of an input of the file, which nothing has computed.
    """
    made_by = {name: node for node in model.graph.node for name in node.output}
    found = {}
    for value in model.graph.output:
        node = made_by.get(value.name)
        while node is not None and node.op_type in _SAME:
            node = made_by.get(node.input[0])
        if node is not None and node.op_type in _NODES and node.input[0] in made_by:
            found[value.name] = node.input[0]
    return found
