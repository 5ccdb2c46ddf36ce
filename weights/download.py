"""OpenAI's and Apple's released files: where they are, and how to get one without ever using a broken one.

A file gets its final name only after its sha256 was checked. Until then its bytes are in `<file>.part`, which outlives
a cut connection, a full disk or a kill, and is continued by the next call. `<file>.lock` keeps a second process waiting
meanwhile. Where no sha256 is published, that of the first file that came, if it is large enough, is written to
`<file>.sha256`, and expected from then on.

Environment:
    MINICLIP_MIRROR    base URL used instead of `OPENAI_URL`; below it the layout is the same, <sha256>/<file>. Apple's
                       files are <file> there
    MINICLIP_OFFLINE   1: never use the network
    http_proxy, https_proxy, no_proxy: as everywhere
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import sys
import time
import warnings
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib import request
from urllib.error import HTTPError, URLError

from tqdm import tqdm

if os.name == "nt":
    import msvcrt

    LOCK_IS_HELD = PermissionError
else:
    import fcntl

    LOCK_IS_HELD = BlockingIOError

OPENAI_URL = "https://openaipublic.azureedge.net/clip/models"

# model: (file, sha256), from openai/CLIP clip/clip.py
OPENAI_FILES: dict[str, tuple[str, str]] = {
    "RN50": ("RN50.pt", "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"),
    "RN101": ("RN101.pt", "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599"),
    "RN50x4": ("RN50x4.pt", "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd"),
    "RN50x16": ("RN50x16.pt", "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa"),
    "RN50x64": ("RN50x64.pt", "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c"),
    "ViT-B/32": ("ViT-B-32.pt", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "ViT-B/16": ("ViT-B-16.pt", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "ViT-L/14": ("ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    "ViT-L/14@336px": ("ViT-L-14-336px.pt", "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"),
}

APPLE_URL = "https://docs-assets.developer.apple.com/ml-research/datasets/mobileclip"
HUGGING_FACE_URL = "https://huggingface.co/apple/{}/resolve/main"


class AppleFile(NamedTuple):
    url: str
    least: int  # bytes: two for each of the model's parameters
    sha256: str | None = None


# From ml-mobileclip's get_pretrained_models.sh and README; mobileclip_l14.pt is named as its second generation's is.
_S0_SHA256 = "809b408eff74f8058843e86a1f92967097d42ba782450e85b8f4867b7f0ca0b7"
MOBILECLIP_FILES: dict[str, AppleFile] = {
    "MobileCLIP-S0": AppleFile(f"{APPLE_URL}/mobileclip_s0.pt", 107_695_362, _S0_SHA256),
    "MobileCLIP-S1": AppleFile(f"{APPLE_URL}/mobileclip_s1.pt", 169_938_434),
    "MobileCLIP-S2": AppleFile(f"{APPLE_URL}/mobileclip_s2.pt", 198_485_634),
    "MobileCLIP-B": AppleFile(f"{APPLE_URL}/mobileclip_b.pt", 299_553_282),
    "MobileCLIP-B-LT": AppleFile(f"{APPLE_URL}/mobileclip_blt.pt", 299_553_282),
    **{
        name: AppleFile(f"{HUGGING_FACE_URL.format(name)}/{file}", least)
        for name, file, least in (
            ("MobileCLIP-S3", "mobileclip_s3.pt", 497_771_906),
            ("MobileCLIP-L-14", "mobileclip_l14.pt", 855_234_562),
            ("MobileCLIP-S4", "mobileclip_s4.pt", 890_870_274),
            ("MobileCLIP2-S0", "mobileclip2_s0.pt", 149_670_146),
            ("MobileCLIP2-S2", "mobileclip2_s2.pt", 198_486_658),
            ("MobileCLIP2-B", "mobileclip2_b.pt", 299_554_306),
            ("MobileCLIP2-S3", "mobileclip2_s3.pt", 497_771_906),
            ("MobileCLIP2-L-14", "mobileclip2_l14.pt", 855_234_562),
            ("MobileCLIP2-S4", "mobileclip2_s4.pt", 890_870_274),
        )
    },
}

TIMEOUT = 30  # seconds to connect, and of silence in mid-body
RETRY_DELAYS = (1, 2, 4, 8)  # seconds before each new try of one call
CHUNK = 1 << 18  # bytes

# What urllib needs for http and https. Its usual opener speaks ftp too, and would follow a redirect there.
HANDLERS = (
    *(request.ProxyHandler, request.HTTPHandler, request.HTTPSHandler, request.UnknownHandler),
    *(request.HTTPErrorProcessor, request.HTTPDefaultErrorHandler, request.HTTPRedirectHandler),
)


class DownloadError(OSError):
    """The file could not be had; the message says why, and where to put it by hand."""


class _Interrupted(OSError):
    """This try failed, and the next one may not."""


def cached(name: str, root: str | Path | None = None) -> Path | None:
    """The file of the model `name` if it is there, its content unchecked."""
    path = _path(name, root)
    return path if path.is_file() else None


def download(name: str, root: str | Path | None = None) -> Path:
    """The verified file of the model `name`, OpenAI's or Apple's, downloaded unless it is in `root` already.

    `root` is ~/.cache/clip by default, as in openai/CLIP. Raises ValueError for an unknown name, and DownloadError.
    """
    path = _path(name, root)
    mirror = os.environ.get("MINICLIP_MIRROR", "").rstrip("/")
    if name in OPENAI_FILES:
        file, sha256 = OPENAI_FILES[name]
        return fetch(f"{mirror or OPENAI_URL}/{sha256}/{file}", path, sha256)
    apple = MOBILECLIP_FILES[name]
    url = f"{mirror}/{path.name}" if mirror else apple.url
    return fetch(url, path, apple.sha256) if apple.sha256 else _fetch_and_record(url, path, apple.least)


def _fetch_and_record(url: str, path: Path, least: int) -> Path:
    """As `fetch`, of a file whose sha256 nobody published: its first one is recorded, and from then on expected."""
    record = path.with_name(path.name + ".sha256")
    if record.exists():
        return fetch(url, path, record.read_text().strip())
    fetch(url, path, None)
    size = path.stat().st_size
    if size < least:
        path.unlink()
        raise DownloadError(f"{url} gave {size:,} bytes; expected at least {least:,}: removed. Is it a web page?")
    sha256 = sha256_of(path)
    _say(f"no sha256 is published for {path.name}; {sha256} is written to {record.name} and expected from now on")
    record.write_text(f"{sha256}\n")
    return path


def fetch(url: str, path: Path, sha256: str | None) -> Path:
    """Makes `path` the file at `url`, unless it is that already, and returns it. Raises DownloadError.

    sha256: None takes whatever file is there or comes.
    """
    by_hand = f"By hand: get {url} (sha256 {sha256 or 'not published'}) and put it at {path}"
    if path.exists() and not path.is_file():
        raise DownloadError(f"{path} exists and is not a regular file; move it away")
    found = sha256_of(path) if path.exists() else None
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
        with _locked(path.with_name(path.name + ".lock")):
            # If it is there now, another process got it while we waited.
            if not path.exists() or sha256 not in (sha256_of(path), None):
                _complete(url, part, sha256)
                os.replace(part, path)
    except OSError as error:
        kept = f"{part} is kept and will be continued. " if _size(part) else ""
        raise DownloadError(f"{path.name} could not be downloaded: {error}. {kept}{by_hand}") from error
    return path


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _path(name: str, root: str | Path | None) -> Path:
    if name not in OPENAI_FILES and name not in MOBILECLIP_FILES:
        known = ", ".join([*OPENAI_FILES, *MOBILECLIP_FILES])
        raise ValueError(f"no file is known for model {name!r}; expected one of {known}")
    file = OPENAI_FILES[name][0] if name in OPENAI_FILES else MOBILECLIP_FILES[name].url.rpartition("/")[2]
    return Path(root or "~/.cache/clip").expanduser() / file


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _locked(path: Path) -> BinaryIO:
    """Opens and locks the file `path`, waiting if need be. Closing it, or the death of the process, unlocks it.

    The file stays: were it deleted, a process waiting for the old one and another with a new one would both get a lock.
    """
    file = open(path, "ab")  # noqa: SIM115 (the caller closes it)
    told = False
    while True:
        try:
            if os.name == "nt":
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except LOCK_IS_HELD:
            if not told:
                _say(f"waiting for another process, which holds {path}")
                told = True
            time.sleep(0.2)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _complete(url: str, part: Path, sha256: str | None) -> None:
    """Makes `part` the whole file, verified if its sha256 is known; should bytes left by an earlier call spoil it, once
    more without them."""
    was_begun = _size(part) > 0
    _request_until_whole(url, part)
    if sha256 is None or (got := sha256_of(part)) == sha256:
        return
    fault = f"{_size(part):,} bytes came with sha256 {got}, expected {sha256}"
    part.unlink()
    if not was_begun:
        raise DownloadError(f"{fault}; does a proxy or mirror answer with something else?")
    _say(f"{part.name}: {fault}; starting over")
    _complete(url, part, sha256)


def _request_until_whole(url: str, part: Path) -> None:
    for delay in RETRY_DELAYS:
        try:
            return _request_rest(url, part)
        except _Interrupted as error:
            _say(f"{part.name}: {error}; trying again in {delay} s")
            time.sleep(delay)
    return _request_rest(url, part)


def _request_rest(url: str, part: Path) -> None:
    """One request, for what follows the bytes in `part`. Raises _Interrupted where another try may help."""
    have = _size(part)
    headers = {"User-Agent": "miniclip"} | ({"Range": f"bytes={have}-"} if have else {})
    with _open(request.Request(url, headers=headers)) as response:
        status = response.status
        content_range = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", response.headers.get("Content-Range", ""))
        start, total = (content_range[1], int(content_range[2])) if content_range else (None, None)
        if status == 200:  # the whole file, also from a server that ignores Range
            _write(response, part, "wb", response.length)
        elif status == 206 and start == str(have):
            _write(response, part, "ab", total)
        elif status == 416 and total == have:
            return  # nothing follows: an earlier process was killed between the last byte and the renaming
        elif status in (206, 416):
            part.unlink(missing_ok=True)
            raise _Interrupted(f"the server cannot continue after {have:,} bytes; starting over")
        elif status in (408, 429) or status >= 500:
            raise _Interrupted(f"the server answered {status} {response.reason}")
        else:
            raise DownloadError(f"the server answered {status} {response.reason}")


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
    """Copies the body into `part`, to `total` bytes where the server said how many."""
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
