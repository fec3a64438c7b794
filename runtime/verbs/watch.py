"""``fieldfit watch``: inspect what the sources bring, until they end or somebody stops it."""

import argparse
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from runtime import atomic
from runtime.delivery.slots import default_folder
from runtime.errors import EngineError, FleetError
from runtime.private_files import Lock
from runtime.sources import address
from runtime.verbs.options import add_engine_options, add_state_option, add_verb, request

if TYPE_CHECKING:
    from runtime.classifier import Classifier
    from runtime.delivery.live import LiveClassifier
    from runtime.line.evidence import Evidence
    from runtime.line.health import Health
    from runtime.line.outbox import Outbox
    from runtime.line.page.process import PageProcess
    from runtime.line.page.snapshot import Board
    from runtime.line.reporting import Reporting
    from runtime.line.sending import Plc, Sending
    from runtime.line.showing import Parts

OUTBOX, IN_HAND, LOCK = "outbox.db", "in_hand.json", "watch.lock"

_FILES: Set[address.Kind] = {"files", "watch", "video"}
_NETWORK: Set[address.Kind] = {"stream", "gstreamer", "aravis"}


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command."""
    parser = add_verb(
        verbs,
        "watch",
        run,
        summary="inspect what cameras and folders bring, frame after frame",
        description="Give each frame of each source a verdict: OK, DEFECT, ABSTAIN, or NOT "
        "INSPECTED with its reason. Each is kept in the state folder before it is printed as a "
        "line of JSON. Answers come from the device's slots, or from --bundle. It ends when the "
        "sources do, or after the frame in hand on SIGTERM or Ctrl-C.",
        example="fieldfit watch watch:/srv/inbox --bundle build/solar/bundle --ok functional",
    )
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE",
        help="a file, glob or folder; watch:FOLDER; video:FILE; rtsp://...; /dev/videoN; "
        "gst:PIPELINE; aravis:CAMERA",
    )  # fmt: skip
    parser.add_argument(
        "--bundle", type=Path, metavar="PATH", help="answer with this one, not from the slots"
    )
    parser.add_argument(
        "--ok", action="append", default=[], metavar="LABEL",
        help="a label that is OK, every other one being a DEFECT; may be given again; default "
        "what the bundle says",
    )  # fmt: skip
    parser.add_argument("--mqtt", metavar="URL", help="send verdicts: mqtt(s)://host/topic")
    parser.add_argument("--modbus", metavar="ADDR", help="show verdicts to a PLC: [HOST:]PORT")
    parser.add_argument(
        "--page", metavar="ADDR", help="serve a status page and /metrics: HOST:PORT"
    )
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE",
        help="who looks at the page must send one of these tokens, one a line",
    )  # fmt: skip
    parser.add_argument(
        "--evidence", type=Path, metavar="FOLDER", help="keep frames there that are worth a look"
    )
    parser.add_argument(
        "--metrics", type=Path, metavar="FILE",
        help="write metrics there for a textfile collector, NAME.prom",
    )  # fmt: skip
    parser.add_argument(
        "--hot", type=_celsius, default=90.0, metavar="CELSIUS",
        help="work less from this temperature on; default 90",
    )  # fmt: skip
    add_state_option(parser)
    add_engine_options(parser)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options that ``fieldfit watch ARGUMENTS`` would have; wrong usage ends the program."""
    parser = argparse.ArgumentParser(prog="fieldfit")
    add(parser.add_subparsers())
    return parser.parse_args(["watch", *arguments])


def written(options: argparse.Namespace) -> tuple[Path, ...]:
    """Folders beside the state folder that such a line writes to."""
    files = [options.evidence, options.metrics and options.metrics.parent, options.cache]
    return tuple(path.absolute() for path in files if path)


def read(options: argparse.Namespace) -> tuple[Path, ...]:
    """Where such a line finds its bundle and its files. Raises DataError for what is no source."""
    places = [a.place for a in map(address.parse, options.sources) if a.kind in _FILES]
    files = [Path(place).absolute() for place in places]
    return (*files, options.bundle.absolute()) if options.bundle else tuple(files)


def needs_network(options: argparse.Namespace) -> bool:
    """Whether such a line talks to cameras, a broker, a PLC or browsers."""
    kinds = {address.parse(source).kind for source in options.sources}
    return bool(kinds & _NETWORK) or any((options.mqtt, options.modbus, options.page))


def needs_low_port(options: argparse.Namespace) -> bool:
    """Whether such a line listens on a port that only root may have."""
    ports = [text.rpartition(":")[2] for text in (options.modbus, options.page) if text]
    return any(port.isdecimal() and 0 < int(port) < 1024 for port in ports)


def run(options: argparse.Namespace) -> int:
    """0 when the sources have ended or somebody stopped it."""
    state = options.state or default_folder()
    atomic.make_folder(state)
    with ExitStack() as stack, _alone(state):
        return _watch(options, state, stack)


