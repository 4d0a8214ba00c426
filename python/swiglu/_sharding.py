"""How the operations run on DTensors: which placements of the operands give which of the results.

Registered when the first DTensor comes by: importing this package shall not import torch.distributed.tensor.
"""

from __future__ import annotations

import functools

from torch import Tensor

from ._ffn import ffn_op, ffn_saving_op
from ._gate import gate_backward_op, gate_op, gate_packed_backward_op, gate_packed_op
from ._op import forward_op, forward_saving_op
from ._operands import is_dtensor


def prepare_for(tensors: tuple[Tensor | None, ...]) -> None:
    """Registers the rules if one of ``tensors`` is a DTensor."""
    if any(map(is_dtensor, tensors)):
        _register()


@functools.cache
def _register() -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    def rows(tensor, outputs: int, inputs: list) -> list:
        """Tokens may be sharded along any leading dimension, and everything may be replicated.

        ``inputs`` says of every operand whether it has tokens; None stands for what is no tensor.
        """
        leading = range(tensor.ndim - 1)
        return [
            ([placement] * outputs, [None if has is None else placement if has else Replicate() for has in inputs])
            for placement in (Replicate(), *map(Shard, leading))
        ]

    def columns(tensor, outputs: int, inputs: int) -> list:
        """An elementwise operation may be sharded along the last dimension too."""
        return [([Shard(tensor.ndim - 1)] * outputs, [Shard(tensor.ndim - 1)] * inputs)]

    def given(placement, tensor):
        return None if tensor is None else placement

    @register_sharding(gate_op)
    def _gate(gate, up):
        return rows(gate, 1, [True, True]) + columns(gate, 1, 2)

    @register_sharding(gate_backward_op)
    def _gate_backward(dz, gate, up):
        return rows(gate, 2, [True] * 3) + columns(gate, 2, 3)

    @register_sharding(gate_packed_op)
    def _gate_packed(gate_up, up_first):
        return rows(gate_up, 1, [True, None])

    @register_sharding(gate_packed_backward_op)
    def _gate_packed_backward(dz, gate_up, up_first):
        return rows(gate_up, 1, [True, True, None])

    def forward(outputs: int):
        def rule(x, gate, up, gate_bias=None, up_bias=None):
            biases = [gate_bias, up_bias]
            by_columns = [Replicate(), Shard(0), Shard(0), *(given(Shard(0), bias) for bias in biases)]
            return [
                *rows(x, outputs, [True, False, False, *(given(False, bias) for bias in biases)]),
                ([Shard(x.ndim - 1)] * outputs, by_columns),
            ]

        return rule

    register_sharding(forward_op)(forward(1))
    register_sharding(forward_saving_op)(forward(3))

    def ffn(outputs: int):
        def rule(x, w_gate, w_up, w_down, b_gate, b_up, b_down):
            biases = [b_gate, b_up, b_down]
            rules = rows(x, outputs, [True, False, False, False, *(given(False, bias) for bias in biases)])
            if b_down is None:  # else every rank would add it
                hidden = [Shard(x.ndim - 1)] * (outputs - 1)
                weights = [Shard(0), Shard(0), Shard(1), given(Shard(0), b_gate), given(Shard(0), b_up), None]
                rules.append(([Partial(), *hidden], [Replicate(), *weights]))
            return rules

        return rule

    register_sharding(ffn_op)(ffn(1))
    register_sharding(ffn_saving_op)(ffn(3))
