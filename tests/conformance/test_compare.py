"""compare: what passes, what fails and how it is said; its command."""

import json
from pathlib import Path

import make_goldens
import numpy as np
import pytest
import torch
from conformance import seeded
from conformance.openai_cases import CASES
from safetensors.torch import load_file, save_file

from miniclip.commands import main
from miniclip.config import PreprocessConfig
from miniclip.conformance import TraceError, compare, load_stages, load_trace, trace
from miniclip.conformance.files import save_trace, without_padding
from miniclip.conformance.measure import EXACT, PRECISIONS, Tolerance, fit, measure, tolerance_of
from miniclip.conformance.report import as_text
from miniclip.conformance.rules import utf8
from miniclip.io import save_tensors
from miniclip.loading import blank_model, build_model, shapes_of
from miniclip.preprocess import normalize
from miniclip.tokenizer import tokenize

HERE = Path(__file__).parent
DOG = Path(__file__).parents[2] / "examples" / "images" / "dog.png"
COLOURS = PreprocessConfig(1).mean, PreprocessConfig(1).std
ACTIVATION = "visual.transformer.resblocks.0.mlp.activation"


@pytest.fixture(scope="module")
def model():
    config = CASES["vit"]
    return build_model(seeded.weights(shapes_of(blank_model(config, torch.float32).state_dict())), config)


@pytest.fixture(scope="module")
def golden(model):
    return trace(model, seeded.image(2, 40), seeded.text(3, 13, 301))


@pytest.fixture
def mine(golden):
    return {name: stage.clone() for name, stage in golden.items()}


# Measuring


def test_measures_by_hand():
    golden, mine = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    difference = measure(golden, mine, Tolerance(largest=0.125, relative=0.1))
    assert difference.max_error == 0.5
    assert difference.relative_error == pytest.approx(0.1) and difference.nmse == pytest.approx(0.01)
    assert difference.max_limit == 0.5 and difference.relative_limit == 0.1
    assert difference.ulp == 2**20  # a step of 4.0 is 2^-21
    assert difference.cosine == pytest.approx(27 / (5 * (9 + 4.5**2) ** 0.5))
    assert difference.passed
    assert not measure(golden, mine, Tolerance(largest=0.124, relative=0.1)).passed
    assert not measure(golden, mine, Tolerance(largest=0.125, relative=0.099)).passed


def test_measures_zeros_and_nans():
    zeros = torch.zeros(3)
    assert measure(zeros, zeros, EXACT).passed and measure(zeros, zeros, EXACT).cosine == 1
    assert not measure(zeros, torch.tensor([0, 0, 1e-9]), PRECISIONS[torch.float16]).passed
    assert not measure(torch.ones(3), torch.tensor([1, 1, torch.nan]), PRECISIONS[torch.bfloat16]).passed


@pytest.mark.parametrize("brightness", [1, 20, 254])
def test_a_byte_that_is_off_by_one_passes_in_any_picture(brightness):
    decoded = torch.full((64, 64, 3), brightness, dtype=torch.uint8)
    pixels = normalize(decoded.numpy(), *COLOURS)[None]
    for name, golden, byte in (("image.resized", decoded, 1), ("image.pixels", pixels, 1 / 255 / COLOURS[1][1])):
        mine = golden.clone()
        mine.flatten()[5000] += byte
        assert compare({name: golden}, {name: mine}).passed
        mine.flatten()[5000] += byte
        assert not compare({name: golden}, {name: mine}).passed


def test_what_follows_from_pixels_off_by_one_is_compared_with_what_the_model_makes_of_them(golden, model):
    """The embedding of the port's own pixels passes and the golden's fails; without a model it is the reverse."""
    pixels = golden["image.pixels"].clone()
    pixels[0, 1, ::9, ::9] += 1 / 255 / COLOURS[1][1]
    own = {"image.pixels": pixels, "image_embedding": trace(model, pixels)["image_embedding"]}
    assert compare(golden, own, model).passed
    assert compare(golden, own).first_wrong == "image_embedding"
    others = own | {"image_embedding": golden["image_embedding"]}
    assert compare(golden, others, model).first_wrong == "image_embedding"
    wrong = own | {"image_embedding": 2 * own["image_embedding"]}
    assert compare(golden, wrong, model).first_wrong == "image_embedding"


