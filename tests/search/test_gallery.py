"""The page of pictures: whole in one file, harmless whatever the names are, and usable in a browser."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conformance.make_preprocess import MODES, picture
from PIL import Image

from miniclip.commands import main
from miniclip.search import Hit, gallery, update_index
from miniclip.search.gallery import write_gallery

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<script>document.title='taken'</script> \"><img src=x onerror=alert(1)> $title & 'so'.png"


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i, (name, size) in enumerate({"wide.png": (900, 300), "tall.jpg": (200, 700), "square.png": (64, 64)}.items()):
        Image.new("RGB", size, (80 * i, 120, 200)).save(folder / name)
    (folder / "deep").mkdir()
    Image.new("RGBA", (50, 50), (255, 0, 0, 0)).save(folder / "deep" / "clear.png")
    Image.new("RGB", (50, 50), "green").save(folder / HOSTILE.replace("/", "∕"))
    return folder


@pytest.fixture
def hits(photos) -> list[Hit]:
    files = ["wide.png", "tall.jpg", HOSTILE.replace("/", "∕"), "square.png", "deep/clear.png"]
    return [Hit(0.3 - 0.1 * i, str(photos / name)) for i, name in enumerate(files)]


def thumbnails(page: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


class Tags(HTMLParser):
    """The elements of a page, and their attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, list[str]]] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, [name for name, _ in attributes]))

    def count(self, wanted: str) -> int:
        return sum(tag == wanted for tag, _ in self.found)

    def handlers(self) -> list[str]:
        return [name for _, names in self.found for name in names if name.startswith("on")]


