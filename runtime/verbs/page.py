"""``fieldfit page``: the status page of this device's line."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.delivery.slots import default_folder
from runtime.errors import ServeError
from runtime.verbs.options import add_state_option, add_verb

if TYPE_CHECKING:
    import ssl

    from runtime.line.page.server import Address
    from runtime.serving.access import Certificates, Tokens

_NICE = 10
"""Of 19: a browser must not take time from a camera."""


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command."""
    parser = add_verb(
        verbs,
        "page",
        run,
        summary="show how the line stands, in a browser",
        description="Serve the status page of the line that runs, or ran, with a state folder: "
        "verdicts, what stands out, sources, speed, health, engine and machine; below it "
        "/status.json and /metrics. It only reads. Beyond this machine it must know its clients: "
        "--token-file, or --cert, --key and --client-ca; a browser asks for the token as a "
        "password. fieldfit watch --page starts it beside a line.",
        example="fieldfit page --listen 127.0.0.1:8090",
    )
    parser.add_argument(
        "--listen", default="127.0.0.1:8090", metavar="ADDR",
        help="HOST:PORT; default 127.0.0.1:8090, port 0 is any free one",
    )  # fmt: skip
    add_state_option(parser)
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE",
        help="clients must send one of these tokens, one a line: as the password of a browser, "
        "or Authorization: Bearer TOKEN",
    )  # fmt: skip
    parser.add_argument("--cert", type=Path, metavar="FILE", help="serve TLS: certificate, PEM")
    parser.add_argument("--key", type=Path, metavar="FILE", help="the certificate's key, PEM")
    parser.add_argument(
        "--client-ca", type=Path, metavar="FILE",
        help="clients must have a certificate that this authority signed, PEM",
    )  # fmt: skip
    parser.add_argument(
        "--lifeline", action="store_true", help="end when standard input does, as beside a line"
    )


def run(options: argparse.Namespace) -> int:
    """0 when it was asked to end."""
    from runtime.line.page.answers import Access
    from runtime.line.page.server import Address, serve
    from runtime.line.page.snapshot import board_folder
    from runtime.serving.access import Tokens, is_loopback

    address = Address.parse(options.listen)
    tokens = Tokens.read(options.token_file) if options.token_file else None
    tls = _tls(options, address, tokens)
    access = Access(
        host=is_loopback if is_loopback(address.host) and tokens is None else lambda _: True,
        authorization=tokens.allow if tokens else None,
    )

    def say(url: str) -> None:
        if options.json:
            print(json.dumps({"url": url}), flush=True)
        print(f"fieldfit: the page is at {url}", file=sys.stderr, flush=True)

    os.nice(_NICE)
    board = board_folder(options.state or default_folder())
    serve(board, address, access, tls=tls, listening=say, lifeline=options.lifeline)
    return 0


def _tls(
    options: argparse.Namespace, address: "Address", tokens: "Tokens | None"
) -> "ssl.SSLContext | None":
    from runtime.serving.access import check_exposure, tls_context

    certificates = _certificates(options)
    check_exposure(address.host, tokens, certificates, option="--listen")
    return tls_context(certificates) if certificates else None


def _certificates(options: argparse.Namespace) -> "Certificates | None":
    from runtime.serving.access import Certificates

    if options.cert is None and options.key is None and options.client_ca is None:
        return None
    if options.cert is None or options.key is None:
        raise ServeError("TLS needs both --cert and --key")
    return Certificates(options.cert, options.key, options.client_ca)
