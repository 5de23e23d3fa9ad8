"""The command line: `soundwave transcribe | ask | train | ...`, also as `python -m soundwave.apps.cli`.

Each command is imported when it is chosen, so that `soundwave --help` and a mistyped option answer at once.
"""

import argparse
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

import soundwave

# Commands with options of their own: the rest of the line goes to their `main(arguments)` as it is.
DELEGATED = {
    "train": ("soundwave.training.train", "run one training stage: align, shrink or instruct"),
    "evaluate": ("soundwave.eval.evaluate", "answer test sets and score the answers"),
    "merge": ("soundwave.apps.merge", "write a stage as a standalone model, and its LLM alone"),
    "card": ("soundwave.model_card.build_card", "write the model card of a saved stage"),
    "convert": (
        "soundwave.modeling_soundwave.convert_released",
        "convert the published release to this package's format",
    ),
    "quickstart": ("soundwave.apps.quickstart", "train the whole model small, from nothing, and ask it something"),
}
# Packages that an installation may lack -> the extra that brings them.
EXTRAS = {"jiwer": "eval", "soxr": "tiny", "matplotlib": "tiny", "espeakng_loader": "tiny"}
# Looked for before a command starts: the quickstart draws its pictures after minutes of training.
NEEDS = {"evaluate": ("jiwer",), "quickstart": ("jiwer", "soxr", "matplotlib")}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; `arguments.run` of what it parses is the chosen one."""
    parser = argparse.ArgumentParser(prog="soundwave", description="From speech to text, and to answers about it.")
    parser.add_argument("--version", action="version", version=f"soundwave {soundwave.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    # Also accepted after the command, where one types it after a failure. SUPPRESS: absent there is not "off".
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    transcribe = commands.add_parser("transcribe", parents=[debug], help="write down what is said in recordings")
    transcribe.add_argument("files", nargs="+", metavar="FILE", help="WAV, FLAC, OGG or MP3, any rate and length")
    transcribe.add_argument(
        "--batch-size", type=_positive, default=8, metavar="N", help="recordings per batch (default: 8)"
    )
    _add_model_options(transcribe)
    transcribe.set_defaults(run=_transcribe)

    ask = commands.add_parser("ask", parents=[debug], help="ask a question about a recording")
    ask.add_argument("file", metavar="FILE", help="WAV, FLAC, OGG or MP3, any rate and length")
    ask.add_argument("question", metavar="QUESTION", help="the question or instruction, in quotes")
    _add_model_options(ask)
    ask.set_defaults(run=_ask, max_new_tokens=256)

    for name, (_, summary) in DELEGATED.items():
        # No help and no abbreviations of its own: `--help` and all else is handed on.
        commands.add_parser(name, parents=[debug], help=summary, add_help=False, allow_abbrev=False)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="M", help="folder or Hub id (default: the tiny model that comes with the package)"
    )
    parser.add_argument("--max-new-tokens", type=_positive, metavar="N", help="longest answer, in tokens")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {value}")
    return value


def _transcribe(arguments: argparse.Namespace) -> int:
    from soundwave.apps.transcribe import transcribe_files

    return transcribe_files(arguments.files, arguments.model, arguments.batch_size, arguments.max_new_tokens)


def _ask(arguments: argparse.Namespace) -> int:
    from soundwave.apps.transcribe import ask_file

    return ask_file(arguments.file, arguments.question, arguments.model, arguments.max_new_tokens)


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
    # ImportError: an optional extra that a command needs; the message names it.
    except (ValueError, OSError, ImportError) as error:
        if arguments.debug:
            traceback.print_exc()
        else:
            # One line, whatever the library below wrote into its message.
            print(f"soundwave {arguments.command}: {' '.join(_message(error).split())}", file=sys.stderr)
        return 1


def _message(error: Exception) -> str:
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if missing in EXTRAS:
        return f'{missing.replace("_", "-")} is not installed: pip install "soundwave[{EXTRAS[missing]}]"'
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