def test_units_in_the_last_place():
    one, next_one = 1.0, 1.0 + 2**-23
    ulps = lambda x, y: measure(torch.tensor([x]), torch.tensor([y]), EXACT).ulp  # noqa: E731
    assert ulps(one, next_one) == 1 and ulps(-one, -next_one) == 1 and ulps(one, one) == 0
    assert ulps(0.0, -0.0) == 0 and ulps(2.0**-149, -(2.0**-149)) == 2
    assert ulps(1.0, 2.0) == 2**23


def test_tolerances_go_by_the_least_precise_dtype():
    assert tolerance_of("visual.conv1", torch.float32, torch.float64) == PRECISIONS[torch.float32]
    assert tolerance_of("visual.conv1", torch.float32, torch.float16) == PRECISIONS[torch.float16]
    assert tolerance_of("visual.conv1", torch.float32, torch.float32, torch.bfloat16) == PRECISIONS[torch.bfloat16]
    assert tolerance_of("visual.conv1", torch.float32, torch.int32) == PRECISIONS[torch.float32]
    assert tolerance_of("text.ids", torch.int32, torch.bfloat16) == EXACT
    assert tolerance_of("image.pixels", torch.float32, torch.bfloat16)[:2] == PRECISIONS[torch.bfloat16][:2]
    assert tolerance_of("image.resized", torch.uint8, torch.uint8).largest * 255 < 2


def test_shapes_that_fit():
    golden, mine = fit("visual.pooled", torch.zeros(1, 4), torch.zeros(4))
    assert golden.shape == mine.shape == (1, 4)
    assert fit("visual.conv1", torch.zeros(1, 4, 1, 2), torch.zeros(4, 1, 2))[1].shape == (1, 4, 1, 2)
    golden, mine = fit("ln_final", torch.zeros(1, 77, 8), torch.zeros(5, 8))
    assert golden.shape == mine.shape == (1, 5, 8)
    golden, mine = fit("transformer.resblocks.0.attn.probabilities", torch.zeros(2, 3, 5, 5), torch.ones(2, 3, 77, 77))
    assert golden.shape == mine.shape == (2, 3, 5, 5)
    assert fit("ln_final", torch.zeros(2, 77, 8), torch.zeros(2, 5, 8))[0].shape == (2, 5, 8)
    assert fit("visual.transformer.resblocks.0", torch.zeros(2, 77, 8), torch.zeros(2, 5, 8)) is None
    for shape in ((7,), (2, 1, 7), (1, 2, 7), (7, 2)):
        assert fit("text.pooled", torch.zeros(2, 7), torch.zeros(shape)) is None
    assert fit("logits_per_image", torch.zeros(1, 3), torch.zeros(3, 1)) is None
    assert fit("visual.conv1", torch.zeros(1, 4, 1, 2), torch.zeros(1, 4, 2)) is None
    assert fit("text.pooled", torch.zeros(2, 7), torch.zeros(2, 8)) is None
    assert fit("ln_final", torch.zeros(2, 7, 8), torch.zeros(2, 8, 7)) is None


# Comparing


def test_equal_stages_pass(golden, mine, model):
    comparison = compare(golden, mine, model)
    assert comparison.passed and len(comparison.stages) == len(golden)
    assert str(comparison).startswith(f"all {len(golden)} stages that were given pass; the largest error is 0% of")


def test_any_subset_in_any_order_dtype_and_kind_of_array_passes(golden, mine):
    names = ["text_embedding", ACTIVATION, "visual.conv1"]
    assert [stage.name for stage in compare(golden, {name: mine[name] for name in names}).stages] == names[::-1]
    for dtype in PRECISIONS:
        assert compare(golden, {name: mine[name].to(dtype) for name in names}).passed
    assert compare(golden, {name: mine[name].numpy().astype(np.float16) for name in names}).passed


def test_padding_is_not_compared(golden, mine):
    for name in ("ln_final", "transformer.resblocks.0.attn.probabilities"):
        mine[name][:, -1] = 7.0 if name == "ln_final" else mine[name][:, -1]
        mine[name][..., 8:, :] = 7.0
    assert not compare(golden, mine).passed
    assert compare(without_padding(golden), mine).passed


