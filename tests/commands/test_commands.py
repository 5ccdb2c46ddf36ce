"""The commands, run as a user runs them, on a small model with OpenAI's vocabulary."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import miniclip
from miniclip import commands, load, tokenize
from miniclip.commands import main
from miniclip.config import MODELS, CLIPConfig, PreprocessConfig, TextConfig, ViTConfig, openai_transformer
from miniclip.data.templates import TEMPLATES
from miniclip.embed import embed_images
from miniclip.models import CLIP
from miniclip.preprocess import open_image
from miniclip.zero_shot import zero_shot_weights

CONFIG = CLIPConfig(
    embed_dim=32,
    vision=ViTConfig(32, 8, openai_transformer(64, 1)),
    text=TextConfig(77, 49408, openai_transformer(64, 1)),
    preprocess=PreprocessConfig(32),
)
IMAGES = Path(__file__).parents[2] / "examples" / "images"
PICTURES = [str(IMAGES / name) for name in ("dog.png", "guitar.png", "pizza.png")]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    save_file(CLIP(CONFIG).state_dict(), path)
    return str(path)


def probabilities(model: str, picture: str, labels: list[str]) -> list[float]:
    """What openai/CLIP's own example computes."""
    clip, preprocess = load(model, device="cpu")
    with torch.no_grad():
        logits, _ = clip(preprocess(open_image(picture)).unsqueeze(0), tokenize(labels))
    return logits[0].softmax(dim=-1).tolist()


