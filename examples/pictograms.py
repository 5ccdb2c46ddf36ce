"""Makes a data set of pictures with English captions from emoji artwork under open licences.

    pip install 'miniclip[pictograms]'            # resvg-py, which draws SVG; npm must be installed too
    python examples/pictograms.py OUT_DIR         # a minute and a half on one core

Nine sets are for training. All of Noto's drawings are held out, to test on a style that is not in the training data.
OUT_DIR then contains

    images/<set>/<icon>.png    96 x 96 RGBA on a transparent background: 1.5 times the 64 px that the tiny models take
    train.json, noto.json      [{"image": "images/twemoji/red-apple.png", "captions": ["red apple", ...]}, ...]
    README.md                  the packages, their versions and licences
    packages/                  the packages as they were fetched; they are not fetched again

The first caption is the name of the class. The names that other sets give to the same character follow, and keywords.
Sets use different names ("chart-increasing", "chartupwardstrend"), so the class of an icon is its Unicode character, if
a package states which one it shows. The versions of the packages are fixed, so that everyone gets the same data.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path

from PIL import Image
from tqdm import tqdm

PACKAGES = {  # in the order in which names are learnt: sets that state code points first, fxemoji's own names last
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "openmoji": "@iconify-json/openmoji@1.2.29",
    "fluent-emoji-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "noto": "@iconify-json/noto@1.2.9",
    "fluent-emoji": "@iconify-json/fluent-emoji@1.2.7",
    "emojione": "@iconify-json/emojione@1.2.3",
    "emojione-v1": "@iconify-json/emojione-v1@1.2.3",
    "streamline-emojis": "@iconify-json/streamline-emojis@1.2.4",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
    "fluent-emoji-3d": "@lobehub/fluent-emoji-3d@1.1.0",
}
# What the info.json of packages of WebP files named by code points would say, if they had one. Only pictures that
# fluent-emoji-flat has too are taken: Microsoft draws no flags of countries, and those in the package are Noto's.
PICTURES = {
    "fluent-emoji-3d": {
        "name": "Fluent Emoji 3D",
        "author": {"name": "Microsoft Corporation", "url": "https://github.com/microsoft/fluentui-emoji"},
        "license": {"spdx": "MIT"},
    }
}
HELD_OUT = "noto"  # noto-v1 and Blobmoji are Noto's drawings too, and must not be added to the others
VOCABULARY = "emojilib@4.0.3"  # a name and keywords for each character
PIXELS = 96
COMMON = 10  # a keyword that more characters have than this ("food", "face") is too general for a caption

# What is shown by icons with a misleading or meaningless name, as a character or a name.
RENAMED = {
    "emojione": "flag-for-swaziland=🇸🇿",
    "emojione-v1": "flag-for-swaziland=🇸🇿 lips2=👄",
    "streamline-emojis": """
        2=🐣 amazed-face=😮 amusing-face=🤭 anxious-face=😚 computer-disk=💾 crazy-face=🤪 game-dice=🎲
        gesturing-ok-1=woman-gesturing-ok hourglass-not-done-1=⌛ tennis-1=🎾 turkey=🇹🇷""",
    # This set names icons by rules of its own and without hyphens. Icons that neither another set's name nor this table
    # explains are left out, and so is "heartblue", a broken drawing.
    "fxemoji": """
        2hearts=💕 acorn=acorn americasglobe=🌎 anger=💢 angry=😠 anguish=😧 anticlockwiseupwardsanddownwardsarrows=🔄
        aok=👌 arrowrightwardsdownwards=⤵ arrowrightwardsupwards=⤴ asiaaustraliaglobe=🌏 astonished=😵
        backwithleftwardsarrow=🔙 ballotboldscriptx=❌ banknotedollar=💵 banknoteeuro=💶 banknotepound=💷
        banknoteyen=💴 beachumbrella=🏖 bellcancellation=🔕 blackdownpointingdoublearrow=⏬ blackdroplet=💧
        blackleftpointingarrow=◀ blackleftpointingdoublearrow=⏪ blackmissingsmiley=🙂 blackquestionmark=❓
        blackrightpointingarrow=▶ blackrightpointingdoublearrow=⏩ blackuppointingdoublearrow=⏫ blackwaving=🏴
        blonde=👱 bolt=⚡ bookmarktab=📑 boot=👢 bow=🎀 bowing=🙇 bride=👰 bunny=🐰 bunny-ears=👯 bunnyside=🐇 cat=🐱
        catside=🐈 cellphone=📱 chartdownwardstrend=📉 chartupwardstrend=📈 chartupwardstrendyen=💹 chilipepper=🌶
        chineseflag=🇨🇳 cjkunifiedideograph-a=🈯 cjkunifiedideograph-b=🈺 cjkunifiedideograph-c=🈲
        cjkunifiedideograph-d=🈳 cjkunifiedideograph-e=🈴 cjkunifiedideograph-f=🈵 cjkunifiedideograph-g=🈶
        cjkunifiedideograph-h=🈷 cjkunifiedideograph-i=🈚 cjkunifiedideograph-j=🈸 cjkunifiedideograph-k=🈹 clap=👏
        clock12oclock=🕛 clock12thirty=🕧 clock1oclock=🕐 clock1thirty=🕜 clock2oclock=🕑 clock2thirty=🕝
        clock3oclock=🕒 clock3thirty=🕞 clock4oclock=🕓 clock4thirty=🕟 clock5thirty=🕠 clock6oclock=🕕 clock6thirty=🕡
        clock7oclock=🕖 clockwisedownupcircledarrows=🔃 clockwiserightwardsleftwardscirclearrows=🔁
        clockwiserightwardsleftwardscirclearrowsone=🔂 closedmailboxlowered=📪 closedmailboxraised=📫 coldsweat=😰
        confetti=🎊 confounded=😖 confused=😕 construct=👷 construction=🏗 contact=👤 contact2=👥 controlknob=🎛 cop=👮
        couple=💑 couplekiss=💏 crying=😢 dash=💨 devilhorns=😈 diamondshapewithdotinside=💠 disappointed=😞
        dissapointedrelief=😥 dog=🐶 dogside=🐕 doubleexclaimationmark=‼ down=👇 downpointingsmallredtrisngle=🔽
        dragonhead=🐲 dragonside=🐉 eightspokedasterix=✳ endwithleftwardsarrow=🔚 envelopedownarrowabove=📩
        europeafricaglobe=🌍 evergreen=🌲 exclaimationquestionmark=⁉ expressionless=😑 fallingleaf=🍂 faxicon=📠
        fearful=😨 fishcakeswirl=🍥 fistedhand=👊 flexbicep=💪 floppydisk2=💾 flushed=😳 forkknife=🍽 foxgrin=🦊
        foxsmiling=🦊 foxwry=🦊 franceflag=🇫🇷 frontfacingchick=🐥 frown=🙍 frownmouth=😦 gem=💎 girlgirl=👭 girlguy=👫
        gma=👵 gpa=👴 greatbritainflag=🇬🇧 grimacing=😬 grin=😀 grineyes=😁 grinsquint=😆 grinsweat=😅 grintears=😂
        grinwide=😃 grinwideeyes=😄 guapimao=👲 guyguy=👬 halo=😇 hampster=🐹 hand=✋ handheldvideocamera=📹 hands=👐
        handup=🙋 headmassage=💆 heartarrow=💘 hearteyes=😍 heartgreen=💚 heartpurple=💜 heartribbon=💝 heartyellow=💛
        heavyexclaimationmarksymbol=❗ heavymultiplicationsymbol=✖ heels=👠 high5=🙌 highbrightness=🔆
        highspeedtrainbulletnose=🚅 hushed=😯 index=☝ italianflag=🇮🇹 japaneseangrymask=👺 japanflag=🇯🇵 keyboard=🎹
        kiss=😗 kissclosedeyes=😚 kisseyes=😙 kissing=😘 koreaflag=🇰🇷 leaffluttering=🍃 left=👈 leftmagnifyingglass=🔍
        leopardside=🐆 lips=👄 lockandkey=🔐 loudlycrying=😭 lowbrightness=🔅 lowerleftpen=🖊 mahjong=🀄 makeupbag=👝
        manltepiececlock=🕰 mansshirt=👕 medicalmask=😷 mensrunner=👟 mensshoe=👞 meridianglobe=🌐 monkeyhear=🙉
        monkeysee=🙈 monkeyspeak=🙊 mouse=🐭 mouseside=🐁 negativesquaredlatincaptiala=🅰
        negativesquaredlatincaptialb=🅱 negativesquaredlatincaptialo=🅾 neutral=😐 nogesture=🙅 nomouth=😶
        nooneunder18symbol=🔞 notebookdecorativecover=📔 okgesture=🙆 onarrowleftright=🔛 openmailboxlowered=📭
        openmailboxraised=📬 openmouth=😮 outbox=📤 pensive=😔 perservere=😣 personalcomputer=🖥 phonerightarrowleft=📲
        pig=🐷 pigside=🐖 pigsnout=🐽 pinkwallet=👛 poo=💩 potablewatersystem=🚰 pout=🙎 pouting=😡 pray=🙏 present=🎁
        printericon=🖨 racecar=🏎 raincloud=🌧 raisedhandpartfingers=🖖 raisedhandsfingerssplayed=🖐 relieved=😌
        reminder=🎗 reversehandmiddlefinger=🖕 right=👉 rightmagnifyingglass=🔎 running=🏃 russianflag=🇷🇺
        saggitarius=♐ sandals=👡 screamfear=😱 silhouetteohjapan=🗾 sixpointedstarwithdot=🔯 sleeping=😴 sleepy=😪
        sleuthspy=🕵 smallfrown=🙁 smallsmile=🙂 smileeyes=😊 smiletongue=😋 smirk=😏 snowcloud=🌨 snowmountains=🏔
        softshellfloppy=💾 soonwithrightarrow=🔜 spanishflag=🇪🇸 speaker3soundwaves=🔊 speakercancellation=🔇
        speakeronesoundwave=🔉 speechbubble=💬 spurtingwhale=🐳 squaredup=🆙 stormcloud=🌩 studiomic=🎙 sunglasses=😎
        sunraincloud=🌦 sunrays=☀ sweat=😓 sweatsplash=💦 swimming=🏊 telephonereceiver2=📞 ten=🔟 tennisball=🎾
        thoughtbaloon=💭 tie=👔 tiger=🐯 tigerside=🐅 tired=😫 tongueout=😛 tongueoutwink=😜 tongueoutwink2=😝
        topwithupwardsarrow=🔝 toykotower=🗼 triumph=😤 turban=👳 twobuttonmouse=🖱 unamused=😒 up=👆
        uppointingsmallredtrisngle=🔼 videocasette=📼 waitress=💁 walking=🚶 waningbibbousmoon=🌖 wave=🌊 waving=👋
        weary=😩 whiteexclaimationmark=❕ whitesunsmallcloud=🌤 winking=😉 womansshirt=👚 worried=😟""",
}
BOX = {"left": 0, "top": 0, "width": 16, "height": 16}  # the format's defaults for values that a set leaves out

README = """# Pictograms

