"""The answers to a search as a page with thumbnails: one HTML file that needs no other, or the page of a server.

Names are escaped, and the page's policy lets the browser run one script, whose hash it has, and load or send nothing.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from string import Template
from urllib.parse import quote

import numpy as np
from PIL import Image

from miniclip.embed import as_list
from miniclip.images import ImageError, open_image, read_size
from miniclip.io import printable, write_text
from miniclip.search.index import Hit
from miniclip.search.query import Part, is_picture

THUMBNAIL = 640  # pixels of the longer side: sharp in the page on fine screens, and enough for the viewer
QUERY_THUMBNAIL = 160
QUALITY = 80  # of the thumbnails' JPEG
RATIOS = 0.45, 2.6  # of width to height; of other pictures the page shows the middle
ABOUT_ONE = "The score is the cosine between a picture and the query; a bar shows where it lies on this page."
ABOUT_SEVERAL = (
    "The score is the mean cosine between a picture and the parts of the query{less}; "
    "a bar shows where it lies on this page."
)
FORM = """<form class="ask" action="/" role="search">
<input name="q" type="search" value="{words}" placeholder="a dog in the snow" required autocomplete="off"{focus} \
aria-label="What the pictures should show">
<button>Search</button>
</form>"""
Show = Callable[[Path], tuple[str, str, tuple[int, int]]]  # a picture's address, the link to it, its width and height


def write_gallery(
    file: str | Path, hits: Sequence[Hit], wanted: Part | Sequence[Part], unwanted: Part | Sequence[Part] = ()
) -> None:
    """Write the page. hits: the pictures; wanted, unwanted: the query, as `embed_query` takes it.

    WriteError if the file can't be written.
    """
    wanted, unwanted = as_list(wanted), as_list(unwanted)
    words = [printable(str(part)) if isinstance(part, str) else "a picture" for part in wanted]
    several = len(wanted) > 1 or bool(unwanted)
    less = ", less half of that with what is struck out" if unwanted else ""
    page = _page(
        hits,
        _embedded,
        title=escape(", ".join(words)) + " – search",
        query="".join(_query(wanted, unwanted)),
        about=ABOUT_SEVERAL.format(less=less) if several else ABOUT_ONE,
    )
    write_text(file, page)


def live_page(hits: Sequence[Hit], words: str, about: str = "") -> str:
    """The page of a server, with a field for words to search for.

    words: those of this search, or "". about: what to say if there was none, or why it failed. The server has the
    thumbnails at /thumbnail?path=..., where the path is quoted as bytes, and larger pictures at /picture?path=...
    """
    return _page(
        hits,
        _served,
        title=escape(printable(words) or "pictures") + " – search",
        query=f"<span>{escape(printable(words) or 'Describe a picture')}</span>",
        about=escape(printable(about)) or ABOUT_ONE,
        kind="Pictures found for" if words and not about else "Search",
        form=FORM.format(words=escape(printable(words)), focus="" if words else " autofocus"),
    )


def policy(live: bool) -> str:
    """The Content-Security-Policy of the page: one script, and its own pictures."""
    digest = base64.b64encode(hashlib.sha256(_script().encode()).digest()).decode()
    images, forms = ("'self' data:", "'self'") if live else ("data:", "'none'")
    return (
        f"default-src 'none'; img-src {images}; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        f"base-uri 'none'; form-action {forms}"
    )


def _script() -> str:
    return Path(__file__).with_name("gallery.js").read_text(encoding="utf-8")


def _page(hits: Sequence[Hit], show: Show, kind: str = "Pictures found for", form: str = "", **parts: str) -> str:
    """show: how a picture comes into the page. parts: title, query, about, as HTML."""
    common = _common_folder(hits)
    return Template(Path(__file__).with_name("gallery.html").read_text(encoding="utf-8")).substitute(
        parts,
        policy=policy(live=bool(form)),
        kind=kind,
        form=form,
        count=f"{len(hits)} picture{'s' * (len(hits) != 1)}",
        folder=f"All are in <code>{escape(printable(common))}</code>." if common else "",
        cards="\n".join(_cards(hits, common, show)),
        script=_script(),
    )


def _query(wanted: Sequence[Part], unwanted: Sequence[Part]) -> Iterator[str]:
    for parts, sign, kind in ((wanted, "+", ""), (unwanted, "−", ' class="not"')):
        for i, part in enumerate(parts):
            if sign == "−" or i:
                yield f'<span class="sign">{"without" if sign == "−" else "and"}</span>'
            if is_picture(part):
                name = printable(Path(getattr(part, "filename", "") if isinstance(part, Image.Image) else part).name)
                picture = part if isinstance(part, Image.Image) else open_image(part, upright=True)
                yield f'<img{kind} src="{_data_uri(picture, QUERY_THUMBNAIL)}" alt="{escape(name or "a picture")}">'
            else:
                yield f"<span{kind}>{escape(printable(part))}</span>"


def _common_folder(hits: Sequence[Hit]) -> str:
    """The folder that holds all pictures, or "" if that is the root of the disk."""
    try:
        common = Path(os.path.commonpath([os.path.dirname(hit.path) for hit in hits]))
    except ValueError:  # no paths, or paths on several drives
        return ""
    return "" if common == Path(common.anchor) else str(common)


def _cards(hits: Sequence[Hit], common: str, show: Show) -> Iterator[str]:
    if not hits:
        return
    low, high = min(hit.score for hit in hits), max(hit.score for hit in hits)
    for rank, hit in enumerate(hits, 1):
        path = Path(hit.path)
        name = escape(printable(path.name))
        folder = os.path.relpath(path.parent, common) if common else str(path.parent)
        folder = "" if folder == os.curdir else escape(printable(folder))
        share = (hit.score - low) / (high - low) if high > low else 1.0
        score = f"{round(hit.score, 3) + 0:.3f}".replace("-", "−")
        try:
            source, link, (width, height) = show(path)
            ratio = min(max(width / height, RATIOS[0]), RATIOS[1])
            shown = f'<img src="{escape(source)}" alt="{name}" loading="lazy" decoding="async">'
            frame = f'<span class="frame">{shown}</span>'
        except ImageError:
            ratio, link = 1.0, path.absolute().as_uri()
            frame = '<span class="frame gone">The file is gone or can’t be read</span>'
        yield (
            f'<li style="--ratio:{ratio:.3f}"><a class="card" href="{escape(link)}" '
            f'data-path="{escape(printable(hit.path))}" '
            f'aria-label="{rank}: {name}, score {score}">{frame}'
            f'<span class="bar"><i style="--share:{4 + 96 * share:.1f}%"></i></span>'
            f'<span class="line"><span class="rank">{rank}</span><span class="name">{name}</span>'
            f'<span class="score">{score}</span></span><span class="folder">{folder}</span></a></li>'
        )


def _embedded(path: Path) -> tuple[str, str, tuple[int, int]]:
    """A thumbnail in the page itself, a link to the file, and the picture's size."""
    image = open_image(path, upright=True)
    return _data_uri(image, THUMBNAIL), path.absolute().as_uri(), image.size


def _served(path: Path) -> tuple[str, str, tuple[int, int]]:
    where = "?path=" + quote(os.fsencode(path))
    return "/thumbnail" + where, "/picture" + where, read_size(path)


def _data_uri(image: Image.Image, size: int) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg(image, size)).decode()


def jpeg(image: Image.Image, size: int) -> bytes:
    """A JPEG of at most size x size pixels, on white."""
    image = _eight_bits(image) if image.mode.startswith(("I", "F")) else image.copy()
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    data = BytesIO()
    image.convert("RGB").save(data, "JPEG", quality=QUALITY, optimize=True)
    return data.getvalue()


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of more than 8 bits, from its darkest value in black to its brightest in white."""
    values = np.nan_to_num(np.asarray(image, np.float32))
    low, high = values.min(), values.max()
    return Image.fromarray(((values - low) * (255 / max(high - low, 1e-9))).astype(np.uint8))
