"""Downloads from a local server that misbehaves as told. Whatever it does, no wrong file gets its final name."""

from __future__ import annotations

import errno
import hashlib
import importlib
import itertools
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import namedtuple
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miniclip.config import MODELS, OPENAI_URL, NamedModel

download = importlib.import_module("miniclip.weights.download")  # the module, also where a function has its name
DownloadError = download.DownloadError

BODY = random.Random(0).randbytes(100_000)
SHA256 = hashlib.sha256(BODY).hexdigest()
HALF = len(BODY) // 2
HTML = b"<html>Please log in</html>"
FILE = "ViT-B-32.pt"
MODEL = NamedModel(MODELS["ViT-B/32"].config, FILE, f"{OPENAI_URL}/{SHA256}/{FILE}", SHA256)


# --- A server, and its answers: functions of the request, played in turn, the last one for good ---


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.paths.append(self.path)
        server.ranges.append(self.headers.get("Range"))
        script = server.script
        (script.pop(0) if len(script) > 1 else script[0])(self)

    def send_body(self, body, status=200, length=None, send=None, **headers):
        """Announces `length` bytes and sends the first `send` of the body; by default all of it, honestly."""
        self.server.sent.append(len(body[:send]))  # before the client can be done
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body[:send])

    def send_rest(self, send=None, body=BODY):
        asked = self.headers.get("Range")
        if asked is None:
            return self.send_body(body, send=send)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
        if start >= len(body):
            return self.send_body(b"", 416, Content_Range=f"bytes */{len(body)}")
        return self.send_body(body[start:], 206, send=send, Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}")

    def log_message(self, *_):
        pass


def clean(h):
    h.send_rest()


def cut(h):
    h.send_rest(send=HALF)


def reset(h):
    h.send_rest(send=HALF)
    h.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    h.connection.close()


def ignore_range(h):
    h.send_body(BODY)


def ignore_range_and_cut(h):
    h.send_body(BODY, send=HALF)


def wrong_body(h):
    h.send_rest(body=BODY[::-1])


def longer_body(h):
    h.send_rest(body=BODY + b"more")


def html(h):
    h.send_body(HTML)


def no_length(h):
    h.send_response(200)
    h.end_headers()
    h.wfile.write(BODY)


def wrong_range(h):
    h.send_body(BODY[1:], 206, Content_Range=f"bytes 1-{len(BODY) - 1}/{len(BODY)}")


def no_range_header(h):
    h.send_body(BODY, 206)


def bare_416(h):
    h.send_body(b"", 416)


def status(code):
    def answer(h):
        h.send_body(b"", code)

    answer.__name__ = f"status_{code}"
    return answer


def garbage(h):
    h.wfile.write(b"\x00\xff not HTTP\r\n\r\n")


def redirect(target):
    return lambda h: h.send_body(b"", 302, Location=target)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.go_on = threading.Event()  # for answers that wait
        self.play(clean)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def play(self, *script):
        self.script, self.paths, self.ranges, self.sent = list(script), [], [], []

    def handle_error(self, *_):  # clients that go away are what is tested
        pass

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def close(self):
        self.go_on.set()
        self.shutdown()
        self.server_close()


