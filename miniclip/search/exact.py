"""Exact search: the rows with the highest products. The embeddings are read once, in bounded memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.cosines import similarity_topk

PIECE = 1 << 14  # rows that a thread takes at a time
CONVERTED = 1 << 19  # numbers that a thread converts to float32 at a time: 2 MiB, which fit in the cache
AGAIN = 1 << 12  # products that are computed again at a time
SPAN = 128  # rows whose maximum is computed before single rows are compared
GPU_ROWS = 1 << 18  # rows that a GPU searches at a time
SPARE = 6  # rows beyond the k best that a GPU ranks in float64; the kernel gives at most 16, and 10 are the usual k

_starting = threading.Lock()


def top_k(blocks: Iterable[Tensor], queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k rows with the highest product with each query, best first; of equal ones the lower row first.

    blocks: [n, E] of one float dtype, finite, of at most unit length; all their rows are searched
    queries: float [Q, E]; if they are on a CUDA GPU, the rows are searched there
    Returns scores float32 and row numbers int64, both [Q, k], or less wide if there are fewer rows, on the CPU.

    Quick products, whose error is bounded, find the candidates, and products in float64 rank them. So the result is
    exact, and a score does not depend on the row's place, as the rounding of a matrix product does. Each thread takes
    the next piece. PyTorch's own threads would wait for each other after every short operation, which takes longer.
    """
    queries = queries.float()
    if queries.is_cuda:
        return top_k_by_cosine(blocks, queries, k)
    queries = queries.cpu()
    best = _Best(queries, k)
    pieces = _Shared(_pieces(blocks))

    def work() -> None:
        multiply = _Multiply(queries)
        for first, piece in pieces:
            best.add(first, piece, *multiply(piece))

    _in_single_threaded_workers(work)
    _, row, score = best.rows
    return score.view(len(queries), -1), row.view(len(queries), -1)


def top_k_by_cosine(blocks: Iterable[Tensor], queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`top_k` on the device of the queries, float32, where `similarity_topk` finds the candidates."""
    scores, rows = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    first = 0
    for block in _joined((block.to(queries.device) for block in blocks), GPU_ROWS):
        score, row = _best_by_cosine(block, queries, k)
        scores, order = torch.cat([scores, score], dim=1).sort(dim=1, descending=True, stable=True)
        rows = torch.cat([rows, first + row], dim=1).gather(1, order)[:, :k]
        scores, first = scores[:, :k], first + len(block)
    return scores, rows


def _joined(blocks: Iterable[Tensor], rows: int) -> Iterator[Tensor]:
    """The same rows in blocks of at least `rows`; the last one may have fewer."""
    waiting: list[Tensor] = []
    for block in blocks:
        waiting.append(block)
        if sum(map(len, waiting)) >= rows:
            yield torch.cat(waiting)
            waiting = []
    if any(map(len, waiting)):
        yield torch.cat(waiting)


def _best_by_cosine(rows: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and numbers of the k best rows, on the CPU, best first.

    `similarity_topk` rounds the queries to the rows' dtype and divides by the rows' lengths. Where the error of that
    could let one of the k best rows be missing among k + SPARE candidates, the query is answered on the CPU. (TF32
    products, which PyTorch's settings can allow, have larger errors.)
    """
    count, norm, unit = min(k + SPARE, len(rows)), queries.norm(dim=1), F.normalize(queries, dim=1)
    rounded, one = unit.to(rows.dtype), torch.ones((), device=queries.device)
    found = similarity_topk(rounded, rows, one, count)[1].sort(dim=1).values
    parts = zip(queries.split(AGAIN), found.split(AGAIN), strict=True)
    scores = torch.cat([(q[:, None].double() * rows[r].double()).sum(dim=2) for q, r in parts]).float()
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    answers = scores[:, :k].cpu(), found.gather(1, order)[:, :k].cpu()
    if count < len(rows):
        off = (torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32) - 1).abs().amax()
        error = norm * ((unit - rounded).norm(dim=1) + 2 * off + rows.shape[1] * 2**-22)
        unsure = (scores[:, k - 1] - scores[:, -1] <= 2 * error).nonzero()[:, 0].cpu()
        if len(unsure):
            for answer, exact in zip(answers, top_k([rows.cpu()], queries.cpu()[unsure], k), strict=True):
                answer[unsure] = exact
    return answers


