"""An attacker's toolbox: a small repository of which every key is at hand, and a server that lies.

Made with python-tuf directly and not by ``export.publish``, which refuses to do most of this.
"""

import copy
import datetime
import hashlib
import io
import shutil
import ssl
import threading
from collections.abc import Callable, Iterable
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    Metadata,
    MetaFile,
    Role,
    Root,
    Signed,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from runtime.bundle import encode_zip
from runtime.delivery.channel import Offer, encode
from runtime.delivery.floor import second_copy
from runtime.manifest import Adaptation, Artifact, FileEntry, Manifest, Quality
from runtime.manifest import encode as encode_manifest
from runtime.preprocess import InputSpec

NOW = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
DAY = datetime.timedelta(days=1)


def tiny_bundle(version: str, *, name: str = "tiny", padding: int = 0) -> bytes:
    """A whole and honest bundle whose model is no model: nothing here runs it."""
    golden = io.BytesIO()
    np.savez(golden, images=np.zeros((1, 16, 16, 1), np.uint8))
    files = {
        "fp32.onnx": f"{name} {version} ".encode() + bytes(padding),
        "golden.npz": golden.getvalue(),
    }
    entries = [
        FileEntry(name=file, sha256=hashlib.sha256(data).hexdigest(), size=len(data))
        for file, data in files.items()
    ]
    quality = Quality(samples=1, labelled=1, agreement=1.0, sqnr_db=200.0)
    manifest = Manifest(
        format=1, name=name, version=version, labels=("bad", "good"),
        input=InputSpec(size=(16, 16), channels=1),
        adaptation=Adaptation(rung="as is", verified=True, reason="a test", labels_used=0),
        artifacts=(Artifact(form="fp32", file="fp32.onnx", quality=quality),),
        files=tuple(entries), golden="golden.npz",
        recipe_sha256="0" * 64, checkpoint_sha256="0" * 64,
    )  # fmt: skip
    return encode_zip(files | {"manifest.json": encode_manifest(manifest)})


def copy_device(state: Path, to: Path) -> Path:
    """Another device that is as this one is, the second copy of its floor included."""
    shutil.copytree(state, to, symlinks=True)
    shutil.copytree(second_copy(state).parent, second_copy(to).parent)
    return to


class Keys(NamedTuple):
    """Whoever has them can sign."""

    root: tuple[CryptoSigner, ...]
    targets: CryptoSigner
    online: CryptoSigner

    @classmethod
    def make(cls) -> "Keys":
        new = CryptoSigner.generate_ed25519
        return cls((new(), new(), new()), new(), new())


