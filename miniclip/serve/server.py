"""The server: reads requests within limits of time and size, answers each connection in a thread, and stops in order.

When it stops, requests that have begun to arrive are answered; connections that are idle, and new ones, are closed.
"""

from __future__ import annotations

import io
import ipaddress
import socket
import socketserver
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from miniclip.errors import UsageError
from miniclip.serve.app import Answer, App, as_error
from miniclip.serve.inputs import RequestError

LINGER = 2.0  # seconds that the rest of a refused request is read, so that the client gets to see the answer
GRACE = 0.25  # seconds from the decision to stop until the first connection is closed
SAFETY = {"X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin"}
SAFETY |= {"Referrer-Policy": "no-referrer"}


class _TimedReader(io.RawIOBase):
    """The bytes that a client sends, until a moment: a client that sends one byte a second gets no longer."""

    def __init__(self, connection: socket.socket):
        self.connection, self.end = connection, 0.0
        self.idle = True  # nothing of the next request has arrived

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.connection.settimeout(left)
        count = self.connection.recv_into(buffer)
        self.idle = self.idle and not count
        return count


class _Handler(BaseHTTPRequestHandler):
    """One connection, on which requests follow each other."""

    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.1"  # otherwise what is not HTTP would get an answer of HTTP/0.9, without a head
    server: Server

    def setup(self) -> None:
        super().setup()
        self.source = _TimedReader(self.connection)
        self.rfile.close()
        self.rfile = io.BufferedReader(self.source)
        self.server.open.add(self)

    def finish(self) -> None:
        self.server.open.discard(self)
        super().finish()

    def handle_one_request(self) -> None:
        self.source.end = time.monotonic() + self.server.app.limits.seconds
        self.source.idle = True
        if self.server.closing:  # after `idle` is set: see close_idle
            self.close_idle()
        super().handle_one_request()

    def close_idle(self) -> None:
        """End a connection on which no request is arriving. What has arrived can still be read."""
        if self.source.idle:
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RD)

    def do_GET(self) -> None:
        self.server.count("accepted")
        try:
            self._check_head()
            body = self._read_body()
        except RequestError as error:
            self._send(as_error(str(error), error.status), close=True)
            self._linger()
        else:
            self._send(self.server.app.answer("GET" if self.command == "HEAD" else self.command, self.path, body))
        self.server.count("answered")

    do_HEAD = do_POST = do_GET

    def _check_head(self) -> None:
        """RequestError for a request whose body must not be read."""
        if self.server.is_local and not _is_local(self.headers.get_all("Host", [])):
            host = self.headers.get("Host")
            raise RequestError(f"Host is {host!r:.80}; expected localhost, 127.0.0.1 or [::1], and the port", 403)
        if self.headers.defects:  # what follows such a line would be ignored here, and obeyed by a proxy
            raise RequestError("the head has a line that is not a header")
        if "Transfer-Encoding" in self.headers:
            raise RequestError("the body has a Transfer-Encoding; expected Content-Length, without chunks", 411)
        length = self.headers.get_all("Content-Length", [])
        if self.command != "POST":
            if length not in ([], ["0"]):
                raise RequestError(f"{self.command} with a body; expected none")
            return
        if len(length) != 1 or not (length[0].isascii() and length[0].isdecimal()):
            raise RequestError(f"Content-Length is {length or None!r:.80}; expected the bytes of the body", 411)
        most = self.server.app.limits.body
        if len(length[0]) > 18 or int(length[0]) > most:
            raise RequestError(f"the body has {length[0]:.30} bytes; expected at most {most}: send less at a time", 413)
        kind = self.headers.get("Content-Type", "")
        if kind.split(";")[0].strip().lower() != "application/json" or "Content-Encoding" in self.headers:
            raise RequestError(f"Content-Type is {kind!r:.80}; expected application/json, without an encoding", 415)

    def _read_body(self) -> bytes:
        length = int(self.headers.get("Content-Length", 0))
        try:
            body = self.rfile.read(length)
        except TimeoutError:
            seconds = self.server.app.limits.seconds
            raise RequestError(f"the request did not arrive within {seconds:g} seconds", 408) from None
        if len(body) < length:
            raise RequestError(f"the body ended after {len(body)} of {length} bytes, its Content-Length")
        return body

    def _send(self, answer: Answer, close: bool = False) -> None:
        self.connection.settimeout(self.server.app.limits.seconds)
        self.send_response(answer.status)
        headers = {"Content-Type": answer.kind, "Content-Length": str(len(answer.body)), **SAFETY, **answer.headers}
        if close or self.server.stopping:
            headers["Connection"] = "close"  # send_header notices it
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def _linger(self) -> None:
        """Read on for a while: closing a connection with unread bytes would take the answer from the client."""
        self.source.end = time.monotonic() + LINGER
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while self.rfile.read1(1 << 16):
                pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses: requests that are not HTTP, and methods without a `do_`."""
        self._send(as_error(f"{message or 'this is not a request of HTTP/1.1'}", code), close=True)

    def version_string(self) -> str:
        return "miniclip"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is logged: texts that people search for are theirs."""


