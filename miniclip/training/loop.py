"""The training loop. One optimizer step is `Trainer.step`; `Trainer.run` does all of them, and what comes between."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from miniclip.data.batches import Batch, Epochs, Pictures, choose_captions
from miniclip.data.seeds import generator
from miniclip.data.shards import Shards
from miniclip.models import CLIP
from miniclip.parallel import is_main, is_set_up, rank, world_size
from miniclip.training import augment
from miniclip.training.checkpoint import export_weights, load_checkpoint, save_checkpoint
from miniclip.training.diverged import TrainingDivergedError, explain
from miniclip.training.gradient_cache import Embedder, cached_backward
from miniclip.training.loss import LOSSES, clamp_logit_scale, sharded_loss, whole_loss, without_autocast
from miniclip.training.optim import build_optimizer, freeze, learning_rate, training_mode
from miniclip.training.options import TrainOptions
from miniclip.training.report import Reporter
from miniclip.training.validate import tokenize_short, validate
from miniclip.training.whiten import whiten_patches

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MAY_CHANGE = {"steps", "epochs", "workers", "threads", "log_every", "val_every", "save_every", "output", "download"}


class Trainer:
    """A run: model, optimizer, data, and the number of steps done. All randomness comes from (seed, step, rank), so
    that a run that goes on from a checkpoint does bit for bit what it would have done uninterrupted."""

    def __init__(self, model: CLIP, source: Epochs | Shards, val: Pictures | None, total: int, options: TrainOptions):
        self.model, self.source, self.val, self.total, self.options = model, source, val, total, options
        self.device = model.logit_scale.device
        self.output = Path(options.output)
        self.loss = LOSSES[options.loss]
        self.report = Reporter(self.output, is_main(), self.loss.chance(options.batch_size))
        freeze(model, options)
        training_mode(model, options)
        self.embedder = Embedder(model, self.loss.bias)
        self.parallel = DistributedDataParallel(self.embedder) if is_set_up() else self.embedder
        self.optimizer = build_optimizer(self.embedder, options)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.precision == "fp16")
        self.patch_dropout = augment.PatchDropout(model.visual, options.patch_dropout)
        self.done = 0  # steps
        self.best = -1.0  # top-1 accuracy of a validation

    def run(self) -> None:
        """Do all steps that are left, with logs, validations and checkpoints in between."""
        options, pairs = self.options, self.options.batch_size
        bar = tqdm(total=self.total * pairs, initial=self.done * pairs, unit=" pairs", disable=not is_main())
        logged, since = self.done, time.perf_counter()
        for batch in self.source.batches(self.done, self.total):
            line = self.step(batch)
            self.done += 1
            bar.update(pairs)
            last = self.done == self.total
            if self.done % options.log_every == 0 or last:
                elapsed = time.perf_counter() - since
                line["pairs_per_second"] = round((self.done - logged) * pairs / elapsed, 1)
                self.report.log(line)
                bar.set_postfix_str(f"loss {line['loss']:.3f}")
                logged, since = self.done, time.perf_counter()
            if self.val is not None and (self.done % options.val_every == 0 or last):
                self.validate()
            if self.done % options.save_every == 0 or last:
                self.save()
        bar.close()
        self.report.finish()

    def whiten_patches(self) -> None:
        """Start the ViT's patch embedding from what the first few batches look like."""
        batches = enumerate(self.source.batches(0, min(8, self.total)))
        pixels = [self.prepare(batch, generator(self.options.seed, "start", step))[0] for step, batch in batches]
        whiten_patches(self.model.visual, torch.cat(pixels))

    def step(self, batch: Batch) -> dict:
        """One optimizer step; returns what to log about it. Raises TrainingDivergedError for NaN and infinity."""
        options = self.options
        rng = generator(options.seed, "step", self.done, rank())
        self.report.problems(batch.problems, "replaced by other pictures")
        images, texts, repeated = self.prepare(batch, rng)
        rate = learning_rate(self.done, self.total, options)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        loss, norm = self.backward(images, texts, rng)
        if not self.is_finite(loss, norm):
            with self.arithmetic():
                cause = explain(self.model, images, texts)
            raise TrainingDivergedError(self.done + 1, loss.item(), norm.item(), cause)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        clamp_logit_scale(self.model)
        self.report.watch_loss(loss.item(), warming_up=self.done < options.warmup)
        scale = self.model.logit_scale.exp().item()
        line = {"step": self.done + 1, "loss": loss.item(), "lr": rate, "logit_scale": scale, "grad_norm": norm.item()}
        return {**line, "repeated_captions": repeated} if repeated else line

    def prepare(self, batch: Batch, rng: torch.Generator) -> tuple[Tensor, Tensor, int]:
        """Augmented, normalised pixels [N, 3, R, R] and token ids [N, L] on the device; how many texts are repeated."""
        options, config = self.options, self.model.config.preprocess
        change = augment.AUGMENTATIONS[options.augment]
        if options.augment == "pictogram":
            change = partial(change, strength=options.augment_strength)
        pixels = change(batch.pixels.to(self.device), config.image_size, batch.captions, rng)
        texts = choose_captions(batch.captions, options.template, options.first_caption, rng)
        repeated = self.report.watch_texts(texts)
        tokens = tokenize_short(texts, self.model.context_length)
        return augment.normalize(pixels, config), tokens.to(self.device), repeated

    def backward(self, images: Tensor, texts: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Leave clipped gradients in the parameters; return the loss, mean over ranks, and the norm before clipping."""
        micro_batch = self.options.micro_batch or len(images)
        self.patch_dropout.rng = rng
        with self.arithmetic():
            if micro_batch < len(images):
                scaled = cached_backward(self.parallel, images, texts, micro_batch, self.scaled_loss)
            else:
                scaled = self.scaled_loss(*self.parallel(images, texts))
                with without_autocast(images):
                    scaled.backward()
        self.patch_dropout.rng = None
        loss = scaled.detach() / self.scaler.get_scale()
        if is_set_up():
            dist.all_reduce(loss)
            loss /= world_size()
        self.scaler.unscale_(self.optimizer)
        return loss, torch.nn.utils.clip_grad_norm_(self.embedder.parameters(), self.options.clip).detach()

    def scaled_loss(self, *embedded: Tensor) -> Tensor:
        """The loss of what the embedder returns, times the factor that keeps float16 gradients from vanishing."""
        return self.scaler.scale(sharded_loss(self.loss.function, *embedded, chunk=self.options.chunk))

    def own_loss(self, image: Tensor, text: Tensor) -> Tensor:
        """The loss of unit embeddings of this process alone."""
        return whole_loss(self.loss.function, image, text, *self.embedder.scalars())

    def is_finite(self, loss: Tensor, norm: Tensor) -> bool:
        """In float16 gradients may overflow: the scaler then leaves the step out and halves its factor, down to 1."""
        if self.scaler.is_enabled() and self.scaler.get_scale() > 1:
            return bool(loss.isfinite())
        return bool(loss.isfinite() and norm.isfinite())

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        """The precision asked for; and on a CPU the plain attention, because the flash kernel's backward is slow there
        at lengths as short as these."""
        dtype = AUTOCAST[self.options.precision]
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.autocast(self.device.type, dtype, enabled=dtype is not None))
            if self.device.type == "cpu":
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield

    def validate(self) -> None:
        """Log how good the model is on the validation pictures, and keep its weights if it was never better."""
        if is_main():
            with self.arithmetic():
                result = validate(self.model, self.val, self.options.template, self.options.batch_size, self.own_loss)
            training_mode(self.model, self.options)
            self.report.log({"step": self.done, **{f"val_{name}": value for name, value in asdict(result).items()}})
            if result.image_top1 > self.best:
                self.best = result.image_top1
                export_weights(self.model, self.output / "best.safetensors")

    def save(self) -> None:
        if is_main():
            parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"logit_bias": self.embedder.logit_bias, "done": self.done, "best": self.best}
            state |= {"options": asdict(self.options)}
            export_weights(self.model, self.output / "last.safetensors")
            save_checkpoint(state, self.output / "checkpoint.pt")  # last: what it has done is not done again

    def resume(self) -> None:
        """Go on from the output folder's checkpoint, if there is one, else make what is left to make of the start."""
        path = self.output / "checkpoint.pt"
        if path.exists():
            state = load_checkpoint(path)
            before, now = asdict(TrainOptions()) | state["options"], asdict(self.options)
            for name in sorted(now.keys() - MAY_CHANGE):
                if before[name] != now[name]:
                    self.report.say(f"{path} was made with {name} = {before[name]!r}; going on with {now[name]!r}")
            self.model.load_state_dict(state["model"])
            settings = [(group["lr_scale"], group["weight_decay"]) for group in self.optimizer.param_groups]
            self.optimizer.load_state_dict(state["optimizer"])  # also brings the old settings back
            for group, values in zip(self.optimizer.param_groups, settings, strict=True):
                group["lr_scale"], group["weight_decay"] = values
            self.scaler.load_state_dict(state["scaler"])
            if self.embedder.logit_bias is not None and state.get("logit_bias") is not None:
                self.embedder.logit_bias.data.copy_(state["logit_bias"])
            self.done, self.best = state["done"], state["best"]
            self.report.say(f"going on from {path}, after step {self.done} of {self.total}")
        elif self.options.whiten_patches:
            self.whiten_patches()
