"""The routes of the server: a request's method, target and body -> an answer. Threads may share an `App`.

    POST /v1/embeddings   unit embeddings of texts and pictures, in OpenAI's format
    GET  /v1/models       the name of the model, in OpenAI's format
    POST /classify        the labels of pictures, the most probable first
    GET  /                the page of the index; ?q=WORDS searches it
    GET  /thumbnail, /picture   ?path=PATH: a picture of the index as JPEG, small or larger
    GET  /health          whether the server answers, and what it has
"""

from __future__ import annotations

import base64
import json
import os
import threading
import traceback
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import parse_qs, unquote_to_bytes

import torch
from PIL import Image
from torch import Tensor

from miniclip import ops
from miniclip.answers import ONE_LABEL, Label
from miniclip.errors import MiniclipError
from miniclip.images import ImageError
from miniclip.models import CLIP
from miniclip.search.gallery import THUMBNAIL, live_page, policy
from miniclip.serve.batching import BATCH, Batcher, BusyError
from miniclip.serve.inputs import Limits, RequestError, choice, is_data_url, parse, picture, strings
from miniclip.serve.pictures import Pictures
from miniclip.zero_shot import expand_templates, probabilities

TOP = 48  # pictures on a page
LARGER = 2048  # pixels of the longer side of /picture
MOST_DECODERS = 8  # threads that decode pictures, parse or search at a time, each with its memory
LABEL_SETS = 64  # sets of labels whose embeddings are kept
EMBEDDINGS = ("input", "model", "encoding_format", "dimensions", "user")
CLASSIFY = ("pictures", "labels", "templates", "model")
CACHED = {"Cache-Control": "private, max-age=300"}


class Answer(NamedTuple):
    """An answer of HTTP."""

    status: int
    kind: str  # its Content-Type
    body: bytes
    headers: dict[str, str] = {}  # noqa: RUF012


def as_json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    body = json.dumps(value, allow_nan=False).encode()
    return Answer(status, "application/json", body, {"Cache-Control": "no-store", **(headers or {})})