def _watch(options: argparse.Namespace, state: Path, stack: ExitStack) -> int:
    from runtime import machine
    from runtime.delivery.identity import device
    from runtime.line.feed import Feed
    from runtime.line.health import Health
    from runtime.line.in_hand import InHand
    from runtime.line.inspection import Inspector
    from runtime.line.json_lines import JsonLines
    from runtime.line.line_metrics import LineMetrics, sentence
    from runtime.line.loop import Line
    from runtime.line.notify import Notifier
    from runtime.line.outbox import Outbox
    from runtime.line.showing import Parts, Showing, starting
    from runtime.line.thermal import Cooling, read_heat
    from runtime.sources import open_source

    notifier = Notifier.from_environment()
    me = device(state)
    sources = [open_source(text, state=state) for text in options.sources]
    page, board = _page(options, state, stack)
    if board:
        board.publish(starting(me.name))
    model = _open_model(options, state)
    stack.callback(model.close)
    health = Health(model.bundle, files={s.name for s in sources if not s.live})
    inspector = Inspector(model, boot=machine.boot_id(), ok=options.ok, checks=health)
    outbox = stack.enter_context(Outbox(state / OUTBOX, me.id))
    in_hand = stack.enter_context(closing(InHand(state / IN_HAND)))
    evidence, sending = _evidence(options, health, stack), _sending(options, outbox, stack)
    plc = _plc(options, model.bundle.manifest.labels, stack)
    metrics, cooling = LineMetrics(), Cooling(options.hot)
    feed = Feed(sources)
    stack.callback(feed.close)
    line = Line(
        feed, inspector, outbox, in_hand, say=JsonLines(sys.stdout).write, notifier=notifier,
        metrics=metrics, cooling=cooling, read_heat=read_heat, idle=model.poll,
        beat=plc.beat if plc else _nothing,
    )  # fmt: skip
    parts = Parts(
        model=model, state=state, device=me.name, feed=feed, metrics=metrics, cooling=cooling,
        heat=lambda: line.heat, inspector=inspector, health=health, outbox=outbox,
        evidence=evidence, sending=sending,
    )  # fmt: skip
    reporting = _reporting(options, parts)
    showing = Showing(parts, notifier, board=board, file=options.metrics)
    beside = (plc, health, evidence, sending, showing, page, reporting)
    line.beside += [part for part in beside if part]
    with _stopped_by_signals(line.stop):
        notifier.ready(showing.status())
        line.run()
    notifier.stopping()
    showing.end("the sources ended" if feed.ended else "it was stopped")
    _tell(sentence(metrics.results, sum(feed.dropped().values())))
    print(f"next: {_next_step(options, outbox)}", file=sys.stderr)
    return 0


def _page(
    options: argparse.Namespace, state: Path, stack: ExitStack
) -> "tuple[PageProcess | None, Board | None]":
    if options.page is None:
        return None, None
    from runtime.line.page.process import PageProcess
    from runtime.line.page.server import Address
    from runtime.line.page.snapshot import Board, board_folder
    from runtime.serving.access import Tokens, check_exposure

    file = options.token_file
    tokens = Tokens.read(file) if file else None
    check_exposure(Address.parse(options.page).host, tokens, None, option="--page")
    page = PageProcess(state, options.page, _tell, token_file=file and file.absolute())
    stack.callback(page.close)
    board = Board(board_folder(state))
    page.tick()
    return page, board


def _evidence(options: argparse.Namespace, health: "Health", stack: ExitStack) -> "Evidence | None":
    from runtime.line.evidence import Evidence

    if options.evidence is None:
        return None
    return stack.enter_context(closing(Evidence(options.evidence, drifts=health.drifts)))


def _sending(options: argparse.Namespace, outbox: "Outbox", stack: ExitStack) -> "Sending | None":
    if options.mqtt is None:
        return None
    from runtime.line.mqtt import Sender
    from runtime.line.sending import Sending

    sender = stack.enter_context(Sender(outbox, options.mqtt))
    return Sending(sender, options.mqtt)


def _reporting(options: argparse.Namespace, parts: "Parts") -> "Reporting | None":
    """A status of the device goes along with the records, where it can be signed."""
    if options.mqtt is None:
        return None
    from runtime.line.reporting import Reporting

    try:
        return Reporting(
            parts.state, parts.outbox, drift=lambda: parts.health.report, counted=parts.counted
        )
    except FleetError as error:
        _tell(f"records are sent, and no status of this device: {error}")
        return None


def _plc(options: argparse.Namespace, labels: Sequence[str], stack: ExitStack) -> "Plc | None":
    if options.modbus is None:
        return None
    from runtime.line.modbus import Registers
    from runtime.line.sending import Plc

    return Plc(stack.enter_context(Registers(labels, options.modbus)))


def _next_step(options: argparse.Namespace, outbox: "Outbox") -> str:
    """The one thing that leads on from here."""
    if outbox.rows and not options.mqtt:
        return f"send the {outbox.rows} records that wait: --mqtt mqtt://HOST/TOPIC"
    if options.evidence:
        return f"fieldfit collect {options.evidence}"
    return "fieldfit service install, to keep it running"


def _open_model(options: argparse.Namespace, state: Path) -> "Classifier | LiveClassifier":
    """What answers: the bundle that is named, or the slots, which may change."""
    from runtime.classifier import Classifier
    from runtime.delivery.live import LiveClassifier

    asked = request(options)
    if options.bundle is None:
        return LiveClassifier(state, request=asked)
    return Classifier.open(options.bundle, **asked._asdict(), cache=options.cache)


@contextmanager
def _alone(state: Path) -> Iterator[None]:
    """Two lines with one outbox would both be right and nobody could tell them apart."""
    lock = Lock.attempt(state / LOCK)
    if lock is None:
        raise EngineError(
            f"{state}: another fieldfit watch inspects with this state folder; stop it, or give "
            "this one another --state"
        )
    with closing(lock):
        yield


@contextmanager
def _stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and Ctrl-C let the frame in hand be finished."""
    numbers = signal.SIGTERM, signal.SIGINT
    before = {number: signal.signal(number, lambda *_: stop()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _nothing() -> None:
    pass


def _tell(sentence: str) -> None:
    print(f"fieldfit: {sentence}", file=sys.stderr, flush=True)


def _celsius(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 20 <= value <= 150:
        raise argparse.ArgumentTypeError(f"expected 20 to 150 degrees Celsius, got {text!r}")
    return value
