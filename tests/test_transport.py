"""What is fetched, from where, and how much of it at most."""

import datetime
import ipaddress
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from tuf.api.exceptions import DownloadHTTPError

from runtime.delivery.transport import Transport
from runtime.errors import UpdateError
from tests.update_repository import NOW, Handler, Lie, Server

CONTENT = bytes(range(256)) * 1000


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "file").write_bytes(CONTENT)
    with Server(tmp_path / "www") as server:
        yield server


def test_plain_http_is_for_this_machine_or_for_those_who_ask_for_it() -> None:
    Transport().check("http://localhost:8000/repository")
    Transport().check("https://updates.example.org")
    Transport().check("file:///media/usb")
    with pytest.raises(UpdateError, match=r"expected https, got http.*--allow-http"):
        Transport().check("http://updates.example.org")
    Transport(allow_http=True).check("http://updates.example.org")


@pytest.mark.parametrize(
    "url", ["ftp://h/x", "/media/usb", "file://host/x", "https:///x", "http:///x", "data:,x", ""]
)
def test_other_addresses_are_none(url: str) -> None:
    with pytest.raises(UpdateError, match="expected https://HOST/PATH or file:///PATH"):
        Transport(allow_http=True).check(url)


def redirect(to: str) -> Lie:
    return lambda handler: handler.answer(302, b"", {"Location": to})


def test_redirects_are_followed_on_the_same_scheme_and_not_for_ever(server: Server) -> None:
    server.lies["moved"] = redirect("/file")
    assert Transport().download_bytes(f"{server.url}/moved", len(CONTENT)) == CONTENT
    server.lies["circle"] = redirect("/circle")
    with pytest.raises(UpdateError, match="more than 5 redirects"):
        Transport().download_bytes(f"{server.url}/circle", 9)


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://h/x", "https://portal.example.org/"])
def test_redirects_to_another_scheme_are_refused(server: Server, to: str) -> None:
    server.lies["moved"] = redirect(to)
    with pytest.raises(UpdateError, match=r"sends us to .*captive portal"):
        Transport().download_bytes(f"{server.url}/moved", 9)


def test_redirects_off_this_machine_do_not_lift_the_ban_on_http(server: Server) -> None:
    server.lies["moved"] = redirect("http://portal.example.org/")
    with pytest.raises(UpdateError, match="expected https, got http"):
        Transport().download_bytes(f"{server.url}/moved", 9)


def test_a_server_that_says_nothing_or_too_little_is_given_up(server: Server) -> None:
    def silent(handler: Handler) -> None:
        handler.rfile.read(1)  # the client hangs up first

    def dripping(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.flush()
        while True:
            handler.wfile.write(b"x")
            handler.wfile.flush()

    server.lies = {"silent": silent, "drip": dripping}
    with pytest.raises(UpdateError, match="no answer in time"):
        Transport(timeout=0.1).download_bytes(f"{server.url}/silent", 9)
    with pytest.raises(UpdateError, match="are too slow"):
        Transport(timeout=1.0, slowest=1 << 40).download_bytes(f"{server.url}/drip", 1 << 30)


def test_a_part_longer_than_what_the_source_has_begins_again(
    server: Server, tmp_path: Path
) -> None:
    """The server answers 416 to such a range."""
    part = tmp_path / "x.part"
    part.write_bytes(CONTENT[:700])
    (server.folder / "file").write_bytes(CONTENT[:600])

    def unsatisfiable(handler: Handler) -> None:
        if "Range" in handler.headers:
            handler.answer(416, b"")
        else:
            handler.answer(200, CONTENT)

    server.lies["file"] = unsatisfiable
    seen: list[int] = []
    Transport().download(f"{server.url}/file", part, len(CONTENT), seen.append)
    assert part.read_bytes() == CONTENT
    assert (seen[0], seen[-1]) == (0, len(CONTENT))


def test_a_range_that_was_not_asked_for_is_refused(server: Server, tmp_path: Path) -> None:
    part = tmp_path / "x.part"
    part.write_bytes(CONTENT[:700])
    wrong = {"Content-Range": f"bytes 9-{len(CONTENT)}/{len(CONTENT)}"}
    server.lies["file"] = lambda handler: handler.answer(206, CONTENT[9:], wrong)
    with pytest.raises(UpdateError, match="expected the bytes from 700 on, got others"):
        Transport().download(f"{server.url}/file", part, len(CONTENT), lambda _: None)
    assert part.read_bytes() == CONTENT[:700]


def test_requests_and_bytes_are_counted(server: Server, tmp_path: Path) -> None:
    transport = Transport()
    transport.download_bytes(f"{server.url}/file", len(CONTENT))
    transport.download_bytes((server.folder / "file").as_uri(), len(CONTENT))
    with pytest.raises(DownloadHTTPError, match="404"):
        transport.download_bytes(f"{server.url}/none", 9)
    assert (transport.requests, transport.received) == (3, 2 * len(CONTENT))


def test_bytes_that_nobody_can_trust_yet_stop_at_the_limit(server: Server) -> None:
    with pytest.raises(UpdateError, match="at most 100 bytes, the source sends more"):
        Transport().download_bytes(f"{server.url}/file", 100)
    assert b"".join(Transport().fetch(f"{server.url}/file")) == CONTENT


def certificate(folder: Path) -> Path:
    """Key and certificate of 127.0.0.1, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    day = datetime.timedelta(days=1)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW - day)
        .not_valid_after(NOW + day)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = folder / "server.pem"
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return file


def test_https_believes_the_machines_certificates_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    pem = certificate(tmp_path)
    with Server(tmp_path, certificate=pem) as server:
        with pytest.raises(UpdateError, match="no trusted certificate"):
            Transport().download_bytes(f"{server.url}/file", len(CONTENT))
        monkeypatch.setenv("SSL_CERT_FILE", str(pem))
        assert Transport().download_bytes(f"{server.url}/file", len(CONTENT)) == CONTENT
