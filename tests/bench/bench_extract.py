"""How far extraction is from the machine's limits. Prints medians and ratios, all measured in this one run.

    python tests/bench/bench_extract.py                          # CLIP ViT-B/32 with random weights, synthetic pairs
    python tests/bench/bench_extract.py --data DIR --rows 1024   # on real pairs
    python tests/bench/bench_extract.py --encoder resnet --weights FILE

Rounds take turns, so that a machine whose speed drifts doesn't favour anyone.
"""

import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import clip
import numpy as np
import torch
import torchvision
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from torchvision.transforms.functional import to_tensor

from feats.acceleration import DTYPES, compiled, dtype_name, resolve_device, resolve_dtype
from feats.encoders.base import Encoder
from feats.encoders.registry import ENCODERS, load_encoder
from feats.extraction.local import default_workers, extract
from feats.extraction.plan import default_batch_size
from feats.extraction.preparation import Job, Preparation, prepare
from feats.extraction.settings import ExtractionSettings
from feats.records import Record, read_dataset
from feats.store import DONE, FeatureStore
from feats.text import clean

VIT_B32 = {
    "embed_dim": 512,
    "image_resolution": 224,
    "vision_layers": 12,
    "vision_width": 768,
    "vision_patch_size": 32,
    "context_length": 77,
    "vocab_size": 49408,
    "transformer_width": 512,
    "transformer_heads": 8,
    "transformer_layers": 12,
}


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", choices=tuple(ENCODERS), default="clip")
    parser.add_argument("--model")
    parser.add_argument("--weights", help="(default for clip: a random ViT-B/32)")
    parser.add_argument("--data", type=Path, help="pairs (default: synthetic ones)")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rounds", type=_at_least_one, default=3)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--compile", action="store_true", help="also measure the compiled forward pass")
    parser.add_argument("--skip-store", action="store_true", help="leave out the store's own figures")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    device = resolve_device(args.device)
    dtype = resolve_dtype(ENCODERS[args.encoder].auto_dtype or args.dtype, device)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        work = Path(folder)
        weights = args.weights or (_random_clip(work) if args.encoder == "clip" else None)
        encoder = load_encoder(args.encoder, args.model, weights, device=device, dtype=dtype)
        settings = ExtractionSettings(args.batch_size or default_batch_size(encoder), args.workers, encoder.text_clean)
        records = _records(args, work)
        print(
            f"{args.encoder} {encoder.identity.get('model')}, {len(records)} rows, batch {settings.batch_size}, "
            f"{device}, {dtype_name(dtype)}, {torch.get_num_threads()} threads, {settings.workers} workers"
        )
        bench_pipeline(args, encoder, weights, records, settings, work)
        if args.encoder == "clip":
            bench_clip_text(weights, encoder, records, settings, args.rounds)
        if not args.skip_store:
            bench_store(work, args.rounds)
    return 0


