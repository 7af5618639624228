"""Tune encoders and head together on raw pairs, and save them as a run: the encoders and head of a run of train_head.py
(default: the newest with one head), a reference study's model (--model), or any encoders with any head
(--image-encoder, --text-encoder, --head). Started by torchrun, several processes share the work."""

if __name__ == "__main__":  # before what takes its time to import
    from feats.interrupts import quiet_start

    quiet_start()

import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import feats.threads  # noqa: F401

# isort: split

from feats.command_line.exit_status import EXIT_DONE
from feats.command_line.messages import rows_bar
from feats.command_line.parser import ScriptParser
from feats.command_line.wording import as_typed
from feats.errors import UsageError
from feats.leftovers import temporary_folder
from feats.names import checked_name
from modeling.command_line import messages
from modeling.command_line.messages import OPTION_OF, command_line, guarded
from modeling.command_line.options import (
    RUN_HELP,
    add_caches_of_run_option,
    add_corrections_option,
    add_data_options,
    add_run_options,
    add_split_options,
    chosen_runs,
    data_place,
    named_texts,
    new_parser,
    split_in_use,
    split_settings,
)
from modeling.command_line.training import HEAD_OPTIONS, modality, option_names
from modeling.command_line.tuning import add_tuning_options, tuning_settings
from modeling.finetuning.settings import TuneSettings
from modeling.finetuning.studies import MODELS, EncoderChoice, tuning_recipe
from modeling.heads.config import ABLATIONS, HeadConfig

if TYPE_CHECKING:
    import torch

    from modeling.finetuning.starts import Start

NEW_MODEL = ("model", "image_encoder", "text_encoder")  # each says that the model isn't a run's
OF_HEADS = ("layers", "attention_norm", "image_positions", "image_pooling")
OF_NEW_MODELS = ("head", "D", "ablation", *OF_HEADS, "norm", "tokens", "sizes")
OF_SPLITS = ("val_ratio", "test_ratio", "split_seed", "split_file")
SIZES = ("layers", "width", "heads", "patch")


def build_parser() -> ArgumentParser:
    """The script's arguments."""
    parser = new_parser(
        __doc__,
        "python modeling/finetune.py --run newest --tune last-2 --ep 3",
        "python modeling/finetune.py --image-encoder efficientnet --text-encoder minilm --head concat",
    )
    add_start_options(parser)
    add_split_options(parser)
    add_corrections_option(parser)
    add_tuning_options(parser)
    add_run_options(parser)
    parser.add_argument("--name", help="the run's name (default: made of time, encoders and head)")
    parser.add_argument(
        "--ablation-eval",
        action="store_true",
        help="also score the tuned model with a black picture (text only) and with an empty text (image only)",
    )
    return parser


def add_start_options(parser: ScriptParser) -> None:
    """What a finetuning begins with."""
    group = parser.add_argument_group("what is tuned")
    group.add_argument("--run", metavar="RUN", help=f"{RUN_HELP} (default: newest; both with one head)")
    add_caches_of_run_option(group)
    add_data_options(group, "the pairs (default: where the caches say, or data)")
    group.add_argument("--new-head", action="store_true", help="begin with a new head of the run's shape")
    group.add_argument("--weights", nargs="+", default=[], metavar="NAME=PATH", help="weights of a cache or encoder")
    new = parser.add_argument_group("a new model")
    new.add_argument("--model", choices=tuple(MODELS), help="a reference study's")
    new.add_argument("--image-encoder", metavar="NAME[=MODEL]", help="of stage 1: clip, resnet=resnet18, ...")
    new.add_argument(
        "--text-encoder", metavar="NAME[=MODEL]", help="of stage 1: minilm, roberta=bert-base-uncased, ..."
    )

    def add(name: str, text: str, **keywords: Any) -> None:
        new.add_argument(*option_names(name), default=SUPPRESS, help=text, **keywords)

    add("head", "a head of stage 2 (default: the model's, else fusion)")
    add("D", f"width of the common space or hidden layer (default: {HeadConfig.D})", type=int)
    add("dropout", "of the head, a run's too (default: its own)", type=float)
    add(
        "ablation",
        "0 both sides, 1 text only, 2 image only; or both, text, image",
        type=modality,
        choices=range(len(ABLATIONS)),
    )
    for name in OF_HEADS:
        text, keywords = HEAD_OPTIONS[name]
        add(name, text, **keywords)
    add("norm", "of the head's inputs (default: none)", choices=("none", "l2"))
    add("tokens", "let a head that can read token features", action="store_true")
    shown = f"of untrained encoders: {', '.join(SIZES)}, such as text.layers=6 image.patch=32"
    add("sizes", shown, nargs="+", metavar="SIDE.SIZE=N")
    parser.fill_in(model_in_use)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    args = build_parser().parse_args(argv)
    kept = "checkpoints are kept, run the same command to go on"
    named = {**OPTION_OF, "rank": "lora", "alpha": "lora_alpha"}
    same_bits = hasattr(args, "deterministic")
    return guarded(lambda: work(args, command_line(argv)), kept, named, same_bits=same_bits, given=args.given)