{summary}
Written by `examples/pictograms.py` of miniclip. Captions: the icons' names, and keywords from {vocabulary} (MIT).

| set | npm package | author | licence | pictures |
|---|---|---|---|---|
{table}
"""

RENAMED = {icons: dict(pair.split("=") for pair in table.split()) for icons, table in RENAMED.items()}


def fetch(package: str, folder: Path) -> Path:
    """The archive of an npm package "NAME@VERSION" in `folder`, fetched by `npm pack` if it is not there."""
    archive = folder / (re.sub("[/@]", "-", package.lstrip("@")) + ".tgz")
    if archive.exists():
        return archive
    if shutil.which("npm") is None:
        raise SystemExit(f"npm was not found; it is needed to fetch {package}. Install Node.js, which includes it.")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as arriving:  # a download that breaks off leaves no archive
        done = subprocess.run(["npm", "pack", package, "--pack-destination", arriving], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"npm could not fetch {package}:\n{done.stderr}")
        next(Path(arriving).glob("*.tgz")).replace(archive)
    return archive


def read(archive: Path, name: str) -> dict:
    """The value in a JSON file of a package's archive."""
    with tarfile.open(archive) as files:
        return json.load(files.extractfile(f"package/{name}"))


def read_pictures(archive: Path, characters: set[str]) -> dict:
    """The pictures of these characters, in the form of the other sets' icons.json: {"icons": {code points: ...}}."""
    with tarfile.open(archive) as files:
        found = {Path(file.name).stem: files.extractfile(file).read() for file in files if file.name.endswith(".webp")}
    # Some characters occur twice, as 23-fe0f-20e3 and 0023-fe0f-20e3; the flag of a country is 1f3f4-e0067_...
    codes = {character(name.replace("_", "-")): name for name in found}
    return {"icons": {codes[x]: {"picture": found[codes[x]]} for x in sorted(characters & codes.keys())}}


