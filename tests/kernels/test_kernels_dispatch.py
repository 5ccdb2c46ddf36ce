"""Which operation runs as its kernel: by default, when asked for, and never. On a GPU that is not there."""

from __future__ import annotations

import math
import sys
import warnings
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="Triton is not installed; it is there for Linux only")
from pretend_gpu import HALF, Launches, on_gpu, pretend_gpu, texts_of

from miniclip import cosines, ops
from miniclip.fast import gpu, graphs
from miniclip.fast import ops as fused
from miniclip.kernels import attention as attention_module
from miniclip.kernels import bias_quick_gelu as gelu_module
from miniclip.kernels import dispatch, tiles
from miniclip.kernels.dispatch import Rule
from miniclip.training.loss import contrastive_loss

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
KERNELS = set(dispatch.MEASURES)


def kernels_in(call) -> set[str]:
    with Launches() as seen:
        call()
    return KERNELS & set(seen.names)


def test_an_image_tower_takes_at_most_120_launches(monkeypatch):
    with pretend_gpu(monkeypatch):
        model, image = on_gpu("ViT-B/32"), torch.empty(256, 3, 224, 224, **HALF)
        with Launches() as fast:
            assert model.encode_image(image).shape == (256, 512)
        model.fast = False
        with Launches() as plain:
            model.encode_image(image)
    assert fast.names.total() <= 120 < 200 < plain.names.total()
    assert fast.names["add_layer_norm"] == 22 and fast.names["bias_quick_gelu"] == 11
    assert not KERNELS & set(plain.names)


@pytest.mark.parametrize("batch, kernels", [(109, set()), (110, {"bias_quick_gelu", "add_layer_norm"}), (1, set())])
def test_row_kernels_begin_where_bytes_say(batch, kernels, monkeypatch):
    """add_layer_norm at 2^22 elements, which are 110 pictures; bias_quick_gelu at a quarter of them."""
    with pretend_gpu(monkeypatch):
        model = on_gpu("ViT-B/32")
        found = kernels_in(lambda: model.encode_image(torch.empty(batch, 3, 224, 224, **HALF)))
    assert found - {"bias_quick_gelu"} == kernels - {"bias_quick_gelu"}
    assert ("bias_quick_gelu" in found) == (batch * 50 * 3072 >= 2**22)


@pytest.mark.parametrize("count, longest, packed", [(64, 32, True), (63, 32, False), (64, 33, False), (1000, 14, True)])
def test_many_short_texts_are_packed(count, longest, packed, monkeypatch):
    with pretend_gpu(monkeypatch):
        model, text = on_gpu("ViT-B/32"), torch.empty(count, 77, dtype=torch.long, device="cuda")
        asked = texts_of(monkeypatch, longest, 10 * count)
        with Launches() as seen:
            assert model.encode_text(text).shape == (count, 512)
    assert ("attention_varlen" in seen.names) == packed
    assert asked == [1] and seen.names["cumsum"] == 1  # the host waits once; the starts are computed once


@pytest.mark.parametrize("longest, length", [(1, 8), (8, 8), (9, 16), (70, 72), (73, 77), (77, 77)])
def test_lengths_of_text_are_rounded_up(longest, length, monkeypatch):
    seen = []

    def attention(qkv, *_, **__):
        seen.append(qkv.shape[1])
        return qkv[:, :, 0].flatten(2)

    monkeypatch.setattr(gpu.ops, "attention", attention)
    with pretend_gpu(monkeypatch):
        model, text = on_gpu("ViT-B/32"), torch.empty(3, 77, dtype=torch.long, device="cuda")
        texts_of(monkeypatch, longest, 20)
        with Launches():
            model.encode_text(text)
    assert set(seen) == {length}


def test_a_resnet_is_launched_no_more_often_than_its_plain_form(monkeypatch):
    with pretend_gpu(monkeypatch):
        model, image = on_gpu("RN50"), torch.empty(256, 3, 224, 224, **HALF)
        totals = []
        for model.fast in True, False:
            with Launches() as seen:
                model.encode_image(image)
            totals.append(seen.names.total())
    assert totals[0] <= totals[1] < 200


@pytest.mark.parametrize("name", ["RN50", "ViT-B/32"])
def test_small_batches_are_captured_once_whatever_the_tower(name, monkeypatch):
    captured = []

    def capture(form, inputs):
        captured.append(len(inputs))
        return graphs.Graph(SimpleNamespace(copy_=lambda inputs: None), form(inputs), lambda: None)

    monkeypatch.setattr(graphs, "capture", capture)
    with pretend_gpu(monkeypatch), Launches():
        model = on_gpu(name)
        model.graphs = True
        for count in 2, 2, 33, 1:
            image, text = torch.empty(count, 3, 224, 224, **HALF), torch.empty(count, 77, dtype=int, device="cuda")
            texts_of(monkeypatch, 9, 9 * count)
            assert model.encode_image(image).shape == model.encode_text(text).shape
        assert captured == [2, 2, 1, 1]  # pictures and texts; 33 are too many
        model.graphs = False
        model.encode_image(image)
    assert captured == [2, 2, 1, 1]