class Forge:
    """A repository in ``folder``, and everything that honest and dishonest people do with it."""

    def __init__(self, folder: Path, keys: Keys | None = None) -> None:
        self.folder = folder
        self.keys = keys or Keys.make()
        self.root = Root(expires=NOW + 365 * DAY, consistent_snapshot=True)
        self.root.roles["root"] = Role([], 2)
        for signer in self.keys.root:
            self.root.add_key(signer.public_key, "root")
        self.root.add_key(self.keys.targets.public_key, "targets")
        self.root.add_key(self.keys.online.public_key, "snapshot")
        self.root.add_key(self.keys.online.public_key, "timestamp")
        self.targets = Targets(expires=NOW + 365 * DAY)
        self.snapshot = Snapshot(expires=NOW + 30 * DAY)
        self.timestamp = Timestamp(expires=NOW + 30 * DAY)
        for unsigned in (self.targets, self.snapshot, self.timestamp):
            unsigned.version = 0
        (folder / "metadata").mkdir(parents=True)
        self.write(self.root, self.keys.root[:2])

    def publish(
        self, version: str, channel: str = "line", *, data: bytes | None = None, **offer: Any
    ) -> Offer:
        """Put a bundle into a channel, and sign all that it takes; ``offer`` overrides fields."""
        data = data or tiny_bundle(version)
        bundle = self.add(f"bundles/tiny-{version}.zip", data)
        fields: dict[str, Any] = {
            "name": "tiny", "version": version, "path": bundle.path, "size": bundle.length,
            "sha256": bundle.hashes["sha256"], "published": NOW,
        }  # fmt: skip
        made = Offer(**(fields | offer))
        self.add(f"channels/{channel}.json", encode(made))
        self.sign()
        return made

    def add(self, path: str, data: bytes) -> TargetFile:
        """A target, not yet signed."""
        target = TargetFile.from_data(path, data, ["sha256"])
        self.targets.targets[path] = target
        place = self.folder / "targets" / target.get_prefixed_paths()[0]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
        return target

    def sign(self, *, targets_by: CryptoSigner | None = None) -> None:
        """The next version of targets, snapshot and timestamp."""
        self.targets.version += 1
        self.write(self.targets, [targets_by or self.keys.targets])
        self.sign_online()

    def sign_online(self) -> None:
        """What who has the online key can do: the next version of snapshot and timestamp."""
        self.snapshot.version += 1
        self.snapshot.meta["targets.json"] = MetaFile(version=self.targets.version)
        self.write(self.snapshot, [self.keys.online])
        self.timestamp.version += 1
        self.timestamp.snapshot_meta = MetaFile(version=self.snapshot.version)
        self.write(self.timestamp, [self.keys.online])

    def write(self, signed: Signed, signers: Iterable[CryptoSigner]) -> Path:
        metadata: Metadata[Any] = Metadata(signed)
        for signer in signers:
            metadata.sign(signer, append=True)
        prefix = "" if isinstance(signed, Timestamp) else f"{signed.version}."
        path = self.folder / "metadata" / f"{prefix}{signed.type}.json"
        path.write_bytes(metadata.to_bytes(JSONSerializer(compact=True)))
        return path

    def copy(self, folder: Path) -> Path:
        """The repository as it is now: what an attacker, or a stick in a drawer, keeps."""
        return Path(shutil.copytree(self.folder, folder))

    def moved(self, folder: Path) -> "Forge":
        """The same repository elsewhere, to be gone on with there."""
        other = copy.copy(self)
        other.folder = self.copy(folder)
        other.root, other.targets = copy.deepcopy(self.root), copy.deepcopy(self.targets)
        other.snapshot = copy.deepcopy(self.snapshot)
        other.timestamp = copy.deepcopy(self.timestamp)
        return other

    @property
    def trust(self) -> bytes:
        return (self.folder / "metadata" / "1.root.json").read_bytes()


class Served(NamedTuple):
    """What the server was asked for, and gave."""

    path: str
    start: int
    """Of the range that was asked for; 0 for all."""
    sent: int
    """Bytes of the body."""


Lie = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Static files with ranges, unless the server was told to lie."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: two would wait for each other
    server: "Server"

    def do_GET(self) -> None:
        lie = next((lie for part, lie in self.server.lies.items() if part in self.path), None)
        if lie is not None:
            self.close_connection = True
            lie(self)
            return
        try:
            data = (self.server.folder / self.path.lstrip("/")).read_bytes()
        except OSError:
            self.answer(404, b"")
            return
        self.answer(200, data)

    @cached_property
    def start(self) -> int:
        return int(self.headers.get("Range", "bytes=0-")[len("bytes=") : -1])

    def answer(
        self,
        status: int,
        data: bytes,
        headers: dict[str, str] | None = None,
        cut: int | None = None,
    ) -> None:
        """``data`` from the range's start on; ``cut`` ends the connection after that many bytes."""
        self.__dict__.pop("start", None)
        start = self.start if self.server.ranges and status == 200 else 0
        body = data[start:]
        self.send_response(206 if start else status)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        sent = body if cut is None else body[:cut]
        self.server.log.append(Served(self.path, start, len(sent)))
        self.server.sent += len(sent)
        self.wfile.write(sent)

    def flush_headers(self) -> None:
        self.server.sent += len(b"".join(self._headers_buffer))  # type: ignore[attr-defined]
        super().flush_headers()

    def parse_request(self) -> bool:
        whole = super().parse_request()
        first: bytes = self.raw_requestline  # type: ignore[attr-defined]
        self.server.received += len(first) + len(bytes(self.headers))
        return whole

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """A web server on loopback for ``folder``; ``lies`` by a part of the path."""

    daemon_threads = True

    def __init__(self, folder: Path, certificate: Path | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self._scheme = "https" if certificate else "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.folder = folder
        self.ranges = True
        self.lies: dict[str, Lie] = {}
        self.log: list[Served] = []
        self.sent = self.received = 0
        """Bytes on the wire, headers included."""
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}).start()

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up on a liar is as it should be."""

    def __exit__(self, *args: object) -> None:
        self.shutdown()
        self.server_close()
