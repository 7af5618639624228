"""The command `mmprobe`: every script under one name, wherever one stands."""

import ast
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten

from feats.escapes import one_line
from feats.interrupts import started_quietly

NAME = "mmprobe"
COMMANDS = {
    "quickstart": "modeling.quickstart",
    "inspect": "feats.inspect_feats",
    "merge": "feats.merge_feats",
    "export": "feats.export_feats",
    "import": "feats.import_feats",
    "export-texts": "feats.export_texts",
    "train": "modeling.train_head",
    "sweep": "modeling.sweep_heads",
    "predict": "modeling.inference_head",
    "serve": "modeling.serve",
    "list-runs": "modeling.list_runs",
    "compare-runs": "modeling.compare_runs",
    "report": "modeling.make_report",
    "explain": "modeling.explain",
    "learning-curve": "modeling.learning_curve",
    "bad-cases": "modeling.bad_cases",
    "audit-labels": "modeling.audit_labels",
    "finetune": "modeling.finetune",
    "compare-finetuning": "modeling.compare_finetuning",
    "reproduce": "modeling.reproduce",
}
EXTRACT = "extract"  # EXTRACT NAME: feats/NAME_extract_feats.py


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names, or two of `extract`, with the rest of the words; returns the exit
    status, 2 with the list of commands for a word that is none."""
    with started_quietly():
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        return _shown(usage())
    if words[0] == "--version":
        from feats.terminal import version_line

        return _shown(version_line())
    command, *rest = words
    module = COMMANDS.get(command)
    if command == EXTRACT and rest:
        encoder, *rest = rest
        command, module = f"{EXTRACT} {encoder}", f"feats.{encoder}_extract_feats" if encoder in encoders() else None
    if module is None:
        print(usage(), file=sys.stderr)
        print(f"error: {_unknown(command)}; {NAME} --help lists them", file=sys.stderr)
        return 2
    script = import_module(module)
    sys.argv = [script.__file__ or module, *rest]  # runs record the script, so that the record repeats them
    status: int = script.main(rest)
    return status


def _unknown(command: str) -> str:
    if command == EXTRACT:
        return f"{EXTRACT} what? {', '.join(encoders())}"
    known = [*COMMANDS, *(f"{EXTRACT} {name}" for name in encoders())]
    close = get_close_matches(command, known, 1) or [name for name in known if name.startswith(f"{command}-")]
    return f"{one_line(command)} is no command{f', did you mean {close[0]}?' if close else ''}"


def _shown(text: str) -> int:
    """Print it; returns the exit status."""
    from feats.errors import UsageError
    from feats.terminal import written_out

    try:
        with written_out():
            print(text, flush=True)
    except (UsageError, BrokenPipeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def usage() -> str:
    """All commands, a line each."""
    lines = {f"{EXTRACT} NAME": "Encode pairs once, with the encoder NAME (below)"}
    lines |= {command: _summary(module) for command, module in COMMANDS.items()}
    listed = "\n".join(f"  {command:20}{summary}" for command, summary in lines.items())
    return (
        f"usage: {NAME} COMMAND [OPTIONS]; {NAME} COMMAND --help for options\n\n{listed}\n\n"
        f"NAME: {', '.join(encoders())}"
    )


def encoders() -> list[str]:
    """The names that `extract` knows."""
    folder = Path(__file__).parents[1] / "feats"
    return sorted(path.name.removesuffix("_extract_feats.py") for path in folder.glob("*_extract_feats.py"))


def _summary(module: str) -> str:
    """The first sentence of a script's docstring, read without running it."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None  # all of COMMANDS are in the tree: a test holds it
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    sentence = " ".join(text.split()).partition(". ")[0].partition(": ")[0]
    return shorten(sentence.rstrip("."), 57, placeholder=" ...")