def test_names_are_escaped(hits, tmp_path, monkeypatch):
    query = ["<img src=y onerror=alert(2)>", "</script><script>alert(3)</script>"]
    write_gallery(tmp_path / "page.html", hits, query, query)
    tags = Tags((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert (tags.count("script"), tags.count("img"), tags.handlers()) == (1, 5 + 1, [])
    monkeypatch.setattr("miniclip.search.gallery.escape", lambda text: text)  # the control
    write_gallery(tmp_path / "page.html", hits, query, query)
    tags = Tags((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert tags.count("script") > 1 and tags.handlers()


def test_the_page_is_whole(hits, tmp_path):
    write_gallery(tmp_path / "page.html", hits, ["<b>red</b> & $blue"], ["rain"])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<b>red" not in page and "&lt;b&gt;red&lt;/b&gt; &amp; $blue" in page
    assert "default-src 'none'" in page and "unsafe-inline'; script-src 'sha256-" in page
    assert not re.search(r"(src|href)=\"(https?:|//)", page) and "url(" not in page and "@import" not in page
    pictures = thumbnails(page)
    assert [picture.size for picture in pictures] == [(640, 213), (183, 640), (50, 50), (64, 64), (50, 50)]
    assert pictures[4].getpixel((9, 9)) == (255, 255, 255)  # was transparent
    assert "0.300" in page and "−0.100" in page
    assert page.count('<li style="--ratio:') == 5


def test_pictures_that_are_gone_and_queries_that_are_pictures(photos, hits, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    gone = [*hits[:1], Hit(0.1, str(tmp_path / "gone.png")), Hit(0.0, str(tmp_path / "broken.png"))]
    write_gallery(tmp_path / "page.html", gone, [str(photos / "wide.png"), "words"])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("The file is gone or can’t be read") == 2
    assert [picture.size for picture in thumbnails(page)] == [(160, 53), (640, 213)]


def test_a_page_without_pictures(tmp_path):
    for query in (["nothing"], "nothing"):
        write_gallery(tmp_path / "page.html", [], query)
        page = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert "0 pictures" in page and "<title>nothing" in page


def test_photos_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (80, 40)).save(tmp_path / "turned.jpg", exif=exif)
    write_gallery(tmp_path / "page.html", [Hit(0.1, str(tmp_path / "turned.jpg"))], ["x"])
    assert thumbnails((tmp_path / "page.html").read_text(encoding="utf-8"))[0].size == (40, 80)


@pytest.mark.parametrize("size", [(64, 43), (900, 600), (1, 3000)])
@pytest.mark.parametrize("mode", [*MODES, "RGBa"])
def test_every_mode_that_is_indexed_is_shown(mode, size):
    data = gallery._data_uri(picture(mode, *size) if mode in MODES else Image.new(mode, size), 640)
    with Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))) as shown:
        assert max(shown.size) == min(640, max(size)) and shown.mode == "RGB"


def test_sixteen_bits_and_damaged_exif(tmp_path):
    bright = np.full((2560, 16), 40_000, np.uint16)
    bright[1280:] = 60_000
    Image.fromarray(bright).save(tmp_path / "bright.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 40)).save(tmp_path / "broken.jpg", exif=exif)
    data = (tmp_path / "broken.jpg").read_bytes()
    at = data.index(b"Exif\0\0") + 6
    (tmp_path / "broken.jpg").write_bytes(data[:at] + b"MM\0\x2a\xff\xff\xff" + data[at + 7 :])
    with pytest.warns(UserWarning, match="all white"):
        assert update_index(tmp_path / "index", tmp_path, "tiny-ViT").pictures == 2
    hits = [Hit(0.1, str(tmp_path / name)) for name in ("bright.png", "broken.jpg")]
    write_gallery(tmp_path / "page.html", hits, ["x"])
    shown = thumbnails((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert [image.size for image in shown] == [(4, 640), (80, 40)]
    assert shown[0].getpixel((2, 10))[0] < 9 and shown[0].getpixel((2, 630))[0] > 246


def test_a_full_disk_leaves_the_page_that_was_there(hits, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("the old page")
    code = """if True:
        import resource, sys
        from miniclip.search import Hit
        from miniclip.search.gallery import write_gallery
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        write_gallery(sys.argv[1], [Hit(0.1, sys.argv[2])], ["x"])"""
    done = subprocess.run([sys.executable, "-c", code, page, hits[0].path], capture_output=True, text=True)
    assert "WriteError: can't write" in done.stderr and "File too large" in done.stderr
    assert page.read_text() == "the old page" and os.listdir(tmp_path) == ["page.html"]


def test_the_command(photos, tmp_path, capsys):
    assert update_index(tmp_path / "index", [photos], "tiny-ViT").pictures == 5
    assert main(["search", str(tmp_path / "index"), "a red square", "--html", str(tmp_path / "page.html")]) == 0
    assert "page.html" in capsys.readouterr().err
    assert "a red square" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("there is no Chromium here")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser, hits, tmp_path):
    """The page of the five pictures, open; at the end nothing must have gone wrong in it or been asked of a network."""
    write_gallery(tmp_path / "page.html", hits, ["a <i>red</i> bicycle"], ["rain"])
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    tab = context.new_page()
    faults, requests = [], []
    tab.on("console", lambda message: faults.append(message.text))
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("dialog", lambda dialog: faults.append("alert: " + dialog.message))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto((tmp_path / "page.html").as_uri())
    yield tab
    assert faults == []
    assert [url for url in requests if not url.startswith("data:")] == [(tmp_path / "page.html").as_uri()]
    context.close()


def names(tab) -> list[str]:
    return [card.text_content() for card in tab.locator(".card:visible .name").all()]


def test_names_are_shown_not_run(tab):
    assert tab.title() == "a <i>red</i> bicycle – search"
    assert names(tab)[2] == HOSTILE.replace("/", "∕")
    assert tab.locator(".card img").count() == 5
    sizes = tab.evaluate("[...document.images].filter(i => i.loading === 'lazy').map(i => i.decode().then(() => 1))")
    assert len(sizes) == 5
    assert tab.evaluate("document.querySelectorAll('script').length") == 1


def test_the_policy_stops_what_escaping_would_miss(browser, hits, tmp_path):
    """The control of the test before: a script that did get into the page is not run."""
    write_gallery(tmp_path / "page.html", hits, ["x"])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    taken = page.replace("</body>", "<script>document.title = 'taken'</script></body>")
    (tmp_path / "taken.html").write_text(taken, encoding="utf-8")
    (tmp_path / "open.html").write_text(re.sub("<meta http-equiv[^>]*>", "", taken), encoding="utf-8")
    tab = browser.new_page()
    tab.goto((tmp_path / "taken.html").as_uri())
    assert tab.title() == "x – search"
    tab.goto((tmp_path / "open.html").as_uri())
    assert tab.title() == "taken"
    tab.close()


def test_filtering(tab):
    assert tab.locator("#count").text_content() == "5 pictures"
    tab.keyboard.press("/")
    tab.keyboard.type("PNG e")
    assert [name for name in names(tab) if not name.startswith("<")] == ["wide.png", "square.png", "clear.png"]
    tab.fill("#filter", "deep")  # a folder
    assert names(tab) == ["clear.png"] and tab.locator("#count").text_content() == "1 of 5 pictures"
    tab.fill("#filter", "zebra")
    assert names(tab) == [] and "zebra" in tab.locator("#none").text_content()
    tab.keyboard.press("Escape")
    assert len(names(tab)) == 5 and not tab.locator("#none").is_visible()


def focused(tab) -> str:
    return tab.evaluate("document.activeElement.querySelector?.('.name')?.textContent || document.activeElement.id")


def test_the_keyboard_alone_is_enough(tab):
    tab.keyboard.press("/")
    assert focused(tab) == "filter"
    tab.keyboard.press("ArrowDown")
    assert focused(tab) == "wide.png"
    tab.keyboard.press("ArrowRight")
    assert focused(tab) == "tall.jpg"
    tab.keyboard.press("End")
    assert focused(tab) == "clear.png"
    tab.keyboard.press("Home")
    tab.keyboard.press("Enter")
    assert tab.locator("#viewer").is_visible() and tab.locator("#view-name").text_content() == "wide.png"
    tab.keyboard.press("ArrowLeft")
    assert tab.locator("#view-name").text_content() == "wide.png"
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#view-name").text_content() == "tall.jpg"
    assert tab.locator("#view-path").text_content().endswith("tall.jpg")
    tab.keyboard.press("Escape")
    assert not tab.locator("#viewer").is_visible() and focused(tab) == "tall.jpg"
    tab.keyboard.press("ArrowUp")
    assert focused(tab) == "filter"


def test_what_a_screen_reader_is_told(tab):
    heading = tab.get_by_role("heading", level=1)
    assert heading.inner_text().split() == ["a", "<i>red</i>", "bicycle", "without", "rain"]
    assert tab.get_by_role("search").count() == 1
    assert tab.get_by_role("searchbox", name="Filter the pictures on this page by name or folder").count() == 1
    assert tab.get_by_role("list", name="Pictures, best first").get_by_role("listitem").count() == 5
    assert tab.get_by_role("link", name="1: wide.png, score 0.300").count() == 1
    assert tab.locator("#count").get_attribute("aria-live") == "polite"
    assert tab.locator("img:not([alt])").count() == 0
    assert tab.evaluate("document.documentElement.lang") == "en"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1400])
def test_light_and_dark_narrow_and_wide(tab, scheme, width):
    """Text stands out from what is behind it as WCAG AA asks (4.5), and nothing is wider than the screen."""
    tab.emulate_media(color_scheme=scheme)
    tab.set_viewport_size({"width": width, "height": 800})
    colours = tab.evaluate(
        """() => ["h1", ".about", ".name", ".score", ".folder", "#count", ".not"].map((which) => {
            const of = (what) => getComputedStyle(what);
            return [of(document.querySelector(which)).color, of(document.body).backgroundColor]; })"""
    )
    for front, back in colours:
        assert contrast(front, back) >= 4.5
    assert (luminance(colours[0][1]) < 0.1) == (scheme == "dark")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_without_scripts(browser, hits, tmp_path):
    write_gallery(tmp_path / "page.html", hits, ["x"])
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto((tmp_path / "page.html").as_uri())
    assert tab.locator(".card:visible").count() == 5
    assert not tab.locator("#filter").is_visible()
    assert tab.locator(".card").first.get_attribute("href") == Path(hits[0].path).as_uri()
    context.close()
