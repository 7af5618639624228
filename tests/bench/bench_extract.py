"""How far extraction is from the machine's limits. Prints medians and ratios, all measured in this one run.

    python tests/bench/bench_extract.py                          # CLIP ViT-B/32 with random weights, synthetic pairs
    python tests/bench/bench_extract.py --data DIR --rows 1024   # on real pairs
    python tests/bench/bench_extract.py --encoder resnet --weights FILE    # without: random weights

On a machine with a GPU, where all of it takes a minute or two:

    python tests/bench/bench_extract.py --device cuda --rows 8192 --skip-store
    python tests/bench/bench_extract.py --device cuda --rows 8192 --skip-store --model ViT-L/14@336px
    python tests/bench/bench_extract.py --device cuda --rows 8192 --skip-store --encoder resnet

Whatever runs on a GPU is waited for. Rounds take turns, so that a machine whose speed drifts doesn't favour anyone.
"""

import statistics
import sys
import tempfile
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import clip
import numpy as np
import torch
import torchvision
from efficientnet_lite_pytorch import EfficientNet
from limits import Figure, Product, Settings, device_name, ratios, seconds_of
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import to_tensor

from feats.acceleration import DTYPES, compiled, dtype_name, resolve_device, resolve_dtype
from feats.cache_reader import DONE
from feats.encoders.base import Encoder
from feats.encoders.registry import ENCODERS, load_encoder
from feats.extraction.local import default_workers, extract
from feats.extraction.plan import default_batch_size
from feats.extraction.preparation import Images, Job, Preparation, prepare
from feats.extraction.settings import ExtractionSettings
from feats.images import ResizeCrop, read_image
from feats.records import Record, read_dataset
from feats.store import FeatureStore
from feats.text import clean

# embedding, resolution, vision layers, vision width, patch, context, vocabulary, text width, text heads, text layers
CLIP_MODELS = {
    "ViT-B/32": (512, 224, 12, 768, 32, 77, 49408, 512, 8, 12),
    "ViT-L/14@336px": (768, 336, 24, 1024, 14, 77, 49408, 768, 12, 12),
}
PICTURES = 256  # synthetic ones that differ; more rows show them again
NAIVE_ROWS = 8


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", choices=tuple(ENCODERS), default="clip")
    parser.add_argument("--model")
    parser.add_argument("--weights", help="(default for clip and resnet: random ones)")
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
        weights = args.weights or _random_weights(args, work)
        encoder = load_encoder(args.encoder, args.model, weights, device=device, dtype=dtype)
        settings = ExtractionSettings(args.batch_size or default_batch_size(encoder), args.workers, encoder.text_clean)
        records = _records(args, work)
        print(
            f"{args.encoder} {encoder.identity.get('model')}, {len(records)} rows, batch {settings.batch_size}, "
            f"{device_name(device)}, {dtype_name(dtype)}, {torch.get_num_threads()} threads, {settings.workers} workers"
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
    show_pipeline(time_pipeline(args, encoder, weights, records, settings, work), encoder)


@dataclass(frozen=True)
class Times:
    """Seconds a row of each round, by what was done, "product" in all; floating-point operations a row of everything
    and of the image side; those of the product."""

    seconds: dict[str, list[float]]
    flops: float
    image_flops: float
    product: Product


def time_pipeline(
    args: Namespace,
    encoder: Encoder,
    weights: str | None,
    records: list[Record],
    settings: ExtractionSettings,
    work: Path,
) -> Times:
    """What `bench_pipeline` shows. What is compared takes turns."""
    batches = _in_memory(encoder, records, settings)
    naive = _naive(args.encoder, args.model, weights, encoder) if batches.images else None
    seconds: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], object], rows: int) -> None:
        seconds.setdefault(name, []).append(seconds_of(work, encoder.device) / rows)

    fast = None
    if args.compile and batches.images:

        def compile_it() -> None:
            nonlocal fast, why_not
            fast, why_not = compiled(encoder.image.forward, batches.images[0])

        why_not = ""
        print(f"compiling the image side: {seconds_of(compile_it, encoder.device):.1f} s{why_not and f' ({why_not})'}")
    product = Product(encoder.device, encoder.dtype)
    flops = _flops(lambda: batches.forward(encoder)) / len(records)  # and warms up
    size = settings.batch_size
    whole = [x for x in batches.images if len(x) == size] or batches.images
    for number in range(args.rounds):
        timed("end to end", lambda n=number: extract(encoder, records, work / f"r{n}_x.h5", settings), len(records))
        timed("forward alone", lambda: batches.forward(encoder), len(records))
        if batches.images:
            pictures = sum(map(len, whole))
            timed("image forward", lambda: [encoder.image.forward(x) for x in whole], pictures)
            if fast:
                timed("image forward, compiled", lambda: [fast(x) for x in whole if len(x) == len(whole[0])], pictures)
            timed("decode alone", lambda: [None for _ in _decoded(encoder, records, settings)], len(records))
            timed(
                "naive loop", lambda: [naive(record) for record in records[:NAIVE_ROWS]], min(NAIVE_ROWS, len(records))
            )
        timed("product", product, 1)
    of_image = _flops(lambda: encoder.image.forward(batches.images[0][:1])) if batches.images else 0.0
    return Times(seconds, flops, of_image, product)