def test_quick_gelu_is_one_pass_below_the_kernels_threshold(monkeypatch):
    with pretend_gpu(monkeypatch):
        model = on_gpu("ViT-B/32")
        with Launches() as seen:
            model.encode_image(torch.empty(1, 3, 224, 224, **HALF))
    assert seen.names["silu_"] == 12 and not seen.names["sigmoid"]


def test_best_classes_past_2_to_the_26_logits(monkeypatch):
    with pretend_gpu(monkeypatch):
        scale = torch.ones((), device="cuda")
        monkeypatch.setattr(cosines, "_topk", lambda logits, k: (logits[:, :k], logits[:, :k], logits[:, 0]))
        for n, m, kernel in (1, 2**26, False), (1, 2**26 + 1, True), (50_000, 21_841, True):
            x, c = torch.empty(n, 64, **HALF), torch.empty(m, 64, **HALF)
            found = kernels_in(lambda: cosines.similarity_topk(x, c, scale, 5))  # noqa: B023
            assert found == ({"similarity_topk"} if kernel else set())


def test_attention_is_pytorchs_until_a_gpu_has_timed_it(monkeypatch):
    with pretend_gpu(monkeypatch):
        qkv = torch.empty(256, 50, 3, 12, 64, **HALF)
        assert not kernels_in(lambda: ops.attention(qkv))
        monkeypatch.setitem(dispatch.RULES, "sm_90", {"attention": [Rule((1, 50), (1000, math.inf), "timed")]})
        assert kernels_in(lambda: ops.attention(qkv)) == {"attention"}
        assert not kernels_in(lambda: ops.attention(qkv[:1, :1]))  # too few elements: a batch of one has no veto
        assert not kernels_in(lambda: ops.attention(torch.empty(256, 51, 3, 12, 64, **HALF)))
        assert not kernels_in(lambda: ops.attention(torch.empty(256, 50, 3, 12, 80, **HALF)))  # not what was timed
        monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_80")
        assert not kernels_in(lambda: ops.attention(qkv))


def test_rules_of_an_architecture_replace_those_of_any(monkeypatch):
    with pretend_gpu(monkeypatch):
        x, bias = torch.empty(2**12, 2**10, **HALF), torch.empty(2**10, **HALF)
        assert dispatch.use_kernel("bias_quick_gelu", None, x, bias)
        never = Rule((1, math.inf), (2**40, math.inf), "timed")
        monkeypatch.setitem(dispatch.RULES, "sm_90", {"bias_quick_gelu": [never]})
        assert not dispatch.use_kernel("bias_quick_gelu", None, x, bias)
        monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_75")
        assert not dispatch.use_kernel("bias_quick_gelu", None, x, bias)  # no tiles


def large(**changes) -> dict:
    """Arguments for every operation, past the thresholds of all rules; `changes` replaces some by what they must be."""
    x, c, scale = torch.empty(2**14, 64, **HALF), torch.empty(2**13, 64, **HALF), torch.ones((), device="cuda")
    weight, wide = torch.empty(768, device="cuda"), torch.empty(2**13, 768, **HALF)
    qkv, starts = torch.empty(640, 3, 8, 64, **HALF), torch.empty(65, dtype=torch.int32, device="cuda")
    arguments = {
        "similarity_topk": {"x": x, "c": c, "logit_scale": scale, "k": 5},
        "add_layer_norm": {"x": wide, "residual": wide, "weight": weight, "bias": weight},
        "bias_quick_gelu": {"x": wide, "bias": weight.half()},
        "attention_varlen": {"qkv": qkv, "cu_seqlens": starts, "max_len": 16},
    }
    for name, change in changes.items():
        arguments[name] |= {key: make(arguments[name][key]) for key, make in change.items()}
    return arguments


def chosen(arguments: dict) -> set[str]:
    return {name for name, values in arguments.items() if dispatch.use_kernel(name, None, *values.values())}