def test_models(capsys):
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:10]] == list(MODELS)[:9]
    assert "151,277,313" in next(line for line in lines if line.startswith("ViT-B/32"))
    assert main(["models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    # payload of the released file, which is 0.2% larger
    assert rows["ViT-B/32"]["bytes"] == 353_436_676
    assert rows["RN50"]["bytes"] == 255_262_844
    assert rows["ViT-L/14@336px"]["pixels"] == 336
    row = rows["laion/CLIP-ViT-H-14-laion2B-s32B-b79K"]
    assert (row["parameters"], row["data"], row["published"]["imagenet"]) == (986_109_441, "LAION-2B", 77.96)
    assert any(line.split()[:2] == [row["name"], "986,109,441"] for line in lines)


def test_classify(model, capsys):
    labels = ["a dog", "a guitar", "a slice of pizza"]
    assert main(["classify", *PICTURES, "--labels", ", ".join(labels), "--model", model, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [result["image"] for result in results] == PICTURES
    for result in results:
        expected = probabilities(model, result["image"], labels)
        assert list(result["probabilities"]) == labels
        np.testing.assert_allclose(list(result["probabilities"].values()), expected, atol=1e-6)


def test_classify_prints_the_likeliest_first(model, capsys):
    labels = ["dog", "guitar", "pizza"]
    options = ["--labels", ",".join(labels), "--template", "a photo of a {}.", "--model", model]
    assert main(["classify", PICTURES[0], *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == PICTURES[0]
    expected = probabilities(model, PICTURES[0], [f"a photo of a {label}." for label in labels])
    ranked = sorted(zip(expected, labels, strict=True), reverse=True)
    assert [line.split() for line in lines[1:]] == [[f"{p:.2%}", label] for p, label in ranked]


def test_classify_folders_with_labels_of_all_kinds(model, tmp_path, capsys):
    for picture in PICTURES:
        shutil.copy(picture, tmp_path)
    (tmp_path / "labels.txt").write_text("\ufeffa pizza\n\n a dog \n", encoding="utf-8")
    options = ["--labels", "a dog, a cat", "--label", "red, round", "--labels-file", str(tmp_path / "labels.txt")]
    options += ["--template", "a photo of {}.", "--template", "cifar", "--model", model]
    assert main(["classify", str(tmp_path), *options, "--scores", "cosine", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [Path(result["image"]).name for result in results] == ["dog.png", "guitar.png", "pizza.png"]
    labels = ["a dog", "a cat", "red, round", "a pizza"]
    clip, preprocess = load(model, device="cpu")
    weights = zero_shot_weights(clip, labels, ["a photo of {}.", *TEMPLATES["cifar"]])
    expected, _ = embed_images(clip, preprocess, PICTURES)
    for result, row in zip(results, expected @ weights, strict=True):
        assert list(result["cosines"]) == labels
        np.testing.assert_allclose(list(result["cosines"].values()), row, atol=1e-6)
    assert main(["classify", str(tmp_path), *options, "--csv"]) == 0
    header, *rows = csv.reader(capsys.readouterr().out.splitlines())
    assert header == ["picture", *labels]
    assert [row[0] for row in rows] == [str(tmp_path / Path(picture).name) for picture in PICTURES]
    assert all(sum(map(float, row[1:])) == pytest.approx(1) for row in rows)


def test_one_label_has_a_cosine_but_no_probability(model, capsys):
    assert main(["classify", PICTURES[0], "--labels", "a dog", "--model", model]) == 2
    assert "a single label always has the probability 100%" in capsys.readouterr().err
    assert main(["classify", PICTURES[0], "--labels", "a dog", "--model", model, "--scores", "cosine"]) == 0
    printed = capsys.readouterr().out
    assert main(["similarity", PICTURES[0], "--text", "a dog", "--model", model]) == 0
    assert capsys.readouterr().out == printed
    assert main(["similarity", PICTURES[0], "--text", "a dog", "--text", "x", "--model", model, "--json"]) == 0
    ((_, cosines),) = (result.values() for result in json.loads(capsys.readouterr().out))
    assert list(cosines) == ["a dog", "x"]
    assert f"{cosines['a dog']:.4f}" in printed


def test_classify_draws(model, tmp_path):
    plot = tmp_path / "plot.png"
    assert main(["classify", *PICTURES, "--labels", "dog,guitar", "--model", model, "--plot", str(plot)]) == 0
    assert Image.open(plot).size[1] > 900  # three rows


def test_classify_draws_no_more_than_a_page(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("miniclip.commands.classify.MOST_DRAWN", 2)
    arguments = ["--labels", "a,b", "--model", model, "--plot", str(tmp_path / "a.png")]
    assert main(["classify", *PICTURES[:3], *arguments]) == 0
    assert "a.png shows the first 2 of 3 pictures" in capsys.readouterr().err
    height = Image.open(tmp_path / "a.png").height
    assert main(["classify", *PICTURES[:2], *arguments]) == 0
    assert Image.open(tmp_path / "a.png").height == height and not capsys.readouterr().err


def test_classify_draws_what_it_prints(model, capsys, tmp_path, monkeypatch):
    """A single label has no probability other than 100%."""
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr("miniclip.io.write_atomically", lambda _, write: write(None))
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    arguments = ["classify", PICTURES[0], "--label", "a $dog$", "--model", model, "--plot", str(tmp_path / "a.png")]
    assert main([*arguments, "--scores", "cosine"]) == 0
    cosine = float(capsys.readouterr().out.splitlines()[1].split()[0])
    axis = drawn[0].axes[1]
    assert axis.patches[0].get_width() == pytest.approx(cosine, abs=1e-4)
    assert axis.texts[0].get_text() == f"cosine {cosine:.4f}"
    assert main([*arguments, "--label", "b"]) == 0
    assert drawn[1].axes[1].texts[0].get_text().endswith("%")


def test_embed_pictures_and_texts(model, tmp_path, capsys):
    texts = tmp_path / "lines.txt"
    texts.write_text("a dog\n\na guitar\n" + "word " * 100 + "\n", encoding="utf-8")
    folder = tmp_path / "folder"
    folder.mkdir()
    for picture in PICTURES:
        shutil.copy(picture, folder)
    broken = folder / "broken.jpg"
    broken.write_bytes(Path(PICTURES[0]).read_bytes()[:500])
    (folder / "notes.md").write_text("not a picture")
    output = tmp_path / "out.safetensors"

    status = main(["embed", str(folder), str(texts), "-o", str(output), "--model", model, "--batch-size", "2"])
    assert status == 1  # some were bad, and the rest is there
    errors = capsys.readouterr().err
    assert str(broken) in errors
    assert f"{texts}:4" in errors
    assert "2 of 7 inputs could not be used" in errors

    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["images"]) == [str(folder / Path(picture).name) for picture in PICTURES]
    assert json.loads(metadata["texts"]) == ["a dog", "a guitar"]
    clip, preprocess = load(model, device="cpu")
    with torch.no_grad():
        images = clip.encode_image(torch.stack([preprocess(open_image(p)) for p in PICTURES]), normalize=True)
        words = clip.encode_text(tokenize(["a dog", "a guitar"]), normalize=True)
    embeddings = load_file(output)
    torch.testing.assert_close(embeddings["images"], images, atol=1e-6, rtol=0)
    torch.testing.assert_close(embeddings["texts"], words, atol=1e-6, rtol=0)


@pytest.mark.parametrize("suffix", ["npy", "csv"])
def test_embed_for_other_programs(model, suffix, tmp_path):
    output = tmp_path / f"out.{suffix}"
    assert main(["embed", *PICTURES, "-o", str(output), "--model", model]) == 0
    expected, _ = embed_images(*load(model, device="cpu"), PICTURES)
    if suffix == "npy":
        found = np.load(output)
    else:
        names, *columns = zip(*csv.reader(output.open(encoding="utf-8", newline="")), strict=True)
        assert list(names) == PICTURES
        found = np.array(columns, dtype=np.float32).T
    np.testing.assert_array_equal(found, expected.numpy())


def test_options_of_pictures(model, tmp_path, capsys, monkeypatch):
    """--upright, --hidden and --max-pixels, by every command that reads pictures of folders."""
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "photos" / ".hidden").mkdir(parents=True)
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "photos" / "turned.png", exif=exif)
    Image.new("RGB", (300, 300)).save(tmp_path / "photos" / ".hidden" / "large.png")
    folder, output = str(tmp_path / "photos"), tmp_path / "out.safetensors"
    commands = {
        "embed": ["embed", folder, "-o", str(output)],
        "classify": ["classify", folder, "--labels", "a dog,a cat", "--json"],
        "similarity": ["similarity", folder, "--text", "a dog", "--json"],
        "search": ["search", folder, "a dog", "--json"],
    }

    def answer(name: str, *options: str) -> tuple[int, object]:
        capsys.readouterr()
        status = main([*commands[name], *options, "--model", model])
        printed = capsys.readouterr()
        assert ("exceeds Pillow's limit" in printed.err) == ("--max-pixels" in options)
        return status, load_file(output)["images"].tolist() if name == "embed" else json.loads(printed.out)

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    for name in commands:
        status, plain = answer(name)
        assert status == 0 and answer(name, "--upright") not in ((0, plain), (1, plain))
        results = answer(name, "--hidden")[1]
        assert len(results["results"] if name == "search" else results) == 2
    for name in ("embed", "classify", "similarity"):
        assert answer(name, "--hidden", "--max-pixels", "80000")[0] == 1
    index = ["index", folder, "-o", str(tmp_path / "index"), "--model", model]
    assert main([*index, "--upright", "--hidden", "--json"]) == 1  # the limit is still there
    report = json.loads(capsys.readouterr().out)
    assert report["pictures"] == 1 and "exceeds" in report["rejected"][0]
    assert main([*index, "--hidden", "--max-pixels", "90000"]) == 0
    assert "2 pictures (1 new, 1 unchanged)" in capsys.readouterr().out
    assert main(index) == 0
    assert "left out: 1 hidden files and folders" in capsys.readouterr().err


def test_convert(model, tmp_path):
    for output in ("a.pt", "b", "c.safetensors"):
        assert main(["convert", model, str(tmp_path / output)]) == 0
        model = str(tmp_path / output)
    original = CLIP(CONFIG).state_dict()
    assert load_file(tmp_path / "c.safetensors").keys() == original.keys()
    assert torch.load(tmp_path / "a.pt", weights_only=True).keys() == original.keys()
    assert json.loads((tmp_path / "b" / "config.json").read_text())["model_type"] == "clip"


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["classify", PICTURES[0], "--labels", "a,b", "--model", "ViT-B-32"], "did you mean ViT-B/32?"),
        (["classify", PICTURES[0]], f"or: miniclip classify {PICTURES[0]} --label 'a dog' --label 'a cat'\n"),
        (["classify", PICTURES[0], "a cup"], f"or: miniclip classify {PICTURES[0]} --label 'a cup'\n"),
        (["similarity", "a cup", PICTURES[0], "no"], f"similarity {PICTURES[0]} --text 'a cup' --text no\n"),
        (["similarity", "http://a.b/c d.png"], "similarity 'http://a.b/c d.png' --text 'a dog'\n"),
        (["classify", PICTURES[0], "--labels", " , "], "--labels: it is empty"),
        (["classify", PICTURES[0], "--labels", "a", "--template", "a photo"], "expected {} where the label goes"),
        (["classify", PICTURES[0], "--labels", "a,b", "--plot", "x.doc"], ".png, .svg or .pdf"),
        (["embed", PICTURES[0], "-o", "x.pt"], "ends in one of .safetensors, .npy, .csv"),
        (["embed", PICTURES[0], "-o", "x.npy", "--output-dtype", "bfloat16"], "NumPy has no bfloat16"),
        (["embed", PICTURES[0], "-o", "nowhere/x.safetensors"], "there is no folder nowhere"),
        (["embed", str(Path(__file__).parents[2] / "kernels"), "-o", "x.safetensors"], "no pictures or lines of text"),
        (["train"], "no data to train on"),
        (["train", str(IMAGES)], "has no folders of pictures"),
        (["clasify", "a.png"], "there is no command clasify: did you mean classify?\n"),
        ([PICTURES[0], "classify"], f"there is no command {PICTURES[0]}; expected one of models, classify"),
        (["explore", "prompts", "--templates", "a {}"], "--templates 'a {}': did you mean --template?; `miniclip"),
        (["classify", "a.png", "--labels", "a", "b c"], "unrecognized arguments: 'b c'; `miniclip classify --help`"),
        (["search", "a dog", str(IMAGES)], f"comes first: miniclip search {IMAGES} 'a dog'\n"),
        (["search", str(IMAGES.parents[1] / "weights" / "x y"), "a dog"], "weights/x y'`\n"),
        (["index", PICTURES[0], "-o", PICTURES[0]], f"-o {PICTURES[0]}.index`\n"),
        (["convert", "nothing.pt", "x"], "nothing.pt is neither a file or directory"),
    ],
)
def test_bad_arguments(arguments, fault, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a run's folder is made
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("miniclip: error: ")
    assert fault in error


@pytest.mark.parametrize("option", [["--device", "gpu"], ["--batch-size", "0"], ["--dtype", "int3"]])
def test_bad_options(option, capsys):
    assert main(["embed", PICTURES[0], "-o", "x.safetensors", *option]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"miniclip: error: argument {option[0]}: ") and option[1] in error
    assert "`miniclip embed --help` lists the options" in error


def parser_of(command: str):
    """The parser of a command's own arguments."""
    (subparsers,) = (action for action in commands._parser(command)._actions if action.dest == "==SUPPRESS==")
    return subparsers.choices[command]


def test_help_version_and_no_arguments(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"    {command}" in printed for command in commands.COMMANDS) and "--model tiny-ViT" in printed
    for arguments, expected in (["--version"], f"miniclip {miniclip.__version__}\n"), (["--help"], printed):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 0 and capsys.readouterr().out == expected
    for command in commands.COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        printed = capsys.readouterr().out
        assert len(re.findall(rf"^    miniclip {command}\b", printed, re.MULTILINE)) >= 2, "two examples"
        for action in parser_of(command)._actions:
            assert not (action.help or "").startswith("of "), "a sentence, or its part, with a subject"


def test_python_m_miniclip():
    done = subprocess.run([sys.executable, "-m", "miniclip", "--help"], capture_output=True, text=True, check=True)
    for command in ("models", "classify", "embed", "evaluate", "train", "convert"):
        assert command in done.stdout


def test_options_may_be_written_with_underscores(model, capsys):
    arguments = ["classify", PICTURES[0], "--label=a_b", "--label", "c_d", "--model", model, "--json"]
    assert main([*arguments, "--image_size", "64", "--context_length=77"]) == 0
    ((_, scores),) = (result.values() for result in json.loads(capsys.readouterr().out))
    assert list(scores) == ["a_b", "c_d"]  # values stay as they are
    assert main([*arguments, "--no_such", "1"]) == 2
    assert "unrecognized arguments: --no-such" in capsys.readouterr().err
    arguments = ["classify", "--labels", "a,b", "--model", model, "--", "--my_picture.png"]  # no option after --
    assert main(arguments) in (1, 2)
    assert "--my_picture.png" in capsys.readouterr().err
