"""miniclip.training.augment: what augmentations may do to a picture, and what not."""

from __future__ import annotations

import pytest
import torch

from miniclip.config import PreprocessConfig, ViTConfig, openai_transformer
from miniclip.data.seeds import generator
from miniclip.models.vit import VisionTransformer
from miniclip.training import augment
from miniclip.training.whiten import whiten_patches


def pictures(count=6, side=40, seed=0):
    """Noise, opaque in the middle."""
    images = torch.randint(256, (count, 4, side, side), generator=generator(seed, "test"), dtype=torch.uint8)
    images[:, 3] = 0
    images[:, 3, 10:-10, 10:-10] = 255
    return images


def names(count, name="apple"):
    return [(name,)] * count


@pytest.mark.parametrize("name", augment.AUGMENTATIONS)
def test_shape_range_and_determinism(name):
    images = pictures(side=32)
    change = augment.AUGMENTATIONS[name]
    pixels = change(images, 32, names(6), generator(1, "test"))
    assert pixels.shape == (6, 3, 32, 32)
    assert pixels.dtype == torch.float32
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    assert torch.equal(pixels, change(images, 32, names(6), generator(1, "test")))
    assert name == "none" or not torch.equal(pixels, change(images, 32, names(6), generator(2, "test")))


@pytest.mark.parametrize("name", ["none", "photo", "pictogram"])
def test_other_sizes(name):
    assert augment.AUGMENTATIONS[name](pictures(), 24, names(6), generator(0, "test")).shape == (6, 3, 24, 24)


def test_cifar_needs_the_models_size():
    with pytest.raises(ValueError, match="40 pixels wide, the model takes 24"):
        augment.cifar(pictures(), 24, names(6), generator(0, "test"))


def test_none_is_the_picture_on_white():
    images = pictures()
    pixels = augment.none(images, 40, names(6), generator(0, "test"))
    inside, outside = pixels[:, :, 10:-10, 10:-10], pixels[:, :, :10]
    torch.testing.assert_close(inside, images[:, :3, 10:-10, 10:-10] / 255, atol=1e-5, rtol=0)
    torch.testing.assert_close(outside, torch.ones_like(outside))


@pytest.mark.parametrize("name", ["none", "photo", "pictogram"])
def test_the_colour_of_transparent_pixels_never_shows(name):
    images = pictures()
    hidden = images.clone()
    hidden[:, :3, :10] = 255 - hidden[:, :3, :10]
    shown = images.clone()
    shown[:, :3, 10:20] = 255 - shown[:, :3, 10:20]
    pixels, same, other = (
        augment.AUGMENTATIONS[name](x, 40, names(6), generator(0, "test")) for x in (images, hidden, shown)
    )
    assert torch.equal(pixels, same)
    assert not torch.equal(pixels, other)


def test_cifar_crops_are_windows_of_the_padded_picture():
    images = torch.zeros(200, 4, 32, 32, dtype=torch.uint8)
    images[:, 0, 16, 15] = 255  # one red pixel
    pixels = augment.cifar(images, 32, names(200), generator(0, "test"))
    places = pixels[:, 0].flatten(1).argmax(1)
    rows, columns = places // 32, places % 32
    assert pixels.sum() == 200
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (12, 20, 11, 20)  # mirrored: column 16, not 15


def left_halves(name, caption):
    """How much lies in the left half after augmentation, for 200 pictures that are black in the left half only."""
    images = torch.zeros(200, 4, 40, 40, dtype=torch.uint8)
    images[:, 3, :, :20] = 255
    pixels = augment.AUGMENTATIONS[name](images, 40, names(200, caption), generator(0, "test"))
    return (pixels[:, :, :, :16].mean((1, 2, 3)) < pixels[:, :, :, 24:].mean((1, 2, 3))).float().mean().item()


