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

from feats.encoders.base import parameter_depths
from feats.errors import UsageError
from modeling.finetuning.checkpoint import Tensors, WorkFolder
from modeling.finetuning.data import PairReader, Sample, epoch_samples, stream
from modeling.finetuning.distributed import Team
from modeling.finetuning.lora import add_lora, merge_lora, merged_state
from modeling.finetuning.model import BATCH_NORMS, HEAD, PairBatch, PairModel
from modeling.finetuning.settings import TuneSettings, lr_factor
from modeling.heads.layers import Noise, attach_noise
from modeling.training.problem import validation_figures

EVAL_ROWS = 64
WISE_FT_SHARES = tuple(k / 10 for k in range(1, 10))  # of the way from the start to the tuned weights


@dataclass(frozen=True)
class TuneData:
    """Rows of a reader, by number, and their labels; `hard`: training rows that come a second time, augmented."""

    reader: PairReader
    labels: Tensor  # (N,) int64; of rows in no part -1
    train: Sequence[int]
    val: Sequence[int]
    test: Sequence[int] = ()
    hard: Sequence[int] = ()
    class_weights: Tensor | None = None  # (C,)


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


Progress = Callable[[int], Any]  # is told training rows as they are done


def tune(
    model: PairModel,
    data: TuneData,
    settings: TuneSettings,
    work: WorkFolder,
    team: Team = Team(),
    progress: Progress = lambda rows: None,
    told: Callable[[dict[str, Any]], Any] = lambda row: None,
) -> Tuned:
    """Train `model` in place, from the newest checkpoint in `work` if there is one; at the end it holds the weights
    that did best on the validation rows, the start included.

    `told` hears of each epoch's figures. Raises `UsageError` when the loss is no longer finite, when a step doesn't fit
    into memory, and for settings that the model can't follow.
    """
    tuning = _Tuning(model, data, settings, work, team, progress, told)
    with memory_named(settings):
        tuning.run()
        return tuning.finish()


def total_rows(data: TuneData, settings: TuneSettings) -> int:
    """What `tune` reports in all."""
    return settings.ep * (len(data.train) + len(data.hard))


def choose_parameters(model: PairModel, settings: TuneSettings) -> None:
    """Let those parameters require gradients that `settings` say are trained. Raises `UsageError` when an encoder has
    fewer blocks than are to be tuned, or none has attention for adapters."""
    for part, side in model.sides.items():
        network = model.parts[part]
        network.requires_grad_(settings.tune == "all" and settings.lora is None)
        if settings.last_blocks is not None and next(network.parameters(), None) is not None:
            blocks = side.blocks
            count = 0 if blocks is None else len(blocks.modules)
            if count < settings.last_blocks:
                raise UsageError(f"`tune` {settings.tune}: {part} has {count} blocks; give a smaller number, or all")
            depths = parameter_depths(side)
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(depths[name] > count - settings.last_blocks)
    model.head.requires_grad_(True)
    model.train_batch_norm = settings.train_batch_norm
    if settings.lora is not None:
        _add_adapters(model, settings)


