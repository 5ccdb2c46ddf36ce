"""Several processes that work together, started by torchrun: torch.distributed, in one place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from miniclip.errors import UsageError


def setup(device: str | None = None) -> torch.device:
    """Join the other processes, if torchrun (or a launcher that sets the same variables) started this one.

    device: "cuda" or "cpu"; None is CUDA if there is a GPU. Returns the device to work on: with CUDA, this process's
    own GPU, which also becomes the current one. The processes communicate with nccl, on the CPU with gloo.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if "RANK" not in os.environ:
        return chosen
    if chosen.type == "cuda":
        chosen = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return chosen


@contextmanager
def joined(device: str | None = None) -> Iterator[torch.device]:
    """`setup`, and at the end of the block leave the other processes, unless this one had joined them before."""
    before = is_set_up()
    chosen = setup(device)
    try:
        yield chosen
    finally:
        if is_set_up() and not before:
            dist.destroy_process_group()


def is_set_up() -> bool:
    """Whether torch.distributed is set up, also for a single process. Some builds of PyTorch come without it."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, from 0; 0 if there is one process."""
    return dist.get_rank() if is_set_up() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if is_set_up() else 1


def is_main() -> bool:
    """Whether this is the process that prints and writes files."""
    return rank() == 0


def barrier() -> None:
    """Wait until all processes are here."""
    if is_set_up():
        dist.barrier()


def mean(x: Tensor) -> Tensor:
    """The mean of `x` over all processes, without gradient."""
    if is_set_up():
        x = x.clone()
        dist.all_reduce(x)
        x /= world_size()
    return x


class _AllGather(torch.autograd.Function):
    """All processes' rows, in rank order. The gradient of a process's rows is summed over the losses of all processes.

    torch.distributed.nn has such a function too, but deprecated, in favour of private ones (torch 2.13). reduce_scatter
    would move half as much as all_reduce, which every version of every backend has.
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

    Raises UsageError, in all processes, if N is not the same in all.
    """
    if world_size() == 1:
        return x
    sizes = torch.zeros(world_size(), dtype=torch.int64, device=x.device)
    sizes[rank()] = len(x)
    dist.all_reduce(sizes)
    if len(sizes.unique()) > 1:
        raise UsageError(
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
