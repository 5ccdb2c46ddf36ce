"""The command line: `miniclip ...`, or `python -m miniclip ...`.

A command is a module of this folder and a row of `COMMANDS`. The module's docstring is the description that its --help
prints; it has `add_arguments(parser)` and `run(options) -> exit status`. A command reads options, calls the part of the
project that does the work, and prints. options.py has the options that several commands share, output.py what prints.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Collection
from difflib import get_close_matches
from importlib import import_module

from miniclip.commands.options import set_pixel_limit
from miniclip.commands.output import complain, show_warnings, survive_any_character
from miniclip.errors import MiniclipError, UsageError
from miniclip.version import __version__

COMMANDS = {
    "models": "list the models that can be loaded by name",
    "classify": "probabilities of labels for pictures",
    "similarity": "cosines of pictures and texts",
    "embed": "write unit embeddings of pictures and texts to a file",
    "index": "make pictures searchable; when repeated, read only what is new",
    "search": "find pictures in an index by words or pictures",
    "serve": "answer over HTTP: embeddings, classification, a page that searches an index",
    "evaluate": "measure accuracy, retrieval and probes on a data set",
    "explore": "run one of nine experiments, each with a table and a figure",
    "train": "train a CLIP from scratch, or fine-tune one",
    "trace": "write every stage of a forward pass to a file, for ports",
    "compare": "find the first wrong stage of a port, and why it is wrong",
    "bench": "measure speed and memory beside openai/CLIP, open_clip and others",
    "convert": "rewrite a checkpoint in another format, its values unchanged",
    "export": "write both towers as ONNX, as programs of torch.export, or as a page",
}

EXAMPLE = """\
An example that needs no download, in a checkout of the project:

    miniclip classify examples/images --labels "a dog,a guitar,a pizza" --model tiny-ViT

`miniclip COMMAND --help` explains a command, with examples.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0; 1 if some inputs could not be used, or a comparison failed; 2 if
    nothing could be done; 130 if the user interrupted it."""
    arguments = _dashed(sys.argv[1:] if arguments is None else arguments)
    survive_any_character()
    show_warnings()
    try:
        parser = _parser(next((word for word in arguments if word in COMMANDS), None))
        if not arguments:
            parser.print_help()
            return 0
        if not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
            meant = _meant(arguments[0], COMMANDS) or f"; expected one of {', '.join(COMMANDS)}"
            raise UsageError(f"there is no command {arguments[0]}{meant}")
        options, unknown = parser.parse_known_args(arguments)
        if unknown:
            meant = _meant(unknown[0], options.parser._option_string_actions)
            options.parser.error(f"unrecognized arguments: {shlex.join(unknown)}{meant}")
        set_pixel_limit(options)
        status = options.run(options)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
    except BrokenPipeError:  # the reader of our output has closed it: `miniclip search ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes there
        return 1
    except Exception as error:
        message = _message(error)
        if message is None or sys.flags.dev_mode:
            raise
        complain(f"error: {message}")
        return 2


def _dashed(arguments: list[str]) -> list[str]:
    """--model_size is taken for --model-size, before a -- after which nothing is an option."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [re.sub(r"^--\w[\w-]*", lambda option: option[0].replace("_", "-"), word) for word in arguments[:end]]
    return options + arguments[end:]


def _meant(word: str, names: Collection[str]) -> str:
    """The end of a message: which name was probably meant by a wrong one, if any is close."""
    close = get_close_matches(word, names, n=1)
    return f": did you mean {close[0]}?" if close else ""


class _Parser(argparse.ArgumentParser):
    """Reports wrong arguments in the same way as every other error."""

    def error(self, message: str):
        raise UsageError(f"{message}; `{self.prog} --help` lists the options")


def _parser(asked: str | None) -> argparse.ArgumentParser:
    """The parser, with the arguments of the command `asked`; the modules of the other commands are not imported."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="miniclip", description="CLIP in plain PyTorch.", epilog=EXAMPLE, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"miniclip {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name == asked:
            module = import_module(f"miniclip.commands.{name}")
            command.description = module.__doc__
            command.formatter_class = raw
            command.set_defaults(run=module.run, parser=command)
            module.add_arguments(command)
    return parser


def _message(error: Exception) -> str | None:
    """What to tell the user of an error that has its cause outside the code; None: it is a fault of the code."""
    from safetensors import SafetensorError

    if isinstance(error, MiniclipError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    if isinstance(error, SafetensorError):
        return f"a safetensors file can't be read: {error}"
    if isinstance(error, RuntimeError) and not isinstance(error, (NotImplementedError, RecursionError)):
        first = next(iter(str(error).splitlines()), type(error).__name__)
        hint = "if memory ran out, make the batch or the model smaller; `python -X dev -m miniclip ...` shows the place"
        return f"PyTorch could not do this: {first} ({hint})"
    return None