def test_the_least_error_that_fails(golden, mine):
    noise = torch.randn(mine[ACTIVATION].shape, generator=torch.Generator().manual_seed(0))
    noise *= golden[ACTIVATION].norm() / noise.norm()
    for dtype, tolerance in PRECISIONS.items():
        mine[ACTIVATION] = golden[ACTIVATION] + noise * tolerance.relative * 0.9
        assert compare(golden, mine, dtype=dtype).passed
        mine[ACTIVATION] = golden[ACTIVATION] + noise * tolerance.relative * 1.1
        assert compare(golden, mine, dtype=dtype).first_wrong == ACTIVATION


def test_the_first_wrong_stage_is_the_first_in_forward_order(golden, mine):
    mine["text_embedding"] = mine["text_embedding"] * 2
    mine[ACTIVATION] = mine[ACTIVATION] * 2
    comparison = compare(golden, dict(sorted(mine.items(), reverse=True)))
    assert comparison.first_wrong == ACTIVATION
    assert [stage.name for stage in comparison.stages if not stage.passed] == [ACTIVATION, "text_embedding"]


def test_stages_that_were_not_given_are_told(golden, mine):
    mine["visual.transformer.resblocks.0"] += 1
    for name in ("mlp.c_fc", "mlp.activation", "mlp.c_proj"):
        del mine[f"visual.transformer.resblocks.0.{name}"]
    comparison = compare(golden, mine)
    assert [name.rsplit(".", 1)[1] for name in comparison.not_given] == ["c_fc", "activation", "c_proj"]
    assert "between the last stage that passes and this one: visual.transformer.resblocks.0.mlp.c_fc, " in str(
        comparison
    )


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda x: x[:, :3], "has shape [2, 3, 512]; expected [2, 26, 512]"),
        (lambda x: x.index_fill(2, torch.tensor([5]), torch.nan), "has 52 NaNs or infinities, the first at [0, 0, 5]"),
        (lambda x: x / 0, "NaNs or infinities, the first at [0, 0, 0]"),
    ],
)
def test_stages_that_cannot_be_measured_fail(golden, mine, model, change, fault):
    mine[ACTIVATION] = change(mine[ACTIVATION])
    comparison = compare(golden, mine, model)
    assert comparison.first_wrong == ACTIVATION and comparison.diagnosis is None
    assert fault in str(comparison)


@pytest.mark.parametrize(
    ("stage", "change", "hint"),
    [
        (ACTIVATION, lambda x: 3 * x, "it is the golden's times 3"),
        (ACTIVATION, lambda x: 0 * x, "it is all zeros"),
        ("visual.embedded", lambda x: x.transpose(1, 2), "it is right after permute(0, 2, 1)"),
        ("visual.embedded", lambda x: x.reshape(26, 2, -1), "its numbers are right, only its shape is not"),
        ("visual.ln_pre", None, "it is the golden's visual.embedded"),
    ],
)
def test_hints(golden, mine, stage, change, hint):
    assert hint not in str(compare(golden, mine))
    mine[stage] = change(mine[stage]) if change else mine["visual.embedded"]
    comparison = compare(golden, mine)
    assert comparison.first_wrong == stage
    assert any(hint in x for x in comparison.hints)


def test_pixels_that_differ_are_hinted_at(golden, mine):
    mine["image.pixels"][0, 0, 0, 0] += 1e-3
    mine["visual.conv1"] = mine["visual.conv1"] * 1.001
    comparison = compare(golden, mine)
    assert comparison.first_wrong == "visual.conv1"
    assert any("run its towers on the golden's image.pixels" in hint for hint in comparison.hints)


def test_diagnosis_from_few_stages(golden, mine, model):
    """A mistake in every block is found from the tower's result alone, and named as one."""
    wrong = build_model(model.state_dict(), CASES["vit"])
    for block in wrong.visual.transformer.resblocks:
        block.mlp.activation = "gelu"
    with torch.no_grad():
        mine = {"image_embedding": wrong.encode_image(golden["image.pixels"], normalize=True)}
    comparison = compare(golden, mine, model)
    assert comparison.diagnosis.mistake == "GELU instead of QuickGELU"
    assert comparison.diagnosis.place.startswith("miniclip/ops.py:")
    assert "sigmoid(1.702" in str(comparison)
    logits = model.logit_scale.detach().exp() * mine["image_embedding"] @ golden["text_embedding"].T
    assert compare(golden, {"logits_per_image": logits}, model).diagnosis.mistake == "GELU instead of QuickGELU"
    noisy = {"image_embedding": torch.randn(2, 48, generator=torch.Generator().manual_seed(0))}
    assert compare(golden, noisy, model).diagnosis is None