MISFITS = {
    "half-precision scale": ("similarity_topk", {"logit_scale": lambda s: s.half()}),
    "scale on the CPU": ("similarity_topk", {"logit_scale": lambda s: torch.ones(())}),
    "classes in another dtype": ("similarity_topk", {"c": lambda c: c.float()}),
    "classes on the CPU": ("similarity_topk", {"c": lambda c: c.new_empty(c.shape, device="cpu")}),
    "classes transposed": ("similarity_topk", {"c": lambda c: c.new_empty(64, 2**13).T}),
    "queries transposed": ("similarity_topk", {"x": lambda x: x.new_empty(64, 2**14).T}),
    "no queries": ("similarity_topk", {"x": lambda x: x.new_empty(0, 64)}),
    "no classes": ("similarity_topk", {"c": lambda c: c.new_empty(0, 64)}),
    "k too large": ("similarity_topk", {"k": lambda k: 17}),
    "float32 queries": ("similarity_topk", {"x": lambda x: x.float(), "c": lambda c: c.float()}),
    "residual in another dtype": ("add_layer_norm", {"residual": lambda r: r.float()}),
    "residual that is broadcast": ("add_layer_norm", {"residual": lambda r: r.new_empty(768)}),
    "weight in float64": ("add_layer_norm", {"weight": lambda w: w.double()}),
    "rows too wide": ("add_layer_norm", dict.fromkeys(("x", "residual"), lambda x: x.new_empty(512, 8193))),
    "bias in another dtype": ("bias_quick_gelu", {"bias": lambda b: b.float()}),
    "bias of one number": ("bias_quick_gelu", {"bias": lambda b: b.new_empty(1)}),
    "bias on the CPU": ("bias_quick_gelu", {"bias": lambda b: b.new_empty(768, device="cpu")}),
    "int64 starts": ("attention_varlen", {"cu_seqlens": lambda s: s.long()}),
    "starts on the CPU": ("attention_varlen", {"cu_seqlens": lambda s: s.new_empty(65, device="cpu")}),
    "heads of 16": ("attention_varlen", {"qkv": lambda q: q.new_empty(640, 3, 8, 16)}),
    "last stride of 2": ("attention_varlen", {"qkv": lambda q: q.new_empty(640, 3, 8, 64, 2).select(4, 0)}),
}  # fmt: skip


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_default_takes_no_call_that_the_kernel_would_refuse(misfit, monkeypatch):
    name, change = MISFITS[misfit]
    with pretend_gpu(monkeypatch):
        assert chosen(large()) == set(large())
        assert chosen(large(**{name: change})) == set(large()) - {name}


def test_no_default_under_gradient_compilation_or_without_triton(monkeypatch):
    with pretend_gpu(monkeypatch):
        arguments = large()
        assert chosen(arguments) == set(arguments)
        with torch.enable_grad():
            leaf = {name: dict(values) for name, values in arguments.items()}
            for values in leaf.values():
                first = next(iter(values))
                values[first] = values[first].detach().requires_grad_()
            assert not chosen(leaf)
            scale = arguments["similarity_topk"] | {"logit_scale": torch.ones((), device="cuda", requires_grad=True)}
            assert not chosen({"similarity_topk": scale})
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not chosen(arguments)
        monkeypatch.undo()
    with pretend_gpu(monkeypatch):
        monkeypatch.setattr(dispatch, "triton_works", lambda device: False)
        assert not chosen(large())
        monkeypatch.setattr(dispatch, "INSTALLED", False)
        assert not chosen(large())


def test_backends_by_name(monkeypatch):
    with pretend_gpu(monkeypatch):
        x, bias = torch.empty(4, 64, **HALF), torch.empty(64, **HALF)
        assert dispatch.use_kernel("bias_quick_gelu", "triton", x, bias)  # however small
        assert not dispatch.use_kernel("bias_quick_gelu", "torch", torch.empty(2**20, 64, **HALF), bias)
        with pytest.raises(ValueError, match="backend is 'cuda'"):
            dispatch.use_kernel("bias_quick_gelu", "cuda", x, bias)
        with pytest.raises(ValueError, match="the kernel takes float16 and bfloat16"):
            ops.attention(torch.empty(1, 4, 3, 1, 64, device="cuda"), backend="triton")
    assert not dispatch.use_kernel("bias_quick_gelu", "triton", torch.empty(4, 64).half(), torch.empty(64).half())


def test_every_operation_reaches_its_kernel_when_asked(monkeypatch):
    triton = {"backend": "triton"}
    with pretend_gpu(monkeypatch):
        qkv, x, scale = torch.empty(2, 5, 3, 8, 64, **HALF), torch.empty(6, 64, **HALF), torch.ones((), device="cuda")
        starts, parameter = torch.empty(3, device="cuda", dtype=torch.int32), torch.empty(64, device="cuda")
        calls = {
            "attention": lambda: ops.attention(qkv, **triton),
            "attention_varlen": lambda: fused.attention_varlen(qkv.flatten(0, 1), starts, 5, **triton),
            "add_layer_norm": lambda: fused.add_layer_norm(x, x, parameter, parameter, **triton),
            "bias_quick_gelu": lambda: fused.bias_quick_gelu(x, parameter.half(), **triton),
            "similarity_softmax": lambda: cosines.similarity_softmax(x, x, scale, **triton),
            "similarity_topk": lambda: cosines.similarity_topk(x, x, scale, 3, **triton),
            "contrastive_loss": lambda: contrastive_loss(x, x, scale, **triton),
        }
        for name, call in calls.items():
            assert kernels_in(call) == {name}
    assert set(calls) == KERNELS


