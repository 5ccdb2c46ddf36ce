"""Large jobs: the same embeddings as one by one, whatever the batches, threads and processes."""

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from miniclip import embed, load, parallel, tokenize
from miniclip.config import CLIPConfig, PreprocessConfig, TextConfig, ViTConfig, openai_transformer
from miniclip.embed import embed_images, embed_texts, stream_images, stream_texts
from miniclip.evaluation import DataError, zero_shot_weights
from miniclip.models import CLIP
from miniclip.preprocess import Preprocess

CONFIG = CLIPConfig(
    embed_dim=32,
    vision=ViTConfig(32, 8, openai_transformer(64, 1)),
    text=TextConfig(77, 49408, openai_transformer(64, 1)),
    preprocess=PreprocessConfig(32),
)
PREPROCESS = Preprocess(CONFIG.preprocess)
TEXTS = [" ".join(["word"] * (1 + 7 * i % 11)) + f" {i}" for i in range(23)]


@pytest.fixture(scope="module")
def model() -> CLIP:
    torch.manual_seed(0)
    return CLIP(CONFIG).eval()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list:
    """PIL images and files, each of its own colour."""
    folder = tmp_path_factory.mktemp("pictures")
    pictures = [Image.new("RGB", (40, 32), (10 * i, 255 - 9 * i, 99 * i % 256)) for i in range(11)]
    for i in (2, 5):
        pictures[i].save(folder / f"{i}.png")
        pictures[i] = folder / f"{i}.png"
    return pictures


@torch.no_grad()
def one_by_one(model, texts) -> torch.Tensor:
    model.fast = False
    rows = [model.encode_text(tokenize(text), normalize=True) for text in texts]
    del model.fast
    return torch.cat(rows)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_texts_keep_their_order(model, batch_size, monkeypatch):
    monkeypatch.setattr(embed, "WINDOW", 10)  # three of them
    embeddings, rejected = embed_texts(model, TEXTS, batch_size)
    assert rejected == {}
    assert not embeddings.requires_grad and not embeddings.is_inference()
    torch.testing.assert_close(embeddings, one_by_one(model, TEXTS), atol=1e-6, rtol=0)


def test_short_texts_are_not_computed_with_long_ones(model, monkeypatch):
    lengths = []
    encode = model.encode_text

    def spy(tokens, normalize):
        lengths.append((tokens.argmax(dim=-1) + 1).tolist())
        return encode(tokens, normalize)

    monkeypatch.setattr(model, "encode_text", spy)
    embed_texts(model, TEXTS, 4)
    flat = [length for batch in lengths for length in batch]
    assert flat == sorted(flat) and flat[0] < flat[-1]


def test_what_is_rejected_is_left_out(model, images, tmp_path):
    texts = [*TEXTS[:3], "word " * 80, *TEXTS[3:6], "word " * 90]
    embeddings, rejected = embed_texts(model, texts, 2)
    assert list(rejected) == [3, 7] and "82 tokens" in rejected[3]
    torch.testing.assert_close(embeddings, one_by_one(model, TEXTS[:6]), atol=1e-6, rtol=0)

    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    embeddings, rejected = embed_images(model, PREPROCESS, [images[0], broken, images[1], tmp_path / "gone.png"], 2)
    assert list(rejected) == [1, 3] and "broken.png" in rejected[1]
    torch.testing.assert_close(embeddings, embed_images(model, PREPROCESS, images[:2])[0], atol=1e-6, rtol=0)
    embeddings, rejected = embed_images(model, PREPROCESS, [broken])
    assert embeddings.shape == (0, 32) and list(rejected) == [0]