def as_error(message: str, status: int, headers: dict[str, str] | None = None) -> Answer:
    """In OpenAI's format."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": None}
    return as_json({"error": error}, status, headers)


class App:
    """A model, and an index if there is one, behind the routes. name: the model's, which a request may state."""

    def __init__(
        self,
        model: CLIP,
        preprocess: Callable[[Image.Image], Tensor],
        name: str,
        pictures: Pictures | None = None,
        limits: Limits | None = None,
    ):
        self.preprocess, self.name, self.pictures = preprocess, name, pictures
        self.limits = limits or Limits()
        self.tokenize = model.tokenize
        self.logit_scale = model.logit_scale.detach().exp().float().cpu()
        self.logit_bias = None if model.logit_bias is None else model.logit_bias.detach().float().cpu()  # of a SigLIP
        self.width = model.text_projection.shape[1]
        self.batcher = Batcher(model, self.limits.waiting)
        self.work = threading.BoundedSemaphore(min(MOST_DECODERS, os.cpu_count() or 1))
        self.label_embeddings = lru_cache(LABEL_SETS)(self._label_embeddings)
        self.routes: dict[str, tuple[str, Callable]] = {  # path: method, and what takes the body or the query
            "/v1/embeddings": ("POST", self.embeddings),
            "/v1/models": ("GET", self.models),
            "/classify": ("POST", self.classify),
            "/": ("GET", self.page),
            "/thumbnail": ("GET", lambda query: self.picture(query, THUMBNAIL)),
            "/picture": ("GET", lambda query: self.picture(query, LARGER)),
            "/health": ("GET", self.health),
        }

    def close(self) -> None:
        """End the model's thread, when all requests are answered."""
        self.batcher.close()

    def answer(self, method: str, target: str, body: bytes = b"") -> Answer:
        """method: GET or POST. target: path and query. Whatever happens becomes an answer."""
        path, _, query = target.partition("?")
        try:
            if path not in self.routes:
                raise RequestError(f"there is no {path!r:.80}; expected one of {', '.join(self.routes)}", 404)
            allowed, handle = self.routes[path]
            if method != allowed:
                return as_error(f"{path} does not take {method}; use {allowed}", 405, {"Allow": allowed})
            return handle(body if method == "POST" else query)
        except RequestError as error:
            return as_error(str(error), error.status)
        except BusyError as error:
            return as_error(str(error), 503, {"Retry-After": "1"})
        except MiniclipError as error:
            return as_error(str(error), 500)
        except Exception:
            traceback.print_exc()
            return as_error("the server failed; its standard error says why", 500)

    def health(self, query: str) -> Answer:
        pictures = None if self.pictures is None else len(self.pictures)
        return as_json({"status": "ok", "model": self.name, "embedding": self.width, "pictures": pictures})

    def models(self, query: str) -> Answer:
        return as_json({"object": "list", "data": [{"id": self.name, "object": "model", "owned_by": "miniclip"}]})

    def embeddings(self, body: bytes) -> Answer:
        request = self._parse(body, EMBEDDINGS)
        inputs = strings(request, "input", self.limits.inputs)
        as_base64 = choice(request, "encoding_format", ("float", "base64")) == "base64"
        choice(request, "dimensions", (self.width,))
        pictures = [i for i, each in enumerate(inputs) if is_data_url(each)]
        texts = [i for i in range(len(inputs)) if i not in set(pictures)]
        embeddings = torch.empty(len(inputs), self.width)
        embeddings[texts], tokens = self._embed_texts([inputs[i] for i in texts], [f"input[{i}]" for i in texts])
        embeddings[pictures] = self._embed_pictures([inputs[i] for i in pictures], [f"input[{i}]" for i in pictures])
        values = map(_base64, embeddings) if as_base64 else embeddings.tolist()
        data = [{"object": "embedding", "index": i, "embedding": value} for i, value in enumerate(values)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return as_json({"object": "list", "data": data, "model": self.name, "usage": usage})

    def classify(self, body: bytes) -> Answer:
        request = self._parse(body, CLASSIFY)
        pictures = strings(request, "pictures", self.limits.inputs)
        labels = tuple(dict.fromkeys(strings(request, "labels", self.limits.prompts)))
        if len(labels) < 2 and self.logit_bias is None:
            raise RequestError(f"{ONE_LABEL} (of embeddings from /v1/embeddings)")
        templates = strings({"templates": "{}", **request}, "templates", self.limits.prompts)
        weights = self.label_embeddings(labels, tuple(templates))
        embeddings = self._embed_pictures(pictures, [f"pictures[{i}]" for i in range(len(pictures))])
        scores = probabilities(embeddings, weights.T, self.logit_scale, self.logit_bias).tolist()
        data = []
        for i, rows in enumerate(zip(scores, (embeddings @ weights.T).tolist(), strict=True)):
            found = [Label(*figures)._asdict() for figures in zip(labels, *rows, strict=True)]
            data.append({"index": i, "labels": sorted(found, key=lambda label: -label["score"])})
        return as_json({"data": data, "model": self.name})

    def page(self, query: str) -> Answer:
        pictures = self._need_index()
        words = " ".join(parse_qs(query).get("q", [])).strip()
        about, hits, status = f"{len(pictures):,} pictures, searched with {self.name}.", [], 200
        try:
            if words:
                embedding, _ = self._embed_texts([words], ["the query"])
                with self.work:
                    hits, about = pictures.search(embedding, TOP), ""
        except RequestError as error:
            about, status = str(error), error.status
        safety = {"Content-Security-Policy": policy(live=True) + "; frame-ancestors 'none'"}
        with self.work:
            page = live_page(hits, words, about)
        return Answer(status, "text/html; charset=utf-8", page.encode(), {"Cache-Control": "no-store", **safety})

    def picture(self, query: str, size: int) -> Answer:
        """Only the paths of the index are ever opened, and only decoded pixels are sent."""
        pictures = self._need_index()
        name, _, path = query.partition("=")
        try:
            if name != "path":
                raise KeyError(name)
            with self.work:
                return Answer(200, "image/jpeg", pictures.jpeg(os.fsdecode(unquote_to_bytes(path)), size), CACHED)
        except KeyError:
            raise RequestError("the index has no such picture; expected ?path= and a path that it holds", 404) from None
        except ImageError:
            raise RequestError("the file of this picture is gone or can't be read; update the index", 404) from None

    def _parse(self, body: bytes, fields: Sequence[str]) -> dict:
        with self.work:
            request = parse(body, fields)
        if request.get("model", self.name) != self.name:
            raise RequestError(f"there is no model {request['model']!r:.80}; expected {self.name!r}, or no model", 404)
        return request

    def _need_index(self) -> Pictures:
        if self.pictures is None:
            raise RequestError("this server has no index; start it with `miniclip serve --index INDEX`", 404)
        return self.pictures

    def _embed_texts(self, texts: Sequence[str], names: Sequence[str]) -> tuple[Tensor, int]:
        """Unit embeddings [N, E], and the number of tokens. names: of the texts, for messages."""
        ids = [self._tokenize(text, name) for text, name in zip(texts, names, strict=True)]
        parts = [self.batcher.encode("text", torch.cat(ids[i : i + BATCH])) for i in range(0, len(ids), BATCH)]
        return torch.cat([torch.empty(0, self.width), *parts]), sum(map(self._count, ids))

    def _tokenize(self, text: str, name: str) -> Tensor:
        if len(text) > self.limits.letters:
            raise RequestError(f"{name} has {len(text)} characters; expected at most {self.limits.letters}")
        try:
            with self.work:
                return self.tokenize(text)
        except (ValueError, RuntimeError) as error:
            raise RequestError(f"{name}: {error}") from None

    def _count(self, ids: Tensor) -> int:
        """The number of tokens up to a text's end; a SigLIP attends to its padding too."""
        return int(ids.argmax()) + 1 if self.logit_bias is None else ids.shape[1]

    def _embed_pictures(self, urls: Sequence[str], names: Sequence[str]) -> Tensor:
        """Unit embeddings [N, E]; only the pixels of one batch are in memory."""
        parts = [torch.empty(0, self.width)]
        for start in range(0, len(urls), BATCH):
            end = start + BATCH
            pixels = [self._pixels(*each) for each in zip(urls[start:end], names[start:end], strict=True)]
            parts.append(self.batcher.encode("image", torch.stack(pixels)))
        return torch.cat(parts)

    def _pixels(self, url: str, name: str) -> Tensor:
        with self.work:
            image = picture(url, name)
            try:
                return self.preprocess(image)
            except ImageError as error:
                raise RequestError(f"{name}: {error}") from None

    def _label_embeddings(self, labels: tuple[str, ...], templates: tuple[str, ...]) -> Tensor:
        """Unit embeddings [labels, E], each the mean of a label's prompts, as `zero_shot_weights`."""
        try:
            expanded = expand_templates(templates)
        except MiniclipError as error:
            raise RequestError(str(error)) from None
        count, most = len(labels) * len(expanded), self.limits.prompts
        if count > most:
            raise RequestError(f"{len(labels)} labels in {len(expanded)} templates are {count} prompts, over {most}")
        label = max(map(len, labels))
        longest = max(len(template) + template.count("{}") * (label - 2) for template in expanded)
        if longest > self.limits.letters:
            raise RequestError(f"a prompt has {longest} characters; expected at most {self.limits.letters}")
        prompts = [template.replace("{}", label) for label in labels for template in expanded]
        embeddings, _ = self._embed_texts(prompts, [f"the prompt {prompt!r:.60}" for prompt in prompts])
        return ops.normalize(embeddings.unflatten(0, (len(labels), -1)).mean(dim=1))


def _base64(row: Tensor) -> str:
    """float32, little-endian."""
    return base64.b64encode(row.numpy().astype("<f4").tobytes()).decode()
