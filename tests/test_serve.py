"""`fieldfit serve` as its clients meet it: the protocol, by the unmodified tritonclient and by
curl's kind of request; who may ask; and how it begins and ends.
"""

import contextlib
import datetime
import io
import ipaddress
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from runtime.__main__ import main
from runtime.classifier import Classifier
from runtime.delivery.slots import Slots
from runtime.errors import ServeError
from runtime.serving import access
from runtime.serving.gate import MIB, Limits
from tests.model_zips import SIZE, looping, model_zip
from tests.prometheus import check_metrics
from tests.serving_client import PATIENCE_S, ROOT, Client, Running, ask, infer_body, inside, started
from tests.test_engines import CHANNELS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # gevent's, about threads that were there first
    import tritonclient.http as triton  # type: ignore[import-untyped]

INFER = "/v2/models/tiny/infer"
LONG = 200_000
TOKEN = "a-token-of-twenty-and-more-characters"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    model_zip(folder, "1.0")
    return folder / "tiny-1.0"


@pytest.fixture(scope="module")
def running(bundle: Path) -> Iterator[Running]:
    with started("--bundle", bundle) as service:
        yield service


@pytest.fixture
def client(running: Running) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(running.url.removeprefix("http://"), concurrency=8) as client:
        yield client


@pytest.fixture(scope="module")
def classifier(bundle: Path) -> Iterator[Classifier]:
    with Classifier.open(bundle, threads=1) as model:
        yield model


def pictures(count: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, *SIZE, CHANNELS), dtype=np.uint8)


def encoded(array: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def tensor(data: np.ndarray, datatype: str = "UINT8", *, binary: bool = True) -> Any:
    found = triton.InferInput("image", list(data.shape), datatype)
    found.set_data_from_numpy(data, binary_data=binary)
    return found


# --- the unmodified tritonclient


def test_tritonclient_finds_the_service_and_its_model_ready(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1.0")
    assert not client.is_model_ready("tiny", "2.0")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    about = client.get_model_metadata("tiny", "1.0")
    assert about["versions"] == ["1.0"]
    assert about["inputs"] == [
        {"name": "image", "datatype": "UINT8", "shape": [-1, *SIZE, CHANNELS]}
    ]
    assert about["outputs"][1] == {"name": "probabilities", "datatype": "FP32", "shape": [-1, 4]}


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "JSON"])
def test_tritonclient_gets_what_the_engine_says(
    client: Any, classifier: Classifier, binary: bool
) -> None:
    images = pictures(3)
    expected = classifier.engine.infer(images)
    names = ["logits", "features", "label", "probabilities", "abstained"]
    wanted = [triton.InferRequestedOutput(name, binary_data=binary) for name in names]

    result = client.infer("tiny", [tensor(images, binary=binary)], outputs=wanted, request_id="a%s")

    assert result.get_response()["id"] == "a%s"
    assert result.get_response()["model_version"] == "1.0"
    np.testing.assert_allclose(result.as_numpy("logits"), expected.logits, rtol=1e-6)
    np.testing.assert_allclose(result.as_numpy("features"), expected.features, rtol=1e-6)
    answers = classifier(list(images))
    labels = [text.decode() if binary else text for text in result.as_numpy("label")]
    assert labels == [answer.label for answer in answers]
    np.testing.assert_allclose(
        result.as_numpy("probabilities"),
        [list(answer.probabilities.values()) for answer in answers],
        rtol=1e-6,
    )
    assert result.as_numpy("abstained").tolist() == [False] * 3


