"""A block of rows -> its features. Knows no store, no progress bar and no lock: whoever asks may be anyone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from feats.acceleration import dtype_name, full_products
from feats.encoders.base import by_length
from feats.extraction.plan import Plan
from feats.extraction.preparation import Images, Job, Preparation, Texts, prepare, take
from feats.extraction.transfer import Fetched, Transfer, transfer_for

Results = Callable[[], dict[str, np.ndarray]]  # waits for what was queued, and gives it


@dataclass(frozen=True)
class Block:
    """Some rows' features and facts.

    `rows` (R,) are row numbers, `done` (R,) says which could be encoded, `arrays` map datasets to (R, ...) values, for
    `text_tokens` to the tokens of all R texts in a row; `reasons` say of the ids that aren't done why.
    """

    rows: np.ndarray
    done: np.ndarray
    arrays: dict[str, np.ndarray]
    reasons: dict[str, str]


def encode_block(plan: Plan, number: int) -> Block:
    """Block `number` of the plan, in this process. The same bytes whenever and wherever it is asked for on a machine of
    one kind. Pictures and texts that can't be read are reasons, not errors."""
    return next(encode_blocks(plan, [number], workers=0))


def encode_blocks(
    plan: Plan, numbers: Sequence[int], workers: int, told: Callable[[int], None] = lambda rows: None
) -> Iterator[Block]:
    """The blocks `numbers` one after another, while `workers` processes prepare what comes next. `told` hears of rows
    as they are encoded: how many more. On a GPU a block is given when the next one's work is queued there, so that
    nothing waits while results are copied back."""
    jobs = [job for number in numbers for job in _jobs(plan, plan.blocks[number])]
    preparation = Preparation(plan.encoder, plan.records, jobs, plan.text_clean, plan.settings)
    transfer = transfer_for(plan.encoder.device)
    prepared = prepare(preparation, workers, pin_memory=transfer.ahead)
    begun: Callable[[], Block] | None = None
    for number in numbers:
        finish = _begin(plan, plan.blocks[number], prepared, transfer, told)
        if begun is not None:
            yield begun()
        begun = finish
        if not transfer.ahead:
            yield begun()
            begun = None
    if begun is not None:
        yield begun()


def _jobs(plan: Plan, rows: np.ndarray) -> Iterator[Job]:
    if plan.encoder.text and plan.texts is None:
        yield Job("texts", rows)
    if plan.encoder.image:
        for low in range(0, len(rows), plan.batch_size):
            yield Job("images", rows[low : low + plan.batch_size])


def encode_prepared(plan: Plan, rows: np.ndarray, prepared: Iterator[Texts | Images]) -> Block:
    """A block of the plan's `rows`, of what was prepared for it: takes exactly that much of `prepared`, first its texts
    (where the encoder reads any and the plan has none), then its pictures in batches of the plan's size."""
    return _begin(plan, rows, prepared, transfer_for(plan.encoder.device), lambda rows: None)()