def test_what_speaks_of_sides_is_never_mirrored():
    assert left_halves("photo", "right arrow") == 1
    assert left_halves("photo", "The LEFT hand") == 1
    assert 0.3 < left_halves("photo", "apple") < 0.7


def test_pictogram_grounds_are_white_black_and_coloured():
    images = torch.zeros(400, 4, 16, 16, dtype=torch.uint8)
    corners = augment.pictogram(images, 16, names(400), generator(0, "test"))[:, :, 0, 0]
    assert (corners.amax(1) == 0).float().mean() > 0.04  # black, of any brightness
    assert ((corners.amax(1) - corners.amin(1)) > 0.2).float().mean() > 0.1
    assert (corners.amin(1) > 0.6).float().mean() > 0.3


def test_some_pictograms_lose_all_colour_and_most_do_not():
    images = torch.full((300, 4, 16, 16), 255, dtype=torch.uint8)
    images[:, 1:3] = 0
    pixels = augment.pictogram(images, 16, names(300), generator(0, "test"))[:, :, 8, 8]
    grey = ((pixels.amax(1) - pixels.amin(1)) < 1e-5).float().mean()
    assert 0.05 < grey < 0.17


def test_normalize():
    config = PreprocessConfig(2, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    pixels = augment.normalize(torch.ones(1, 3, 2, 2), config)
    assert pixels[0, :, 0, 0].tolist() == [1, 3, 0.5]


def test_patch_dropout_keeps_the_class_token_and_some_patches():
    torch.manual_seed(0)
    visual = VisionTransformer(ViTConfig(32, 8, openai_transformer(64, 1)), 8)
    lengths = []
    visual.ln_pre.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    dropout = augment.PatchDropout(visual, 0.75)
    images = torch.randn(2, 3, 32, 32)
    whole = visual(images)
    dropout.rng = generator(0, "test")
    part = visual(images)
    dropout.rng = generator(0, "test")
    assert torch.equal(visual(images), part)
    assert not torch.allclose(whole, part)
    dropout.rng = None
    assert torch.equal(visual(images), whole)
    assert lengths == [17, 5, 5, 17]


def test_pictogram_without_strength_only_mirrors():
    images = torch.randint(256, (40, 4, 32, 32), generator=generator(0, "test"), dtype=torch.uint8)
    plain = augment.none(images, 32, names(40), generator(0, "test"))
    still = augment.pictogram(images, 32, names(40, "left"), generator(1, "test"), strength=0.0)
    torch.testing.assert_close(still, plain, atol=1e-5, rtol=0)
    mirrored = augment.pictogram(images, 32, names(40), generator(1, "test"), strength=0.0)
    same = torch.isclose(mirrored, plain, atol=1e-5).flatten(1).all(1)
    flipped = torch.isclose(mirrored, plain.flip(-1), atol=1e-5).flatten(1).all(1)
    assert (same ^ flipped).all()
    assert 8 < same.sum() < 32


def test_whitened_patches_see_what_varies_little():
    """On pictures that are nearly flat a random patch embedding sees the mean; the whitened one also the rest."""
    torch.manual_seed(0)
    visual = VisionTransformer(ViTConfig(32, 8, openai_transformer(64, 1)), 8)
    pixels = torch.randn(200, 3, 1, 1) + 0.05 * torch.randn(200, 3, 32, 32)

    def rank(outputs):
        """How many directions the outputs fill, as the exponential of their spectrum's entropy."""
        outputs = outputs.flatten(2).transpose(1, 2).flatten(0, 1)
        share = torch.linalg.svdvals(outputs - outputs.mean(0)) ** 2
        share = share / share.sum()
        return (-share * share.log()).sum().exp().item()

    before = visual.conv1(pixels).detach()
    whiten_patches(visual, pixels)
    after = visual.conv1(pixels).detach()
    assert rank(after) > 1.5 * rank(before)
    assert after.std().item() == pytest.approx(0.5, rel=0.05)