def slug(name: str) -> str:
    """A name in the form that icon sets use: "Man’s shoe" and "man_s_shoe" -> "mans-shoe"."""
    ascii_only = unicodedata.normalize("NFKD", name.lower().replace("’", "")).encode("ascii", "ignore").decode()
    return re.sub("(?<=[a-z]{3})-s(?=-|$)", "s", re.sub("[^a-z0-9]+", "-", ascii_only).strip("-"))


def caption(name: str) -> str:
    """An icon's name in words: "flag-for-jordan" -> "flag of jordan", "mans-shoe" -> "man's shoe"."""
    words = slug(name).replace("-", " ")
    words = re.sub("^(flag (for )?)+(?!in hole)", "flag of ", words)
    words = re.sub(r"\b((wo)?m[ae]n|worker)s (?=\w)", r"\1's ", words)
    return re.sub(r"\bo ?clock\b", "o'clock", re.sub(r"\bu s\b", "us", words))


def plain(text: str) -> str:
    """A character without variation selectors (text or emoji style), which not all packages have."""
    return text.replace("\ufe0f", "").replace("\ufe0e", "")


def character(codes: str) -> str:
    """A character from code points, "1f1ef-1f1f4" -> "🇯🇴"; "" from private ones, which only their set defines."""
    text = "".join(chr(int(code, 16)) for code in codes.split("-"))
    return "" if any(unicodedata.category(letter) == "Co" for letter in text) else plain(text)