def test_diagnosis_of_a_port_in_half_precision(golden, model):
    wrong = build_model(model.state_dict(), CASES["vit"], dtype=torch.bfloat16)
    wrong.visual.ln_pre.forward = lambda x: x
    with torch.no_grad():
        embedding = wrong.encode_image(golden["image.pixels"], normalize=True)
    diagnosis = compare(golden, {"image_embedding": embedding}, model).diagnosis
    assert diagnosis.mistake == "ln_pre missing" and diagnosis.explained < 1


def test_biases_of_queries_keys_and_values_are_told_apart(golden, mine, model):
    """A key's bias has no influence on what follows; the queries and values that are right tell that it is alone."""
    attention = "visual.transformer.resblocks.0.attn"
    bias = model.visual.transformer.resblocks[0].attn.in_proj_bias.detach().chunk(3)
    for i, part in enumerate("qkv"):
        wrong = golden[f"{attention}.{part}"] - bias[i].reshape(1, 2, 1, 64)
        diagnosis = compare(golden, {**mine, f"{attention}.{part}": wrong}, model).diagnosis
        assert diagnosis.mistake == f"bias of {part} missing" and not diagnosis.also


def test_half_precision_is_not_hinted_at_where_a_mistake_is_known(golden, mine, model):
    """An eps of 1e-3 moves a norm by less than bfloat16 does."""
    name = "visual.transformer.resblocks.0.ln_1"
    norm = model.visual.transformer.resblocks[0].ln_1
    x = golden["visual.ln_pre"]
    mine[name] = torch.nn.functional.layer_norm(x, x.shape[-1:], norm.weight.detach(), norm.bias.detach(), 1e-3)
    assert "half precision" in str(compare(golden, mine))
    named = str(compare(golden, mine, model))
    assert "LayerNorm's eps is 1e-3" in named and "half precision" not in named


def test_half_precision_is_hinted_at(golden, mine):
    mine[ACTIVATION] = golden[ACTIVATION].half().float()
    assert "all its numbers are float16's" in str(compare(golden, mine))
    noise = torch.randn(mine[ACTIVATION].shape, generator=torch.Generator().manual_seed(0)) * golden[ACTIVATION].std()
    mine[ACTIVATION] = golden[ACTIVATION] + 1e-3 * noise
    assert "it is as near as half precision comes" in str(compare(golden, mine))
    mine[ACTIVATION] = golden[ACTIVATION] + noise
    assert "half precision" not in str(compare(golden, mine))


STRINGS = ["a dog", "sure: CAFÃ©", "señor", "crêpes 10"]


def test_wrong_ids_are_shown_and_explained_row_by_row():
    golden = {"text.utf8": utf8(STRINGS), "text.ids": tokenize(STRINGS)}
    ids = golden["text.ids"].clone()
    ids[1], ids[3] = tokenize("sure: CAFÃ©".replace("Ã©", "\u00c3\u200b\u00a9"))[0], tokenize("crepes 10")[0]
    comparison = compare(golden, {"text.ids": ids[:, :20]})
    assert comparison.first_wrong == "text.ids"
    first, second = comparison.texts
    assert (first.row, first.text) == (1, STRINGS[1]) and second.row == 3
    assert second.mistakes == ("accents stripped",) and second.place == 1
    report = str(comparison)
    assert f"text 3: {STRINGS[3]!r}" in report and "mistake: accents stripped" in report
    right, got = (" ".join(map(str, x[3][x[3] > 0].tolist())) for x in (golden["text.ids"], ids))
    assert f"expected {right}\n" in report and f"got      {got}\n" in report
    assert f"first difference at position 1: {got.split()[1]} instead of {right.split()[1]}" in report


def test_only_failures_are_shown_unless_all_are_asked_for(golden, mine):
    for name in golden:
        if name.startswith("visual"):
            mine[name] = mine[name] * 2
    comparison = compare(golden, mine)
    report = as_text(comparison)
    wrong = sum(not stage.passed for stage in comparison.stages)
    assert report.count("FAIL") == 10 and f"and {wrong - 10} later stages that are wrong too" in report
    assert f"{wrong} of {len(golden)} stages that were given are wrong" in report and "ln_final" not in report
    report = as_text(comparison, all_stages=True)
    assert report.count("FAIL") == wrong and report.count("  pass") == len(golden) - wrong


