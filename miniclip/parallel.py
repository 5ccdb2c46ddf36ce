"""Several processes that work together, started by torchrun: torch.distributed, in one place."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def setup(device: str | None = None) -> torch.device:
    """Join the other processes, if torchrun (or a launcher that sets the same variables) started this one.

    device: "cuda" or "cpu"; None is CUDA where there is one. Returns the device to work on: with CUDA, this process's
    own GPU, also made the current one. The processes then speak through nccl, on the CPU through gloo.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if "RANK" not in os.environ:
        return chosen
    if chosen.type == "cuda":
        chosen = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return chosen


def is_set_up() -> bool:
    """Whether torch.distributed is set up, also for a single process. Some builds of PyTorch come without it."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number among all, from 0; 0 where there is one process."""
    return dist.get_rank() if is_set_up() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if is_set_up() else 1


def is_main() -> bool:
    """Whether this is the process that prints and writes files."""
    return rank() == 0


class _AllGather(torch.autograd.Function):
    """All processes' rows, in rank order. Backward, a process's rows get the sum of what *all* losses ask of them.

    torch.distributed.nn has it too, but deprecated, in favour of private functions (torch 2.13). reduce_scatter would
    move half of what all_reduce does; the latter is in every version of every backend.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        gathered = x.new_empty(world_size(), *x.shape)
        dist.all_gather(list(gathered.unbind()), x.contiguous())
        return gathered.flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)  # all_reduce works in place
        dist.all_reduce(total)
        return total.chunk(world_size())[rank()]


def all_gather(x: Tensor) -> Tensor:
    """Concatenate every process's `x` [N, ...] into [world size * N, ...], in rank order, with gradient.

    Raises ValueError, in all processes, where N is not the same in all.
    """
    if world_size() == 1:
        return x
    sizes = torch.zeros(world_size(), dtype=torch.int64, device=x.device)
    sizes[rank()] = len(x)
    dist.all_reduce(sizes)
    if len(sizes.unique()) > 1:
        raise ValueError(
            f"the processes have batches of {sizes.tolist()} pairs; expected one size: leave out the last, incomplete "
            "batch, or fill it up"
        )
    return _AllGather.apply(x)


def all_gather_objects(value: object) -> list:
    """Every process's `value`, in rank order, in every process."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def broadcast_object(value: object) -> object:
    """The first process's `value`, in every process."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def merge_rows(x: Tensor) -> Tensor:
    """Every process's rows of `x`, on the CPU, of which each is zero in all processes but one. No bit is changed."""
    if world_size() == 1:
        return x
    raw = x.view(torch.uint8).to("cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(raw)  # the sum of one row and zeros
    return raw.cpu().view(x.dtype)