def bench_pipeline(
    args: Namespace,
    encoder: Encoder,
    weights: str | None,
    records: list[Record],
    settings: ExtractionSettings,
    work: Path,
) -> None:
    """End to end against the forward pass alone, decoding alone, the naive loop and the matrix-product limit."""
    batches = _in_memory(encoder, records, settings)
    naive = _naive(args.encoder, args.model, weights, encoder) if batches.images else None
    seconds: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], object], rows: int) -> None:
        _synchronise(encoder.device)
        start = time.perf_counter()
        work()
        _synchronise(encoder.device)
        seconds.setdefault(name, []).append((time.perf_counter() - start) / rows)

    fast = None
    if args.compile and batches.images:
        start = time.perf_counter()
        fast, why_not = compiled(encoder.image.forward, batches.images[0])
        print(f"compiling the image side: {time.perf_counter() - start:.1f} s{why_not and f' ({why_not})'}")
    product = _matrix_product(encoder)
    batches.forward(encoder)
    for number in range(args.rounds):
        timed("end to end", lambda n=number: extract(encoder, records, work / f"r{n}_x.h5", settings), len(records))
        timed("forward alone", lambda: batches.forward(encoder), len(records))
        if batches.images:
            whole = [x for x in batches.images if len(x) == settings.batch_size]
            timed("image forward", lambda: [encoder.image.forward(x) for x in whole], len(whole) * settings.batch_size)
            if fast:
                timed("image forward, compiled", lambda: [fast(x) for x in whole], len(whole) * settings.batch_size)
            timed("prepare alone", lambda: _prepare_all(encoder, records, settings), len(records))
            timed("naive loop", lambda: [naive(record) for record in records[:24]], 24)
        timed("matrix product", product, 1)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    limit = 2 * 4096**3 / median.pop("matrix product")
    for name, value in median.items():
        print(
            f"  {name:<26} {1 / value:10.1f} rows/s   (min {1 / max(seconds[name]):.1f}, max {1 / min(seconds[name]):.1f})"
        )
    print(f"  {'4096^3 product':<26} {limit / 1e9:10.0f} GFLOP/s in {dtype_name(encoder.dtype)}")
    print(f"end to end / forward alone:       {median['forward alone'] / median['end to end']:.2f}")
    if batches.images:
        print(f"end to end / naive loop:          {median['naive loop'] / median['end to end']:.1f}")
        flops = _flops(encoder, batches.images[0][:1])
        for name in ("image forward", "image forward, compiled"):
            if name in median:
                print(f"{name} / product limit: {flops / median[name] / limit:.2f}")


def bench_clip_text(
    weights: str, encoder: Encoder, records: list[Record], settings: ExtractionSettings, rounds: int
) -> None:
    """Texts cut to the longest of a sorted batch, against the same tower on texts padded to 77."""
    texts = [clean(r.text or "", "tweet") for r in records]
    tokens = encoder.text.tokenize(texts)
    order = np.argsort([t.length for t in tokens], kind="stable")
    size = settings.batch_size
    batches = [[tokens[k].ids for k in order[low : low + size]] for low in range(0, len(order), size)]
    network = clip.model.build_model(torch.load(weights, weights_only=True)).to(encoder.device)
    network = network.float() if encoder.device.type == "cpu" else network
    fp32 = load_encoder("clip", weights=weights, device=encoder.device) if encoder.device.type == "cpu" else encoder
    padded = [
        clip.tokenize(texts[low : low + size], truncate=True).to(encoder.device) for low in range(0, len(texts), size)
    ]
    ways = {
        "padded to 77 (clip package)": lambda: [network.encode_text(batch) for batch in padded[:4]],
        "cut, fp32": lambda: [fp32.text.forward(batch) for batch in batches],
        f"cut, {dtype_name(encoder.dtype)}": lambda: [encoder.text.forward(batch) for batch in batches],
    }
    rows = {name: sum(map(len, padded[:4])) if "padded" in name else len(texts) for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            start = time.perf_counter()
            work()
            _synchronise(encoder.device)
            seconds[name].append((time.perf_counter() - start) / rows[name])
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in median.items():
        print(f"  text, {name:<28} {1 / value:10.1f} rows/s")
    reference = median.pop("padded to 77 (clip package)")
    for name, value in median.items():
        print(f"text, {name} / padded to 77: {reference / value:.2f}")


def bench_store(work: Path, rounds: int, rows: int = 100_000, width: int = 768) -> None:
    """Writing and reading 100k x 768 fp16 rows."""
    values = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float16)
    start = time.perf_counter()
    path = work / "store_x.h5"
    with FeatureStore.create(path, [str(i) for i in range(rows)], [""] * rows, {}, {"image_feats": (width,)}) as store:
        for low in range(0, rows, store.block_rows):
            block = np.arange(low, min(low + store.block_rows, rows))
            store.write(block, np.full(len(block), DONE), {"image_feats": values[block]})
        store.finish()
    written = time.perf_counter() - start
    seconds = []
    with FeatureStore.open(path) as store:
        for _ in range(rounds):
            start = time.perf_counter()
            store.read("image_feats")
            seconds.append(time.perf_counter() - start)
    size = values.nbytes / 1e6
    print(
        f"store, {rows} x {width} fp16 ({size:.0f} MB): create and write {written:.2f} s, read {statistics.median(seconds):.3f} s"
    )


