"""Models by their name on the Hugging Face Hub, from a local server that speaks what huggingface_hub asks for."""

import hashlib
import importlib
import json
import re
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from conformance.openai_cases import CASES
from conformance.seeded import weights

from miniclip import load
from miniclip.config import is_hub_name
from miniclip.errors import MissingExtraError
from miniclip.loading import blank_model
from miniclip.openai.hub import HUB
from miniclip.save import save_checkpoint
from miniclip.weights import CheckpointError
from miniclip.weights.download import DownloadError
from miniclip.weights.openclip import read_config

CONFIG = CASES["vit"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "laion/small"
STORAGE = "http://localhost:{}"  # for huggingface_hub another server than 127.0.0.1


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        server = self.server
        path = self.path.split("?")[0]
        server.asked.append((self.command, path))
        head = f"/{REPOSITORY}/resolve/"
        if path.startswith("/old/name/"):  # a repository that was renamed
            return self.answer(307, b"", Location=path.replace("/old/name/", f"/{REPOSITORY}/"))
        if path.startswith("/storage/"):
            return self.answer(200, self.content(path.rpartition("/")[2]))
        if path.startswith("/private/"):
            return self.answer(401, b"", X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        if not path.startswith(head):
            return self.answer(404, b"", X_Error_Code="RepoNotFound")
        revision, _, file = path.removeprefix(head).partition("/")
        if revision not in ("main", "v2", COMMIT):
            return self.answer(404, b"", X_Error_Code="RevisionNotFound")
        content = server.files.get(file)
        if content is None:
            return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        if server.storage and file.endswith(".safetensors"):  # as the Hub does: large files are on another server
            linked = {"X_Linked_ETag": etag, "X_Linked_Size": str(len(content))}
            return self.answer(302, b"", X_Repo_Commit=COMMIT, Location=f"{server.storage}/storage/{file}", **linked)
        return self.answer(200, self.content(file), len(content), X_Repo_Commit=COMMIT, ETag=etag)

    do_GET = do_HEAD

    def content(self, file):
        """What is sent of a file: weights may be damaged on the way."""
        content = self.server.files[file]
        if self.command == "HEAD" or not file.endswith(".safetensors"):
            return content
        return {"cut": content[:-9], "changed": content[:-1] + b"?"}.get(self.server.damage, content)

    def answer(self, status, body, length=None, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The server, with the directory that `save_checkpoint` writes, and an empty cache."""
    pytest.importorskip("huggingface_hub")
    constants = importlib.import_module("huggingface_hub.constants")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.damage, server.storage = [], None, None
    blank = blank_model(CONFIG, torch.float32).state_dict()
    tensors = weights({name: tuple(tensor.shape) for name, tensor in blank.items()})
    save_checkpoint(CONFIG, tensors, tmp_path / "model")
    server.files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    del server.files["miniclip.json"]
    server.files |= {"pytorch_model.bin": b"not asked for", "README.md": b"# small"}
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    for part in (constants, importlib.import_module("huggingface_hub.file_download")):
        for name, value in (("ENDPOINT", url), ("HF_HUB_CACHE", str(tmp_path / "cache"))):
            if hasattr(part, name):
                monkeypatch.setattr(part, name, value)
    impatient = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})  # between tries
    monkeypatch.setattr("huggingface_hub.file_download.time", impatient)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", [f"hf-hub:{REPOSITORY}", REPOSITORY, f"hf-hub:{REPOSITORY}@v2"])
def test_a_model_by_its_name(hub, name):
    model, preprocess = load(name, "cpu")
    assert model.config == CONFIG and preprocess.config == CONFIG.preprocess
    got = [path.rpartition("/")[2] for method, path in hub.asked if method == "GET" and REPOSITORY in path]
    assert sorted(got) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    hub.asked.clear()
    load(name, "cpu")
    assert not [path for method, path in hub.asked if method == "GET" and REPOSITORY in path]  # all is in the cache


def test_without_the_network_the_cache_is_used(hub, monkeypatch):
    load(REPOSITORY, "cpu")
    hub.asked.clear()
    monkeypatch.setattr(sys.modules["huggingface_hub.constants"], "HF_HUB_OFFLINE", True)
    assert load(REPOSITORY, "cpu")[0].config == CONFIG and hub.asked == []
    with pytest.raises(DownloadError, match=r"laion/other has none of .* in .*cache"):
        load("laion/other", "cpu")


def test_without_a_network_the_cache_is_used_at_once(hub, monkeypatch):
    load(REPOSITORY, "cpu")
    hub.asked.clear()
    monkeypatch.setattr("miniclip.weights.hub.is_offline", lambda url: True)
    assert load(REPOSITORY, "cpu")[0].config == CONFIG and hub.asked == []
    with pytest.raises(DownloadError, match=r"laion/other has none of .* can't be reached. The models tiny-ViT"):
        load("laion/other", "cpu")
    assert hub.asked == []


def test_an_openclip_repository(hub):
    hub.files["open_clip_config.json"] = json.dumps(
        {
            "model_cfg": {
                "embed_dim": 48, "quick_gelu": True,
                "vision_cfg": {"image_size": 40, "layers": 3, "width": 128, "patch_size": 8},
                "text_cfg": {"context_length": 13, "vocab_size": 301, "width": 64, "heads": 1, "layers": 2},
            },
            "preprocess_cfg": {"interpolation": "bilinear"},
        }
    ).encode()  # fmt: skip
    hub.files["open_clip_model.safetensors"] = hub.files["model.safetensors"]
    _, preprocess = load(f"hf-hub:{REPOSITORY}", "cpu")
    assert preprocess.config.interpolation == "bilinear"
    assert {path.rpartition("/")[2] for method, path in hub.asked if method == "GET"} == {
        *("open_clip_config.json", "open_clip_model.safetensors"),
    }


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("hf-hub:private/model", "private/model: miniclip.json can't be fetched"),
        ("hf-hub:laion/absent", "can't be fetched"),
        (f"hf-hub:{REPOSITORY}@absent", "can't be fetched"),
        ("hf-hub:../../etc/passwd", "no name on the Hub"),
        ("hf-hub:a/..b", "no name on the Hub"),
        ("hf-hub:laion/small@../../x", "no name on the Hub"),
        ("hf-hub:laion", "no name on the Hub"),
    ],
)
def test_what_the_hub_does_not_give(hub, name, fault):
    with pytest.raises(DownloadError, match=fault) as error:
        load(name, "cpu")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize(
    ("damage", "fault"),
    [("cut", r"model\.safetensors can't be fetched"), ("changed", r"came with sha256 \w{64}, expected")],
)
def test_a_file_that_is_damaged(hub, damage, fault, elsewhere):
    hub.damage, hub.storage = damage, STORAGE.format(hub.server_port) if elsewhere else None
    for _ in range(2):  # nothing wrong stays in the cache
        with pytest.raises(DownloadError, match=fault):
            load(REPOSITORY, "cpu")
    hub.damage = None
    assert load(REPOSITORY, "cpu")[0].config == CONFIG


def test_redirects(hub):
    """A repository that was renamed, and weights that lie on another server."""
    hub.storage = STORAGE.format(hub.server_port)
    assert load("old/name", "cpu")[0].config == CONFIG
    assert ("GET", "/storage/model.safetensors") in hub.asked


def test_a_repository_without_weights(hub):
    for name in ("model.safetensors", "pytorch_model.bin"):
        del hub.files[name]
    with pytest.raises(DownloadError, match=r"has no weights, any of model\.safetensors.*, .* in .*cache"):
        load(REPOSITORY, "cpu")


def test_shards_beside_the_index_alone(hub):
    del hub.files["model.safetensors"]
    hub.files["model.safetensors.index.json"] = json.dumps({"weight_map": {"a": "../../x.safetensors"}}).encode()
    with pytest.raises(DownloadError, match=r"refers to '../../x\.safetensors', which is no file beside it"):
        load(REPOSITORY, "cpu")
    assert not [path for _, path in hub.asked if path.endswith("x.safetensors")]


def test_names():
    assert all(map(is_hub_name, ("openai/clip-vit-base-patch32", "hf-hub:x", "hf-hub:x/y.pt")))
    for name in ("ViT-B-32", "a/b/c", "/a/b", "./a/b", "~/x", "a\\b", "", "weights/model.pt", "runs/best.safetensors"):
        assert not is_hub_name(name)


def test_a_path_is_a_path_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "laion" / "small").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="is a directory without"):
        load("laion/small", "cpu")


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r'neither a file nor a named model.* pip install "miniclip\[hub\]"'):
        load("openai/clip-vit-base-patch32", "cpu")


# The table of well-known names ----------------------------------------------------------------------------------------

PARAMETERS = (  # in the name, millions as OpenCLIP's table of results has them
    ("B-32-256x256", 151.29),
    ("B-32|patch32|fashion", 151.28),
    ("B-16|patch16|bioclip", 149.62),
    ("large-patch14-336", 427.94),
    ("L-14|large_?-?patch14", 427.62),
    ("H-14-378", 986.71),
    ("H-14|huge_patch14", 986.11),
    ("g-14-laion2B-s34B", 1366.68),
    ("bigG-14", 2539.57),
)


def millions(config) -> float:
    return round(sum(p.numel() for p in blank_model(config, torch.float16).parameters()) / 1e6, 2)


@pytest.mark.parametrize("name", HUB)
def test_the_table_s_parameters_are_the_published_ones(name):
    config = HUB[name].config
    assert is_hub_name(name)
    assert millions(config) == next(count for pattern, count in PARAMETERS if re.search(pattern, name))
    layers = replace(config.text.transformer, layers=config.text.transformer.layers - 1)
    assert millions(replace(config, text=replace(config.text, transformer=layers))) < millions(config) - 3


def test_the_table_s_configs_are_openclip_s(tmp_path):
    """Config and preprocessing of the pretrained weights that OpenCLIP 3.3.0 finds under these names."""
    open_clip = pytest.importorskip("open_clip", "3.3.0")
    table = importlib.import_module("open_clip.pretrained")._PRETRAINED
    checked = set()
    for model, tags in table.items():
        for stated in tags.values():
            name = stated.get("hf_hub", "").strip("/")
            if name not in HUB or (stated.get("quick_gelu") and not model.endswith("-quickgelu")):
                continue
            preprocess = {key: stated[key] for key in ("mean", "std", "interpolation", "resize_mode")}
            cfg = {"model_cfg": open_clip.get_model_config(model), "preprocess_cfg": preprocess}
            (tmp_path / "open_clip_config.json").write_text(json.dumps(cfg))
            assert read_config(tmp_path) == HUB[name].config, name
            checked.add(name)
    assert set(HUB) - checked == {
        *("patrickjohncyh/fashion-clip", "imageomics/bioclip"),
        *(name for name in HUB if name.startswith("openai/")),
    }