def _add_adapters(model: PairModel, settings: TuneSettings) -> None:
    assert settings.lora is not None
    refusals = []
    for part in model.sides:
        try:
            seed = stream(settings.seed, f"lora/{part}")
            add_lora(model.parts[part], settings.lora, settings.lora_alpha, seed)
            model.adapted.append(part)
        except UsageError as error:
            refusals.append(str(error))
    if not model.adapted:
        raise UsageError("; ".join(refusals))


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
        told: Callable[[dict[str, Any]], Any],
    ):
        self.model, self.data, self.settings, self.work = model, data, settings, work
        self.team, self.progress, self.told = team, progress, told
        self.rows = len(data.train) + len(data.hard)
        self.steps_per_epoch = math.ceil(self.rows / settings.bs)
        self.micro = settings.micro_bs or math.ceil(settings.bs / team.size)
        self.labels = data.labels.to(model.device)
        choose_parameters(model, settings)
        self._leave_out_unused()
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.statistics = self._moving_statistics()
        self.start = self._plain_state()
        self.optimizer, self.peaks = self._optimizer()
        fp16 = torch.float16 in model.autocast.values()
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=fp16)
        self.step = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=model.device)
        self.history: list[dict[str, Any]] = []

    # -- setting up --------------------------------------------------------------------------------------------

    def _leave_out_unused(self) -> None:
        """Parameters that take no part in the logits (a pooler, a classifier for another task) aren't trained."""
        batch = next(self.data.reader.batches([[Sample(self.data.train[0])] * 2]))
        with seeded(0, self.model.device):
            attach_noise(self.model.head, Noise([0], self.model.device))
            self.model.train(False)
            self.model(batch).sum().backward()
        for _, parameter in self.model.named_parameters():
            if parameter.grad is None:
                parameter.requires_grad_(False)
            parameter.grad = None

    def _moving_statistics(self) -> dict[str, Tensor]:
        """The running statistics that training changes."""
        self.model.train()
        moving = {
            f"{part}/{path}{'.' if path else ''}{name}"
            for part, network in self.model.parts.items()
            for path, module in network.named_modules()
            if isinstance(module, BATCH_NORMS) and module.training
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_floating_point()
        }
        return {name: buffer for name, buffer in self.model.named_buffers() if name in moving}

    def _optimizer(self) -> tuple[torch.optim.Optimizer, list[float]]:
        """Adam or AdamW, and the peak rate of each of its groups: a rate by depth, decay for matrices only."""
        settings = self.settings
        groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
        for name, parameter in self.trained.items():
            stacked = name.startswith(f"{HEAD}/")  # a head's parameters have the models as their first dimension
            decay = settings.weight_decay if parameter.dim() - stacked > 1 else 0.0
            groups.setdefault((self._peak_of(name), decay), []).append(parameter)
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer]
        chosen = [{"params": members, "weight_decay": decay} for (_, decay), members in groups.items()]
        return kind(chosen, lr=settings.lr, fused=True), [peak for peak, _ in groups]

    def _peak_of(self, name: str) -> float:
        if name.startswith(f"{HEAD}/"):
            return self.settings.rate_of_head
        part = next(part for part in self.model.sides if name.startswith(f"{part}/"))
        depths = self._depths(part)
        above = max(depths.values()) - depths[name.removeprefix(f"{part}/")]
        return self.settings.lr * self.settings.layer_decay**above

    def _depths(self, part: str) -> dict[str, int]:
        side = self.model.sides[part]
        if self.settings.layer_decay == 1:
            return dict.fromkeys((name for name, _ in self.model.parts[part].named_parameters()), 0)
        return parameter_depths(side)

    # -- training ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """All steps that aren't done."""
        self._resume()
        self.data.reader.fill([*self.data.val, *([] if "image" in self.settings.augment else self.data.train)])
        self.progress(self._rows_done())
        if not self.history:
            self._note_epoch(0)
        while self.step < self.settings.ep * self.steps_per_epoch and not self._stopped():
            epoch, first = divmod(self.step, self.steps_per_epoch)
            for rows, batches in self._epoch(epoch + 1, first):
                self._take_step(rows, batches)
                self.progress(len(rows))
                if self.step % self.steps_per_epoch == 0:
                    self._note_epoch(epoch + 1)
                elif self.settings.checkpoint_steps and self.step % self.settings.checkpoint_steps == 0:
                    self._save()
        self.progress(total_rows(self.data, self.settings) - self._rows_done())

    def _rows_done(self) -> int:
        epochs, steps = divmod(self.step, self.steps_per_epoch)
        return epochs * self.rows + steps * self.settings.bs

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
        of_rows = self._row_weights([sample.row for sample in rows])
        before = {name: buffer.clone() for name, buffer in self.statistics.items()}
        after = {name: torch.zeros_like(buffer) for name, buffer in self.statistics.items()}
        total = torch.zeros((), dtype=torch.float64, device=self.model.device)
        for k, samples, batch in shares:
            for name, buffer in self.statistics.items():
                buffer.copy_(before[name])
            with seeded(stream(self.settings.seed, f"dropout/{self.step}/{k}"), self.model.device) as seed:
                attach_noise(self.model.head, Noise([seed], self.model.device))
                logits = self.model(batch)
            loss = self._loss(logits, [sample.row for sample in samples]) / of_rows.sum()
            self.scaler.scale(loss).backward()
            total += loss.detach()
            for name, buffer in self.statistics.items():
                after[name] += buffer
        gradients = [self._gradient(parameter) for parameter in self.trained.values()]
        self.team.sum([*gradients, *after.values(), total])
        for name, buffer in self.statistics.items():
            buffer.copy_(after[name] / math.ceil(len(rows) / self.micro))
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * lr_factor(self.settings, self.step, self.settings.ep * self.steps_per_epoch)
        self.scaler.unscale_(self.optimizer)
        if self.settings.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(list(self.trained.values()), self.settings.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.loss_sum += total * len(rows)
        self.step += 1

    def _gradient(self, parameter: torch.nn.Parameter) -> Tensor:
        if parameter.grad is None:  # this process had no share of the step
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    def _row_weights(self, rows: Sequence[int]) -> Tensor:
        labels = self.labels[rows]
        weights = self.data.class_weights
        return torch.ones_like(labels, dtype=torch.float32) if weights is None else weights.to(labels.device)[labels]

    def _loss(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """The sum over rows that, divided by the sum of their weights, is torch's weighted mean."""
        weights = None if self.data.class_weights is None else self.data.class_weights.to(logits.device)
        smoothing = self.settings.label_smoothing
        return F.cross_entropy(logits, self.labels[rows], weights, reduction="sum", label_smoothing=smoothing)

    def _note_epoch(self, epoch: int) -> None:
        """What an epoch (0: the start) came to; its weights, where they may be wanted in the end."""
        logits = predict(self.model, self.data.reader, self.data.val, self.team)
        figures = _figures(logits, self.data)
        train_loss = float(self.loss_sum) / self.rows if epoch else None
        self.loss_sum.zero_()
        diverged = [x for x in (train_loss, figures["val_loss"]) if x is not None and not math.isfinite(x)]
        if diverged:
            raise UsageError(
                f"the loss became {diverged[0]} in epoch {epoch} (lr {self.settings.lr:g}); use a smaller `lr` or "
                "`head_lr`, or `dtype` bf16 in place of fp16"
            )
        rate = self.optimizer.param_groups[0]["lr"] if epoch else None
        row = {"epoch": epoch, "lr": rate, "train_loss": train_loss, **figures}
        self.history.append(row)
        if epoch:
            self.work.save_epoch(epoch, self._plain_state())
            self.work.keep_epochs(self._wanted_epochs())
        self._save()
        self.told(row)

    def _score(self, row: dict[str, Any]) -> float:
        monitor = self.settings.monitor
        return float(-row["val_loss"] if monitor == "loss" else row[monitor])

    def _best_epoch(self) -> int:
        """The first epoch that no later one betters by `min_gain`."""
        best = self.history[0]
        for row in self.history[1:]:
            if self._score(row) > self._score(best) + self.settings.min_gain:
                best = row
        return int(best["epoch"])

    def _stopped(self) -> bool:
        patience = self.settings.patience
        return patience is not None and len(self.history) - 1 - self._best_epoch() >= patience

    def _wanted_epochs(self) -> list[int]:
        """Those whose weights may be chosen: the best, and the best few for a soup."""
        ranked = sorted(self.history[1:], key=lambda row: (-self._score(row), row["epoch"]))
        return [self._best_epoch(), *(int(row["epoch"]) for row in ranked[: self.settings.soup])]

    # -- checkpoints -------------------------------------------------------------------------------------------

    def _save(self) -> None:
        tensors = {f"weights/{name}": p.detach() for name, p in self.trained.items()}
        tensors |= {f"statistics/{name}": buffer for name, buffer in self.statistics.items()}
        tensors["loss_sum"] = self.loss_sum
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
        for name, parameter in self.trained.items():
            prefix = f"optimizer/{name}/"
            moments = {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}
            for key, x in moments.items():
                if x.dim() == 4:  # channels_last, where the parameter is: fused kernels go by memory
                    moments[key] = torch.empty_like(parameter).copy_(x)
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
        """The weights and statistics that training changes, adapters folded in, by their names in plain networks."""
        names = [name for name in self.trained if not any(name.startswith(f"{part}/") for part in self.model.adapted)]
        state = {name: self.trained[name].detach().clone() for name in names}
        for part in self.model.adapted:
            state |= {f"{part}/{name}": x.detach().clone() for name, x in merged_state(self.model.parts[part]).items()}
        return state | {name: buffer.clone() for name, buffer in self.statistics.items()}

    def _load(self, state: Tensors) -> None:
        own = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        with torch.no_grad():
            for name, tensor in state.items():
                own[name].copy_(tensor)

    def _judged(self, state: Tensors, weights: str, epoch: int | None = None) -> "_Candidate":
        """Some weights, with what they say of the validation rows."""
        self._load(state)
        logits = predict(self.model, self.data.reader, self.data.val, self.team)
        return _Candidate(state, weights, epoch, self._score(_figures(logits, self.data)), logits)

    def finish(self) -> Tuned:
        """Choose the weights, on the validation rows alone, and leave them in the model."""
        count = sum(parameter.numel() for parameter in self.trained.values())
        for part in self.model.adapted:
            merge_lora(self.model.parts[part])
        self.model.adapted.clear()
        best = self._of_epoch(self._best_epoch())
        tried: list[_Candidate] = []
        if self.settings.soup:
            tried += self._soup()
            best = max([best, *tried], key=lambda candidate: candidate.score)  # of equals the first
        if self.settings.wise_ft and best.epoch != 0:
            between = [self._between(share, best) for share in WISE_FT_SHARES]
            tried += between
            best = max([best, *between], key=lambda candidate: candidate.score)
        self._load(best.state)
        scores = [{"weights": candidate.weights, self.settings.monitor: abs(candidate.score)} for candidate in tried]
        return Tuned(best.logits, self.history, best.weights, best.epoch, count, scores)

    def _of_epoch(self, epoch: int) -> "_Candidate":
        state = self.work.load_epoch(epoch, self.model.device) if epoch else self.start
        return self._judged(state, f"epoch {epoch}" if epoch else "the start, which no epoch bettered", epoch)

    def _soup(self) -> list["_Candidate"]:
        """Greedy soup (Wortsman et al. 2022): from the best epoch down, each is mixed in if that betters the figure."""
        ranked = sorted(self.history[1:], key=lambda row: (-self._score(row), row["epoch"]))[: self.settings.soup]
        mixed, tried = self._of_epoch(int(ranked[0]["epoch"])), []
        members = [mixed.epoch]
        for row in ranked[1:]:
            more = self.work.load_epoch(int(row["epoch"]), self.model.device)
            share = 1 / (len(members) + 1)
            state = {name: torch.lerp(x, more[name], share) for name, x in mixed.state.items()}
            names = ", ".join(map(str, [*members, row["epoch"]]))
            tried.append(self._judged(state, f"the mean of epochs {names}"))
            if tried[-1].score > mixed.score:
                mixed, members = tried[-1], [*members, row["epoch"]]
        return tried

    def _between(self, share: float, tuned: "_Candidate") -> "_Candidate":
        """WiSE-FT (Wortsman et al. 2022): weights on the straight way from the start to the tuned ones."""
        state = {name: torch.lerp(self.start[name], x, share) for name, x in tuned.state.items()}
        return self._judged(state, f"{share:g} of the way from the start to {tuned.weights}")


@dataclass(frozen=True)
class _Candidate:
    """Weights that may be chosen."""

    state: Tensors
    weights: str  # in words
    epoch: int | None
    score: float
    logits: np.ndarray


def _figures(logits: np.ndarray, data: TuneData) -> dict[str, float]:
    labels = data.labels[list(data.val)]
    return {name: float(x[0]) for name, x in validation_figures(torch.from_numpy(logits)[None], labels).items()}


@torch.no_grad()
def predict(
    model: PairModel,
    reader: PairReader,
    rows: Sequence[int],
    team: Team = Team(),
    change: Callable[[PairBatch], PairBatch] = lambda batch: batch,
) -> np.ndarray:
    """Logits (len(rows), C) float32 of `rows`, each by exactly one process. `change` may alter the batches."""
    model.train(False)
    blocks = [rows[low : low + EVAL_ROWS] for low in range(0, len(rows), EVAL_ROWS)]
    own = team.share(blocks)
    batches = reader.batches([[Sample(row) for row in block] for block in own])
    found = [model(change(batch)).cpu().numpy() for batch in batches]
    of_all = team.gather(found)
    return np.concatenate([of_all[k % team.size][k // team.size] for k in range(len(blocks))])


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[int]:
    """The block draws its random numbers from `seed`; the random state outside stays as it is."""
    on_gpu = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=on_gpu):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            torch.cuda.manual_seed(seed)
        yield seed


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