class _in_memory:
    """All rows prepared: normalised pixels in batches, tokens in sorted batches."""

    def __init__(self, encoder: Encoder, records: list[Record], settings: ExtractionSettings):
        self.images, self.texts = [], []
        rows = np.arange(len(records))
        size = settings.batch_size
        if encoder.image:
            for batch in _prepare_all(encoder, records, settings):
                self.images.append(encoder.to_pixels(batch.pixels[:, 0]))
        if encoder.text:
            dataset = Preparation(encoder, records, [Job("texts", rows)], settings.text_clean)
            tokens = dataset[0].tokens
            for block in range(0, len(rows), 8 * size):
                order = block + np.argsort([t.length for t in tokens[block : block + 8 * size]], kind="stable")
                self.texts += [[tokens[k].ids for k in order[low : low + size]] for low in range(0, len(order), size)]

    def forward(self, encoder: Encoder) -> None:
        for batch in self.texts:
            encoder.text.forward(batch)
        for batch in self.images:
            encoder.image.forward(batch)


def _prepare_all(encoder: Encoder, records: list[Record], settings: ExtractionSettings) -> list:
    rows = np.arange(len(records))
    size = settings.batch_size
    jobs = [Job("images", rows[low : low + size]) for low in range(0, len(rows), size)]
    return list(prepare(Preparation(encoder, records, jobs, settings.text_clean), settings.workers, False))


def _naive(name: str, model: str | None, weights: str | None, encoder: Encoder) -> Callable[[Record], object]:
    """The usual first script, on the package's own model: one pair at a time, batch 1, fp32, texts padded to 77."""
    if name == "clip":
        network = clip.model.build_model(torch.load(weights, weights_only=True)).float()
        image = network.encode_image
    elif name == "resnet":
        network = torchvision.models.get_model(model or "resnet50", weights=None)
        image = network
    else:
        network = EfficientNet.from_name(f"efficientnet-{model or 'lite2'}")
        image = network
    network.eval()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.image.mean, encoder.image.std))

    def one(record: Record) -> None:
        picture = encoder.image.preprocess(Image.open(record.image_path).convert("RGB"))
        image(((to_tensor(picture) - mean) / std)[None])
        if name == "clip":
            network.encode_text(clip.tokenize([clean(record.text or "", "tweet")], truncate=True))

    return one


def _matrix_product(encoder: Encoder) -> Callable[[], object]:
    """A 4096^3 product in the compute dtype, warmed up."""
    a, b = (torch.randn(4096, 4096, device=encoder.device).to(encoder.dtype) for _ in range(2))
    a @ b
    return lambda: a @ b


def _flops(encoder: Encoder, pixels: torch.Tensor) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        encoder.image.forward(pixels)
    return counter.get_total_flops()


def _random_clip(work: Path) -> str:
    torch.manual_seed(0)
    path = work / "vit_b32.pt"
    torch.save(clip.model.CLIP(**VIT_B32).half().state_dict(), path)
    return str(path)


def _records(args: Namespace, work: Path) -> list[Record]:
    if args.data:
        splits = read_dataset(args.data).splits
        return [r for records in splits.values() for r in records][: args.rows]
    rng = np.random.default_rng(0)
    folder = work / "pairs"
    folder.mkdir()
    records = []
    for i in range(args.rows):
        small = Image.fromarray(rng.integers(0, 255, (60, 60, 3), np.uint8))
        small.resize((600, 600), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=85)
        records.append(Record(str(i), folder / f"{i}.jpg", "word " * int(rng.integers(3, 30))))
    return records


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _at_least_one(text: str) -> int:
    if int(text) < 1:
        raise ArgumentTypeError("at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
