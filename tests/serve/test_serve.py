"""The server, asked by real clients: under load, while it stops, with hostile requests, and by a browser."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from PIL import Image

import miniclip
from miniclip import classify, embed_images, embed_texts, load, tokenize
from miniclip.search import Index, embed_query, update_index
from miniclip.serve.app import App
from miniclip.serve.batching import Batcher, BusyError
from miniclip.serve.inputs import Limits
from miniclip.serve.pictures import Pictures
from miniclip.serve.server import Server

IMAGES = Path(__file__).parents[2] / "examples" / "images"
FILES = sorted(IMAGES.glob("*.png"))
HOSTILE = "<img src=x onerror=document.title='taken'> \"&é\udcff.png"  # the last letter is a byte that is not UTF-8
CLIENTS, REQUESTS = 16, 1000


@pytest.fixture(scope="module")
def loaded():
    return load("tiny-ViT", device="cpu")


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for file in FILES[:4]:
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "tall").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (90, 30), "red").save(folder / "tall" / "turned.jpg", exif=exif)
    (folder / HOSTILE).write_bytes(FILES[0].read_bytes())
    update_index(folder.parent / "photos.index", folder, "tiny-ViT")
    return folder.parent / "photos.index"


@contextmanager
def running(loaded, index=None, **limits):
    server = Server(App(*loaded, "tiny-ViT", index and Pictures(index), Limits(**limits)), port=0)
    stop = threading.Event()
    thread = threading.Thread(target=server.run, args=(stop,))
    thread.start()
    try:
        yield server
    finally:
        stop.set()
        thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(loaded, index):
    with running(loaded, index) as server:
        yield server


@pytest.fixture(scope="module")
def small(loaded, index):
    """A server with narrow limits."""
    with running(loaded, index, body=300_000, inputs=4, prompts=8, letters=400, seconds=0.4) as server:
        yield server


def ask(server, path, body=None, connection=None, **headers):
    """The status and the JSON, or the bytes, of an answer."""
    connection = connection or http.client.HTTPConnection(*server.server_address[:2], timeout=20)
    if body is not None:
        headers = {"Content-Type": "application/json", **headers}
        body = json.dumps(body) if not isinstance(body, (str, bytes)) else body
    connection.request("GET" if body is None else "POST", path, body, headers)
    answer = connection.getresponse()
    content = answer.read()
    return answer.status, json.loads(content) if "json" in answer.headers["Content-Type"] else content


def send(server, data: bytes, pause: float = 0) -> tuple[int, str]:
    """Raw bytes -> status and message of the error; (0, "") if the connection is closed without an answer."""
    with socket.create_connection(server.server_address[:2], timeout=20) as connection:
        try:
            for start in range(0, len(data), 1 if pause else 1 << 30):
                connection.sendall(data[start : start + (1 if pause else 1 << 30)])
                time.sleep(pause)
        except OSError:  # refused while it was sent
            pass
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    return (int(head.split()[1]), json.loads(body)["error"]["message"]) if answer else (0, "")


def post(body: bytes, *headers: str, path: str = "/v1/embeddings", host: str = "localhost") -> bytes:
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", "Connection: close", *headers]
    if not any(line.startswith("Content-Type") for line in headers):
        lines.append("Content-Type: application/json")
    if not any(line.startswith(("Content-Length", "Transfer")) for line in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def data_url(data: bytes | Path, kind: str = "image/png") -> str:
    data = data.read_bytes() if isinstance(data, Path) else data
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def vectors(answer: dict) -> np.ndarray:
    assert [each["index"] for each in answer["data"]] == list(range(len(answer["data"])))
    return np.array([each["embedding"] for each in answer["data"]], np.float32)


def error(answer) -> str:
    status, content = answer
    kind = "invalid_request_error" if status < 500 else "server_error"
    assert content["error"].keys() == {"message", "type", "param", "code"} and content["error"]["type"] == kind
    return f"{status} {content['error']['message']}"


def test_embeddings_of_texts_and_pictures(server, loaded):
    texts, pictures = ["a dog", "", "data: what a bicycle, says 日本"], FILES[:2]
    inputs = [texts[0], data_url(pictures[0]), texts[1], data_url(pictures[1], "IMAGE/JPEG;x=y"), texts[2]]
    status, answer = ask(server, "/v1/embeddings", {"input": inputs, "model": "tiny-ViT", "user": "me"})
    expected_texts, expected_pictures = embed_texts(loaded[0], texts)[0], embed_images(*loaded, pictures)[0]
    assert status == 200 and answer["object"] == "list" and answer["model"] == "tiny-ViT"
    np.testing.assert_allclose(vectors(answer)[[0, 2, 4]], expected_texts, atol=1e-6)
    np.testing.assert_allclose(vectors(answer)[[1, 3]], expected_pictures, atol=1e-6)
    tokens = int((tokenize(texts).argmax(dim=1) + 1).sum())
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    _, one = ask(server, "/v1/embeddings", {"input": "a dog", "encoding_format": "base64", "dimensions": 256})
    row = np.frombuffer(base64.b64decode(one["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(row, expected_texts[0], atol=1e-6)
    assert ask(server, "/v1/models")[1]["data"][0]["id"] == "tiny-ViT"


def test_classify(server, loaded):
    labels, templates = ["dog", "guitar", "bicycle"], ["a drawing of a {}.", "a {}"]
    body = {"pictures": [data_url(file) for file in FILES[:3]], "labels": labels, "templates": templates}
    _, answer = ask(server, "/classify", body)
    expected = classify(FILES[:3], labels, loaded, templates)
    for found, wanted in zip(answer["data"], expected, strict=True):
        assert [each["label"] for each in found["labels"]] == [each.label for each in wanted]
        figures = [[each["score"], each["cosine"]] for each in found["labels"]]
        np.testing.assert_allclose(figures, [each[1:] for each in wanted], atol=2e-6)
    assert ask(server, "/classify", {**body, "templates": "imagenet"})[0] == 200


def test_a_thousand_requests_of_sixteen_clients(server, loaded, monkeypatch):
    """Nothing is lost, each gets its own answer, and what comes together is encoded together."""
    model, _ = loaded
    texts = [f"{number} {['dogs', 'cats', 'owls'][number % 3]}" for number in range(REQUESTS)]
    expected = embed_texts(model, texts)[0].numpy()
    pictures = embed_images(*loaded, FILES)[0].numpy()
    urls = [data_url(file) for file in FILES]
    sizes, encode = [], model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda ids, **options: sizes.append(len(ids)) or encode(ids, **options))

    def client(numbers) -> list[float]:
        connection, errors = http.client.HTTPConnection(*server.server_address[:2], timeout=20), []
        for i in numbers:
            picture = i % len(FILES)
            inputs = [texts[i], urls[picture]] if i % 10 == 0 else [texts[i]]
            status, answer = ask(server, "/v1/embeddings", {"input": inputs}, connection)
            assert status == 200
            wanted = np.stack([expected[i], pictures[picture]][: len(inputs)])
            errors.append(np.abs(vectors(answer) - wanted).max())
        return errors

    with ThreadPoolExecutor(CLIENTS) as pool:
        parts = pool.map(client, [range(first, REQUESTS, CLIENTS) for first in range(CLIENTS)])
        errors = [each for part in parts for each in part]
    assert len(errors) == REQUESTS and max(errors) < 1e-6
    assert sum(sizes) == REQUESTS and len(sizes) < REQUESTS / 2
    assert np.abs(expected[0] - expected[3]).max() > 1e-3  # the control: another's answer would be noticed


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_under_load_loses_nothing_that_was_accepted(number, index, tmp_path):
    command = [sys.executable, "-m", "miniclip", "serve", "--index", str(index), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    port = int(re.search(r"serving tiny-ViT at http://127.0.0.1:(\d+)/ ", process.stderr.readline())[1])
    started = threading.Barrier(CLIENTS + 1)

    def client(first: int) -> tuple[int, bool]:
        """The number of whole answers, and whether one was begun and not finished."""
        answers, keep = 0, first % 2
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        body = json.dumps({"input": [f"text {first} {i}" for i in range(4)]})
        while True:
            try:
                connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
            except (OSError, http.client.RemoteDisconnected):
                return answers, False
            try:
                assert answer.status == 200 and len(json.loads(answer.read())["data"]) == 4
            except (OSError, http.client.HTTPException):
                return answers, True
            answers += 1
            if answers == 3:
                started.wait(30)
            if not keep:
                connection.close()

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client, first) for first in range(CLIENTS)]
        idle = socket.create_connection(("127.0.0.1", port))
        started.wait(30)
        process.send_signal(number)
        results = [each.result(30) for each in clients]
    assert process.wait(20) == 0
    idle.close()
    answered, accepted = map(int, re.search(r"stopped; (\d+) of (\d+) requests", process.stderr.read()).groups())
    assert not any(broken for _, broken in results)
    assert sum(answers for answers, _ in results) == answered == accepted > 3 * CLIENTS


def test_a_signal_that_another_thread_receives_stops_the_server():
    """Python runs the handler in the main thread, which nothing wakes if the system gives the signal to another."""
    code = """