@torch.inference_mode()
def _begin(
    plan: Plan,
    rows: np.ndarray,
    prepared: Iterator[Texts | Images],
    transfer: Transfer,
    told: Callable[[int], None],
) -> Callable[[], Block]:
    """Encode a block of what was prepared for it: takes exactly that much of `prepared`. Nothing in here waits for a
    GPU; what is returned does, and gives the block."""
    reasons: dict[int, str] = {}
    of_pictures: dict[int, str] = {}
    of_texts: Results = dict
    of_images: Results = dict
    if plan.encoder.text:
        texts = next(prepared) if plan.texts is None else take(plan.texts, rows)
        assert isinstance(texts, Texts)
        room = None if plan.token_counts is None else plan.token_counts[rows]
        with full_products(plan.encoder.dtype):
            of_texts = _encode_texts(plan, texts, room, transfer, reasons)
    if plan.encoder.image:
        batches = islice(prepared, -(-len(rows) // plan.batch_size))
        with full_products(plan.encoder.dtype):
            of_images = _encode_images(plan, batches, transfer, of_pictures, told)
    else:
        told(len(rows))

    def finish() -> Block:
        arrays = of_texts() | of_images()
        for k, reason in of_pictures.items():
            reasons[k] = "; ".join(filter(None, (reasons.get(k), reason)))
        for name, values in arrays.items():
            if values.dtype == np.float16 and name != "text_tokens":
                _note_overflow(plan, np.all(np.isfinite(values.reshape(len(rows), -1)), axis=1) == 0, reasons)
        done = np.ones(len(rows), bool)
        done[list(reasons)] = False
        return Block(rows, done, arrays, {plan.records[rows[k]].id: reason for k, reason in sorted(reasons.items())})

    return finish


def _encode_texts(
    plan: Plan, texts: Texts, room: np.ndarray | None, transfer: Transfer, reasons: dict[int, str]
) -> Results:
    """Features and facts of a block's texts, in its order. Batches are sorted by length, to pad little.

    `room` (R,): with token vectors, for how many of them there is place.
    """
    side = plan.encoder.text_side()
    reasons |= texts.reasons
    lengths = np.array([t.length for t in texts.tokens], np.int32)
    batches = list(by_length(texts.tokens, plan.batch_size))
    feats: list[torch.Tensor] = []
    states: list[Fetched] = []
    for chosen in batches:
        out = side.forward([texts.tokens[k].ids for k in chosen])
        feats.append(out["feats"].to(torch.float16))
        if room is not None:
            states.append(transfer.fetch(out["tokens"].to(torch.float16)))
    sorted_feats = transfer.fetch(torch.cat(feats))

    def results() -> dict[str, np.ndarray]:
        values = sorted_feats()
        of_rows = np.empty_like(values)
        of_rows[np.concatenate(batches)] = values
        arrays = {
            "text_feats": of_rows,
            "n_tokens": lengths,
            "truncated": np.array([t.truncated for t in texts.tokens], np.uint8),
            "text_hash": texts.hashes,
            "text_key": texts.keys,
        }
        if room is not None:
            tokens = [np.empty(0, np.float16)] * len(lengths)
            for chosen, of_batch in zip(batches, states, strict=True):
                for k, of_text in zip(chosen, of_batch(), strict=True):
                    tokens[k] = of_text[: lengths[k]]
            arrays["text_tokens"] = _in_their_room(plan, tokens, lengths, room, reasons)
        return arrays

    return results


def _in_their_room(
    plan: Plan, tokens: list[np.ndarray], lengths: np.ndarray, room: np.ndarray, reasons: dict[int, str]
) -> np.ndarray:
    """All texts' tokens in a row, each text as many as there is place for: NaN where it has another number."""
    _note_overflow(plan, np.array([not np.isfinite(t).all() for t in tokens]), reasons)
    for k in np.flatnonzero(lengths != room):
        tokens[k] = np.full((room[k], *tokens[k].shape[1:]), np.nan, np.float16)
        reasons[int(k)] = f"{lengths[k]} tokens now, {room[k]} when the cache was made; overwrite the cache"
    return np.concatenate(tokens)


def _encode_images(
    plan: Plan,
    batches: Iterator[Texts | Images],
    transfer: Transfer,
    reasons: dict[int, str],
    told: Callable[[int], None],
) -> Results:
    """Features and facts of a block's pictures. Results stay on the device until the block's end, so that the GPU
    never waits for the host. A compiled forward gets batches of full size only."""
    encoder, side = plan.encoder, plan.encoder.image_side()
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in plan.features if name.startswith("image_")}
    hashes, sizes = [], []
    start = 0
    for batch in batches:
        assert isinstance(batch, Images)
        count, views = batch.pixels.shape[:2]
        reasons |= {start + k: reason for k, reason in batch.reasons.items()}
        if len(batch.reasons) < count:
            outs = []
            there = transfer.send(batch.pixels)
            for view in range(views):
                pixels = there[:, view]
                if plan.compiled and count < plan.batch_size:
                    pixels = torch.cat([pixels, pixels.new_zeros(plan.batch_size - count, *pixels.shape[1:])])
                out = side.forward(encoder.to_pixels(pixels))
                outs.append({name: value[:count].to(torch.float16) for name, value in out.items()})
            kept["image_feats"].append(outs[0]["feats"])
            if encoder.tokens:
                kept["image_tokens"].append(outs[0]["tokens"])
            if views > 1:
                kept["image_views"].append(torch.stack([out["feats"] for out in outs[1:]], 1))
        else:  # nothing to see
            for name, values in kept.items():
                shape = (count, *plan.features[name])
                values.append(torch.full(shape, torch.nan, dtype=torch.float16, device=encoder.device))
        hashes.append(batch.hashes)
        sizes.append(batch.sizes)
        start += count
        told(count)
    fetched = {name: transfer.fetch(torch.cat(values)) for name, values in kept.items()}
    facts = {"image_hash": np.concatenate(hashes), "image_bytes": np.concatenate(sizes)}
    return lambda: {**{name: values() for name, values in fetched.items()}, **facts}


def _note_overflow(plan: Plan, rows: np.ndarray, reasons: dict[int, str]) -> None:
    """Give the rows that aren't finite in float16 a reason, unless they have one."""
    for k in np.flatnonzero(rows):
        reasons.setdefault(int(k), f"features beyond float16's range, computed in {dtype_name(plan.encoder.dtype)}")
