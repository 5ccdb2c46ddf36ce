"""The training loop: `Trainer.step` is one optimizer step; `Trainer.run` does all, logs, validates and saves."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from miniclip.data.batches import Batch, choose_captions
from miniclip.data.seeds import generator
from miniclip.errors import UsageError
from miniclip.models import CLIP
from miniclip.parallel import is_main, is_set_up, mean, rank
from miniclip.training import augment
from miniclip.training.checkpoint import export_weights, load_state, save_state
from miniclip.training.diverged import TrainingDivergedError, explain
from miniclip.training.gradient_cache import Embedder, cached_backward
from miniclip.training.loss import LOSSES, clamp_logit_scale, sharded_loss, whole_loss, without_autocast
from miniclip.training.optim import build_optimizer, freeze, learning_rate, training_mode
from miniclip.training.options import TrainOptions
from miniclip.training.report import Reporter
from miniclip.training.sources import Data
from miniclip.training.validate import tokenize_short, validate
from miniclip.training.whiten import whiten_patches

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Options that a run may change when it continues, without a word about it.
MAY_CHANGE = {"steps", "epochs", "workers", "threads", "device", "strict", "restart", "output", "download", "data"}
MAY_CHANGE |= {"log_every", "val_every", "save_every", "image_root", "create_synthetic", "synthetic_pictures"}


class Trainer:
    """A run: model, optimizer, data, and the number of steps done. All randomness comes from (seed, step, rank), so
    that a run that continues from a checkpoint ends with the same bits as one that was not interrupted."""

    def __init__(self, model: CLIP, data: Data, total: int, options: TrainOptions, report: Reporter):
        self.model, self.data, self.total, self.options, self.report = model, data, total, options, report
        self.device = model.logit_scale.device
        self.output = Path(options.output)
        self.loss = LOSSES[options.loss]
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
        logged, since = self.done, time.perf_counter()
        with tqdm(total=self.total * pairs, initial=self.done * pairs, unit=" pairs", disable=not is_main()) as bar:
            for batch in self.data.train.batches(self.done, self.total):
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
                if self.data.val is not None and (self.done % options.val_every == 0 or last):
                    self.validate()
                if self.done % options.save_every == 0 or last:
                    self.save()
        self.report.finish()

    def whiten_patches(self) -> None:
        """Start the ViT's patch embedding from what the first few batches look like."""
        batches = enumerate(self.data.train.batches(0, min(8, self.total)))
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
        tokens = tokenize_short(self.model, texts)
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
        loss = mean(scaled.detach() / self.scaler.get_scale())
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
            options = self.options
            with self.arithmetic():
                result = validate(self.model, self.data.val, options.template, options.batch_size, self.own_loss)
            training_mode(self.model, self.options)
            self.report.log({"step": self.done, **{f"val_{name}": value for name, value in asdict(result).items()}})
            if result.image_top1 > self.best:
                self.best = result.image_top1
                export_weights(self.model, self.output / "best.safetensors")

    def save(self) -> None:
        """Write the weights, then the checkpoint: a run never continues from steps whose weights are not written."""
        if is_main():
            parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"logit_bias": self.embedder.logit_bias, "done": self.done, "best": self.best}
            state |= {"data": self.data.digest, "options": asdict(self.options)}
            export_weights(self.model, self.output / "last.safetensors")
            save_state(state, self.output)

    def resume(self) -> None:
        """Continue from the output folder's checkpoint, if there is one; otherwise prepare the start."""
        state = load_state(self.output, self.report.say)
        if state is None:
            if self.options.whiten_patches:
                self.whiten_patches()
            return
        self._check_same_run(state)
        self.model.load_state_dict(state["model"])
        settings = [(group["lr_scale"], group["weight_decay"]) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])  # also brings the old settings back
        for group, values in zip(self.optimizer.param_groups, settings, strict=True):
            group["lr_scale"], group["weight_decay"] = values
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():
                if value.shape == parameter.shape:  # in the parameter's memory format, as the fused step needs it
                    moments[name] = torch.empty_like(parameter).copy_(value)
        self.scaler.load_state_dict(state["scaler"])
        if self.embedder.logit_bias is not None and state.get("logit_bias") is not None:
            self.embedder.logit_bias.data.copy_(state["logit_bias"])
        self.done, self.best = state["done"], state["best"]
        self.report.say(f"continuing in {self.output}, after step {self.done} of {self.total}")

    def _check_same_run(self, state: dict) -> None:
        """UsageError if the state is of another model or other data; what else has changed is reported."""
        before, now = asdict(TrainOptions()) | state["options"], asdict(self.options)
        changed = [name for name in sorted(now.keys() - MAY_CHANGE) if before[name] != now[name]]
        advice = "choose another --output, or train from the beginning with --restart"
        own = _outline(self.model.state_dict(), self.optimizer.state_dict())
        if _outline(state["model"], state["optimizer"]) != own:
            differing = ", ".join(f"{name} was {before[name]!r} and is {now[name]!r}" for name in changed)
            fault = f"the run in {self.output} trains another model, or other parts of it"
            raise UsageError(f"{fault} ({differing or 'the config differs'}): {advice}")
        digest = state.get("data", self.data.digest)
        if digest != self.data.digest:
            fault = f"the run in {self.output} trains on {digest} in {before['data']}"
            got = f"now the data are {self.data.digest} in {now['data']}"
            raise UsageError(f"{fault}; {got}: {advice}; to fine-tune its model, --from {self.output}")
        for name in changed:
            self.report.say(f"the run began with {name} = {before[name]!r}; it continues with {now[name]!r}")


def _outline(model: dict, optimizer: dict) -> tuple:
    """The shapes of a model's tensors, and how many parameters the groups of an optimizer have."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.items()}
    return shapes, [len(group["params"]) for group in optimizer["param_groups"]]