def show_pipeline(times: Times, encoder: Encoder) -> None:
    seconds, flops, product = times.seconds, times.flops, times.product
    median = {name: statistics.median(values) for name, values in seconds.items()}
    limit = product.flops / median.pop("product")
    for name, value in median.items():
        print(
            f"  {name:<26} {1 / value:10.1f} rows/s   (min {1 / max(seconds[name]):.1f}, max {1 / min(seconds[name]):.1f})"
        )
    print(
        f"  {'product limit':<26} {limit / flops:10.1f} rows/s   ({limit / 1e9:.0f} GFLOP/s in products of "
        f"{product.width} x {product.width}, {dtype_name(encoder.dtype)}; {flops / 1e9:.2f} GFLOP a row)"
    )
    print(f"end to end / forward alone:       {median['forward alone'] / median['end to end']:.2f}")
    print(f"end to end / product limit:       {flops / median['end to end'] / limit:.2f}")
    print(f"forward alone / product limit:    {flops / median['forward alone'] / limit:.2f}")
    if times.image_flops:
        print(f"end to end / decode alone:        {median['decode alone'] / median['end to end']:.2f}")
        print(f"end to end / naive loop:          {median['naive loop'] / median['end to end']:.1f}")
        for name in ("image forward", "image forward, compiled"):
            if name in median:
                print(f"{name} / product limit: {times.image_flops / median[name] / limit:.2f}")


def measure(settings: Settings) -> list[Figure]:
    """CLIP ViT-B/32 from pictures and texts to a cache, and both resizers, in speed."""
    rows = 32 if settings.quick else 512
    if settings.device.type == "cuda":
        rows *= 16
    arguments = ["--rows", str(rows), "--rounds", str(settings.rounds), "--device", str(settings.device)]
    args = build_parser().parse_args([*arguments, *(["--data", str(settings.data)] if settings.data else [])])
    dtype = resolve_dtype("auto", settings.device)
    with torch.inference_mode():
        weights, records = _random_weights(args, settings.work), _records(args, settings.work)
        encoder = load_encoder("clip", args.model, weights, device=settings.device, dtype=dtype)
        how = ExtractionSettings(default_batch_size(encoder), args.workers, encoder.text_clean)
        times = time_pipeline(args, encoder, weights, records, how, settings.work)
        resized = _time_resizers(records, settings)
    seconds, product = times.seconds, times.product
    bare = [product.flops / s / times.flops for s in seconds["product"]]  # rows/s
    forward = [1 / s for s in seconds["forward alone"]]
    slower = [max(pair) for pair in zip(seconds["forward alone"], seconds["decode alone"], strict=True)]
    note = f"CLIP ViT-B/32, random weights, {len(records)} pairs, {dtype_name(dtype)}"
    seconds["slower part"] = slower
    decoding = statistics.median(seconds["decode alone"]) > statistics.median(seconds["forward alone"])
    binding = "JPEG decode" if decoding else "FLOPs"
    return [
        Figure(
            "end to end / slower of encoder, decode", ratios(seconds, "slower part", "end to end"), binding, note=note
        ),
        Figure("encoder / matrix products", [a / b for a, b in zip(forward, bare, strict=True)], "FLOPs", note=note),
        Figure("end to end / naive loop", ratios(seconds, "naive loop", "end to end"), binding, note=note),
        Figure("decode + resize: torch / pil", ratios(resized, "pil", "torch"), "JPEG decode", note="one process"),
    ]


def _time_resizers(records: list[Record], settings: Settings) -> dict[str, list[float]]:
    """Seconds of reading, decoding and resizing by either resizer, in this process."""
    sides = {by: ResizeCrop(224, 224, "bicubic", by) for by in ("pil", "torch")}
    some = records[:64]
    seconds: dict[str, list[float]] = {by: [] for by in sides}
    for number in range(settings.rounds + 1):
        for by, resize in sides.items():
            taken = seconds_of(lambda r=resize: [r(read_image(x.image_path)[0]) for x in some], torch.device("cpu"))
            if number:  # the first round also loads libraries
                seconds[by].append(taken)
    return seconds


