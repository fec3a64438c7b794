"""``fieldfit serve``: answers over HTTP."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.delivery.slots import default_folder
from runtime.errors import ServeError
from runtime.verbs.options import (
    add_engine_options,
    add_state_option,
    add_verb,
    ordinal,
    positive,
    request,
)

if TYPE_CHECKING:
    from runtime.serving.access import Certificates
    from runtime.serving.model import Model
    from runtime.serving.service import Listening


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command."""
    parser = add_verb(
        verbs,
        "serve",
        run,
        summary="answer over HTTP",
        description="Answer over HTTP: Open Inference Protocol v2 below /v2, one encoded image to "
        "/classify, Prometheus metrics at /metrics. Without --bundle the slots of this device "
        "answer, and updates arrive between two batches. It runs at a lower priority than the "
        "camera's process. Beyond this machine it must know its clients: --token-file, or --cert, "
        "--key and --client-ca. It ends on SIGTERM once it has answered what it took.",
        example="fieldfit serve --bundle build/solar/bundle",
    )
    parser.add_argument(
        "--bundle", type=Path, metavar="PATH", help="answer with this bundle, not with the slots"
    )
    add_state_option(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; default 127.0.0.1"
    )
    parser.add_argument(
        "--port", type=ordinal, default=8000, metavar="N", help="default 8000; 0 is any free one"
    )
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="clients must send one of these tokens, one a line: Authorization: Bearer TOKEN",
    )
    parser.add_argument("--cert", type=Path, metavar="FILE", help="serve TLS: certificate, PEM")
    parser.add_argument("--key", type=Path, metavar="FILE", help="the certificate's key, PEM")
    parser.add_argument(
        "--client-ca",
        type=Path,
        metavar="FILE",
        help="clients must have a certificate that this authority signed, PEM",
    )
    parser.add_argument(
        "--max-body",
        type=positive,
        default=16,
        metavar="MIB",
        help="largest body of a request; default 16",
    )
    add_engine_options(parser, threads=1)


def run(options: argparse.Namespace) -> int:
    """0 when it was asked to end."""
    from runtime.serving import service
    from runtime.serving.gate import MIB, Limits

    limits = Limits(body_bytes=options.max_body * MIB)
    limits = limits._replace(held_bytes=max(limits.held_bytes, 2 * limits.body_bytes))
    address = service.Address(
        options.host, options.port, options.token_file, _certificates(options)
    )

    def say(listening: "Listening") -> None:
        manifest, choice = listening.served
        if options.json:
            told = {
                "url": listening.url, "bundle": manifest.name, "version": manifest.version,
                "engine": str(choice.engine),
            }  # fmt: skip
            print(json.dumps(told), flush=True)
        print(f"fieldfit: {choice.steps[-1]}", file=sys.stderr)
        print(
            f"fieldfit: {manifest.name} {manifest.version} answers at {listening.url}",
            file=sys.stderr,
            flush=True,
        )

    service.step_back()
    service.serve(_model(options), address, limits, say)
    return 0


def _model(options: argparse.Namespace) -> "Callable[[], Model]":
    from runtime.serving.model import open_bundle, open_slots

    if options.bundle is not None:
        return open_bundle(options.bundle, request(options), options.cache)
    return open_slots(options.state or default_folder(), request(options))


def _certificates(options: argparse.Namespace) -> "Certificates | None":
    from runtime.serving.access import Certificates

    if options.cert is None and options.key is None and options.client_ca is None:
        return None
    if options.cert is None or options.key is None:
        raise ServeError("TLS needs both --cert and --key")
    return Certificates(options.cert, options.key, options.client_ca)
