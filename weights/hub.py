"""Models on the Hugging Face Hub, by name. huggingface_hub fetches them into its own cache, and uses what is there.

Its variables count as everywhere: HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from miniclip.config import HUB_NAME, HUB_PREFIX
from miniclip.errors import require
from miniclip.io import sha256_of
from miniclip.weights.download import WITHOUT_DOWNLOAD, DownloadError, is_offline
from miniclip.weights.fields import Fields
from miniclip.weights.stated import FORMATS

SHA256 = re.compile("[0-9a-f]{64}")
TOKENIZERS = ("spiece.model", "tokenizer.model", "tokenizer.json")  # of several, the first is fetched
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")  # beside Hugging Face's config.json


def fetch_folder(name: str, cache: str | Path | None = None) -> Path:
    """The directory in the cache that holds a model's config and weights, of one revision, fetched where they are not.

    name: [hf-hub:]organisation/name[@revision]; cache: None is huggingface_hub's. Only the config and one form of the
    weights are asked for, safetensors first. DownloadError if the Hub does not have them or can't be reached,
    MissingExtraError without huggingface_hub.
    """
    match = HUB_NAME.fullmatch(name.removeprefix(HUB_PREFIX))
    if match is None or ".." in name:
        raise DownloadError(f"{name!r:.200} is no name on the Hub; expected hf-hub:organisation/name or ...@revision")
    purpose = f"{name} is neither a file nor a named model: to load it from the Hub"
    modules = ("huggingface_hub", "huggingface_hub.errors", "huggingface_hub.constants")
    hub, errors, constants = (require(module, "hub", purpose) for module in modules)
    repository, revision = match.groups()
    offline = is_offline(constants.ENDPOINT)  # huggingface_hub tries for minutes

    def get(file: str) -> Path | None:
        nonlocal revision
        try:
            held = hub.try_to_load_from_cache(repository, file, cache_dir=cache, revision=revision)
            where = {"revision": revision, "cache_dir": cache, "local_files_only": offline}
            path = Path(hub.hf_hub_download(repository, file, **where))
        except errors.EntryNotFoundError:
            return None
        except Exception as error:  # of the network, of rights, and of names; of many types
            raise DownloadError(f"{name}: {file} can't be fetched from the Hub: {error!s:.500}") from error
        if str(path) != held:
            _check(name, path)
        revision = path.parent.name  # the commit: all files are of the same one
        return path

    where = f"in {cache or constants.HF_HUB_CACHE}"
    where += f", and {constants.ENDPOINT} can't be reached. {WITHOUT_DOWNLOAD}" if offline else ", nor on the Hub"
    return _get_model(name, get, where)


def _check(name: str, path: Path) -> None:
    """Check a file that was just fetched against the sha256 by which huggingface_hub names large files in its cache."""
    content = path.resolve()
    if not SHA256.fullmatch(content.name) or (got := sha256_of(content)) == content.name:
        return
    path.unlink()
    content.unlink()
    raise DownloadError(f"{name}: {path.name} came with sha256 {got}, expected {content.name}; try again")


def _get_model(name: str, get: Callable[[str], Path | None], where: str) -> Path:
    """Get a config and its weights. `get` fetches a file of the repository, or returns None if it has no such file.

    where: the places where `get` looks, for errors.
    """
    for format in FORMATS:
        if config := get(format.config_file):
            break
    else:
        configs = ", ".join(format.config_file for format in FORMATS)
        raise DownloadError(f"{name} has none of {configs} {where}")
    for file in PREPROCESSORS if format.config_file == "config.json" else ():
        get(file)
    if _has_tokenizer(Fields.read(config)):
        get("tokenizer_config.json")
        next(filter(None, map(get, TOKENIZERS)), None)
    weights = next(filter(None, map(get, format.weights)), None)
    if weights is None:
        raise DownloadError(f"{name} has no weights, any of {', '.join(format.weights)}, {where}")
    if weights.suffix == ".json":
        for shard in sorted(set(map(str, Fields.read(weights).section("weight_map").values.values()))):
            if shard != Path(shard).name or get(shard) is None:
                raise DownloadError(f"{name}: {weights.name} refers to {shard!r:.200}, which is no file beside it")
    return config.parent


def _has_tokenizer(config: Fields) -> bool:
    """Whether a model comes with a tokenizer of its own: a SigLIP, in Hugging Face's or OpenCLIP's words."""
    vision = config.section("model_cfg", {}).section("vision_cfg", {})
    return config.values.get("model_type") == "siglip" or "_siglip_" in str(vision.values.get("timm_model_name"))