def has_skin_tone(concept: str) -> bool:
    return bool(re.search("[\U0001f3fb-\U0001f3ff]|skin-tone", concept))


class Concepts:
    """What icons show. A concept is a Unicode character if one is known, otherwise the icon's name."""

    def __init__(self, vocabulary: dict[str, list[str]]):
        self.vocabulary = {plain(text): words for text, words in vocabulary.items()}
        self.by_name: dict[str, str] = {}
        self.names: dict[str, list[str]] = {}  # by concept, as the sets write them
        uses = Counter(word for words in vocabulary.values() for word in words[1:])
        self.rare = {word for word, count in uses.items() if count <= COMMON}

    def learn(self, name: str, concept: str) -> None:
        """Note that `name` means `concept`, also without its hyphens, unless it has a meaning already."""
        self.by_name.setdefault(name.replace("-", ""), concept)
        if self.by_name.setdefault(name, concept) == concept:
            self.names.setdefault(concept, []).append(name)

    def learn_set(self, icons: dict, characters: dict[str, str]) -> None:
        """Learn the names and aliases of a set that states the code points of its icons."""
        for codes, name in sorted(characters.items(), key=lambda item: character(item[0]) not in self.vocabulary):
            if character(codes):
                self.learn(name, character(codes))
        for alias, icon in icons.get("aliases", {}).items():
            if icon.keys() == {"parent"} and icon["parent"] in self.by_name:  # otherwise it is mirrored or rotated
                self.learn(alias, self.by_name[icon["parent"]])

    def learn_vocabulary(self) -> None:
        """Learn the names of the vocabulary, then Unicode's, which older sets use: "black spade suit"."""
        for text, words in self.vocabulary.items():
            self.learn(slug(words[0]), text)
        for text in self.vocabulary:
            if len(text) == 1:
                self.by_name.setdefault(slug(unicodedata.name(text, "")).replace("-", ""), text)

    def find(self, icon: str, icons: str) -> str | None:
        """The concept of an icon of a set; None if its name is not understood."""
        if icons in PICTURES:
            return character(icon) if character(icon) in self.names else None
        name = RENAMED.get(icons, {}).get(icon, icon)
        if not name.isascii():
            return plain(name)
        stem = re.sub("-[0-9]$", "", name)  # "boar-2"
        for known in (name, stem, name.replace("flag-for-", "flag-"), f"flag-{name}"):
            if known in self.by_name:
                return self.by_name[known]
        if icons == "fxemoji" and name == icon:
            return None
        self.learn(stem, stem)
        return stem

    def title(self, concept: str) -> str:
        """The name of the class: the vocabulary's, if no other character has it, otherwise the shortest."""
        known = [slug(words) for words in self.vocabulary.get(concept, [])[:1]]
        names = sorted(self.names[concept], key=lambda name: (name not in known, len(name), name))
        return caption(names[0])

    def captions(self, concept: str, titles: set[str]) -> list[str]:
        """The name of the class, then other names and keywords that neither name another class nor are common."""
        words = [word.replace("\xa0", " ") for word in self.vocabulary.get(concept, [""])[1:] if word in self.rare]
        words = [word for word in words if re.fullmatch("[a-z][a-z' -]{2,}", word)]
        others = [word for word in [*map(caption, self.names[concept]), *words] if word not in titles]
        return list(dict.fromkeys([self.title(concept), *others]))