class Server(ThreadingHTTPServer):
    """An `App` at an address. UsageError if the address can't be used."""

    daemon_threads = False
    request_queue_size = 128

    def __init__(self, app: App, host: str = "127.0.0.1", port: int = 8000):
        self.app = app
        self.stopping = False  # every answer closes its connection
        self.closing = False  # connections without a request are closed
        self.open: set[_Handler] = set()
        self.accepted = self.answered = 0  # requests
        self._count = threading.Lock()
        self._free = threading.BoundedSemaphore(app.limits.clients)
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            self.address_family, _, _, _, address = found[0]
            super().__init__(address[:2], _Handler)
        except OSError as error:
            raise UsageError(f"can't listen at {host}, port {port}: {error.strerror}; choose another") from error
        self.is_local = ipaddress.ip_address(self.server_address[0]).is_loopback

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own would look up a name, which may take long

    def run(self, stop: threading.Event) -> None:
        """Answer requests until the event is set, and then those that have begun to arrive."""
        accepting = threading.Thread(target=self.serve_forever, args=(0.05,), name="accept")
        accepting.start()
        while not stop.wait(0.5):
            pass  # a signal that the system gave to another thread is handled when this one wakes up
        self.stopping = True
        time.sleep(GRACE)  # clients that send one request after the other get an answer that closes the connection
        self.shutdown()
        self.socket.setblocking(False)
        with suppress(OSError):  # those that wait; clients that connect again and again must not go on for ever
            for _ in range(self.request_queue_size):
                self.process_request(*self.get_request())
        self.closing = True
        for handler in list(self.open):
            handler.close_idle()
        self.server_close()  # waits for the threads
        self.app.close()

    def count(self, what: str) -> None:
        with self._count:
            setattr(self, what, getattr(self, what) + 1)

    def process_request(self, request: socket.socket, client_address: object) -> None:
        if self._free.acquire(blocking=False):
            return super().process_request(request, client_address)
        most = self.app.limits.clients
        answer = as_error(f"{most} clients are connected, the most there may be; try again", 503)
        head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: {answer.kind}\r\nRetry-After: 1\r\n"
        head += f"Content-Length: {len(answer.body)}\r\nConnection: close\r\n\r\n"
        with suppress(OSError):
            request.setblocking(False)  # one client must not keep the others from being accepted
            request.send(head.encode() + answer.body)
            request.recv(1 << 16)
        self.shutdown_request(request)

    def process_request_thread(self, request: socket.socket, client_address: object) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that went away is no fault
            super().handle_error(request, client_address)


def _is_local(hosts: list[str]) -> bool:
    """Whether a page that the browser was led to by another name (DNS rebinding) did not send this Host."""
    if len(hosts) != 1:
        return False
    name, _, port = hosts[0].rpartition(":")
    name = name if port.isdecimal() and name else hosts[0]
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False