# What can't be compared


def test_nothing_in_common(golden):
    with pytest.raises(TraceError, match=r"no stage in common: the golden has image.pixels, .*; the port foo"):
        compare(golden, {"foo": torch.zeros(1)})


def test_names_that_the_golden_lacks_are_told(golden, mine):
    comparison = compare(golden, {**mine, "visual.ln_prae": mine["visual.ln_pre"]})
    assert comparison.passed and comparison.unknown == ("visual.ln_prae",)
    assert "no such stages: visual.ln_prae" in str(comparison)


def test_a_golden_with_nans(golden, mine):
    golden = {**golden, "visual.ln_pre": golden["visual.ln_pre"] * torch.nan}
    with pytest.raises(TraceError, match=r"golden's visual.ln_pre has NaNs"):
        compare(golden, mine)


def test_another_model(golden, mine):
    config = CASES["vit"]
    other = build_model(seeded.weights(shapes_of(blank_model(config, torch.float32).state_dict())), config)
    other.visual.ln_pre.weight.data += 0.01
    mine["visual.ln_post"] *= 2
    with pytest.raises(TraceError, match=r"does not compute the golden's visual.ln_pre: give the model that made"):
        compare(golden, mine, other)


def test_a_golden_without_inputs(golden, mine, model):
    mine[ACTIVATION] *= 2
    with pytest.raises(TraceError, match="nothing can be recomputed"):
        compare({ACTIVATION: golden[ACTIVATION]}, mine, model)


# The commands


@pytest.fixture
def files(golden, mine, model, tmp_path):
    save_trace(without_padding(golden), tmp_path / "golden.safetensors", model, "seeded")
    save_tensors(mine, tmp_path / "mine.safetensors")
    return str(tmp_path / "golden.safetensors"), str(tmp_path / "mine.safetensors")


def run_compare(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["compare", *arguments])
    return (code, *capsys.readouterr())


def test_command_passes(files, capsys):
    code, out, _ = run_compare(capsys, *files)
    assert code == 0 and "stages that were given pass" in out
    code, out, _ = run_compare(capsys, *files, "--json")
    assert code == 0 and json.loads(out)["passed"] is True


def test_command_fails(files, golden, mine, capsys):
    mine[ACTIVATION] = torch.nn.functional.gelu(golden["visual.transformer.resblocks.0.mlp.c_fc"])
    torch.save(mine, files[1])  # what torch.save writes is read too
    code, out, _ = run_compare(capsys, *files)
    assert code == 1
    assert f"first wrong stage: {ACTIVATION}" in out and "give the golden's model (--model)" in out
    assert "--all" in out or out.count("FAIL") == 1
    code, out, _ = run_compare(capsys, *files, "--json")
    report = json.loads(out)
    assert code == 1 and report["first_wrong"] == ACTIVATION and report["diagnosis"] is None
    wrong = next(stage for stage in report["stages"] if not stage["passed"])
    assert wrong["name"] == ACTIVATION and wrong["relative_error"] > 1e-4 and wrong["shape"] == [2, 26, 512]
    assert run_compare(capsys, *files, "--dtype", "bfloat16")[0] == 0  # which is about as imprecise


def test_command_errors(files, tmp_path, capsys):
    golden, mine = files
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"garbage" * 100)
    wrong = tmp_path / "wrong.safetensors"
    save_tensors({"visual.ln_pre": torch.zeros(3)}, wrong)
    for arguments, message in [
        ((mine, golden), "is not a trace"),
        ((golden, str(garbage)), "garbage.safetensors"),
        ((golden, str(tmp_path / "nothing")), "can't be read: No such file"),
        ((str(DOG), mine), "neither a PyTorch file nor safetensors"),
        ((golden, str(wrong), "--model", "tiny-ViT"), "tiny-ViT is not the model that made the golden (seeded): the"),
    ]:
        code, _, err = run_compare(capsys, *arguments)
        assert code == 2 and message in err, err


