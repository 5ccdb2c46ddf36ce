"""Requests of many threads are encoded together, by the one thread that owns the model."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from queue import Empty, Full, Queue
from typing import NamedTuple

import torch
from torch import Tensor

from miniclip.errors import MiniclipError
from miniclip.models import CLIP

BATCH = 32  # inputs that are encoded together, and the most of a request that wait at a time
WAIT = 0.002  # seconds that the first input of a batch waits for others


class BusyError(MiniclipError):
    """Too many requests are waiting."""


class Job(NamedTuple):
    """Some inputs of one request, all pictures or all texts."""

    kind: str
    inputs: Tensor
    result: Future[Tensor]


class Batcher:
    """encode_image and encode_text for many threads. Inputs that arrive while a batch is encoded form the next one.

    waiting: the number of jobs that may wait; further ones raise BusyError.
    """

    def __init__(self, model: CLIP, waiting: int):
        self.model = model
        self.jobs: Queue[Job | None] = Queue(waiting)
        self.thread = threading.Thread(target=self._work, name="model", daemon=True)
        self.thread.start()

    def encode(self, kind: str, inputs: Tensor) -> Tensor:
        """Unit embeddings [N, E], float32 on the CPU.

        kind, inputs: "image" and pixels [N, 3, R, R], or "text" and token ids [N, L]; at most `BATCH` of them.
        """
        job = Job(kind, inputs, Future())
        try:
            self.jobs.put_nowait(job)
        except Full:
            raise BusyError(f"{self.jobs.maxsize} requests are waiting, the most there may be; try again") from None
        return job.result.result()

    def close(self) -> None:
        """Wait until all jobs are done, and end the thread. No thread may call `encode` any more."""
        self.jobs.put(None)
        self.thread.join()

    def _work(self) -> None:
        while (job := self.jobs.get()) is not None:
            jobs = self._gather(job)
            for kind in ("image", "text"):
                if chosen := [job for job in jobs if job.kind == kind]:
                    self._encode(kind, chosen)

    def _gather(self, job: Job) -> list[Job]:
        jobs, end = [job], time.monotonic() + WAIT
        while sum(len(job.inputs) for job in jobs) < BATCH:
            try:
                following = self.jobs.get(timeout=max(0, end - time.monotonic()))
            except Empty:
                break
            if following is None:
                self.jobs.put(None)
                break
            jobs.append(following)
        return jobs

    def _encode(self, kind: str, jobs: list[Job]) -> None:
        encode = self.model.encode_image if kind == "image" else self.model.encode_text
        try:
            inputs = torch.cat([job.inputs for job in jobs]).to(self.model.logit_scale.device)
            with torch.no_grad():
                embeddings = encode(inputs, normalize=True).to("cpu", torch.float32)
            if not embeddings.isfinite().all():
                raise MiniclipError("the model gives NaN or infinity: its weights, or --dtype, are not usable")
        except Exception as error:
            for job in jobs:
                job.result.set_exception(error)
            return
        for job, part in zip(jobs, embeddings.split([len(job.inputs) for job in jobs]), strict=True):
            job.result.set_result(part)
