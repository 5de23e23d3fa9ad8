"""The command line: `soundwave transcribe | ask | train | ...`, also as `python -m soundwave.apps.cli`.

Each command is imported when it is chosen, so that `soundwave --help` and a mistyped option answer at once.
"""

import argparse
import os
import select
import sys
import traceback
from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import soundwave

# Commands with options of their own: the rest of the line goes to their `main(arguments)` as it is.
DELEGATED = {
    "train": ("soundwave.training.train", "run one training stage: align, shrink or instruct"),
    "evaluate": ("soundwave.eval.evaluate", "answer test sets and score the answers"),
    "compare": ("soundwave.eval.compare", "results of several runs beside each other and the papers' figures"),
    "merge": ("soundwave.apps.merge", "write a stage as a standalone model, and its LLM alone"),
    "push": ("soundwave.apps.push", "push a run to the Hub, or finish a push that was cut short"),
    "card": ("soundwave.model_card.build_card", "write the model card of a saved stage"),
    "convert": (
        "soundwave.modeling_soundwave.convert_released",
        "convert the published release to this package's format",
    ),
    "serve": ("soundwave.apps.serve", "answer OpenAI's clients: chat and transcription"),
    "quickstart": ("soundwave.apps.quickstart", "train the whole model small, from nothing, and ask it something"),
}
TRANSCRIBE = """Write down what is said in recordings: files, folders (searched for audio), URLs, or data sets (.jsonl,
.json, .csv or .parquet with a column "audio"; owner/name, owner/name:split or owner/name@revision:split on the Hub).
On several GPUs: accelerate launch -m soundwave.apps.cli transcribe ... --output FILE.jsonl"""
# Packages that an installation may lack -> the extra that brings them.
EXTRAS = {
    "jiwer": "eval",
    "sacrebleu": "eval",
    "soxr": "tiny",
    "matplotlib": "tiny",
    "espeakng_loader": "tiny",
    "fastapi": "serve",
    "uvicorn": "serve",
    "openai": "serve",
    "python_multipart": "serve",
}
# Looked for before a command starts: the quickstart draws its pictures after minutes of training.
NEEDS = {
    "evaluate": ("jiwer", "sacrebleu"),
    "quickstart": ("jiwer", "soxr", "matplotlib"),
    "serve": ("python_multipart",),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; `arguments.run` of what it parses is the chosen one."""
    parser = argparse.ArgumentParser(prog="soundwave", description="From speech to text, and to answers about it.")
    parser.add_argument("--version", action="version", version=f"soundwave {soundwave.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    # Also accepted after the command, where one types it after a failure. SUPPRESS: absent there is not "off".
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    transcribe = commands.add_parser(
        "transcribe", parents=[debug], help="write down what is said in recordings", description=TRANSCRIBE
    )
    transcribe.add_argument("sources", nargs="+", metavar="FILE", help="recordings, folders, URLs or data sets")
    _add_transcribe_options(transcribe)
    _add_model_options(transcribe)
    transcribe.set_defaults(run=_transcribe)

    ask = commands.add_parser("ask", parents=[debug], help="ask a question about a recording")
    ask.add_argument("file", metavar="FILE", help="path or URL: WAV, FLAC, OGG or MP3, any rate and length")
    ask.add_argument("question", metavar="QUESTION", help="the question or instruction, in quotes")
    _add_model_options(ask)
    ask.set_defaults(run=_ask, max_new_tokens=256)

    for name, (_, summary) in DELEGATED.items():
        # No help and no abbreviations of its own: `--help` and all else is handed on.
        commands.add_parser(name, parents=[debug], help=summary, add_help=False, allow_abbrev=False)
    return parser


def _add_transcribe_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, metavar="FILE.jsonl", help="a JSON line per recording here; the same command resumes it"
    )
    parser.add_argument(
        "--timestamps", choices=("srt", "vtt", "json", "textgrid"), help="also write a file with times per recording"
    )
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="where those go (default: beside --output, else here)"
    )
    parser.add_argument("--ctc-only", action="store_true", help="transcribe with the CTC head; no LLM is loaded")
    parser.add_argument("--draft", action="store_true", help="the CTC head drafts what the LLM verifies: faster")
    parser.add_argument("--language", metavar="NAME", help="the language spoken, as a hint")
    parser.add_argument("--bias", action="extend", nargs="+", metavar="WORD", help="words that are likely to occur")
    parser.add_argument("--subset", metavar="NAME", help="the subset (configuration) of a data set on the Hub")
    parser.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help="recordings per batch (default: 8)"
    )


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="M", help="folder or Hub id (default: the tiny model that comes with the package)"
    )
    parser.add_argument("--max-new-tokens", type=positive, metavar="N", help="longest answer, in tokens")
    add_device_options(parser)


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Where and in what precision a model runs."""
    parser.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="precision (default: bfloat16 on a GPU, float32 on the CPU)",
    )


def positive(text: str) -> int:
    """A number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {value}")
    return value


def _transcribe(arguments: argparse.Namespace) -> int:
    from soundwave.apps.transcribe import Transcription, transcribe

    return transcribe(Transcription(**{field.name: getattr(arguments, field.name) for field in fields(Transcription)}))


def _ask(arguments: argparse.Namespace) -> int:
    from soundwave.apps.ask import ask

    names = ("file", "question", "model", "max_new_tokens", "device", "dtype")
    return ask(**{name: getattr(arguments, name) for name in names})


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: the arguments after the program's name; `None` = those of the process.

    Returns:
        0, or 1 when something the user gave cannot be used: then one line on stderr says what.
    """
    arguments, rest = build_parser().parse_known_args(argv)
    if rest and arguments.command not in DELEGATED:
        build_parser().error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if arguments.command in DELEGATED:
            for name in NEEDS.get(arguments.command, ()):
                import_module(name)
            module = import_module(DELEGATED[arguments.command][0])
            return module.main(rest) or 0
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("soundwave: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # whatever a library raises, a user sees one line
        if isinstance(error, BrokenPipeError) and _nobody_reads_on():
            return 141  # as a program that the signal ends
        if arguments.debug:
            traceback.print_exc()
        else:
            # One line, whatever the library below wrote into its message.
            print(f"soundwave {arguments.command}: {' '.join(_message(error).split())}", file=sys.stderr)
        return 1


def _nobody_reads_on() -> bool:
    """Whether stdout is a pipe whose reader left, as `| head` does; what is still to be written then leads nowhere."""
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)
    closed = bool(watch.poll(0))
    if closed:  # Python flushes once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


def _message(error: Exception) -> str:
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if missing in EXTRAS:
        return f'{missing.replace("_", "-")} is not installed: pip install "soundwave[{EXTRAS[missing]}]"'
    # The first kinds are written for users; others, CUDA's or safetensors', mean more with theirs.
    if isinstance(error, ValueError | OSError | ImportError):
        return str(error)
    return f"{type(error).__name__}: {error} (--debug shows where)"


if __name__ == "__main__":
    sys.exit(main())
