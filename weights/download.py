"""OpenAI's and Apple's released files: where they are, and how to get one without ever using a broken one.

A file gets its final name only after its sha256 was checked. Until then its bytes are in `<file>.part`, which stays
after a cut connection, a full disk or a kill, and is continued by the next call, if the server still has the same file:
its ETag or date is in `<file>.part.version`. A second process waits for `<file>.lock` meanwhile. Where no sha256 is
published, the first file that came is taken, if it is large enough. Its sha256 is written to `<file>.sha256`, and
expected from then on.

Environment:
    MINICLIP_MIRROR    base URL used instead of `OPENAI_URL`; below it the layout is the same, <sha256>/<file>. Apple's
                       files are <file> there
    MINICLIP_OFFLINE   1: never use the network
    http_proxy, https_proxy, no_proxy: as everywhere
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import sys
import time
import warnings
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib import request
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from tqdm import tqdm

from miniclip.config import OPENAI_URL, NamedModel
from miniclip.errors import MiniclipError
from miniclip.io import locked, sha256_of, write_text

TIMEOUT = 30  # seconds to connect, and of silence in mid-body
RETRY_DELAYS = (1, 2, 4, 8)  # seconds before each new try of one call
CHUNK = 1 << 18  # bytes
WITHOUT_DOWNLOAD = "The models tiny-ViT and tiny-RN come with miniclip and need no download"

# What urllib needs for http and https. Its usual opener speaks ftp too, and would follow a redirect there.
HANDLERS = (
    *(request.ProxyHandler, request.HTTPHandler, request.HTTPSHandler, request.UnknownHandler),
    *(request.HTTPErrorProcessor, request.HTTPDefaultErrorHandler, request.HTTPRedirectHandler),
)


class DownloadError(MiniclipError, OSError):
    """A file can't be downloaded; the message says why, and where to put it by hand."""


class _Interrupted(OSError):
    """A request failed, but another one may succeed."""


def cached(model: NamedModel, root: str | Path | None = None) -> Path | None:
    """The file of a named model if it is in `root`, its content unchecked."""
    try:
        path = _path(model, root)
        return path if path.is_file() else None
    except OSError:  # there is no home directory, or it is closed
        return None


def download(model: NamedModel, root: str | Path | None = None) -> Path:
    """The verified file of a named model, downloaded unless it is in `root` already.

    `root` is ~/.cache/clip by default, as in openai/CLIP. Raises DownloadError.
    """
    path = _path(model, root)
    mirror = os.environ.get("MINICLIP_MIRROR", "").rstrip("/")
    if not mirror:
        url = model.url
    else:
        url = f"{mirror}/{model.sha256}/{model.file}" if model.url.startswith(OPENAI_URL) else f"{mirror}/{model.file}"
    try:
        return fetch(url, path, model.sha256) if model.sha256 else _fetch_and_record(url, path, model.size)
    except DownloadError as error:
        raise DownloadError(f"{error}. {WITHOUT_DOWNLOAD}") from error


def _fetch_and_record(url: str, path: Path, least: int) -> Path:
    """As `fetch`, of a file whose sha256 nobody published: its first one is recorded, and from then on expected."""
    record = path.with_name(path.name + ".sha256")
    recorded = _text(record)
    if re.fullmatch("[0-9a-f]{64}", recorded):  # an older version's could be empty, if it was killed while writing
        return fetch(url, path, recorded)
    fetch(url, path, None)
    size = path.stat().st_size
    if size < least:
        path.unlink()
        raise DownloadError(f"{url} gave {size:,} bytes; expected at least {least:,}: removed. Is it a web page?")
    sha256 = sha256_of(path)
    _say(f"no sha256 is published for {path.name}; {sha256} is written to {record.name} and expected from now on")
    write_text(record, f"{sha256}\n")
    return path


def fetch(url: str, path: Path, sha256: str | None) -> Path:
    """Make `path` the file at `url`, unless it is that already, and return it. Raises DownloadError.

    sha256: None takes whatever file is there or comes.
    """
    by_hand = f"By hand: get {url} (sha256 {sha256 or 'not published'}) and put it at {path}"
    if path.exists() and not path.is_file():
        raise DownloadError(f"{path} exists and is not a regular file; move it away")
    try:
        found = sha256_of(path) if path.exists() else None
    except OSError as error:
        raise DownloadError(
            f"{path} can't be read: {error.strerror or error}. Remove it, or change its rights"
        ) from error
    if found and sha256 in (found, None):
        return path
    if os.environ.get("MINICLIP_OFFLINE", "0") not in ("", "0"):
        fault = f"has sha256 {found}, expected {sha256}" if found else "is missing"
        raise DownloadError(f"{path} {fault}, and MINICLIP_OFFLINE forbids a download. {by_hand}")
    if not url.startswith(("http://", "https://")):
        raise DownloadError(f"expected a URL of http:// or https://, got {url}; is MINICLIP_MIRROR right?")
    if found:
        warnings.warn(f"{path} has sha256 {found}, expected {sha256}; downloading it anew", stacklevel=2)

    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(path.name + ".lock"), wait=True):
            # If it is there now, another process got it while we waited.
            if not path.exists() or sha256 not in (sha256_of(path), None):
                _complete(url, part, sha256)
                os.replace(part, path)
                _version_file(part).unlink(missing_ok=True)
    except OSError as error:
        kept = f"{part} is kept and will be continued. " if _size(part) else ""
        raise DownloadError(f"{path.name} could not be downloaded: {error}. {kept}{by_hand}") from error
    return path