def bench_clip_text(
    weights: str, encoder: Encoder, records: list[Record], settings: ExtractionSettings, rounds: int
) -> None:
    """Texts cut to the longest of a sorted batch, against the same tower on texts padded to 77."""
    texts = [clean(r.text or "", "tweet") for r in records]
    tokens = encoder.text.tokenize(texts)
    order = np.argsort([t.length for t in tokens], kind="stable")
    size = settings.batch_size
    batches = [[tokens[k].ids for k in order[low : low + size]] for low in range(0, len(order), size)]
    device, dtype = encoder.device, dtype_name(encoder.dtype)
    network = clip.model.build_model(torch.load(weights, weights_only=True)).to(device)
    network, of_package = (network.float(), "fp32") if device.type == "cpu" else (network, "fp16")
    padded = [clip.tokenize(texts[low : low + size], truncate=True).to(device) for low in range(0, len(texts), size)]
    ways = {
        f"padded to 77 (clip package), {of_package}": lambda: [network.encode_text(batch) for batch in padded[:4]],
        f"cut, {dtype}": lambda: [encoder.text.forward(batch) for batch in batches],
    }
    if dtype != "fp32":
        fp32 = load_encoder("clip", weights=weights, device=device)
        ways["cut, fp32"] = lambda: [fp32.text.forward(batch) for batch in batches]
    rows = {name: sum(map(len, padded[:4])) if "padded" in name else len(texts) for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            seconds[name].append(seconds_of(work, device) / rows[name])
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in median.items():
        print(f"  text, {name:<34} {1 / value:10.1f} rows/s")
    reference = median.pop(f"padded to 77 (clip package), {of_package}")
    for name, value in median.items():
        print(f"text, {name} / padded to 77: {reference / value:.2f}")


def bench_store(work: Path, rounds: int, rows: int = 100_000, width: int = 768) -> None:
    """Writing and reading 100k x 768 fp16 rows."""
    values = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float16)
    path, cpu = work / "store_x.h5", torch.device("cpu")

    def write() -> None:
        ids, shapes = [str(i) for i in range(rows)], {"image_feats": (width,)}
        with FeatureStore.create(path, ids, [""] * rows, {}, shapes) as store:
            for low in range(0, rows, store.block_rows):
                block = np.arange(low, min(low + store.block_rows, rows))
                store.write(block, np.full(len(block), DONE), {"image_feats": values[block]})
            store.finish()

    written = seconds_of(write, cpu)
    with FeatureStore.open(path) as store:
        seconds = [seconds_of(lambda: store.read("image_feats"), cpu) for _ in range(rounds)]
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
            for batch in _decoded(encoder, records, settings):
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


def _decoded(encoder: Encoder, records: list[Record], settings: ExtractionSettings) -> Iterator[Images]:
    """The pictures decoded and resized by the worker processes of an extraction, in batches, and nothing more."""
    rows = np.arange(len(records))
    size = settings.batch_size
    jobs = [Job("images", rows[low : low + size]) for low in range(0, len(rows), size)]
    preparation = Preparation(encoder, records, jobs, settings.text_clean)
    return prepare(preparation, settings.workers, pin_memory=encoder.device.type == "cuda")


def _naive(name: str, model: str | None, weights: str | None, encoder: Encoder) -> Callable[[Record], object]:
    """The usual first script, on the package's own model and the same device: one pair at a time, batch 1, fp32, texts
    padded to 77."""
    if name == "clip":
        network = clip.model.build_model(torch.load(weights, weights_only=True)).float()
        image = network.encode_image
    elif name == "resnet":
        network = torchvision.models.get_model(model or "resnet50", weights=None)
        image = network
    else:
        network = EfficientNet.from_name(f"efficientnet-{model or 'lite2'}")
        image = network
    device = encoder.device
    network.eval().to(device)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.image.mean, encoder.image.std))

    def one(record: Record) -> None:
        picture = encoder.image.preprocess(Image.open(record.image_path).convert("RGB"))
        image(((to_tensor(picture) - mean) / std)[None].to(device))
        if name == "clip":
            network.encode_text(clip.tokenize([clean(record.text or "", "tweet")], truncate=True).to(device))

    return one


def _flops(forward: Callable[[], object]) -> int:
    """Floating-point operations of what `forward` does."""
    with FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops()


def _random_weights(args: Namespace, work: Path) -> str | None:
    """A file of random weights for an encoder whose own have to be downloaded; None for the offline ones."""
    torch.manual_seed(0)
    if args.encoder == "clip":
        if args.model not in (None, *CLIP_MODELS):
            sys.exit(f"no shape for random weights of {args.model}; give --weights, or one of {', '.join(CLIP_MODELS)}")
        state = clip.model.CLIP(*CLIP_MODELS[args.model or "ViT-B/32"]).half().state_dict()
    elif args.encoder == "resnet":
        state = torchvision.models.get_model(args.model or "resnet50", weights=None).state_dict()
    else:
        return None
    torch.save(state, work / "weights.pt")
    return str(work / "weights.pt")


def _records(args: Namespace, work: Path) -> list[Record]:
    if args.data:
        splits = read_dataset(args.data).splits
        return [r for records in splits.values() for r in records][: args.rows]
    rng = np.random.default_rng(0)
    folder = work / "pairs"
    folder.mkdir()
    records = []
    for i in range(args.rows):
        if i < PICTURES:
            small = Image.fromarray(rng.integers(0, 255, (60, 60, 3), np.uint8))
            small.resize((600, 600), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=85)
        records.append(Record(str(i), folder / f"{i % PICTURES}.jpg", "word " * int(rng.integers(3, 30))))
    return records


def _at_least_one(text: str) -> int:
    if int(text) < 1:
        raise ArgumentTypeError("at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