import signal, sys, threading, time
from miniclip.commands import main

def send():
    while not any(thread.name == "accept" for thread in threading.enumerate()):
        time.sleep(0.05)
    time.sleep(0.2)
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

threading.Thread(target=send, daemon=True).start()
sys.exit(main(["serve", "--model", "tiny-ViT", "--port", "0"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=40)
    assert done.returncode == 0 and "stopped; 0 of 0 requests" in done.stderr


def test_a_full_queue_is_said_at_once(loaded):
    model, _ = loaded
    blocked, started = threading.Event(), threading.Event()

    class Slow(torch.nn.Module):
        logit_scale = model.logit_scale

        def encode_text(self, ids, normalize):
            started.set()
            assert blocked.wait(20)
            return model.encode_text(ids, normalize=normalize)

    batcher, ids = Batcher(Slow(), waiting=1), torch.zeros(40, 77, dtype=torch.int32)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(batcher.encode, "text", ids)
        assert started.wait(20)
        second = pool.submit(batcher.encode, "text", ids)
        while not batcher.jobs.full():
            time.sleep(0.01)
        with pytest.raises(BusyError, match="1 requests are waiting"):
            batcher.encode("text", ids)
        blocked.set()
        assert len(first.result(20)) == len(second.result(20)) == 40
    batcher.close()
    assert not batcher.thread.is_alive()


def test_busy_and_broken_become_answers(loaded, capsys):
    with running(loaded) as server:
        batcher = server.app.batcher
        for raised, status in ((BusyError("32 requests"), 503), (ZeroDivisionError("secret"), 500)):
            def fail(*_, raised=raised):
                raise raised
            batcher.encode = fail
            answer = error(ask(server, "/v1/embeddings", {"input": "x"}))
            assert answer.startswith(str(status)) and "secret" not in answer
        del batcher.encode
        assert ask(server, "/v1/embeddings", {"input": "x"})[0] == 200
    assert "secret" in capsys.readouterr().err


def test_an_exception_of_the_model_reaches_every_client(loaded, monkeypatch, capsys):
    with running(loaded) as server:
        with monkeypatch.context() as patch:
            patch.setattr(loaded[0], "encode_text", lambda ids, normalize: torch.full((len(ids), 256), torch.nan))
            assert "NaN" in error(ask(server, "/v1/embeddings", {"input": "x"}))
        assert ask(server, "/v1/embeddings", {"input": "x"})[0] == 200


def test_more_clients_than_threads(loaded):
    with running(loaded, clients=2) as server:
        taken = [socket.create_connection(server.server_address[:2]) for _ in range(2)]
        time.sleep(0.2)
        assert send(server, b"") == (503, "2 clients are connected, the most there may be; try again")
        for each in taken:
            each.close()
        time.sleep(0.2)
        assert ask(server, "/health")[0] == 200


JSON = {
    b"": "not JSON in UTF-8",
    b"{": "not JSON in UTF-8",
    b"\xff\xfe": "not JSON in UTF-8",
    b'{"input": "x", "input2": NaN}': "NaN is not JSON",
    b'{"input": Infinity}': "Infinity is not JSON",
    b"[" * 100_000: "not JSON in UTF-8",
    b'{"input": ' + b"9" * 9_000 + b"}": "not JSON in UTF-8",
    b'["x"]': "is a JSON list; expected an object",
    b'{"text": "x"}': "the body has 'text'; expected only input, model",
    b"{}": "input is None; expected a string or a list of strings",
    b'{"input": [1, 2]}': "token ids are not taken",
    b'{"input": [["a"]]}': "expected a string or a list of strings",
    b'{"input": []}': "input has 0 elements; expected 1 to 4",
    b'{"input": ["a", "b", "c", "d", "e"]}': "input has 5 elements; expected 1 to 4: send several requests",
    b'{"input": ["a", "' + b"a " * 100 + b'"]}': "input[1]: the text needs 102 tokens",
    b'{"input": "' + b"a" * 401 + b'"}': "input[0] has 401 characters; expected at most 400",
    b'{"input": "a", "encoding_format": "int8"}': "encoding_format is 'int8'; expected 'float' or 'base64'",
    b'{"input": "a", "dimensions": 128}': "dimensions is 128; expected 256",
    b'{"input": "a", "model": "other"}': "there is no model 'other'; expected 'tiny-ViT'",
    b'{"input": "a", "model": {"a": []}}': "there is no model {'a': []}",
}


@pytest.mark.parametrize("body", JSON, ids=range(len(JSON)))
def test_json_that_is_refused(small, body):
    status, message = send(small, post(body))
    assert status == (404 if "no model" in message else 400) and JSON[body] in message and len(message) < 400


def bomb() -> bytes:
    """A PNG of 12 GB in 100 kB: its header is right."""
    file = io.BytesIO()
    Image.new("1", (1, 1)).save(file, "png")
    data = bytearray(file.getvalue())
    data[16:24] = (100_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data) + bytes(100_000)


PICTURES = {
    data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image/jpeg"): "is not an image (JPEG, PNG",
    data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"): "is not an image",
    data_url(b"8BPS" + bytes(40)): "is not an image",
    data_url(b""): "it is empty",
    data_url(FILES[0].read_bytes()[:900]): "can't decode",
    data_url(bomb()): "exceeds limit of",
    "data:image/png;base64,*": "is not base64",
    "data:image/png;base64,é": "is not base64",
    "data:image/png,abc": "is a data URL of 'image/png'; expected a data URL: \"data:image/png;base64,...\"",
    "data:,abc": "is a data URL of ''",
    "/etc/passwd": "paths and other URLs are not opened",
    "file:///etc/passwd": "paths and other URLs are not opened",
    "http://169.254.169.254/": "paths and other URLs are not opened",
    str(FILES[0]): "paths and other URLs are not opened",
}


@pytest.mark.parametrize("url", PICTURES, ids=range(len(PICTURES)))
def test_what_is_not_a_picture(small, url):
    answer = error(ask(small, "/classify", {"pictures": [data_url(FILES[0]), url], "labels": ["a", "b"]}))
    assert answer.startswith("400 pictures[1]") and PICTURES[url] in answer
    if url.startswith("data:"):
        assert PICTURES[url] in error(ask(small, "/v1/embeddings", {"input": url}))
    else:
        assert ask(small, "/v1/embeddings", {"input": url})[0] == 200  # a text like any other


def test_labels_that_are_refused(small):
    picture = {"pictures": data_url(FILES[0])}
    for labels, templates, status in (
        (["a"], "{}", "a single label"),
        (["a", "a"], "{}", "a single label"),
        (["a", "b"], "no braces", "expected {} in it"),
        (["a", "b"], "imagenet", "160 prompts, over 8"),
        (["a " * 99, "b"], "{}{}", "the prompt 'a a"),
        (["a" * 90, "b"], "{}" * 5, "a prompt has 450 characters; expected at most 400"),
        (["a", None], "{}", "labels is ['a', None]"),
    ):
        answer = error(ask(small, "/classify", {**picture, "labels": labels, "templates": templates}))
        assert answer.startswith("400") and status in answer


HEADS = [
    (["Host: evil.example:80"], 403, "Host is 'evil.example:80'; expected localhost"),
    (["Host: localhost.evil.example"], 403, "expected localhost"),
    (["Host: 127.0.0.1", "Host: evil.example"], 403, "expected localhost"),
    ([], 403, "Host is None"),
    (["Host: localhost", "Transfer-Encoding: chunked"], 411, "Transfer-Encoding"),
    (["Host: localhost"], 411, "Content-Length is None"),
    (["Host: localhost", "Content-Length: -1"], 411, "Content-Length is ['-1']"),
    (["Host: localhost", "Content-Length: 1_0"], 411, "Content-Length is"),
    (["Host: localhost", "Content-Length: ²"], 411, "Content-Length is"),
    (["Host: localhost", "Content-Length: 2", "Content-Length: 3"], 411, "Content-Length is"),
    (["Host: localhost", "Content-Length: 300001"], 413, "300001 bytes; expected at most 300000"),
    (["Host: localhost", "Content-Length: " + "9" * 5000], 413, "send less"),
    (["Host: localhost", "Content-Length: 2", "Content-Type: text/plain"], 415, "expected application/json"),
    (["Host: localhost", "Content-Length: 2", "Content-Encoding: gzip"], 415, "without an encoding"),
    (["Host: localhost", "Content-Length: 2", "no header", "Transfer-Encoding: chunked"], 400, "not a header"),
    (["Host: localhost", "Content-Length: 2", "X: y\rTransfer-Encoding: chunked"], 411, "Transfer-Encoding"),
    (["Host: localhost", *(f"X-{i}: y" for i in range(200))], 431, "Too many headers"),
]


@pytest.mark.parametrize(("lines", "status", "message"), HEADS)
def test_heads_that_are_refused(small, lines, status, message):
    head = "\r\n".join(["POST /v1/embeddings HTTP/1.1", "Content-Type: application/json", *lines, "", ""])
    if "text/plain" in head:
        head = head.replace("Content-Type: application/json\r\n", "")
    found = send(small, head.encode() + b"{}" * 100_000)
    assert found[0] == status and message in found[1]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:8000", "127.9.9.9", "[::1]:8000", "[::1]"])
def test_hosts_of_this_machine(small, host):
    assert send(small, post(b"{}", host=host))[0] == 400


def test_other_methods_and_routes(small):
    for request, status, message in (
        (b"GET /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 405, "use POST"),
        (b"OPTIONS / HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.example\r\n\r\n", 501, "Unsupported method"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nGET /", 400, "GET with a body"),
        (b"GET http://localhost/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 404, "there is no"),
        (b"GET / HTTP/3.0\r\n\r\n", 505, "Invalid HTTP version"),
        (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n", 400, "Bad request"),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414, "HTTP/1.1"),
    ):
        assert (found := send(small, request))[0] == status and message in found[1], found


def test_slow_clients_get_no_longer_than_others(small):
    started = time.monotonic()
    late = "the request did not arrive within 0.4 seconds"
    assert send(small, post(b'{"input": "a"}', "Content-Length: 20")) == (408, late)
    with ThreadPoolExecutor(2) as pool:
        head = pool.submit(send, small, b"GET /health HTTP/1.1\r\nHost: localhost\r\n", 0.03)
        body = pool.submit(send, small, post(b'{"input": "a"}' + b" " * 5000), 0.0005)  # for 2.5 seconds and more
        assert head.result()[0] == 0 and body.result() == (408, late)
    assert time.monotonic() - started < 8
    with socket.create_connection(small.server_address[:2]) as connection:
        connection.sendall(post(b"{", "Content-Length: 9"))
        connection.shutdown(socket.SHUT_WR)
        assert b"the body ended after 1 of 9 bytes" in b"".join(iter(lambda: connection.recv(1 << 16), b""))


def test_a_client_that_goes_away_disturbs_nobody(server, capsys):
    for _ in range(20):
        with socket.create_connection(server.server_address[:2]) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # closed with a reset
            connection.sendall(post(b'{"input": "a"}'))
    assert ask(server, "/health")[0] == 200 and capsys.readouterr().err == ""


def picture_at(server, path, route: str = "/thumbnail"):
    return ask(server, f"{route}?path={quote(os.fsencode(path))}")


def test_only_pictures_of_the_index_are_served(server, index):
    held = next(path for path in Index(index).paths(list(range(6))) if path.endswith(FILES[0].name))
    folder = Path(held).parent
    status, data = picture_at(server, held)
    assert status == 200 and Image.open(io.BytesIO(data)).format == "JPEG"
    outside = folder.parent / "outside.png"
    outside.write_bytes(FILES[0].read_bytes())
    others = [outside, f"{folder}/../outside.png", folder, f"{held}/", f"{folder}/./{Path(held).name}", held[1:]]
    others += [f"{folder}/tall/../{Path(held).name}", "../" * 20 + "etc/passwd", "/etc/passwd"]
    others += ["\0", held + "\0", b"\xff"]
    for path in ["", "~", *others]:
        assert error(picture_at(server, path)).startswith("404 the index has no such picture")
    for target in ("/thumbnail", "/thumbnail?", f"/thumbnail?file={quote(held)}", "/thumbnail?path=%zz"):
        assert error(ask(server, target)).startswith("404 the index has no such")
    for target in (f"/thumbnail{held}", "/../../etc/passwd", "/%2e%2e/etc/passwd", "//etc/passwd", "/gallery.js"):
        assert error(ask(server, target)).startswith("404 there is no")
    turned = next(path for path in Index(index).paths(list(range(6))) if path.endswith("turned.jpg"))
    assert Image.open(io.BytesIO(picture_at(server, turned, "/picture")[1])).size == (30, 90)
    content = Path(turned).read_bytes()
    os.unlink(turned)  # it is in the index, and becomes a link to something else
    os.symlink("/etc/passwd", turned)
    assert error(picture_at(server, turned)).startswith("404 the file of this picture is gone or can't be read")
    os.unlink(turned)
    Path(turned).write_bytes(content)


def test_the_page_finds_what_search_finds(server, loaded, index):
    status, page = ask(server, "/?q=a+guitar")
    text = page.decode()
    (hits,) = Index(index).search(embed_query(*loaded, "a guitar"))
    names = re.findall(r'data-path="([^"]+)"', text)
    assert status == 200 and len(names) == len(hits) == 6 and Path(hits[0].path).name in names[0]
    assert "<img src=x" not in text and "onerror=document" in text
    for address in re.findall(r'(?:src|href)="(/[^"]+)"', text):
        assert ask(server, address)[0] == 200, address
    assert b"&lt;script&gt;" in ask(server, "/?q=%3Cscript%3E")[1]
    status, page = ask(server, "/?q=/etc/passwd")  # words like any other, not a file
    assert status == 200
    status, page = ask(server, "/?q=" + "dog+" * 90)
    assert status == 400 and b"needs 92 tokens" in page
    assert b"6 pictures, searched with tiny-ViT" in ask(server, "/")[1]


def test_headers_keep_other_sites_out(server):
    connection = http.client.HTTPConnection(*server.server_address[:2])
    connection.request("HEAD", "/?q=dog", headers={"Origin": "http://evil.example"})
    answer = connection.getresponse()
    assert answer.read() == b"" and int(answer.headers["Content-Length"]) > 1000
    assert "default-src 'none'; img-src 'self' data:;" in answer.headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert not any(name.startswith("Access-Control") for name in answer.headers)


def test_an_index_that_changes(loaded, tmp_path):
    photos, index = tmp_path / "photos", tmp_path / "index"
    photos.mkdir()
    (photos / "a.png").write_bytes(FILES[0].read_bytes())
    update_index(index, photos, "tiny-ViT")
    with running(loaded, index) as server:
        (photos / "a.png").rename(tmp_path / "a.png")
        (photos / "b.png").write_bytes(FILES[1].read_bytes())
        assert error(picture_at(server, str(photos / "b.png"))).startswith("404")
        update_index(index, photos, "tiny-ViT")
        assert picture_at(server, str(photos / "b.png"))[0] == 200
        (tmp_path / "a.png").rename(photos / "a.png")
        assert error(picture_at(server, str(photos / "a.png"))).startswith("404")  # it is there, and not in the index
        assert ask(server, "/?q=x")[1].count(b'class="card"') == 1
        assert ask(server, "/health")[1]["pictures"] == 1
    with running(loaded) as server:
        assert error(ask(server, "/")).startswith("404 this server has no index")


def readme(kind: str, server) -> str:
    """A block of the README, asking this server."""
    text = (Path(miniclip.__file__).parent / "serve" / "README.md").read_text(encoding="utf-8")
    block = next(block for block in re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL) if "http" in block)
    return block.replace("http://127.0.0.1:8000/", server.url)


@pytest.mark.skipif(not all(map(shutil.which, ("bash", "curl"))), reason="needs bash and curl")
def test_the_lines_of_the_readme(server):
    for line in readme("", server).splitlines():
        done = subprocess.run(["bash", "-c", line], cwd=IMAGES, capture_output=True, text=True, check=True)
        answer = json.loads(done.stdout)
        assert "error" not in answer and answer["model"] == "tiny-ViT", done.stdout[:300]


def test_the_openai_client_of_the_readme(server, capsys):
    pytest.importorskip("openai")
    exec(readme("python", server))
    assert capsys.readouterr().out == "2 256\n"


@pytest.mark.skipif(CHROMIUM is None, reason="the page needs a browser: install chromium")
def test_in_a_browser(server, tmp_path):
    browser = Browser(tmp_path)
    try:
        page = browser.open(server.url)
        page.run("document.querySelector('[name=q]').value = 'a guitar'")
        page.run("document.querySelector('.ask button').click()")
        page.wait("document.title === 'a guitar – search'")
        page = browser.open(server.url + "?q=a+guitar", width=375, dark=True)
        seen = page.run(
            "Promise.all([...document.querySelectorAll('.card img')].map((i) => (i.loading = 'eager', i.decode())))"
            ".then((all) => all.length)"
        )
        assert seen == 6 and page.run("document.title") == "a guitar – search"
        assert page.run("document.querySelector('#count').value") == "6 pictures"  # the script runs
        assert page.run("document.documentElement.scrollWidth") <= 375
        assert "<img src=x onerror" in page.run("document.querySelector('ol').textContent")
        page.run("document.querySelector('.card').click()")
        page.wait("document.querySelector('#view-image').naturalWidth > 0")
        assert not page.events("Log.entryAdded") and not page.events("Runtime.exceptionThrown")
        asked = [event["request"]["url"] for event in page.events("Network.requestWillBeSent")]
        assert asked and all(url.startswith((server.url, "data:")) for url in asked)
    finally:
        browser.close()
