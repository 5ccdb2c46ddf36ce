"""CUDA graphs of small batches: when they are captured, replayed and dropped, with a recording that runs on the CPU.

What `capture` itself does needs a GPU.
"""

from __future__ import annotations

import sys
import threading
from functools import partial

import pytest
import torch
from fast_cases import ids, pixels, seeded_model

from miniclip.fast import clip as fast_clip
from miniclip.fast import gpu, graphs
from miniclip.fast.graphs import Graph, Graphs


@pytest.fixture
def captured(monkeypatch) -> list[tuple]:
    """The shapes that were captured. A replay of this recording computes again what was recorded."""
    shapes = []

    def capture(form, inputs):
        shapes.append(tuple(inputs.shape))
        inputs = inputs.clone()
        output = form(inputs)
        return Graph(inputs, output, lambda: output.copy_(form(inputs)))

    monkeypatch.setattr(graphs, "capture", capture)
    return shapes


@pytest.fixture
def model(monkeypatch):
    """On the CPU, by the forms for GPUs."""
    model = seeded_model("vit")
    assert model.graphs, "graphs are the default"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def image_embedding(self, image):
        return self._on_gpu("image", partial(gpu.image_embedding, self.visual), image, list(self.visual.parameters()))

    def text_embedding(self, text):
        form = partial(gpu.text_embedding, self, whole=True)
        return self._on_gpu("text", form, gpu.cut(text), list(self.parameters()))

    monkeypatch.setattr(fast_clip.FastCLIP, "image_embedding", image_embedding)
    monkeypatch.setattr(fast_clip.FastCLIP, "text_embedding", text_embedding)
    return model


def plain(model, method: str, inputs):
    model.graphs = False
    found = getattr(model, method)(inputs)
    model.graphs = True
    return found


@torch.no_grad()
def test_a_graph_for_each_number_of_pictures(model, captured):
    first, second, three = pixels(model, 2), pixels(model, 2) + 1, pixels(model, 3)
    outputs = [model.encode_image(image) for image in (first, second, three, first)]
    assert captured == [(2, *first.shape[1:]), (3, *first.shape[1:])]
    for image, output in zip((first, second, three, first), outputs, strict=True):  # none was overwritten
        torch.testing.assert_close(output, plain(model, "encode_image", image))
    assert not torch.equal(outputs[0], outputs[1])


@torch.no_grad()
def test_a_graph_for_each_padded_length_of_text(model, captured):
    texts = [ids(model, lengths) for lengths in ([3, 5], [8, 2], [9, 1], [2, 2])]
    for text in texts:
        torch.testing.assert_close(model.encode_text(text), plain(model, "encode_text", text))
    assert captured == [(2, 8), (2, model.context_length)] and 8 < model.context_length <= 16


@torch.no_grad()
def test_large_batches_and_other_settings(model, captured, monkeypatch):
    monkeypatch.setattr(fast_clip, "MOST_INPUTS", 2)
    model.encode_image(pixels(model, 3))
    assert not captured
    image = pixels(model, 2)
    model.encode_image(image)
    model.visual.transformer.resblocks[0].attn.backend = "torch"
    model.encode_image(image)
    assert len(captured) == 2
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    model.encode_image(pixels(model, 1))
    model.graphs = False
    model.encode_image(pixels(model, 1))
    assert len(captured) == 2


@torch.no_grad()
def test_edits_in_place_count_and_other_weights_drop_all_graphs(model, captured):
    image = pixels(model, 2)
    before = model.encode_image(image)
    model.visual.proj.mul_(2)
    torch.testing.assert_close(model.encode_image(image), 2 * before)
    model.visual.proj.data.mul_(2)
    torch.testing.assert_close(model.encode_image(image), 4 * before)
    assert len(captured) == 1
    model.visual.proj.data = model.visual.proj.data.clone() / 4
    torch.testing.assert_close(model.encode_image(image), before)
    assert len(captured) == 2
    model.visual.proj = torch.nn.Parameter(model.visual.proj * 3)
    torch.testing.assert_close(model.encode_image(image), 3 * before)
    assert len(captured) == 3 and len(model._kept["image graphs"]._graphs) == 1
    model.forget()
    model.encode_image(image)
    assert len(captured) == 4


def test_only_so_many_are_kept(captured, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    kept, double = Graphs(), lambda x: 2 * x
    for count in 1, 2, 1, 3, 1, 2:  # 1 was used after 2, so 3 takes the place of 2
        assert kept.run(double, torch.ones(count), []).tolist() == [2.0] * count
    assert captured == [(1,), (2,), (3,), (2,)] and len(kept._graphs) == 2


@torch.no_grad()
def test_where_a_capture_fails_the_model_goes_on_without(model, monkeypatch):
    tried = []

    def capture(form, inputs):
        tried.append(len(inputs))
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "capture", capture)
    image = pixels(model, 2)
    with pytest.warns(UserWarning, match="without CUDA graphs: operation not permitted"):
        found = model.encode_image(image)
    torch.testing.assert_close(model.encode_image(image), found)
    torch.testing.assert_close(found, plain(model, "encode_image", image))
    assert tried == [2]


def test_threads_get_their_own_answers(captured):
    """The same graph serves all of them; without the lock one thread's input replaces another's."""
    kept, wrong = Graphs(), []

    def form(x):
        return 2 * x

    def ask(number: float):
        for _ in range(300):
            x = torch.full((4,), number)
            if not torch.equal(kept.run(form, x, []), 2 * x):
                wrong.append(number)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=ask, args=(float(i),)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong and captured == [(4,)]


@torch.no_grad()
def test_each_stream_has_its_own_graph(captured, monkeypatch):
    kept = Graphs()
    for number in 7, 8, 7:
        monkeypatch.setattr(graphs, "stream", lambda inputs, number=number: number)
        kept.run(torch.neg, torch.ones(2), [])
    assert len(captured) == 2
