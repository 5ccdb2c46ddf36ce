"""The sample that comes with the package: 240 drawings of Noto Emoji, twelve of each of twenty kinds.

They are some of the 1,680 held-out drawings that the tiny models are measured on and were not trained on, chosen by
their names alone. The file is made from a folder that examples/pictograms.py drew:

    python -c "from miniclip.data.sample import *; make_sample('pictograms', 'miniclip/data/sample.zip')"

It contains sample.json, a list as `miniclip.data.lists` describes it, and the pictures, 96 x 96 on white, as lossless
WebP. Unpacked, it is a data set like any other.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

from PIL import Image

from miniclip.data.lists import Example
from miniclip.data.text import read_json
from miniclip.io import write_atomically
from miniclip.preprocess import open_image

FILE = Path(__file__).with_name("sample.zip")
LIST = "sample.json"
KINDS = {
    "mammal": "badger, bat, beaver, camel, cat, deer, elephant, giraffe, hedgehog, kangaroo, rabbit, zebra",
    "bird": "chicken, dodo, dove, duck, eagle, flamingo, goose, owl, parrot, peacock, penguin, swan",
    "sea animal": "blowfish, coral, crab, dolphin, fish, jellyfish, lobster, octopus, seal, shark, squid, whale",
    "insect": "ant, beetle, bug, butterfly, cockroach, cricket, fly, honeybee, lady beetle, monarch butterfly, "
    "mosquito, spider",
    "fruit": "banana, blueberries, cherries, coconut, grapes, kiwi fruit, lemon, mango, pear, pineapple, red apple, "
    "strawberry",
    "vegetable": "avocado, bell pepper, broccoli, carrot, cucumber, ear of corn, eggplant, garlic, mushroom, onion, "
    "pea pod, potato",
    "dish": "bagel, burrito, cheese wedge, croissant, french fries, hamburger, hot dog, pizza, sandwich, spaghetti, "
    "sushi, taco",
    "sweet": "birthday cake, candy, chocolate bar, cookie, cupcake, custard, doughnut, honey pot, ice cream, lollipop, "
    "pie, shortcake",
    "drink": "beer mug, beverage box, bubble tea, cocktail glass, cup with straw, glass of milk, hot beverage, mate, "
    "sake, teapot, tropical drink, wine glass",
    "plant": "cactus, cherry blossom, deciduous tree, evergreen tree, four leaf clover, hibiscus, maple leaf, "
    "palm tree, potted plant, rose, sunflower, tulip",
    "land vehicle": "ambulance, automobile, bicycle, bus, delivery truck, fire engine, kick scooter, locomotive, "
    "motorcycle, racing car, tractor, tram",
    "boat or aircraft": "airplane, canoe, ferry, flying saucer, helicopter, motor boat, parachute, passenger ship, "
    "rocket, sailboat, satellite, speedboat",
    "building": "castle, church, classical building, factory, hospital, house, hut, lighthouse, mosque, "
    "office building, school, tent",
    "sport": "badminton, baseball, basketball, bowling, boxing glove, curling stone, ice hockey, ice skate, "
    "skateboard, skis, soccer ball, tennis",
    "musical instrument": "accordion, banjo, drum, flute, guitar, harp, long drum, maracas, musical keyboard, "
    "saxophone, trumpet, violin",
    "tool": "axe, broom, carpentry saw, clamp, hammer, kitchen knife, ladder, magnet, scissors, screwdriver, shovel, "
    "wrench",
    "clothing": "backpack, bikini, billed cap, coat, dress, gloves, jeans, necktie, running shoe, scarf, "
    "socks, top hat",
    "device": "battery, camera, desktop computer, flashlight, joystick, laptop, light bulb, mobile phone, printer, "
    "radio, television, watch",
    "sky": "cloud, cloud with rain, comet, crescent moon, glowing star, high voltage, milky way, rainbow, "
    "ringed planet, snowflake, sun, tornado",
    "face": "angry face, clown face, cowboy hat face, crying face, face with tears of joy, kissing face, nerd face, "
    "sleeping face, smiling face with heart eyes, smiling face with sunglasses, thinking face, winking face",
}


def read_sample() -> list[Example]:
    """The pictures as RGB, each with its name, further names and keywords, and kind."""
    with zipfile.ZipFile(FILE) as files:
        return [
            Example(
                open_image(files.read(row["image"])).convert("RGB"),
                tuple(row["captions"]),
                row["category"],
                f"sample {row['image']}",
            )
            for row in json.loads(files.read(LIST))
        ]


def make_sample(pictograms: str | Path, output: str | Path) -> None:
    """Pack the drawings of KINDS from a folder that examples/pictograms.py made."""
    write_atomically(output, lambda file: _pack(Path(pictograms), file))


def _pack(pictograms: Path, output: Path) -> None:
    drawn = {row["captions"][0]: row for row in read_json(pictograms / "noto.json")}
    rows = []
    with zipfile.ZipFile(output, "w") as files:
        for kind, names in KINDS.items():
            for name in names.split(", "):
                image = open_image(pictograms / drawn[name]["image"]).convert("RGBA")
                on_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
                stream = io.BytesIO()
                on_white.save(stream, "webp", lossless=True, quality=100, method=6)
                path = f"{kind}/{name}.webp".replace(" ", "_")
                files.writestr(zipfile.ZipInfo(path), stream.getvalue())  # dated 1980: the same file every time
                rows.append({"image": path, "captions": drawn[name]["captions"], "category": kind})
        lines = ",\n".join(json.dumps(row) for row in rows)
        files.writestr(zipfile.ZipInfo(LIST), f"[\n{lines}\n]\n", zipfile.ZIP_DEFLATED)