def test_without_a_wish_everything_but_features_is_answered(client: Any) -> None:
    result = client.infer("tiny", [tensor(pictures(1))])

    names = [output["name"] for output in result.get_response()["outputs"]]
    assert names == ["label", "probabilities", "abstained", "logits"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP"])
def test_encoded_images_go_through_the_preprocessing_of_the_device(
    client: Any, classifier: Classifier, kind: str
) -> None:
    files = [encoded(np.kron(one, np.ones((3, 3, 1), np.uint8)), kind) for one in pictures(2)]

    result = client.infer("tiny", [tensor(np.array(files, dtype=object), "BYTES")])

    expected = classifier(files)
    assert [label.decode() for label in result.as_numpy("label")] == [a.label for a in expected]
    np.testing.assert_allclose(
        result.as_numpy("probabilities").max(axis=1), [a.score for a in expected], rtol=1e-6
    )


def test_concurrent_requests_each_get_their_own_answer(client: Any, classifier: Classifier) -> None:
    images = pictures(40, seed=7)
    expected = classifier.engine.infer(images).logits

    asked = [client.async_infer("tiny", [tensor(one[None])]) for one in images]

    logits = [request.get_result().as_numpy("logits")[0] for request in asked]
    np.testing.assert_allclose(logits, expected, rtol=1e-5)


def test_tritonclient_reads_the_sentence_of_a_refusal(client: Any) -> None:
    with pytest.raises(triton.InferenceServerException, match="got UINT8 \\[1, 3, 3, 3\\]"):
        client.infer("tiny", [tensor(np.zeros((1, 3, 3, 3), np.uint8))])
    with pytest.raises(triton.InferenceServerException, match="the model here is 'tiny'"):
        client.get_model_metadata("another")


# --- by hand


def test_one_image_is_classified_by_its_bytes_alone(
    running: Running, classifier: Classifier
) -> None:
    file = encoded(pictures(1)[0], "JPEG")
    expected = classifier(file)

    reply = ask(running.url, "POST", "/classify", file)

    assert reply.status == 200
    assert reply.json == {
        "label": expected.label, "score": pytest.approx(expected.score), "abstained": False,
        "probabilities": pytest.approx(expected.probabilities), "model": "tiny", "version": "1.0",
    }  # fmt: skip


def test_encoded_images_in_json_are_base64(running: Running, classifier: Classifier) -> None:
    file = encoded(pictures(1)[0])
    body, headers = infer_body([file], binary=False, outputs=[{"name": "label"}])

    reply = ask(running.url, "POST", INFER, body, headers)

    assert reply.json["outputs"] == [
        {"name": "label", "shape": [1], "datatype": "BYTES", "data": [classifier(file).label]}
    ]


def test_nested_json_is_read_as_flat_json_is(running: Running) -> None:
    images = pictures(2)
    nested = {"name": "image", "shape": [*images.shape], "datatype": "UINT8"}
    flat = ask(running.url, "POST", INFER, *infer_body(images, binary=False))

    reply = ask(
        running.url, "POST", INFER,
        json.dumps({"inputs": [nested | {"data": images.tolist()}]}).encode(),
    )  # fmt: skip

    assert reply.status == 200
    assert reply.json == flat.json


def tensor_of(**changes: Any) -> dict[str, Any]:
    size = [1, *SIZE, CHANNELS]
    return {"name": "image", "shape": size, "datatype": "UINT8", "data": [0] * 1152} | changes


BAD = {
    "no JSON": (b"{", "in JSON"),
    "not UTF-8": (b"\xff\xfe", "in JSON"),
    "a list": (b"[]", "of the protocol"),
    "very deep": (b'{"unknown":' + b"[" * 100_000, "in JSON"),
    "no input": ({"inputs": []}, "got none"),
    "two inputs": ({"inputs": [tensor_of()] * 2}, "got 'image', 'image'"),
    "another input": ({"inputs": [tensor_of(name="x")]}, "got 'x'"),
    "another type": ({"inputs": [tensor_of(datatype="FP32")]}, "got FP32"),
    "another shape": ({"inputs": [tensor_of(shape=[1, 2])]}, "got UINT8 [1, 2]"),
    "a negative side": ({"inputs": [tensor_of(shape=[-1])]}, ">= 0"),
    "a huge side": ({"inputs": [tensor_of(shape=[10**30])]}, "of the protocol"),
    "no image": ({"inputs": [tensor_of(shape=[0, *SIZE, CHANNELS])]}, "N of 1 to 64, got 0"),
    "too many images": ({"inputs": [tensor_of(shape=[65, *SIZE, 3])]}, "N of 1 to 64, got 65"),
    "no data": ({"inputs": [{**tensor_of(), "data": None}]}, "a list of 1,152 numbers"),
    "too few numbers": ({"inputs": [tensor_of(data=[1])]}, "1,152 numbers for"),
    "numbers of another kind": ({"inputs": [tensor_of(data=[0.5] * 1152)]}, "from 0 to 255"),
    "a level of 256": ({"inputs": [tensor_of(data=[256] * 1152)]}, "from 0 to 255"),
    "texts as numbers": ({"inputs": [tensor_of(data=["0"] * 1152)]}, "from 0 to 255"),
    "endless spaces": (
        b'{"inputs":[{"name":"image","shape":[1,24,16,3],"datatype":"UINT8","data":['
        + b" " * 100_000 + b"]}]}",
        "far more text",
    ),
    "no base64": (
        {"inputs": [tensor_of(datatype="BYTES", shape=[1], data=["$"])]}, "as base64"
    ),
    "no image in base64": (
        {"inputs": [tensor_of(datatype="BYTES", shape=[1], data=["AAAA"])]}, "not an image"
    ),
    "numbers as images": (
        {"inputs": [tensor_of(datatype="BYTES", shape=[1], data=[1])]}, "base64 texts"
    ),
    "fewer images than said": (
        {"inputs": [tensor_of(datatype="BYTES", shape=[2], data=["AAAA"])]}, "2 images, got 1"
    ),
    "an unknown output": (
        {"inputs": [tensor_of()], "outputs": [{"name": "heat"}]}, "got 'heat'"
    ),
    "shared memory": (
        {"inputs": [tensor_of(parameters={"shared_memory_region": "x"})]}, "shared memory"
    ),
    "classification": (
        {"inputs": [tensor_of()],
         "outputs": [{"name": "label", "parameters": {"classification": 3}}]},
        "classification is not offered",
    ),
    "binary data that is not there": (
        {"inputs": [tensor_of(parameters={"binary_data_size": 9})]}, "the 0 bytes after the JSON"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_request_is_refused_with_a_sentence(running: Running, what: str) -> None:
    body, says = BAD[what]

    reply = ask(
        running.url, "POST", INFER, body if isinstance(body, bytes) else json.dumps(body).encode()
    )

    assert reply.status == 400
    assert says in reply.error


BAD_BINARY: dict[str, tuple[Any, dict[str, str], str]] = {
    "too short": (lambda b: b[:-1], {}, "the 1,151 bytes after the JSON, got 1,152"),
    "too long": (lambda b: b + b"x", {}, "got 1,152"),
    "a header that is no number": (lambda b: b, {"Inference-Header-Content-Length": "x"}, "'x'"),
    "a header beyond the body": (
        lambda b: b, {"Inference-Header-Content-Length": "99999"}, "at most the 1,"
    ),
    "a negative header": (lambda b: b, {"Inference-Header-Content-Length": "-1"}, "'-1'"),
    "a header within the JSON": (lambda b: b, {"Inference-Header-Content-Length": "9"}, "in JSON"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_BINARY)
def test_bad_binary_data_is_refused_with_a_sentence(running: Running, what: str) -> None:
    change, more, says = BAD_BINARY[what]
    body, headers = infer_body(pictures(1))

    reply = ask(running.url, "POST", INFER, change(body), headers | more)

    assert reply.status == 400
    assert says in reply.error


@pytest.mark.parametrize(
    ("elements", "says"),
    [
        (b"\x01\x00", "its length is cut short"),
        (b"\xff\xff\xff\xff", "expected 4,294,967,295 bytes, got 0"),
        (b"\x00\x00\x00\x00", "got 0 bytes"),
        (b"", "expected 1 elements, got 0"),
        (b"\x00\x00\x00\x00" * 2, "got more bytes"),
    ],
)
def test_bad_elements_are_refused_with_a_sentence(
    running: Running, elements: bytes, says: str
) -> None:
    image = {
        "name": "image", "shape": [1], "datatype": "BYTES",
        "parameters": {"binary_data_size": len(elements)},
    }  # fmt: skip
    head = json.dumps({"inputs": [image]}).encode()

    reply = ask(
        running.url, "POST", INFER, head + elements,
        {"Inference-Header-Content-Length": str(len(head))},
    )  # fmt: skip

    assert reply.status == 400
    assert says in reply.error


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v2/", 404),
        ("GET", "/v2/models/tiny/versions/9", 404),
        ("GET", "/v2/models/%2e%2e%2fetc/ready", 404),
        ("POST", "/v2/models/tiny/versions/9/infer", 404),
        ("GET", INFER, 405),
        ("DELETE", "/v2", 405),
        ("HEAD", "/v2/health/live", 200),
    ],
)
def test_other_paths_and_methods(running: Running, method: str, path: str, status: int) -> None:
    with Client(running.url) as client:
        client.send(f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert client.status() == status


def test_a_compressed_body_is_refused(running: Running) -> None:
    reply = ask(running.url, "POST", INFER, b"x", {"Content-Encoding": "gzip"})

    assert reply.status == 415
    assert "not compressed" in reply.error


def test_a_picture_that_would_take_too_much_memory_is_refused(running: Running) -> None:
    file = io.BytesIO()
    Image.new("RGBA", (4000, 4000)).save(file, "PNG", compress_level=1)

    reply = ask(running.url, "POST", "/classify", file.getvalue())

    assert reply.status == 413
    assert "6,990,506 pixels of RGBA in PNG, got 16,000,000" in reply.error


def test_promtool_accepts_the_metrics(running: Running) -> None:
    assert ask(running.url, "POST", INFER, *infer_body(pictures(1))).status == 200
    assert ask(running.url, "POST", INFER, b"{}").status == 400

    text = ask(running.url, "GET", "/metrics").body.decode()

    check_metrics(text)
    assert 'fieldfit_serve_model_info{bundle="tiny",bundle_version="1.0"} 1' in text
    assert 'fieldfit_engine_info{bundle="tiny"' in text
    assert 'fieldfit_serve_refused_total{reason="bad request"}' in text
    counts = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert int(counts['fieldfit_serve_responses_total{code="200"}']) >= 1
    assert int(counts["fieldfit_inference_duration_seconds_count"]) >= 1
    assert counts["fieldfit_serve_waiting_requests"] == "0"
    assert counts["fieldfit_serve_held_bytes"] == "0"


# --- who may ask


def test_beyond_this_machine_it_must_know_its_clients(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--bundle", str(bundle), "--host", "0.0.0.0"]) == 1
    assert "--token-file FILE, or --cert, --key and --client-ca" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "device.local", ""])
def test_what_is_not_loopback(host: str) -> None:
    with pytest.raises(ServeError, match="must know its clients"):
        access.check_exposure(host, None, None)
    access.check_exposure(host, access.Tokens([TOKEN]), None)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_what_is_loopback(host: str) -> None:
    access.check_exposure(host, None, None)


def test_tls_without_an_authority_for_clients_exposes_nothing(pki: "Pki") -> None:
    certificates = access.Certificates(pki.server.cert, pki.server.key, None)
    with pytest.raises(ServeError, match="must know its clients"):
        access.check_exposure("0.0.0.0", None, certificates)


def token_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "tokens"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_token_opens_every_path_and_nothing_else_does(bundle: Path, tmp_path: Path) -> None:
    path = token_file(tmp_path, f"{TOKEN}\n{TOKEN[::-1]}\n")
    with inside(bundle, Limits(), host="0.0.0.0", token_file=path) as url:
        url = url.replace("0.0.0.0", "127.0.0.1")
        for wrong in (None, "Bearer", "Bearer x", f"Basic {TOKEN}", f"Bearer {TOKEN}x", TOKEN):
            for method, where in (("GET", "/v2/health/live"), ("POST", INFER), ("GET", "/metrics")):
                headers = {} if wrong is None else {"Authorization": wrong}
                reply = ask(url, method, where, b"", headers)
                assert reply.status == 401
                assert reply.headers["www-authenticate"] == "Bearer"
                assert TOKEN not in reply.body.decode()
        for token in (TOKEN, TOKEN[::-1]):
            headers = {"Authorization": f"Bearer {token}"}
            assert ask(url, "GET", "/v2/health/live", b"", headers).status == 200


def test_without_a_token_no_body_is_read(bundle: Path, tmp_path: Path) -> None:
    path = token_file(tmp_path, TOKEN)
    with inside(bundle, Limits(), token_file=path) as url, Client(url) as client:
        client.send(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        assert client.reply().status == 401


@pytest.mark.parametrize(
    ("text", "mode", "says"),
    [
        (TOKEN, 0o644, "any user may read"),
        ("short", 0o600, "20 or more ASCII characters"),
        ("", 0o600, "one token a line"),
        (f"{TOKEN}\nshort", 0o600, "20 or more"),
        ("é" * 30, 0o600, "ASCII"),
    ],
)
def test_a_token_file_that_protects_nothing(
    tmp_path: Path, text: str, mode: int, says: str
) -> None:
    with pytest.raises(ServeError, match=says):
        access.Tokens.read(token_file(tmp_path, text, mode))


def test_a_token_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="cannot be read: No such file"):
        access.Tokens.read(tmp_path / "none")


class Pair(NamedTuple):
    cert: Path
    key: Path


class Pki(NamedTuple):
    """Two authorities: of one are the service and a client, of the other a stranger."""

    authority: Path
    server: Pair
    client: Pair
    stranger: Pair


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    folder = tmp_path_factory.mktemp("pki")
    now = datetime.datetime.now(datetime.timezone.utc)

    def made(name: str, signer: Any = None) -> Any:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        issuer, signing = (signer[0].subject, signer[1]) if signer else (subject, key)
        local = [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        cert = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=signer is None, path_length=None), True)
            .add_extension(x509.SubjectAlternativeName(local), False)
            .sign(signing, hashes.SHA256())
        )
        (folder / f"{name}.pem").write_bytes(cert.public_bytes(serialization.Encoding.PEM))
        (folder / f"{name}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return cert, key

    ours, theirs = made("ours"), made("theirs")
    signers = {"server": ours, "client": ours, "stranger": theirs}
    for name, signer in signers.items():
        made(name, signer)
    pairs = [Pair(folder / f"{name}.pem", folder / f"{name}.key") for name in signers]
    return Pki(folder / "ours.pem", *pairs)


def test_mutual_tls_lets_in_whom_the_authority_signed(bundle: Path, pki: Pki) -> None:
    certificates = access.Certificates(pki.server.cert, pki.server.key, pki.authority)
    with inside(bundle, Limits(), certificates=certificates) as url:
        assert url.startswith("https://")
        known = ssl.create_default_context(cafile=str(pki.authority))
        known.load_cert_chain(*pki.client)
        assert ask(url, "POST", INFER, *infer_body(pictures(1)), context=known).status == 200
        unknown = ssl.create_default_context(cafile=str(pki.authority))
        stranger = ssl.create_default_context(cafile=str(pki.authority))
        stranger.load_cert_chain(*pki.stranger)
        for context in (unknown, stranger):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                ask(url, "GET", "/v2/health/live", context=context)
        with pytest.raises((ConnectionError, ValueError, IndexError)):
            ask(url.replace("https", "http"), "GET", "/v2/health/live")
        assert ask(url, "GET", "/v2/health/live", context=known).status == 200


def test_certificates_that_are_none(tmp_path: Path, pki: Pki) -> None:
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    with pytest.raises(ServeError, match="a certificate and its key without a passphrase"):
        access.tls_context(access.Certificates(nonsense, pki.server.key, None))
    with pytest.raises(ServeError, match="a certificate and its key"):
        access.tls_context(access.Certificates(pki.server.cert, pki.client.key, None))
    with pytest.raises(ServeError, match="expected certificates in PEM"):
        access.tls_context(access.Certificates(pki.server.cert, pki.server.key, nonsense))


def test_a_certificate_needs_its_key(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--bundle", str(bundle), "--cert", "x"]) == 1
    assert "both --cert and --key" in capsys.readouterr().err


# --- how it begins and ends


def test_sigterm_answers_what_was_taken_and_ends_well(tmp_path: Path) -> None:
    # Long enough for the signal to come while it computes.
    model_zip(tmp_path, "1", model=looping(LONG), recorded=True)
    with started("--bundle", tmp_path / "tiny-1") as service, Client(service.url) as client:
        assert client.ask("GET", "/v2/health/ready").status == 200
        body, headers = infer_body(pictures(1))
        slow = Client(service.url)
        slow.send(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n".encode())
        client.ask("GET", "/v2")  # whatever came before has been read
        reply: list[Any] = []
        asking = threading.Thread(
            target=lambda: reply.append(client.ask("POST", INFER, body, headers))
        )
        asking.start()
        waiting_for_one(service.url)

        service.process.send_signal(signal.SIGTERM)

        asking.join(PATIENCE_S)
        assert reply[0].status == 200
        late = slow.reply()
        slow.close()
        assert (late.status, late.error) == (503, "the service is ending; try again")
        assert service.process.wait(PATIENCE_S) == 0
        assert "Traceback" not in service.said()


def waiting_for_one(url: str) -> None:
    """Return when a whole request waits for its answer."""
    with Client(url) as client:
        while b"fieldfit_serve_waiting_requests 1" not in client.ask("GET", "/metrics").body:
            pass


def test_ctrl_c_is_an_interruption(bundle: Path) -> None:
    with started("--bundle", bundle) as service:
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(PATIENCE_S) == 130
        assert service.said().endswith("fieldfit: interrupted\n")


def test_it_runs_at_a_lower_priority(running: Running) -> None:
    here = os.getpriority(os.PRIO_PROCESS, 0)
    there = os.getpriority(os.PRIO_PROCESS, running.process.pid)
    assert there == min(19, here + 10)


def test_a_port_that_is_taken(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--bundle", str(bundle), "--port", port]) == 1
    assert f"127.0.0.1 port {port}: cannot listen there" in capsys.readouterr().err


def test_a_bundle_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--bundle", str(tmp_path / "none"), "--port", "0"]) == 1
    assert "no such bundle" in capsys.readouterr().err


def test_a_device_without_a_slot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--state", str(tmp_path), "--port", "0"]) == 1
    assert "no slot can answer" in capsys.readouterr().err


def test_a_missing_extra_is_named(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in [name for name in sys.modules if name.startswith("runtime.serving.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)

    assert main(["serve", "--bundle", str(bundle), "--port", "0"]) == 1

    assert "pip install 'fieldfit[serve]'" in capsys.readouterr().err


# --- the slots of a device


def test_an_update_arrives_between_two_batches(tmp_path: Path) -> None:
    slots = Slots(tmp_path / "state")
    slots.activate(slots.stage(model_zip(tmp_path, "1")).sha256)
    slots.begin_try()
    slots.commit()
    second = model_zip(tmp_path, "2")
    with started("--state", slots.folder) as service, Client(service.url) as client:
        assert client.ask("GET", "/v2/models/tiny").json["versions"] == ["1"]
        with slots.lock():
            slots.activate(slots.stage(second).sha256)
        body, headers = infer_body(pictures(1))
        versions = set()
        while "2" not in versions:  # the proof of the new one takes a moment
            reply = client.ask("POST", INFER, body, headers)
            assert reply.status == 200
            versions.add(reply.json["model_version"])
        assert client.ask("GET", "/v2/models/tiny").json["versions"] == ["2"]
        assert client.ask("GET", "/v2/models/tiny/versions/1").status == 404


# --- its page


PAGE = (ROOT / "docs" / "serve.md").read_text()


def page_commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    return [line for block in blocks for line in block.strip().splitlines()]


def test_the_commands_of_the_page_are_commands(
    bundle: Path, pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the page; each service answers until the next one starts."""
    if shutil.which("curl") is None or shutil.which("openssl") is None:
        pytest.skip("no curl or openssl here: apt install curl openssl")
    (tmp_path / "cell.png").write_bytes(encoded(pictures(1)[0]))
    for name, path in (("device.pem", pki.server.cert), ("device.key", pki.server.key)):
        shutil.copy(path, tmp_path / name)
    shutil.copy(pki.authority, tmp_path / "plant.pem")
    monkeypatch.chdir(tmp_path)
    said = []
    with contextlib.ExitStack() as stack:
        url = ""
        for command in page_commands():
            if command.startswith("pip install"):
                continue  # tests/test_wheel.py
            if command.startswith("fieldfit serve "):
                stack.close()
                words = command.replace("build/solar/bundle", str(bundle)).split()[2:]
                url = stack.enter_context(started(*words)).url.replace("0.0.0.0", "127.0.0.1")
            else:
                done = subprocess.run(
                    ["bash", "-ec", command.replace("http://127.0.0.1:8000", url)],
                    capture_output=True, text=True, check=True,
                )  # fmt: skip
                said.append(done.stdout)
    assert url.startswith("https://")
    assert set(json.loads(said[0])) == set(
        json.loads(re.findall(r"```json\n(.*?)```", PAGE, re.S)[0])
    )
    assert json.loads(said[-1])["name"] == "fieldfit"


def test_the_python_of_the_page_runs(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "cell.png").write_bytes(encoded(pictures(1)[0]))
    code = code.replace("127.0.0.1:8000", running.url.removeprefix("http://"))
    done = subprocess.run(
        [sys.executable, "-c", code.replace('"solar"', '"tiny"')],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith("[b'")


def test_every_path_output_and_metric_of_the_page_is_there(running: Running) -> None:
    text = ask(running.url, "GET", "/metrics").body.decode()
    for name in re.findall(r"`(fieldfit_[a-z_]+)", PAGE):
        assert f"# TYPE {name} " in text, name
    limits = Limits()
    for shown in (
        f"{limits.body_bytes // MIB} MiB (`--max-body`)", f"{limits.held_bytes // MIB} MiB |",
        f"{limits.work_bytes // MIB} MiB: {limits.work_bytes // 8 // 10**6} megapixels of RGB",
        f"| {limits.images} |", f"| {limits.places} |", f"| {limits.connections} |",
        f"| {limits.client_s:g} s |",
    ):  # fmt: skip
        assert shown in PAGE, shown
