"""Keep runs and their encoders in memory and predict raw pairs as they come: lines of JSON on standard input, answered
line by line on standard output; or, with --http, requests to a small endpoint that has a page to try it.

A line is {"id": ..., "image": a file or its bytes in base64, "text": ...}; its answer is {"id", "label",
"probabilities"} or {"id", "error"}."""

if __name__ == "__main__":  # before what takes its time to import
    from feats.interrupts import quiet_start

    quiet_start()

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

import feats.threads  # noqa: F401

# isort: split

from feats.command_line.exit_status import EXIT_DONE
from feats.command_line.messages import guarded
from feats.command_line.options import positive
from feats.errors import UsageError
from feats.terminal import let_go
from modeling.choices import VOTES, VoteSettings
from modeling.command_line.options import (
    RUN_HELP,
    add_run_options,
    add_weights_option,
    chosen_runs,
    named_texts,
    new_parser,
)

if TYPE_CHECKING:
    from modeling.prediction.warm import WarmPredictor


def build_parser() -> ArgumentParser:
    """The script's arguments."""
    parser = new_parser(__doc__, "python modeling/serve.py --run best", "python modeling/serve.py --http --port 8000")
    which = parser.add_argument_group("runs")
    which.add_argument("--run", nargs="+", metavar="RUN", help=f"{RUN_HELP} (default: newest)")
    add_weights_option(which)
    which.add_argument("--vote", choices=VOTES, default=VoteSettings.vote, help="several runs: as in inference_head.py")
    which.add_argument("--tie", metavar="CLASS", help="who gets a tie: as in inference_head.py")
    add_run_options(parser)
    batches = parser.add_argument_group("batches")
    batches.add_argument("--max-batch", type=positive, default=16, metavar="N", help="pairs encoded at once at most")
    batches.add_argument(
        "--max-delay", type=float, default=5.0, metavar="MS", help="milliseconds that a pair waits for others"
    )
    web = parser.add_argument_group("over HTTP")
    web.add_argument("--http", action="store_true", help="POST /predict, GET /health, and a page at /")
    web.add_argument("--host", help="where to listen (default: 127.0.0.1, which only this machine reaches)")
    web.add_argument("--port", type=int, help="(default: 8000; 0: any that is free)")
    web.add_argument("--max-body", type=positive, metavar="MB", help="largest request (default: 16)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    args = build_parser().parse_args(argv)
    return guarded(lambda: work(args), "no longer serving", args.given)


def work(args: Namespace) -> int:
    """Serve until the input ends or the process is told to stop; returns the exit status."""
    from feats.acceleration import resolve_device

    idle = [name for name in ("host", "port", "max_body") if getattr(args, name) is not None]
    if idle and not args.http:
        raise UsageError(f"{', '.join(f'`{name}`' for name in idle)} without `http`; give that, too, or leave it out")
    if not 0 <= args.max_delay <= 1000:
        raise UsageError(f"`max_delay` {args.max_delay:g}: expected milliseconds from 0 to 1000")
    runs = chosen_runs(args, told=False)
    device = resolve_device(args.device)
    weights = named_texts(args.weights, "--weights")

    from modeling.prediction.warm import BatchSettings, WarmPredictor  # encoders' libraries: slow to import

    def predictor() -> WarmPredictor:
        batches = BatchSettings(args.max_batch, args.max_delay / 1000)
        voting = VoteSettings(args.vote, args.tie)
        return WarmPredictor(runs, voting=voting, weights=weights, device=device, batches=batches)

    if not args.http:
        with predictor() as warm:
            return answer_stdin(warm)

    from modeling.serving import web

    usual = web.WebSettings()
    settings = web.WebSettings(
        usual.host if args.host is None else args.host,
        usual.port if args.port is None else args.port,
        usual.max_body if args.max_body is None else args.max_body << 20,
    )
    # A port that is taken is said before encoders are loaded.
    with web.listening(settings) as sock, predictor() as warm:
        if not web.is_loopback(settings.host):
            print(
                f"warning: whoever reaches this machine can use {settings.host}: there is neither password nor "
                "encryption",
                file=sys.stderr,
            )
        shown = f"[{settings.host}]" if ":" in settings.host else settings.host
        print("\n".join(f"run {run.path}" for run in runs))
        print(f"http://{shown}:{sock.getsockname()[1]} (Ctrl-C ends it)", flush=True)
        web.serve(warm, sock, settings)
    return EXIT_DONE


def answer_stdin(warm: "WarmPredictor") -> int:
    """Answer the lines of standard input until it ends; returns the exit status."""
    from modeling.serving.lines import answer_lines

    print("\n".join(f"ready: run {run.named}" for run in warm.runs), file=sys.stderr, flush=True)
    try:
        answer_lines(warm, sys.stdin.buffer, lambda line: print(line, flush=True))
    except BrokenPipeError:  # whoever read has gone, as head does
        let_go(sys.stdout)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