def test_upright(model, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.linear_gradient("L").convert("RGB")
    picture.save(tmp_path / "turned.png", exif=exif)
    turning = replace(PREPROCESS, upright=True)
    embeddings = [embed_images(model, each, tmp_path / "turned.png")[0] for each in (PREPROCESS, turning)]
    assert torch.equal(embeddings[0], embed_images(model, PREPROCESS, picture)[0])
    turned = picture.transpose(Image.Transpose.ROTATE_270)
    assert torch.equal(embeddings[1], embed_images(model, PREPROCESS, turned)[0])
    assert not torch.equal(*embeddings)


@pytest.mark.parametrize("fast", [True, False])
def test_what_the_towers_refuse(model, images, fast):
    """Each of these gave an AttributeError or an IndexError."""
    model = load("tiny-ViT", device="cpu")[0] if fast else model
    for wrong in (images[0], "x.png", Path("x.png"), [PREPROCESS(images[0])], np.zeros((1, 3, 32, 32)), None):
        with pytest.raises(TypeError, match=r"image is of type .*; expected float pixels \[N, 3, .*\]: stack"):
            model.encode_image(wrong)
    with pytest.raises(ValueError, match=r"image is torch.float32 \[3, 32, 32\]; expected float pixels"):
        model.encode_image(PREPROCESS(images[0]))
    for wrong in ("a dog", ["a dog"], np.zeros((1, 77), np.int32), [[1, 2]]):
        with pytest.raises(TypeError, match=r"text is of type .*; expected integer token ids .*tokenize\(\)"):
            model.encode_text(wrong)
    for wrong in (49408, -1, 10**6):
        refused = pytest.raises(ValueError, match=rf"ids from .*{wrong}.*; this model's are from 0 to 49407")
        with refused, torch.no_grad():
            model.encode_text(torch.tensor([[49406, wrong, 49407]]))


@pytest.mark.parametrize("workers", [1, 3])
def test_images_keep_their_order(model, images, workers):
    expected = torch.stack([PREPROCESS(Image.open(i) if isinstance(i, Path) else i) for i in images])
    with torch.no_grad():
        expected = model.encode_image(expected, normalize=True)
    embeddings, _ = embed_images(model, PREPROCESS, images, 3, workers=workers)
    torch.testing.assert_close(embeddings, expected, atol=1e-6, rtol=0)
    assert (embeddings[0] - embeddings[1]).abs().max() > 1e-5  # so that a wrong order is seen


def test_half_of_the_memory(model, images):
    for dtype in (torch.float16, torch.bfloat16):
        embeddings, _ = embed_texts(model, TEXTS, dtype=dtype)
        assert torch.equal(embeddings, embed_texts(model, TEXTS)[0].to(dtype))
    assert embed_images(model, PREPROCESS, images, dtype=torch.float16)[0].dtype == torch.float16


def test_nothing_to_embed(model):
    assert embed_texts(model, [])[0].shape == (0, 32)
    assert embed_images(model, PREPROCESS, [])[0].shape == (0, 32)


def test_one_input_is_a_list_of_one(model, images, tmp_path):
    """A string is never taken letter by letter."""
    for text in ("a dog", ["a dog"], ("a dog",), iter(["a dog"])):
        assert torch.equal(embed_texts(model, text)[0], one_by_one(model, ["a dog"]))
    expected = embed_images(model, PREPROCESS, [images[2]])[0]
    with Image.open(images[2]) as picture:
        for image in (images[2], str(images[2]), picture, {images[2]}, np.array([str(images[2])])):
            embeddings, rejected = embed_images(model, PREPROCESS, image)
            assert torch.equal(embeddings, expected) and not rejected
    for wrong in (None, 3, b"a dog", {"a dog": 1}):
        with pytest.raises(TypeError, match="expected a list of texts, paths or pictures, got"):
            embed_texts(model, wrong)
        with pytest.raises(TypeError, match="expected a list of texts, paths or pictures, got"):
            embed_images(model, PREPROCESS, wrong)


def test_decoding_stays_a_bounded_way_ahead(model):
    prepared = threading.Semaphore(0)
    count = 0

    def prepare(image):
        nonlocal count
        count += 1
        prepared.release()
        return PREPROCESS(image)

    batches = stream_images(model, prepare, [Image.new("RGB", (32, 32))] * 100, 4, workers=2)
    next(batches)
    for _ in range(4 + 8 - 1):  # the first batch, and two waiting, less the one whose place is not taken yet
        assert prepared.acquire(timeout=10)
    assert not prepared.acquire(timeout=0.2)
    assert count == 11
    batches.close()


def test_a_mistake_in_the_callers_code_is_not_hidden(model):
    with pytest.raises(ZeroDivisionError):
        embed_images(model, lambda image: 1 / 0, [Image.new("RGB", (32, 32))])
    with pytest.raises(TypeError, match="must be a str"):
        embed_texts(model, [None])


@pytest.mark.parametrize("processes", [2, 3, 30])
def test_shares_make_up_the_whole(model, images, processes, monkeypatch):
    """Bit for bit: no input is computed in other company than in one process."""
    whole = {"images": embed_images(model, PREPROCESS, images, 2)[0], "texts": embed_texts(model, TEXTS, 4)[0]}
    found = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    times = {name: torch.zeros(len(tensor)) for name, tensor in whole.items()}
    for rank in range(processes):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(parallel, "world_size", lambda: processes)
        jobs = {"images": stream_images(model, PREPROCESS, images, 2), "texts": stream_texts(model, TEXTS, 4)}
        for name, batches in jobs.items():
            for batch in batches:
                found[name][batch.indices] = batch.embeddings
                times[name][batch.indices] += 1
    for name in whole:
        assert torch.equal(found[name], whole[name])
        assert (times[name] == 1).all()


@pytest.mark.slow  # three processes start PyTorch
def test_torchrun_gives_the_same_file(tmp_path):
    torch.manual_seed(0)
    save_file(CLIP(CONFIG).state_dict(), tmp_path / "model.safetensors")
    for i in range(5):
        Image.new("RGB", (40, 32), (50 * i, 0, 9)).save(tmp_path / f"{i}.png")
    (tmp_path / "texts.txt").write_text("\n".join([*TEXTS, "word " * 80]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    results = []
    for count in (1, 2):
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", "-m"]
        output = tmp_path / f"{count}.safetensors"
        inputs = [str(tmp_path), str(tmp_path / "texts.txt")]
        command = ["miniclip", "embed", *inputs, "--batch-size", "2", "-o", str(output)]
        launch = launch if count > 1 else [sys.executable, "-m"]
        ran = subprocess.run(
            [*launch, *command, "--model", str(tmp_path / "model.safetensors")],
            env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1],
        )  # fmt: skip
        assert "82 tokens" in ran.stderr and output.exists(), ran.stderr
        assert ran.stdout.count("5 images, 23 texts") == 1  # one process reports
        results.append(load_file(output))
    for name in ("images", "texts"):
        assert torch.equal(results[0][name], results[1][name])


def test_a_classifier_is_kept_by_its_content(model, tmp_path, monkeypatch):
    classes, templates = ["dog", "cat"], ["a {}", "the {}"]
    weights = zero_shot_weights(model, classes, templates, tmp_path)
    assert torch.equal(weights, zero_shot_weights(model, classes, templates))
    (file,) = tmp_path.iterdir()

    def never(*_):
        raise AssertionError("encoded again")

    with monkeypatch.context() as patched:
        patched.setattr("miniclip.zero_shot.embed_texts", never)
        assert torch.equal(weights, zero_shot_weights(model, classes, templates, tmp_path))
        for other in ((["dog", "cow"], templates), (classes, ["a {}"]), (["dog cat"], templates)):
            with pytest.raises(AssertionError, match="encoded again"):
                zero_shot_weights(model, *other, tmp_path)
        bias = model.transformer.resblocks[0].mlp.c_fc.bias.data
        before = bias.clone()
        bias[3] = torch.nextafter(bias[3], torch.tensor(9.0))  # one bit of one weight
        with pytest.raises(AssertionError, match="encoded again"):
            zero_shot_weights(model, classes, templates, tmp_path)
        bias.copy_(before)
        with torch.no_grad():
            model.visual.proj[0, 0] += 1  # the image tower has no part in it
        assert torch.equal(weights, zero_shot_weights(model, classes, templates, tmp_path))

    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(DataError, match="is damaged"):
        zero_shot_weights(model, classes, templates, tmp_path)