@pytest.fixture(scope="module")
def shared_server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def server(shared_server):
    shared_server.go_on.clear()
    shared_server.play(clean)
    return shared_server


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(download, "RETRY_DELAYS", (0, 0, 0))
    for name in ("MINICLIP_MIRROR", "MINICLIP_OFFLINE", "http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def get(server, monkeypatch, tmp_path):
    """download("ViT-B/32") of the small body, from the server, into tmp_path."""
    monkeypatch.setenv("MINICLIP_MIRROR", server.url)
    return lambda: download.download(MODEL, tmp_path)


@pytest.fixture
def path(tmp_path):
    return tmp_path / FILE


@pytest.fixture
def part(tmp_path):
    return tmp_path / f"{FILE}.part"


def names(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


# --- The table ---


def urls():
    return {name: model.url for name, model in MODELS.items() if model.url}


def test_table_is_openais(monkeypatch):
    def digest():
        return hashlib.sha256("\n".join(f"{name} {url}" for name, url in urls().items()).encode()).hexdigest()

    # made from `clip.clip._MODELS` of openai/CLIP d05afc4, written in the same way
    golden = "aa0c36e01515d8917e806f38db4ddd15a5d52cceb0afe578a809aa0435666062"
    assert digest() == golden
    assert all(f"/{model.sha256}/{model.file}" in model.url for model in MODELS.values() if model.url)
    monkeypatch.setitem(MODELS, "RN50", replace(MODELS["RN50"], url=f"{OPENAI_URL}/{'0' * 64}/RN50.pt"))
    assert digest() != golden


def test_table_against_openai():
    clip = pytest.importorskip("clip.clip", exc_type=ImportError)
    assert urls() == clip._MODELS


def test_default_root_is_openais(monkeypatch, tmp_path):
    for home in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(home, str(tmp_path))
    assert download.cached(MODELS["RN50"]) is None
    file = tmp_path / ".cache" / "clip" / "RN50.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"unchecked")
    assert download.cached(MODELS["RN50"]) == file


# --- What arrives ---


def test_clean(get, server, path, tmp_path, capsys):
    assert get() == path
    assert path.read_bytes() == BODY
    assert server.paths == [f"/{SHA256}/{FILE}"]
    assert names(tmp_path) == [FILE]
    bar = capsys.readouterr().err
    assert FILE in bar and "100%" in bar and "B/s" in bar

    assert get() == path and len(server.paths) == 1  # the second time from the cache


def test_new_folders_and_str_root(get, server, tmp_path):
    assert download.download(MODEL, str(tmp_path / "a" / "b")).read_bytes() == BODY


@pytest.mark.parametrize("ending", [cut, reset])
def test_cut_connection_resumes(get, server, path, ending, monkeypatch):
    monkeypatch.setattr(download, "CHUNK", 1000)  # a reset may cost the chunk being read
    server.play(ending, clean)
    assert get().read_bytes() == BODY
    kept = int(server.ranges[1].removeprefix("bytes=").removesuffix("-"))
    assert server.ranges[0] is None and 0 < kept <= HALF
    assert server.sent[1] == len(BODY) - kept  # the rest and nothing more
    if ending is cut:
        assert kept == HALF


def test_silence_is_cut_and_resumes(get, server, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    monkeypatch.setattr(download, "CHUNK", 1000)

    server_gave_up = []

    def stall(h):
        h.send_rest(send=HALF)
        if not server.go_on.wait(5):
            server_gave_up.append(True)

    server.play(stall, clean)
    assert get().read_bytes() == BODY and not server_gave_up
    assert server.ranges == [None, f"bytes={HALF}-"]


def test_server_that_ignores_range(get, server, part, path):
    part.write_bytes(BODY[:HALF])
    server.play(ignore_range)
    assert get().read_bytes() == BODY
    assert server.ranges == [f"bytes={HALF}-"] and server.sent == [len(BODY)]


@pytest.mark.parametrize("answer", [wrong_range, no_range_header, bare_416])
def test_unusable_range_starts_over(get, server, part, answer):
    part.write_bytes(BODY[:HALF])
    server.play(answer, clean)
    assert get().read_bytes() == BODY
    assert server.ranges == [f"bytes={HALF}-", None]


def test_server_that_cuts_and_refuses_to_continue(get, server):
    server.play(cut, bare_416, clean)
    assert get().read_bytes() == BODY
    assert server.ranges == [None, f"bytes={HALF}-", None]


def test_part_longer_than_the_file(get, server, part):
    part.write_bytes(BODY + b"stale")
    assert get().read_bytes() == BODY
    assert server.ranges == [f"bytes={len(BODY) + 5}-", None]


def test_part_that_only_wants_renaming(get, server, part, tmp_path):
    part.write_bytes(BODY)
    assert get().read_bytes() == BODY
    assert server.sent == [0] and names(tmp_path) == [FILE]


@pytest.mark.parametrize("size", [HALF, len(BODY)])
def test_part_of_another_file_starts_over_once(get, server, part, size):
    part.write_bytes(BODY[::-1][:size])
    assert get().read_bytes() == BODY
    assert server.ranges == [f"bytes={size}-", None]


def test_no_length(get, server):
    server.play(no_length)
    assert get().read_bytes() == BODY


@pytest.mark.parametrize("answer", [wrong_body, longer_body, html])
@pytest.mark.parametrize("kept", [0, HALF])
def test_wrong_body(get, server, part, tmp_path, answer, kept):
    if kept:
        part.write_bytes(BODY[:kept])
    server.play(answer)
    with pytest.raises(DownloadError) as error:
        get()
    assert len(server.paths) == (2 if kept else 1)
    assert names(tmp_path) == []
    wrong = hashlib.sha256({wrong_body: BODY[::-1], longer_body: BODY + b"more", html: HTML}[answer]).hexdigest()
    assert f"sha256 {wrong}, expected {SHA256}" in str(error.value)


def test_short_body_is_retried_then_kept(get, server, part, path):
    server.play(cut, status(503))
    with pytest.raises(DownloadError, match=r"503 .*\.part is kept and will be continued"):
        get()
    assert len(server.paths) == 1 + len(download.RETRY_DELAYS)
    assert part.read_bytes() == BODY[:HALF] and not path.exists()
    server.play(clean)
    assert get().read_bytes() == BODY and server.sent == [len(BODY) - HALF]


def test_404_is_not_retried(get, server, tmp_path):
    server.play(status(404))
    with pytest.raises(DownloadError, match=rf"404.*get {server.url}/{SHA256}/{FILE} .*put it at {tmp_path}"):
        get()
    assert len(server.paths) == 1 and names(tmp_path) == []


@pytest.mark.parametrize("code", [500, 503, 429, 408])
def test_passing_errors_are_retried(get, server, code):
    server.play(status(code), clean)
    assert get().read_bytes() == BODY and len(server.paths) == 2


def test_delays_grow(get, server, monkeypatch):
    monkeypatch.undo()
    delays = download.RETRY_DELAYS
    assert all(a < b for a, b in itertools.pairwise(delays)) and sum(delays) < 60
    slept = []
    monkeypatch.setattr(download.time, "sleep", slept.append)
    server.play(status(500))
    with pytest.raises(OSError):
        download._request_until_whole(server.url, Path("never written"))
    assert tuple(slept) == delays


def test_existing_good_file_needs_no_network_and_no_writing(get, server, path, tmp_path):
    path.write_bytes(BODY)
    assert get() == path
    assert server.paths == [] and [p.name for p in tmp_path.iterdir()] == [FILE]


def test_existing_wrong_file_is_replaced_with_a_warning(get, server, path):
    path.write_bytes(BODY[:-1])
    with pytest.warns(UserWarning, match=rf"sha256 [0-9a-f]{{64}}, expected {SHA256}; downloading it anew"):
        get()
    assert path.read_bytes() == BODY


def test_folder_in_the_way(get, path):
    path.mkdir()
    with pytest.raises(DownloadError, match="not a regular file"):
        get()


ANSWERS = [clean, cut, reset, ignore_range, ignore_range_and_cut, wrong_body, longer_body, html, no_length]
ANSWERS += [wrong_range, no_range_header, bare_416, status(404), status(503), garbage]


@settings(max_examples=30, deadline=None)
@given(
    script=st.lists(st.sampled_from(ANSWERS), min_size=1, max_size=4),
    kept=st.sampled_from([0, 1, HALF, len(BODY), len(BODY) + 1]),
)
def test_whatever_the_server_does(shared_server, script, kept):
    shared_server.play(*script)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE
        path.with_name(FILE + ".part").write_bytes((BODY + BODY)[:kept])
        try:
            download.fetch(shared_server.url, path, SHA256)
        except DownloadError:
            assert not path.exists()
        else:
            assert path.read_bytes() == BODY
        assert len(shared_server.paths) <= 2 * (1 + len(download.RETRY_DELAYS))


# --- What is missing: space, network, permission ---


def test_no_space_is_seen_beforehand(get, server, part, monkeypatch):
    part.write_bytes(BODY[:HALF])
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage(10**9, 10**9, HALF - 1))
    with pytest.raises(DownloadError, match=rf"50,000 more bytes are needed in {part.parent}, where 49,999 are free"):
        get()
    assert part.read_bytes() == BODY[:HALF]
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage(10**9, 10**9, HALF))
    assert get().read_bytes() == BODY


def test_no_space_midway_keeps_the_part(get, server, part, path, monkeypatch):
    class Full:
        """A file on a disk with room for 3,000 bytes."""

        def __init__(self, *args):
            self.file = open(*args)  # noqa: SIM115

        def write(self, data):
            if self.file.tell() + len(data) > 3000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(download, "CHUNK", 1000)
    monkeypatch.setattr(download, "open", lambda p, *a, **k: (Full if p == part else open)(p, *a, **k), raising=False)
    with pytest.raises(DownloadError, match=rf"no space: 97,000 more bytes are needed in {part.parent}"):
        get()
    assert len(server.paths) == 1 and not path.exists()  # no retry can mend it
    monkeypatch.delattr(download, "open")
    assert get().read_bytes() == BODY and server.ranges[-1] == "bytes=3000-"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's device that is always full")
def test_no_space_for_real(get, server, part, path):
    part.symlink_to("/dev/full")
    with pytest.raises(DownloadError, match="no space: 100,000 more bytes"):
        get()
    assert len(server.paths) == 1 and not path.exists()


def test_no_network(get, monkeypatch, path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("MINICLIP_MIRROR", url)
    by_hand = rf"get {url}/{SHA256}/{FILE} \(sha256 {SHA256}\) and put it at {path}"
    with pytest.raises(DownloadError, match=f"refused.*{by_hand}"):
        get()


def test_unwritable_folder(get, server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DownloadError, match="By hand"):
        download.download(MODEL, tmp_path / "file" / "folder")
    assert server.paths == []


@pytest.mark.parametrize("value, offline", [("1", True), ("yes", True), ("0", False), ("", False)])
def test_offline(get, server, path, monkeypatch, value, offline):
    monkeypatch.setenv("MINICLIP_OFFLINE", value)
    if offline:
        with pytest.raises(DownloadError, match=rf"missing, and MINICLIP_OFFLINE .*{SHA256}\) and put it at {path}"):
            get()
        path.write_bytes(BODY)  # by hand
    assert get().read_bytes() == BODY
    assert len(server.paths) == (0 if offline else 1)


def test_without_a_network_there_is_no_waiting(tmp_path, monkeypatch):
    def unknown(host, port):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(download.socket, "getaddrinfo", unknown)
    monkeypatch.setattr(download.request, "getproxies", dict)
    monkeypatch.setattr(download.time, "sleep", None)
    with pytest.raises(DownloadError, match=r"nowhere.example can't be resolved.*By hand: .*tiny-ViT and tiny-RN come"):
        download.download(replace(MODELS["RN50"], url="https://nowhere.example/RN50.pt"), tmp_path)
    monkeypatch.setattr(download.request, "getproxies", lambda: {"https": "http://proxy"})
    assert not download.is_offline("https://nowhere.example/RN50.pt")


def test_offline_leaves_a_wrong_file_alone(get, server, path, monkeypatch):
    monkeypatch.setenv("MINICLIP_OFFLINE", "1")
    path.write_bytes(b"wrong")
    with pytest.raises(DownloadError, match=rf"has sha256 {hashlib.sha256(b'wrong').hexdigest()}, expected {SHA256}"):
        get()
    assert path.read_bytes() == b"wrong" and server.paths == []


# --- Where it comes from ---


def test_mirror_may_have_a_path_and_a_slash(get, server, monkeypatch):
    monkeypatch.setenv("MINICLIP_MIRROR", f"{server.url}/some/where/")
    get()
    assert server.paths == [f"/some/where/{SHA256}/{FILE}"]


def test_proxy(get, server, monkeypatch):
    monkeypatch.setenv("MINICLIP_MIRROR", "http://weights.invalid")
    monkeypatch.setenv("http_proxy", server.url)
    assert get().read_bytes() == BODY
    assert server.paths == [f"http://weights.invalid/{SHA256}/{FILE}"]


def test_redirect_keeps_the_range(get, server, part):
    part.write_bytes(BODY[:HALF])
    server.play(redirect(f"{server.url}/elsewhere"), clean)
    assert get().read_bytes() == BODY
    assert server.paths[1] == "/elsewhere" and server.ranges[1] == f"bytes={HALF}-"


@pytest.mark.parametrize("scheme", ["file", "ftp", "data"])
def test_only_http(get, server, tmp_path, monkeypatch, scheme):
    source = tmp_path / "source"
    source.write_bytes(BODY)
    targets = {"file": source.as_uri(), "ftp": f"ftp://127.0.0.1:{server.server_port}/x", "data": "data:,x"}
    server.play(redirect(targets[scheme]))
    with pytest.raises(DownloadError, match=r"not allowed|unknown url type"):
        get()
    monkeypatch.setenv("MINICLIP_MIRROR", targets[scheme])
    with pytest.raises(DownloadError, match="expected a URL of http"):
        get()
    assert names(tmp_path) == ["source"]


# --- Processes ---

CHILD = """
import importlib.util, pathlib, sys
source, url, path, sha256 = sys.argv[1:]
spec = importlib.util.spec_from_file_location("download", source)  # not the package, which imports PyTorch
download = importlib.util.module_from_spec(spec)
spec.loader.exec_module(download)
download.CHUNK = 10_000
download.fetch(url, pathlib.Path(path), sha256)
"""


@pytest.fixture
def child(server, path):
    children = []

    def start():
        command = [sys.executable, "-c", CHILD, download.__file__, server.url, str(path), SHA256]
        children.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        return children[-1]

    yield start
    server.go_on.set()
    for process in children:
        process.kill()
        process.communicate()


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited 20 s in vain"
        time.sleep(0.01)


def half_then_wait(h):
    h.send_rest(send=HALF)
    h.server.go_on.wait(20)
    h.wfile.write(BODY[HALF:])


def test_two_processes_fetch_once(server, child, path, part, tmp_path):
    server.play(half_then_wait)
    first = child()
    wait_until(lambda: download._size(part) > 0)
    second = child()
    while "waiting for another process" not in (line := second.stderr.readline()):
        assert line, "the second process did not wait"
    assert not path.exists()
    server.go_on.set()
    assert first.wait(20) == 0 and second.wait(20) == 0
    assert path.read_bytes() == BODY and names(tmp_path) == [FILE]
    assert len(server.paths) == 1


def test_killed_process_is_continued(get, server, child, path, part):
    server.play(half_then_wait, clean)
    victim = child()
    wait_until(lambda: download._size(part) > 0)
    victim.kill()
    victim.wait(20)
    size = part.stat().st_size
    assert 0 < size <= HALF and not path.exists()
    assert get().read_bytes() == BODY  # its lock went with it
    assert server.ranges == [None, f"bytes={size}-"]


def test_waiting_process_takes_over_from_a_killed_one(server, child, path, part):
    server.play(half_then_wait, clean)
    victim = child()
    wait_until(lambda: download._size(part) > 0)
    heir = child()
    while "waiting for another process" not in (line := heir.stderr.readline()):
        assert line, "the second process did not wait"
    victim.kill()
    assert heir.wait(20) == 0
    assert path.read_bytes() == BODY and len(server.paths) == 2 and server.ranges[1] is not None


# --- Files without a published sha256: never two versions of one in one file ---


OTHER = BODY[::-1]


def versioned(body, version, honest=True, send=None, header="ETag"):
    """An answer of a server that has `body`; honest: it knows If-Range."""

    def answer(h):
        begun, condition = h.headers.get("Range"), h.headers.get("If-Range")
        h.server.conditions.append(condition)
        start = int(re.fullmatch(r"bytes=(\d+)-", begun)[1]) if begun else 0
        if honest and condition and condition != version:
            start = 0
        headers = {header.replace("-", "_"): version} if version else {}
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        h.send_body(body[start:], 206 if start else 200, send=send and send - start, **headers)

    return answer


@pytest.fixture
def unpublished(server, monkeypatch, tmp_path):
    monkeypatch.setenv("MINICLIP_MIRROR", server.url)
    monkeypatch.setattr(download, "RETRY_DELAYS", ())
    server.conditions = []
    model = NamedModel(MODEL.config, FILE, "http://elsewhere/x.pt", None, 10)
    return lambda: download.download(model, tmp_path)


@pytest.mark.parametrize("header", ["ETag", "Last-Modified"])
@pytest.mark.parametrize("honest", [True, False])
def test_a_file_that_changed_is_begun_again(unpublished, server, path, part, tmp_path, honest, header):
    versions = (
        ('"one"', '"two"') if header == "ETag" else ("Mon, 01 Jan 2024 10:00:00 GMT", "Tue, 02 Jan 2024 10:00:00 GMT")
    )
    server.play(versioned(BODY, versions[0], honest, HALF, header))
    with pytest.raises(DownloadError, match="will be continued"):
        unpublished()
    assert part.read_bytes() == BODY[:HALF]
    server.play(versioned(OTHER, versions[1], honest, None, header))
    if not honest:  # it sends the second half of the other file
        with pytest.raises(DownloadError):
            unpublished()
        assert not path.exists()
    assert unpublished().read_bytes() == OTHER
    assert server.conditions[:2] == [None, versions[0]]
    assert (tmp_path / f"{FILE}.sha256").read_text() == hashlib.sha256(OTHER).hexdigest() + "\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == [FILE, f"{FILE}.lock", f"{FILE}.sha256"]


def test_the_same_file_is_continued(unpublished, server, part):
    server.play(versioned(BODY, '"one"', send=HALF))
    with pytest.raises(DownloadError):
        unpublished()
    server.play(versioned(BODY, '"one"'))
    assert unpublished().read_bytes() == BODY
    assert server.ranges == [f"bytes={HALF}-"] and server.sent == [len(BODY) - HALF]


@pytest.mark.parametrize("version", ["", 'W/"weak"'])
def test_without_a_version_nothing_is_continued(unpublished, server, part, version):
    server.play(versioned(BODY, version, send=HALF))
    with pytest.raises(DownloadError):
        unpublished()
    server.play(versioned(OTHER, version))
    assert unpublished().read_bytes() == OTHER and server.ranges == [None]


def test_a_part_of_an_older_version_is_not_continued(unpublished, server, part):
    part.write_bytes(OTHER[:HALF])
    server.play(versioned(BODY, '"one"'))
    assert unpublished().read_bytes() == BODY and server.ranges == [None]


@pytest.mark.parametrize("content", ["", "\n", "not a sum", SHA256[:40]])
def test_a_record_that_was_cut_is_written_again(unpublished, server, path, tmp_path, content):
    path.write_bytes(BODY)
    record = tmp_path / f"{FILE}.sha256"
    record.write_text(content)
    assert unpublished() == path and server.paths == []
    assert record.read_text() == f"{SHA256}\n"


# --- Caches that can't be used ---


def test_a_cached_file_that_cannot_be_read(get, server, path, monkeypatch):
    path.write_bytes(BODY)

    def refuse(_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(download, "sha256_of", refuse)
    with pytest.raises(DownloadError, match=rf"{path} can't be read: Permission denied. Remove it"):
        get()
    assert server.paths == []


def test_without_a_home_directory(monkeypatch, capsys):
    def refuse(_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", refuse)
    with pytest.raises(DownloadError, match=r"there is no home directory .* set HOME, or give download_root="):
        download.download(MODEL)
    assert download.cached(MODEL) is None
    assert importlib.import_module("miniclip.commands").main(["models"]) == 0
    assert "ViT-B/32" in capsys.readouterr().out
