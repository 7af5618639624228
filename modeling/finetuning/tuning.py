"""The training loop: steps, epochs, checkpoints, and which weights are kept in the end.

What a step does is a function of the weights before it and of (seed, epoch, step): data order, augmentation and dropout
are drawn anew from these, so that a finetuning that was killed goes on to the same bytes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from feats.encoders.base import on_device
from feats.errors import UsageError
from modeling.finetuning.checkpoint import Tensors, WorkFolder
from modeling.finetuning.choosing import Choice, best_epoch, epochs_in_question
from modeling.finetuning.data import Sample, TuneData, epoch_samples, stream
from modeling.finetuning.distributed import Team
from modeling.finetuning.lora import merge_lora
from modeling.finetuning.model import PairBatch, PairModel
from modeling.finetuning.parameters import (
    choose_parameters,
    leave_out_unused,
    moving_statistics,
    optimizer_of,
    plain_state,
)
from modeling.finetuning.predicting import figures_of, predict, seeded
from modeling.finetuning.settings import TuneSettings, lr_factor
from modeling.heads.layers import Noise, attach_noise
from modeling.training.problem import averages_of
from modeling.training.stacked_adam import beta1


@dataclass(frozen=True)
class Tuned:
    """What a finetuning came to. The model holds the chosen weights. `chosen` says in words what these are, and `epoch`
    which one they are of (None: of several); epoch 0 is the start. `history` has a row an epoch."""

    val_logits: np.ndarray  # (len(val), C) float32
    history: list[dict[str, Any]]
    chosen: str
    epoch: int | None
    trained_parameters: int
    tried: list[dict[str, Any]] = field(default_factory=list)  # soups and interpolations, with their figure


Progress = Callable[[int, int], Any]  # training rows done, of how many in all
Told = Callable[[dict[str, Any], bool], Any]  # an epoch's row of the history, and whether it is the best so far


def tune(
    model: PairModel,
    data: TuneData,
    settings: TuneSettings,
    work: WorkFolder,
    team: Team = Team(),
    progress: Progress = lambda done, total: None,
    told: Told = lambda row, best: None,
) -> Tuned:
    """Train `model` in place, from the newest checkpoint in `work` if there is one; at the end it holds the weights
    that did best on the validation rows, the start included.

    `told` hears of each epoch's figures. Raises `UsageError` when the loss is no longer finite, when a step doesn't fit
    into memory, and for settings that the model can't follow.
    """
    with memory_named(settings):
        tuning = _Tuning(model, data, settings, work, team, progress, told)
        tuning.run()
        return tuning.finish()


class _Tuning:
    """One finetuning under way."""

    def __init__(
        self,
        model: PairModel,
        data: TuneData,
        settings: TuneSettings,
        work: WorkFolder,
        team: Team,
        progress: Progress,
        told: Told,
    ):
        self.model, self.data, self.settings, self.work = model, data, settings, work
        self.team, self.progress, self.told = team, progress, told
        if model.tuned:
            raise UsageError("this model has been tuned already, and is no start any more; make a new one")
        model.tuned = True
        self.rows = len(data.train) + len(data.hard)
        self.steps_per_epoch = math.ceil(self.rows / settings.bs)
        share = math.ceil(settings.bs / team.size)
        self.micro = min(settings.micro_bs or share, share)  # so that every process has something to do
        self.class_weights = None if data.class_weights is None else data.class_weights.to(model.device)
        choose_parameters(model, settings)
        leave_out_unused(model, data.reader, data.train[0])
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.statistics = moving_statistics(model)
        self.start = self._plain_state()
        self.optimizer, self.peaks = optimizer_of(model, self.trained, settings)
        fp16 = torch.float16 in model.autocast.values()
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=fp16)
        self.step = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=model.device)
        n_classes = len(data.classes)
        self.confusion = torch.zeros(n_classes, n_classes, dtype=torch.float64, device=model.device)
        self.history: list[dict[str, Any]] = []

    # -- training ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """All steps that aren't done."""
        self._resume()
        self.data.reader.fill([*self.data.val, *([] if "image" in self.settings.augment else self.data.train)])
        self._tell()
        if not self.history:
            self._note_epoch(0)
        while self.step < self.settings.ep * self.steps_per_epoch and not self._stopped():
            epoch, first = divmod(self.step, self.steps_per_epoch)
            for rows, batches in self._epoch(epoch + 1, first):
                self._take_step(rows, batches)
                self._tell()
                if self.step % self.steps_per_epoch == 0:
                    self._note_epoch(epoch + 1)
                elif self.settings.checkpoint_steps and self.step % self.settings.checkpoint_steps == 0:
                    self._save()

    def _tell(self) -> None:
        epochs, steps = divmod(self.step, self.steps_per_epoch)
        self.progress(epochs * self.rows + steps * self.settings.bs, self.settings.ep * self.rows)

    def _epoch(
        self, epoch: int, first: int
    ) -> Iterator[tuple[list[Sample], list[tuple[int, list[Sample], PairBatch]]]]:
        """From step `first` of an epoch on: a step's rows, and of each of this process's shares of them its number, its
        rows and their batch."""
        data, settings = self.data, self.settings
        samples = epoch_samples(data.train, data.hard, settings.seed, epoch, settings.augment)
        steps = [samples[low : low + settings.bs] for low in range(0, len(samples), settings.bs)][first:]
        shares = [
            self.team.share(
                [(k, step[low : low + self.micro]) for k, low in enumerate(range(0, len(step), self.micro))]
            )
            for step in steps
        ]
        batches = data.reader.batches([rows for share in shares for _, rows in share])
        for step, share in zip(steps, shares, strict=True):
            yield step, [(k, rows, next(batches)) for k, rows in share]

    def _take_step(self, rows: list[Sample], shares: list[tuple[int, list[Sample], PairBatch]]) -> None:
        self.model.train()
        self.scaler.scale(self.loss_sum)  # a process without a share of the step needs a scale, too
        weight = self._row_weights([sample.row for sample in rows]).sum()
        before = {name: buffer.clone() for name, buffer in self.statistics.items()}
        after = {name: torch.zeros_like(buffer) for name, buffer in self.statistics.items()}
        total, confusion = torch.zeros_like(self.loss_sum), torch.zeros_like(self.confusion)
        for k, samples, batch in shares:
            for name, buffer in self.statistics.items():
                buffer.copy_(before[name])
            logits, loss = self._backward(f"{self.step}/{k}", samples, batch, weight)
            total += loss
            if self.data.classes:
                truth = self._labels([sample.row for sample in samples])
                confusion.index_put_((truth, logits.argmax(1)), confusion.new_ones(()), accumulate=True)
            for name, buffer in self.statistics.items():
                after[name] += buffer
        gradients = [self._gradient(parameter) for parameter in self.trained.values()]
        self.team.sum([*gradients, *after.values(), total, confusion])
        for name, buffer in self.statistics.items():
            buffer.copy_(after[name] / math.ceil(len(rows) / self.micro))
        self._change_weights()
        self.loss_sum += total * len(rows)
        self.confusion += confusion
        self.step += 1

    def _backward(self, drawn: str, samples: list[Sample], batch: PairBatch, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Add the gradients of a share of the step, whose rows weigh `weight` in all; its logits, and its part of the
        loss. `drawn` names what dropout is drawn by."""
        of_head = stream(self.settings.seed, f"dropout of head/{drawn}")
        attach_noise(self.model.head, Noise([of_head], self.model.device))
        with seeded(stream(self.settings.seed, f"dropout/{drawn}"), self.model.device):
            logits = self.model(batch)
        loss = self._loss(logits, [sample.row for sample in samples]) / weight
        self.scaler.scale(loss).backward()
        return logits.detach(), loss.detach()

    def _change_weights(self) -> None:
        """By the gradients of the whole step, at the rates of this step."""
        settings, steps = self.settings, self.settings.ep * self.steps_per_epoch
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * lr_factor(settings, self.step, steps)
            group["betas"] = beta1(settings.schedule, self.step, steps, settings.warmup), group["betas"][1]
        self.scaler.unscale_(self.optimizer)
        if settings.clip_grad:
            torch.nn.utils.clip_grad_norm_(list(self.trained.values()), settings.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def _gradient(self, parameter: torch.nn.Parameter) -> Tensor:
        if parameter.grad is None:  # this process had no share of the step
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    def _labels(self, rows: Sequence[int]) -> Tensor:
        """On the model's device. Indexing there by a list would wait for all that a GPU has to do."""
        return on_device(self.data.labels[rows], self.model.device)

    def _row_weights(self, rows: Sequence[int]) -> Tensor:
        labels = self._labels(rows)
        weights = self.class_weights
        return torch.ones_like(labels, dtype=torch.float32) if weights is None else weights[labels]

    def _loss(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """The sum over rows that, divided by the sum of their weights, is torch's weighted mean."""
        labels, smoothing = self._labels(rows), self.settings.label_smoothing
        return F.cross_entropy(logits, labels, self.class_weights, reduction="sum", label_smoothing=smoothing)

    def _note_epoch(self, epoch: int) -> None:
        """What an epoch (0: the start) came to; its weights, where they may be wanted in the end."""
        rows, at_once = self.data.val, self.settings.rows_to_predict
        logits = predict(self.model, self.data.reader, rows, self.team, at_once=at_once)
        figures = figures_of(logits, self.data.labels[list(self.data.val)], self.data.classes)
        train_loss = float(self.loss_sum) / self.rows if epoch else None
        of_training = averages_of(self.confusion.cpu().numpy(), "train_") if self.data.classes else {}
        trained = {name: float(value) if epoch else None for name, value in of_training.items()}
        self.loss_sum.zero_()
        self.confusion.zero_()
        diverged = [x for x in (train_loss, figures["val_loss"]) if x is not None and not math.isfinite(x)]
        if diverged:
            raise UsageError(
                f"the loss became {diverged[0]} in epoch {epoch} (lr {self.settings.lr:g}); use a smaller `lr` or "
                "`head_lr`, or `dtype` bf16 in place of fp16"
            )
        row = {"epoch": epoch, "lr": self._rate() if epoch else None, "train_loss": train_loss, **trained, **figures}
        self.history.append(row)
        if epoch:
            self.work.save_epoch(epoch, self._plain_state())
        self._save()
        self.work.keep_epochs(epochs_in_question(self.history, self.settings))  # once the others aren't gone back to
        self.team.gather(None)  # nobody reads weights that are still being written
        self.told(row, best_epoch(self.history, self.settings) == epoch)

    def _rate(self) -> float:
        """That of the encoders' last layers in the step before; the head's, where it alone is trained."""
        peak = self.settings.rate_of_head if self.settings.tune == "head" else self.settings.lr
        return peak * lr_factor(self.settings, self.step - 1, self.settings.ep * self.steps_per_epoch)

    def _stopped(self) -> bool:
        patience = self.settings.patience
        return patience is not None and len(self.history) - 1 - best_epoch(self.history, self.settings) >= patience

    # -- checkpoints -------------------------------------------------------------------------------------------

    def _save(self) -> None:
        tensors = {f"weights/{name}": p.detach() for name, p in self.trained.items()}
        tensors |= {f"statistics/{name}": buffer for name, buffer in self.statistics.items()}
        tensors |= {"loss_sum": self.loss_sum, "confusion": self.confusion}
        for name, parameter in self.trained.items():
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"optimizer/{name}/{key}": value for key, value in moments.items()}
        state = {"step": self.step, "history": self.history, "scaler": self.scaler.state_dict()}
        self.work.save_step(self.step, tensors, state)

    def _resume(self) -> None:
        self.team.gather(None)  # nobody reads while the first process still writes
        found = self.work.load_step(self.model.device)
        if found is None:
            return
        tensors, state = found
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(tensors[f"weights/{name}"])
            for name, buffer in self.statistics.items():
                buffer.copy_(tensors[f"statistics/{name}"])
        self.loss_sum.copy_(tensors["loss_sum"])
        self.confusion.copy_(tensors["confusion"])
        for name, parameter in self.trained.items():
            prefix = f"optimizer/{name}/"
            moments = {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}
            if moments:
                # Laid out in memory as their parameter: fused kernels go by position. (The number of steps has no
                # dimensions. Torch's own loading goes by numbers, which says nothing when it goes wrong.)
                self.optimizer.state[parameter] = {
                    key: torch.empty_like(parameter).copy_(x) if x.dim() else x for key, x in moments.items()
                }
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.history = state["step"], state["history"]
        self.team.gather(None)

    # -- the end -----------------------------------------------------------------------------------------------

    def _plain_state(self) -> Tensors:
        return plain_state(self.model, list(self.trained), list(self.statistics))

    def finish(self) -> Tuned:
        """Fold adapters in, and choose the weights to keep."""
        count = sum(parameter.numel() for parameter in self.trained.values())
        for part in self.model.adapted:
            merge_lora(self.model.parts[part])
        self.model.adapted.clear()
        choice = Choice(self.model, self.data, self.settings, self.work, self.team, self.history, self.start)
        best = choice.best()
        tried = [{"weights": words, self.settings.monitor: abs(score)} for words, score in choice.tried]
        return Tuned(best.logits, self.history, best.words, best.epoch, count, tried)


@contextmanager
def memory_named(settings: TuneSettings) -> Iterator[None]:
    """Too large a step, in words that name the option. What was saved is intact."""
    rows = settings.micro_bs or settings.bs
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise UsageError(
            f"{rows} rows at a time don't fit into memory; give a smaller `micro_bs` (the same training in smaller "
            "parts), `lora` or `tune` last-2. What was saved is kept: run the command again to go on"
        ) from None