def test_check_backend(monkeypatch):
    monkeypatch.setattr(dispatch, "INSTALLED", True)
    monkeypatch.setattr(tiles, "architecture", lambda device: "sm_90")
    for backend in None, "torch", "triton":
        dispatch.check_backend(backend, CUDA, torch.bfloat16)
    with pytest.raises(ValueError, match=r"takes float16 and bfloat16, and the model is torch\.float32"):
        dispatch.check_backend("triton", CUDA, torch.float32)
    monkeypatch.setattr(tiles, "architecture", lambda device: "sm_75")
    with pytest.raises(ValueError, match="no tiles for sm_75, only for sm_80"):
        dispatch.check_backend("triton", CUDA, torch.float16)
    monkeypatch.setattr(dispatch, "INSTALLED", False)
    with pytest.raises(ValueError, match="Triton is not installed"):
        dispatch.check_backend("triton", CUDA, torch.float16)


def test_a_triton_that_cannot_build_is_reported_once_and_not_used(monkeypatch):
    def fail(x, bias):
        raise RuntimeError("Failed to find C compiler")

    dispatch.triton_works.cache_clear()
    monkeypatch.setattr(gelu_module, "bias_quick_gelu", fail)
    with pytest.warns(UserWarning, match="PyTorch runs instead: RuntimeError: Failed to find C compiler"):
        assert not dispatch.triton_works(CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not dispatch.triton_works(CPU)
    dispatch.triton_works.cache_clear()
    monkeypatch.undo()
    assert dispatch.triton_works(CPU)  # in the interpreter
    dispatch.triton_works.cache_clear()


def test_explain(monkeypatch):
    def table(*arguments) -> dict:
        return {row["operation"]: row for row in dispatch.explain(*arguments)}

    assert {row["runs as"] for row in table("cpu").values()} == {"torch"} and "needs a GPU" not in str(table("cpu"))
    assert "the kernels need a GPU, and the device is cpu" in table("cpu")["attention"]["why"]
    with pretend_gpu(monkeypatch):
        rows = table(CUDA)
        assert set(rows) == KERNELS
        assert rows["attention"]["runs as"] == "torch" and "no GPU has shown" in rows["attention"]["why"]
        assert rows["add_layer_norm"] == {
            "operation": "add_layer_norm",
            "runs as": "triton",
            "where": "at least 4194304 elements",
            "why": "by bytes, not timed",
        }
        assert rows["attention_varlen"]["where"] == "1 to 32 tokens of the longest text, at least 64 texts"
        assert {row["runs as"] for row in table(CUDA, torch.float16, "triton").values()} == {"triton"}
        assert table(CUDA, torch.float16, "torch")["attention"]["why"] == 'backend="torch"'
        assert "the dtype is float32" in table(CUDA, torch.float32)["attention"]["why"]
        monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_75")
        assert "no tiles for sm_75" in table(CUDA)["attention"]["why"]


def python_calls(call) -> int:
    """Calls of Python functions."""
    count = Counter()

    def profile(frame, event, _):
        count[event] += 1

    call()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count["call"]


def test_plain_inference_calls_the_function_behind_the_operator(monkeypatch):
    """The launch itself is left out; what remains is the way to it, which an operator makes several times as long."""
    monkeypatch.setattr(attention_module, "launch", lambda *_: None)
    qkv = torch.randn(1, 5, 3, 1, 64).half()
    with torch.no_grad():
        direct = python_calls(lambda: attention_module.attention(qkv))
        operator = python_calls(lambda: torch.ops.miniclip.attention(qkv, False))
    assert direct < 20 and operator > direct

    called = []
    monkeypatch.setattr(attention_module, "_attention", lambda *_: called.append(1) or (qkv[:, :, 0], qkv))
    run = attention_module.attention
    with torch.no_grad():
        run(qkv)
        assert called == [1]
        with Launches() as seen:
            run(qkv)
        assert seen.names["attention"] == 1
        torch.compile(run, backend="eager", fullgraph=True)(qkv)
    run(qkv.clone().requires_grad_()).sum()
    with FakeTensorMode():
        run(torch.empty(1, 5, 3, 1, 64, **HALF))
    assert called == [1]
