"""Sharded parameters on two processes: FSDP, tensor parallelism by hooks, and plain DTensors."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import swiglu

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def fsdp(mlp, mesh):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(mlp, mesh=mesh)


def tensor_parallel(mlp, mesh):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return parallelize_module(
        mlp, mesh, {"w_gate": ColwiseParallel(), "w_up": ColwiseParallel(), "w_down": RowwiseParallel()}
    )


def shard(mlp, mesh):
    """DTensors without any hook."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    for name, module in mlp.named_children():
        for kind, parameter in list(module.named_parameters()):
            place = Shard(1 if name == "w_down" else 0) if kind == "weight" or name != "w_down" else Replicate()
            setattr(module, kind, nn.Parameter(distribute_tensor(parameter.data, mesh, [place])))
    return mlp


def replicated(tensor, mesh):
    from torch.distributed.tensor import Replicate, distribute_tensor

    return distribute_tensor(tensor, mesh, [Replicate()])


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check_blocks(mesh):
    for wrap in (fsdp, tensor_parallel, shard):
        for bias in (False, True):
            for save in ("preactivations", "nothing"):
                torch.manual_seed(0)
                plain = swiglu.SwiGLU(8, 12, bias, save=save)
                sharded = wrap(copy.deepcopy(plain), mesh)
                x = torch.randn(2, 3, 8)
                expected, got = plain(x), sharded(replicated(x, mesh) if wrap is shard else x)
                torch.testing.assert_close(full(got), expected, rtol=1e-5, atol=1e-6)
                expected.square().sum().backward()
                full(got).square().sum().backward()
                for ours, theirs in zip(sharded.parameters(), plain.parameters()):
                    torch.testing.assert_close(full(ours.grad), theirs.grad, rtol=1e-4, atol=1e-5)


def check_functions(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.manual_seed(0)
    gate, up, weight = torch.randn(4, 8), torch.randn(4, 8), torch.randn(6, 8)
    for dim in (0, 1):
        parts = [distribute_tensor(t, mesh, [Shard(dim)]).requires_grad_() for t in (gate, up)]
        z = swiglu.swiglu_fused(*parts)
        assert z.placements == (Shard(dim),)
        torch.testing.assert_close(z.full_tensor(), F.silu(gate) * up)
        z.sum().backward()
        assert all(part.grad.placements == (Shard(dim),) for part in parts)
    packed = distribute_tensor(torch.cat([gate, up], 1), mesh, [Shard(0)]).requires_grad_()
    z = swiglu.swiglu_fused(packed)
    torch.testing.assert_close(z.full_tensor(), F.silu(gate) * up)
    z.sum().backward()
    assert packed.grad.placements == (Shard(0),)
    tokens = distribute_tensor(gate, mesh, [Shard(0)])
    z = swiglu.forward(tokens, replicated(weight, mesh), replicated(weight, mesh))
    assert z.placements == (Shard(0),)
    torch.testing.assert_close(z.full_tensor(), F.silu(gate @ weight.t()) * (gate @ weight.t()))


def work(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    check_blocks(mesh)
    check_functions(mesh)
    dist.barrier()
    # Now and then a thread of gloo's outlives the interpreter's end and aborts the process.
    os._exit(0)


def test_two_processes(tmp_path):
    # Not by a port: another process may take it first.
    torch.multiprocessing.spawn(work, (str(tmp_path / "store"),), nprocs=2)


def test_import_leaves_distributed_tensors_alone():
    import subprocess
    import sys

    script = "import sys, torch; before = 'torch.distributed.tensor' in sys.modules; import swiglu\nassert ('torch.distributed.tensor' in sys.modules) == before"
    subprocess.run([sys.executable, "-c", script], check=True)