def _path(model: NamedModel, root: str | Path | None) -> Path:
    try:
        return Path(root or "~/.cache/clip").expanduser() / model.file
    except RuntimeError:
        raise DownloadError(
            "there is no home directory to keep downloads in: set HOME, or give download_root="
        ) from None


def _text(path: Path) -> str:
    """The content of a small file; "" if it is not there."""
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _complete(url: str, part: Path, sha256: str | None) -> None:
    """Make `part` the whole file, verified if its sha256 is known. If bytes that an earlier call left are wrong, it is
    downloaded again without them."""
    if sha256 is None and not _text(_version_file(part)):
        _discard(part)  # nothing would tell whether the rest belongs to the same file
    was_begun = _size(part) > 0
    _request_until_whole(url, part)
    if sha256 is None or (got := sha256_of(part)) == sha256:
        return
    fault = f"{_size(part):,} bytes came with sha256 {got}, expected {sha256}"
    _discard(part)
    if not was_begun:
        raise DownloadError(f"{fault}; does a proxy or mirror answer with something else?")
    _say(f"{part.name}: {fault}; starting over")
    _complete(url, part, sha256)


def is_offline(url: str) -> bool:
    """Whether the server's name can't be resolved, as on a machine without a network; a proxy would do it for us."""
    host = urlsplit(url).hostname
    if not host or request.getproxies():
        return False
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return True
    return False


def _request_until_whole(url: str, part: Path) -> None:
    if not _size(part) and is_offline(url):
        raise DownloadError(f"the name {urlsplit(url).hostname} can't be resolved (no network?)")
    for delay in RETRY_DELAYS:
        try:
            return _request_rest(url, part)
        except _Interrupted as error:
            _say(f"{part.name}: {error}; trying again in {delay} s")
            time.sleep(delay)
    return _request_rest(url, part)


def _request_rest(url: str, part: Path) -> None:
    """One request, for what follows the bytes in `part`. Raises _Interrupted where another try may help."""
    have, version = _size(part), _text(_version_file(part))
    headers = {"User-Agent": "miniclip"}
    if have:
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": version} if version else {})
    with _open(request.Request(url, headers=headers)) as response:
        status = response.status
        content_range = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", response.headers.get("Content-Range", ""))
        start, total = (content_range[1], int(content_range[2])) if content_range else (None, None)
        same = not version or _version(response) in ("", version)  # some servers don't know If-Range
        if status == 200:  # the whole file, also if it has changed, or from a server that ignores Range
            part.write_bytes(b"")  # before its version: bytes of one file never stand beside another's version
            write_text(_version_file(part), _version(response))
            _write(response, part, "wb", response.length)
        elif status == 206 and start == str(have) and same:
            _write(response, part, "ab", total)
        elif status == 416 and total == have:
            return  # nothing follows: an earlier process was killed between the last byte and the renaming
        elif status in (206, 416):
            _discard(part)
            raise _Interrupted(f"the server cannot continue after {have:,} bytes; starting over")
        elif status in (408, 429) or status >= 500:
            raise _Interrupted(f"the server answered {status} {response.reason}")
        else:
            raise DownloadError(f"the server answered {status} {response.reason}")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _version_file(part).unlink(missing_ok=True)


def _version_file(part: Path) -> Path:
    return part.with_name(part.name + ".version")


def _version(response: HTTPResponse | HTTPError) -> str:
    """What tells whether the file on the server is still the same, and If-Range takes: a strong ETag, or the date."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def _open(get: request.Request) -> HTTPResponse | HTTPError:
    """The answer, whatever its status."""
    opener = request.OpenerDirector()
    for handler in HANDLERS:
        opener.add_handler(handler())
    try:
        return opener.open(get, timeout=TIMEOUT)
    except HTTPError as answer:
        return answer
    except (OSError, HTTPException) as error:
        raise _Interrupted(error.reason if isinstance(error, URLError) else error) from error


def _write(response: HTTPResponse, part: Path, mode: str, total: int | None) -> None:
    """Copy the body into `part`, to `total` bytes where the server said how many."""
    folder = part.parent
    try:
        if total is not None and total - _size(part) > shutil.disk_usage(folder).free:
            raise OSError(errno.ENOSPC, "too little space")
        with (
            open(part, mode) as file,
            tqdm(desc=part.stem, total=total, initial=file.tell(), unit="B", unit_scale=True, unit_divisor=1024) as bar,
        ):
            while chunk := _read(response):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if total is None or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        missing, free = total - _size(part), shutil.disk_usage(folder).free
        fault = f"no space: {missing:,} more bytes are needed in {folder}, where {free:,} are free"
        raise DownloadError(f"{fault}; make room there or choose another folder") from error
    if total is not None and _size(part) != total:
        raise _Interrupted(f"the connection ended after {_size(part):,} of {total:,} bytes")


def _read(response: HTTPResponse) -> bytes:
    try:
        return response.read(CHUNK)
    except (OSError, HTTPException) as error:
        raise _Interrupted(error) from error