class _Multiply:
    """Products of queries and rows, and bounds of their errors for rows of at most unit length, float32 [Q]."""

    def __init__(self, queries: Tensor):
        self.queries = queries
        norm = queries.norm(dim=1)
        self.error = norm * queries.shape[1] * 2**-24  # E roundings to float32
        self.half = queries.half()
        # In half precision the query and the product are rounded, and the sum is float32.
        self.half_error = self.error + (queries - self.half).norm(dim=1) + norm * 2**-11
        self.step = max(1, CONVERTED // queries.shape[1])
        self.rows = torch.empty(min(self.step, PIECE), queries.shape[1])
        self.scores = torch.empty(len(queries), PIECE)

    def __call__(self, piece: Tensor) -> tuple[Tensor, Tensor]:
        """piece: [n, E], n <= PIECE. The products, float32 [Q, n], are overwritten by the next call."""
        if len(self.queries) == 1 and piece.dtype == torch.float16:  # one query: converting the rows would take longer
            return (piece @ self.half[0]).float()[None], self.half_error
        for start in range(0, len(piece), self.step):
            some = self.rows[: len(piece) - start].copy_(piece[start : start + self.step])
            torch.mm(self.queries, some.T, out=self.scores[:, start : start + len(some)])
        return self.scores[:, : len(piece)], self.error


def _pieces(blocks: Iterable[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """All rows in pieces, each with the number of its first row."""
    first = 0
    for block in blocks:
        for start in range(0, len(block), PIECE):
            yield first + start, block[start : start + PIECE]
        first += len(block)


class _Best:
    """The best rows of each query among the rows that were added so far, by any thread and in any order."""

    def __init__(self, queries: Tensor, k: int):
        self.queries = queries
        self.k = k
        self.rows = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0)
        self.floor = torch.full((len(queries),), -torch.inf)  # the k-th score
        self.lock = threading.Lock()

    def add(self, first: int, rows: Tensor, scores: Tensor, error: Tensor) -> None:
        """rows: [n, E], of which the first is row `first`; scores: float32 [Q, n], their products, within `error`."""
        query, row = self._candidates(scores, error)
        if not len(query):
            return
        parts = zip(query.split(AGAIN), row.split(AGAIN), strict=True)
        score = torch.cat([(self.queries[q].double() * rows[r].double()).sum(dim=1) for q, r in parts]).float()
        new = query, first + row, score
        with self.lock:
            self.rows = _ranked(*(torch.cat(both) for both in zip(self.rows, new, strict=True)), self.k)
            query, _, score = self.rows
            counts = query.bincount(minlength=len(self.floor))
            full = counts == self.k
            self.floor[full] = score[counts.cumsum(0)[full] - 1]

    def _candidates(self, scores: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and rows whose exact scores may reach the floor and may be among the k best of these rows.

        The maximum of a span of rows shows whether it has any; most have none. The k-th best maximum is a floor too.
        """
        span = max(1, min(SPAN, scores.shape[1] // self.k))
        if scores.shape[1] % span:
            scores = F.pad(scores, (0, -scores.shape[1] % span), value=-torch.inf)
        spans = scores.unflatten(1, (-1, span))
        maxima = spans.amax(dim=2)  # [Q, spans]
        needed = (self.floor - error).clamp(min=torch.finfo(scores.dtype).min)  # above the padding
        if maxima.shape[1] >= self.k:
            needed = torch.maximum(needed, maxima.topk(self.k).values[:, -1] - 2 * error)
        query, number = (maxima >= needed[:, None]).nonzero(as_tuple=True)
        which, offset = (spans[query, number] >= needed[query, None]).nonzero(as_tuple=True)
        return query[which], number[which] * span + offset


def _ranked(query: Tensor, row: Tensor, score: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort by query, falling score, and row; keep the first k of each query."""
    order = row.argsort()
    order = order[score[order].argsort(descending=True, stable=True)]
    order = order[query[order].argsort(stable=True)]
    counts = query.bincount()
    start = (counts.cumsum(0) - counts)[query[order]]
    order = order[torch.arange(len(order)) - start < k]
    return query[order], row[order], score[order]


class _Shared:
    """An iterator that several threads take from."""

    def __init__(self, items: Iterator):
        self.items = items
        self.lock = threading.Lock()

    def __iter__(self) -> Iterator:
        return self

    def __next__(self):
        with self.lock:
            return next(self.items)


def _in_single_threaded_workers(work: Callable[[], None]) -> None:
    """Call `work` in as many threads as PyTorch uses here, in each of which its operations start no further threads.

    torch.set_num_threads counts for the calling thread and for threads in which PyTorch has not run yet. Therefore this
    thread sets its own number again, as soon as all workers have set theirs: later threads get that one.
    """

    def single_threaded() -> None:
        torch.get_num_threads()  # makes PyTorch initialize this thread now, not after its number is set
        torch.set_num_threads(1)
        started.wait()
        work()

    with ExitStack() as stack:
        with _starting:  # no other search meanwhile
            threads = torch.get_num_threads()
            started = threading.Barrier(threads + 1)
            pool = stack.enter_context(ThreadPoolExecutor(threads))
            futures = [pool.submit(single_threaded) for _ in range(threads)]
            started.wait()
            torch.set_num_threads(threads)
        for future in futures:
            future.result()