def render(icon: dict, icons: dict) -> bytes:
    """An icon of a set drawn as a PNG file, PIXELS x PIXELS and RGBA, and centred if it is not square."""
    if "picture" in icon:
        file = io.BytesIO()
        Image.open(io.BytesIO(icon["picture"])).convert("RGBA").resize((PIXELS, PIXELS)).save(file, "png")
        return file.getvalue()
    try:
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise SystemExit("drawing the icons needs resvg-py: pip install 'miniclip[pictograms]'") from error
    left, top, width, height = ({**BOX, **icons, **icon}[side] for side in BOX)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{PIXELS}" '
        f'height="{PIXELS}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )
    return bytes(svg_to_bytes(svg_string=svg, skip_system_fonts=True))


def draw_set(name: str, icons: dict, concepts: Concepts) -> list[tuple[str, str, bytes]]:
    """Every icon of a set whose name is understood, as (icon, concept, PNG file), sorted by icon.

    Icons that the set has withdrawn ("hidden"), skin tones and empty drawings are left out. If several icons have the
    same drawing ("flag-norway", "flag-svalbard-and-jan-mayen"), the one with the shortest name is taken.
    """
    found = {icon: concepts.find(icon, name) for icon, drawing in icons["icons"].items() if not drawing.get("hidden")}
    wanted = [icon for icon, concept in found.items() if concept and not has_skin_tone(concept)]
    drawn: dict[bytes, str] = {}
    for icon in tqdm(sorted(wanted, key=lambda icon: (len(icon), icon)), desc=name, unit="icon"):
        drawn.setdefault(render(icons["icons"][icon], icons), icon)
    kept = [(icon, found[icon], png) for png, icon in drawn.items() if Image.open(io.BytesIO(png)).getbbox()]
    unread = sum(concept is None for concept in found.values())
    print(
        f"{name}: {len(kept)} of {len(found)} icons; left out: {len(found) - len(wanted) - unread} with a skin tone, "
        f"{unread} without a readable name, {len(wanted) - len(kept)} empty or the same drawing again"
    )
    return sorted(kept)


def write_json(path: Path, rows: list[dict]) -> None:
    path.write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n", encoding="utf-8")


def main(out: Path) -> None:
    archives = {name: fetch(package, out / "packages") for name, package in PACKAGES.items()}
    concepts = Concepts(read(fetch(VOCABULARY, out / "packages"), "dist/emoji-en-US.json"))
    sets = {}
    for name, archive in archives.items():
        if name in PICTURES:
            own = read(archives["fluent-emoji-flat"], "chars.json")
            sets[name] = read_pictures(archive, {character(codes) for codes in own})
        else:
            sets[name] = read(archive, "icons.json")
            concepts.learn_set(sets[name], read(archive, "chars.json"))
    concepts.learn_vocabulary()
    drawings = {name: draw_set(name, icons, concepts) for name, icons in sets.items()}

    titles = {concepts.title(concept) for drawn in drawings.values() for _, concept, _ in drawn}
    train, held_out, table = [], [], []
    for name, drawn in drawings.items():
        (out / "images" / name).mkdir(parents=True, exist_ok=True)
        for icon, concept, png in drawn:
            image = f"images/{name}/{icon}.png"
            (out / image).write_bytes(png)
            row = {"image": image, "captions": concepts.captions(concept, titles)}
            (held_out if name == HELD_OUT else train).append(row)
        info = PICTURES.get(name) or read(archives[name], "info.json")
        author, licence = info["author"], info["license"]["spdx"]
        table.append(
            f"| {info['name']} | {PACKAGES[name]} | {author['name']}, {author['url']} | {licence} | {len(drawn)} |"
        )
    write_json(out / "train.json", train)
    write_json(out / f"{HELD_OUT}.json", held_out)
    seen = {row["captions"][0] for row in train}
    shared = sum(row["captions"][0] in seen for row in held_out)
    summary = (
        f"{len(train)} pictures of {len(seen)} names for training; {len(held_out)} held out ({HELD_OUT}), "
        f"{shared} of them with a name that the training pictures have too."
    )
    readme = README.format(summary=summary, vocabulary=VOCABULARY, table="\n".join(table))
    (out / "README.md").write_text(readme, encoding="utf-8")
    print(summary)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", metavar="OUT_DIR", type=Path)
    main(parser.parse_args().out)