def test_a_port_that_changes_in_its_second_run(files, mine, tmp_path, capsys):
    again = str(tmp_path / "again.safetensors")
    mine |= {"visual.conv1": mine["visual.conv1"].bfloat16(), "extra": torch.tensor(3)}
    save_tensors(mine, files[1])
    save_tensors(mine, again)
    assert run_compare(capsys, *files, again)[0] == 0
    mine["visual.ln_pre"][0, 0, 0] += 1e-7  # which passes as such
    del mine["ln_final"]
    save_tensors(mine, again)
    assert run_compare(capsys, files[0], again)[0] == 0
    code, out, _ = run_compare(capsys, *files, again)
    assert code == 1 and "the second run differs from the first in visual.ln_pre, ln_final" in out


def test_an_alternative_that_a_port_may_match(capsys, tmp_path):
    """Each golden of a pair passes under the name of the other, and a file that is neither fails under both."""
    for one, other in make_goldens.ALTERNATIVES.items():
        golden, mine = (HERE / "goldens" / "tiny-ViT" / f"{name}.safetensors" for name in (one, other))
        code, out, _ = run_compare(capsys, str(golden), str(mine))
        assert code == 0 and f"compared with {other}.safetensors, which a port may match instead" in out
        assert not compare(load_trace(golden)[0], load_stages(mine)).passed
        wrong = {name: x.flip(0) if name in ("image.resized", "text.ids") else x for name, x in load_file(mine).items()}
        save_file(wrong, tmp_path / "wrong.safetensors")
        assert run_compare(capsys, str(golden), str(tmp_path / "wrong.safetensors"))[0] == 1


def test_a_golden_whose_list_of_stages_is_wrong(files, tmp_path):
    stages, metadata = load_trace(files[0])
    without = {name: value for name, value in metadata.items() if name != "dtype"}
    for changed in (without, {**metadata, "stages": "[1"}, {**metadata, "stages": "[1]"}, {**metadata, "stages": "7"}):
        save_file(stages, tmp_path / "changed.safetensors", changed)
        with pytest.raises(TraceError, match="is damaged: its list of stages"):
            load_trace(tmp_path / "changed.safetensors")
    del stages["visual.ln_pre"]
    save_file(stages, tmp_path / "cut.safetensors", metadata)
    with pytest.raises(TraceError, match="is damaged: its list of stages"):
        load_trace(tmp_path / "cut.safetensors")


def test_trace_command(tmp_path, capsys):
    output = tmp_path / "golden.safetensors"
    arguments = ["trace", "--model", "tiny-ViT", "--device", "cpu", "--image", str(DOG)]
    arguments += ["--text", "a dog", "--text", "cat"]
    assert main([*arguments, "-o", str(output)]) == 0
    stages, metadata = load_trace(output)
    assert metadata["model"] == "tiny-ViT" and stages["logits_per_image"].shape == (1, 2)
    assert stages["ln_final"].shape[1] == 4 and stages["text.ids"].shape == (2, 77)
    assert main(["compare", str(output), str(output), "--model", "tiny-ViT"]) == 0

    only = ["--only", "visual.*.attn.probabilities", "--only", "*_embedding", "-o", str(output)]
    assert main([*arguments, *only]) == 0
    assert len(load_trace(output)[0]) == 4 + 3  # token_embedding too
    capsys.readouterr()
    assert main([*arguments, "--only", "visual.attn", "-o", str(output)]) == 2
    assert "leaves no stage; there are image.decoded" in capsys.readouterr().err


def test_trace_command_draws(tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ["trace", "--model", "tiny-ViT", "--device", "cpu", "--image", str(DOG)]
    for layer in ("0", "3"):
        assert main([*arguments, "--layer", layer, "--plot", str(tmp_path / f"{layer}.png")]) == 0
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "3.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "x.safetensors"], "there is nothing to trace"),
        (["--text", "a"], "there is nothing to do"),
        (["--text", "a", "-o", "x.npz"], "expected a name that ends in .safetensors"),
        (["--text", "a", "-o", "nowhere/x.safetensors"], "there is no folder nowhere"),
        (["--text", "a", "--plot", "x.png"], "give --image"),
        (["--text", "dog " * 99, "-o", "x.safetensors"], "needs 101 tokens"),
        (["--image", "nowhere.png", "-o", "x.safetensors"], "nowhere.png"),
        (["--image", str(DOG), "--plot", "x.png", "--layer", "9"], "layers 0 to 3"),
    ],
)
def test_trace_command_errors(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["trace", "--model", "tiny-ViT", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
