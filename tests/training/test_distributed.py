"""Two real processes over gloo against one process on the concatenated batch."""

from __future__ import annotations

import contextlib
import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from test_loss import TOLERANCE, gradients, pairs, small_embedder, unit, whole_batch, worst_error
from torch.nn.parallel import DistributedDataParallel

from miniclip.parallel import all_gather, is_main, rank, setup, world_size
from miniclip.training import loss as losses
from miniclip.training.gradient_cache import Embedder, cached_backward
from miniclip.training.loss import contrastive_loss, sharded_loss, sigmoid_loss, softmax_loss, whole_loss

WORLD_SIZE = 2
PAIRS = 10  # in all
SOFTMAX = partial(sharded_loss, softmax_loss)


def plain(model, images, texts, loss_fn=SOFTMAX):
    loss = loss_fn(*model(images, texts))
    loss.backward()
    return loss.detach()


def chunked(model, images, texts):
    return plain(model, images, texts, partial(sharded_loss, softmax_loss, chunk=2))


def cached(model, images, texts):
    return cached_backward(model, images, texts, 2, partial(sharded_loss, softmax_loss))  # micro-batches of 2, 2, 1


def sigmoid(model, images, texts):
    return plain(model, images, texts, partial(sharded_loss, sigmoid_loss))


def chunked_sigmoid(model, images, texts):
    return plain(model, images, texts, partial(sharded_loss, sigmoid_loss, chunk=3))


def detached_gather(x):
    return all_gather(x).detach()


def averaging_gather(x):
    """Divides the gradient by the world size."""
    return all_gather(x / WORLD_SIZE + (x * (1 - 1 / WORLD_SIZE)).detach())


SIGMOID = (sigmoid, chunked_sigmoid)
STEPS = (plain, chunked, cached, *SIGMOID)
CASES = [(step, dtype, all_gather) for step in STEPS for dtype in TOLERANCE]
MISTAKES = [(step, torch.float64, gather) for step in STEPS for gather in (detached_gather, averaging_gather)]


def name(step, dtype, gather) -> str:
    return f"{step.__name__}-{dtype}-{gather.__name__}"


def train_step(step, dtype, gather) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One step of this process on its share of the batch: the loss over all processes, and DDP's gradients."""
    losses.all_gather = gather
    embedder = Embedder(small_embedder(dtype).clip, -3.0 if step in SIGMOID else None)
    images, texts = (x.chunk(WORLD_SIZE)[rank()] for x in pairs(PAIRS, dtype))
    loss = step(DistributedDataParallel(embedder), images, texts)
    dist.all_reduce(loss)
    return loss / WORLD_SIZE, gradients(embedder)


class AlwaysReduces(DistributedDataParallel):
    no_sync = contextlib.nullcontext


def reductions(step, data_parallel=DistributedDataParallel) -> int:
    """How often a step makes DDP reduce a bucket of gradients (the small model's are all in one)."""
    calls = []

    def count(state, bucket):
        calls.append(bucket.index())
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])

    model = data_parallel(small_embedder(torch.float32))
    model.register_comm_hook(None, count)
    step(model, *pairs(5, torch.float32))
    return len(calls)


def error_of_unequal_batches() -> str:
    try:
        sharded_loss(softmax_loss, *unit(1 + 2 * rank(), 4, 1.0))
    except ValueError as error:
        return str(error)
    return "no error"


def work(process: int, port: int, folder: Path):
    """What each process runs. The variables are those that torchrun sets."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(process), LOCAL_RANK=str(process), WORLD_SIZE=str(WORLD_SIZE))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    results = {"device": setup("cpu"), "place": (rank(), world_size(), is_main())}
    results |= {name(*case): train_step(*case) for case in CASES + MISTAKES}
    losses.all_gather = all_gather
    results["reductions"] = reductions(plain), reductions(cached), reductions(cached, AlwaysReduces)
    results["unequal"] = error_of_unequal_batches()
    torch.save(results, folder / f"{process}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    """What each process found; forked once, because importing torch takes longer than all of the work."""
    folder = tmp_path_factory.mktemp("ranks")
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # as torchrun's, on a free port
    torch.multiprocessing.start_processes(work, (store.port, folder), nprocs=WORLD_SIZE, start_method="fork")
    return [torch.load(folder / f"{i}.pt") for i in range(WORLD_SIZE)]


def whole(step, dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What the two processes must reproduce."""
    if step not in SIGMOID:
        return whole_batch(dtype, PAIRS)
    embedder = Embedder(small_embedder(dtype).clip, -3.0)
    loss = whole_loss(sigmoid_loss, *embedder(*pairs(PAIRS, dtype)))
    loss.backward()
    return loss.detach(), gradients(embedder)


@pytest.mark.parametrize("case", CASES, ids=lambda case: name(*case))
def test_two_processes_match_one(results, case):
    step, dtype, _ = case
    loss, expected = whole(step, dtype)
    for of_rank in results:
        sharded_loss, got = of_rank[name(*case)]
        assert abs(sharded_loss - loss) < TOLERANCE[dtype]
        assert worst_error(got, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("case", MISTAKES, ids=lambda case: name(*case))
def test_mistakes_show_in_the_gradients_alone(results, case):
    loss, expected = whole(case[0], torch.float64)
    wrong_loss, got = results[0][name(*case)]
    assert abs(wrong_loss - loss) < 1e-10
    assert worst_error(got, expected) > 0.1


def test_gradients_are_reduced_once_a_step(results):
    assert results[0]["reductions"] == (1, 1, 3)


def test_setup_from_torchruns_environment(results):
    assert [r["place"] for r in results] == [(0, 2, True), (1, 2, False)]
    assert all(r["device"] == torch.device("cpu") for r in results)


def test_unequal_batches_are_an_error_in_every_process(results):
    assert all("[1, 3] pairs" in r["unequal"] for r in results)


def test_one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert setup("cpu") == torch.device("cpu") and not dist.is_initialized()
    assert (rank(), world_size(), is_main()) == (0, 1, True)
    leaves = unit(6, 4, 14.3)
    expected = torch.autograd.grad(contrastive_loss(*leaves), leaves)
    for got, grad in zip(torch.autograd.grad(sharded_loss(softmax_loss, *leaves), leaves), expected, strict=True):
        assert (got - grad).abs().max() < 1e-12
