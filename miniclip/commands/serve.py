"""Answer over HTTP: embeddings in OpenAI's format, classification, and a page that searches an index.

It listens on this machine alone unless --host says otherwise. Ctrl-C or SIGTERM stops it, once the requests that
arrived are answered. miniclip/serve/README.md describes the routes.

    miniclip serve --model tiny-ViT
    miniclip serve --index photos.index --port 8080
"""

from __future__ import annotations

import argparse
import signal
import threading
from argparse import ArgumentTypeError

from miniclip.commands.index import MODEL
from miniclip.commands.options import UPRIGHT, add_model, add_pixel_limit, load_model, path, positive
from miniclip.commands.output import complain
from miniclip.search.index import DEFAULT_MODEL

HOST = "address to listen at (default: 127.0.0.1, this machine alone); others are open to whoever reaches them"
SECONDS = "time for a client to send a request, or to take its answer (default: 30)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--index", type=path, metavar="INDEX", help="an index of `miniclip index`, for the page")
    parser.add_argument("--host", default="127.0.0.1", help=HOST)
    parser.add_argument("--port", type=port, default=8000, help="0 takes a free one (default: 8000)")
    parser.add_argument("--max-body", type=positive, default=16, metavar="MIB", help="size of a request (default: 16)")
    parser.add_argument("--max-inputs", type=positive, default=256, metavar="N", help="texts or pictures of a request")
    parser.add_argument("--seconds", type=positive, default=30, help=SECONDS)
    parser.add_argument("--upright", action="store_true", default=None, help=UPRIGHT)
    add_pixel_limit(parser)
    add_model(parser, None, MODEL)


def port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise ArgumentTypeError(f"{text!r} is not a port, a number up to 65535")
    return int(text)


def run(options: argparse.Namespace) -> int:
    from miniclip.search.update import check_model
    from miniclip.serve.app import App
    from miniclip.serve.inputs import Limits
    from miniclip.serve.pictures import Pictures
    from miniclip.serve.server import Server

    pictures = None
    if options.index:
        pictures = Pictures(options.index)
        settings = check_model(options.index, pictures.index.settings, options.model, options.activation)
        options.model, options.activation = settings.model, settings.activation
        options.upright = options.upright or settings.upright
    options.model = options.model or DEFAULT_MODEL
    limits = Limits(body=options.max_body << 20, inputs=options.max_inputs, seconds=options.seconds)
    server = Server(App(*load_model(options), options.model, pictures, limits), options.host, options.port)
    if not server.is_local:
        complain(f"note: whoever reaches {options.host} can use this server: it asks for no password")
    stop = threading.Event()

    def end(number: int, frame: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)  # the second time ends the process at once

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    complain(f"serving {options.model} at {server.url} (Ctrl-C stops it)")
    server.run(stop)
    complain(f"stopped; {server.answered} of {server.accepted} requests answered")
    return 0