def work(args: Namespace, command: str) -> int:
    """Tune, show what came of it, save it; returns the exit status."""
    if args.name is not None:
        checked_name(args.name, "name")
    from modeling.finetuning.distributed import team  # with these torch, transformers and peft: slow to import
    from modeling.finetuning.finetune import finetune_model, no_bar

    with team(args.device) as (mates, device), temporary_folder() as scratch:
        start = begin(args, tuning_settings(args), device, scratch, told=mates.leads)
        run = finetune_model(
            start,
            tuning_settings(args, start.experiment.classes),
            args.runs,
            name=args.name,
            bad_cases=args.bad_cases,
            ablation_eval=args.ablation_eval,
            cached_trunk=not args.live_trunk,
            caches=args.feats,
            command=command,
            options=args.given,
            team=mates,
            say=say if mates.leads else lambda line: None,
            bar=partial(rows_bar, passing=True) if mates.leads else no_bar,
        )
    if run is not None:
        print(f"finetuned run -> {run.path}")
    return EXIT_DONE


def say(line: str) -> None:
    """Print a line above a bar, its settings as they are typed."""
    messages.say(as_typed(line, OPTION_OF))


# -- what is tuned ----------------------------------------------------------------------------------------------


def begin(
    args: Namespace, settings: TuneSettings, device: "torch.device", scratch: Path, *, told: bool = True
) -> "Start":
    """The model that the options ask for, before its first step; which run it begins with is said where `told`."""
    from modeling.finetuning.starts import start_from_encoders, start_from_run

    place = data_place(args)
    weights = named_texts(args.weights, "--weights")
    recipe = tuning_recipe(args.recipe, args.model)
    if not any(getattr(args, option) for option in NEW_MODEL):
        refuse(
            args, (*OF_NEW_MODELS, *OF_SPLITS, "folds"), "a run has its own; leave it out, or begin anew with `model`"
        )
        refuse(
            args,
            ("corrections",),
            "a run keeps the labels its head was trained with; train the head anew with them, and name that run",
        )
        [run] = chosen_runs(args, single_head=True, told=told)
        return start_from_run(
            run,
            settings,
            device=device,
            folder=args.feats,
            place=place,
            weights=weights,
            new_head=args.new_head,
            dropout=getattr(args, "dropout", recipe.get("dropout")),
        )
    refuse(args, ("run",), "the model is begun anew; leave it out, or leave out `model` and the encoders")
    refuse(args, ("folds",), "one model is tuned on one split; give `val_ratio`, or compare_finetuning.py its folds")
    image, text, head, tokens = model_choice(args, recipe)
    start = start_from_encoders(
        image,
        text,
        head,
        settings,
        split_settings(args, recipe),
        device=device,
        place=place,
        weights=weights,
        norm=getattr(args, "norm", "none"),
        tokens=tokens,
        scratch=scratch,
        sizes=sizes_from(getattr(args, "sizes", [])),
    )
    return corrected(start, args.corrections) if args.corrections else start


def corrected(start: "Start", path: Path) -> "Start":
    """The same start with the labels in a file of corrections; the rows stay in their parts."""
    from modeling.features.corrections import read_corrections

    data = start.experiment.features
    data = data.corrected(read_corrections(path, data.dataset))
    return replace(start, experiment=replace(start.experiment, features=data))


def model_in_use(args: Namespace) -> dict[str, Any]:
    """For --show-config: head and split of a new model, the dropout of any, where they weren't given."""
    recipe = tuning_recipe(args.recipe, args.model)
    if not any(getattr(args, option) for option in NEW_MODEL):
        return {"dropout": recipe.get("dropout")}
    head = model_choice(args, recipe)[2]
    of_head = {"head": head.head, "D": head.D, "dropout": head.dropout, "ablation": 0, "norm": "none"}
    return {**of_head, **split_in_use(args, recipe)}


def refuse(args: Namespace, options: Sequence[str], why: str) -> None:
    """Raise `UsageError` when one of these options was typed."""
    typed = [f"`{option}`" for option in options if getattr(args, option, None) is not None]
    if typed:
        raise UsageError(f"{', '.join(typed)}: {why}")


def model_choice(
    args: Namespace, recipe: dict[str, Any]
) -> tuple[EncoderChoice | None, EncoderChoice | None, HeadConfig, bool]:
    """The encoders and the head of a new model, and whether it reads tokens where it can do without."""
    model = MODELS.get(args.model or "")
    image, text = (
        encoder_choice(typed) if typed else getattr(model, side, None)
        for side, typed in (("image", args.image_encoder), ("text", args.text_encoder))
    )
    given: dict[str, Any] = {"head": model.head} if model else {}
    of_head = {f.name for f in fields(HeadConfig)} - {"sides"}
    given |= {name: value for name, value in {**recipe, **vars(args)}.items() if name in of_head}
    sides = ABLATIONS[getattr(args, "ablation", 0)]
    there = tuple(side for side, choice in (("image", image), ("text", text)) if choice and side in sides)
    if not there:
        raise UsageError("`ablation` leaves no encoder; name one of the other side")
    tokens = getattr(args, "tokens", False) or bool(model and model.tokens)
    return image, text, HeadConfig(**given, sides=there), tokens


def encoder_choice(typed: str) -> EncoderChoice:
    """clip, or resnet=resnet18."""
    name, _, model = typed.partition("=")
    return EncoderChoice(name, model or None)


def sizes_from(items: Sequence[str]) -> dict[str, dict[str, int]]:
    """{"text": {"layers": 6}} of ["text.layers=6"]. Raises `UsageError` for anything else."""
    found: dict[str, dict[str, int]] = {"image": {}, "text": {}}
    for item in items:
        place, _, value = item.partition("=")
        side, _, size = place.partition(".")
        if side not in found or size not in SIZES or not value.isdecimal() or not int(value):
            raise UsageError(
                f"`sizes` {item}: expected SIDE.SIZE=N, such as text.layers=6; sizes are {', '.join(SIZES)}"
            )
        found[side][size] = int(value)
    return found


if __name__ == "__main__":
    sys.exit(main())
