"""The OpenAI door: a Starlette application over a service.

app = make_app(service, Options(keys=("secret",)))
"""

import asyncio
import re
import time
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any
from uuid import uuid4

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from himap_export.graphs.errors import HimapError, suggestion
from himap_export.serve.errors import ApiError, as_api_error, unavailable
from himap_export.serve.gate import Gate, Intake
from himap_export.serve.logs import RequestLog
from himap_export.serve.messages import Question
from himap_export.serve.metrics import Metrics
from himap_export.serve.pictures import PictureLimits, pictures
from himap_export.serve.schema import CONTENT, Chat, read_chat
from himap_export.serve.service import Draining, QueueFull, Service
from himap_export.serve.stream import Answer, AnswerResponse, Events

PREPARING = 8  # requests whose pictures are fetched, decoded and prepared at a time
PREPARERS = 2  # threads that prepare them
TEXT_IN_JSON = 2**18  # bytes of a body beside its pictures


@dataclass(frozen=True)
class Options:
    """How the door is kept. `keys`: one of which each request to /v1 must bear, if there are any; `request_s`: how long
    an answer may take, waiting included; `body_s`: how long a client may take to send its request; `held_bytes`: of all
    bodies that are being read or prepared. /metrics is there if `metrics` are."""

    keys: tuple[str, ...] = ()
    pictures: PictureLimits = field(default_factory=PictureLimits)
    request_s: float = 300.0
    body_s: float = 30.0
    held_bytes: int = 2**29
    metrics: Metrics | None = None
    log: RequestLog | None = None


def make_app(service: Service, options: Options | None = None) -> Starlette:
    """Returns the application; it neither opens nor closes the service."""
    door = Door(service, options or Options())
    gate = Middleware(Gate, keys=door.options.keys, log=door.options.log)
    app = Starlette(routes=door.routes(), middleware=[gate], exception_handlers={HTTPException: _no_route})
    app.router.redirect_slashes = False
    return app


class Door:
    """The routes' functions. Whatever is refused is raised as ApiError, which the gate answers."""

    def __init__(self, service: Service, options: Options) -> None:
        self.service, self.options, self.opened = service, options, int(time.time())
        most = min(options.pictures.together, max(v.budget.images for v in service.bundle.manifest.variants))
        max_bytes = options.pictures.max_bytes * most * 4 // 3 + TEXT_IN_JSON
        self._intake = Intake(max_bytes, options.held_bytes, options.body_s)
        self._preparing = asyncio.Semaphore(PREPARING)
        self._threads = ThreadPoolExecutor(PREPARERS, "himap-prepare")
        self._models = {name: self._model(name, plan) for name, plan in service.models.items()}

    def routes(self) -> list[Route]:
        """Returns all there is."""
        metrics = [Route("/metrics", self._metrics)] if self.options.metrics is not None else []
        return [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/models", self._list_models),
            Route("/v1/models/{name}", self._one_model),
            Route("/health", self._alive),
            Route("/health/ready", self._ready),
            Route("/", _page),
            *metrics,
        ]

    async def _chat(self, request: Request) -> AnswerResponse:
        asked = time.monotonic()
        if not self.service.ready:
            raise self._rejected(Draining("the server is not ready", "it starts or stops"))
        with self._intake.holding() as held:
            chat = read_chat(await held.body(request))
            question = await self._question(chat, asked)
        answer, events = Answer(question, chat.style), Events()
        del chat  # pictures' URIs are megabytes long
        try:
            cancel = self.service.submit(question, events.deliver)
        except (QueueFull, Draining) as problem:
            raise self._rejected(problem) from None
        state, client = request.scope["state"], request.client.host if request.client else None
        return AnswerResponse(
            answer, events, cancel, lambda told, status: self._log(told, status, state["request_id"], client)
        )

    async def _question(self, chat: Chat, asked: float) -> Question:
        self._known(chat.model)
        new_tokens, urls = chat.new_tokens(self.service.max_new_tokens), chat.images
        try:
            self.service.check_images(chat.model, len(urls))
        except HimapError as problem:
            raise as_api_error(problem, CONTENT) from None
        async with self._preparing:
            images = await pictures(urls, self.options.pictures)
            try:
                prepare, loop = self.service.prepare, asyncio.get_running_loop()
                request = await loop.run_in_executor(self._threads, prepare, chat.model, images, chat.prompt)
            except HimapError as problem:
                raise as_api_error(problem, "messages") from None
        return Question(
            f"chatcmpl-{uuid4().hex}", chat.model, request, new_tokens, asked=asked, sampling=chat.sampling,
            stop=chat.stops, deadline=asked + self.options.request_s, streamed=bool(chat.stream),
        )  # fmt: skip

    def _known(self, name: str) -> None:
        if name not in self.service.models:
            text = f"there is no model {name[:80]!r}: {', '.join(self.service.models)}"
            raise ApiError(404, text + suggestion(name, self.service.models), param="model", code="model_not_found")

    def _rejected(self, problem: HimapError) -> ApiError:
        if self.options.metrics is not None:
            self.options.metrics.rejected("queue_full" if isinstance(problem, QueueFull) else "draining")
        return as_api_error(problem)

    def _log(self, answer: Answer, status: int, request_id: str, client: str | None) -> None:
        if self.options.log is None:
            return
        question, usage, now = answer.question, answer.usage(), time.monotonic()
        seconds = {**answer.seconds(), "e2e_s": now - question.asked}
        self.options.log.write(
            "request", request_id=request_id, id=question.id, client=client, status=status, model=question.model,
            plan=question.request.spec.plan_name, text_budget=question.request.spec.budget.text,
            images=len(question.request.sizes), finish_reason=answer.ended.reason if answer.ended else None,
            prompt=question.request.prompt, answer="".join(answer.texts), **usage,
            **{name.replace("_s", "_ms"): None if s is None else round(s * 1e3, 3) for name, s in seconds.items()},
        )  # fmt: skip

    async def _list_models(self, request: Request) -> Response:
        return _json({"object": "list", "data": list(self._models.values())})

    async def _one_model(self, request: Request) -> Response:
        self._known(name := request.path_params["name"])
        return _json(self._models[name])

    def _model(self, name: str, plan: str) -> dict[str, Any]:
        """OpenAI's model object; as extension, what the plan keeps."""
        spec = self.service.bundle.select(plan)
        himap = {
            "plan": plan,
            "cuts": [{"layer": cut.layer, "criterion": cut.criterion} for cut in spec.plan.cuts],
            "image_tokens": dict(zip(spec.plan.stages, spec.budget.visual, strict=True)),
            "picture": spec.image.size,
            "images": sorted({v.budget.images for v in self.service.bundle.manifest.variants}),
            "max_new_tokens": self.service.max_new_tokens,
        }
        return {"id": name, "object": "model", "created": self.opened, "owned_by": "himap-export", "himap": himap}

    async def _alive(self, request: Request) -> Response:
        return _json({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        if not self.service.ready:
            raise unavailable("the server is not ready")
        return _json({"status": "ready"})

    async def _metrics(self, request: Request) -> Response:
        assert self.options.metrics is not None  # else there is no such route
        content, kind = self.options.metrics.render()
        return Response(content, headers={"content-type": kind})


async def _page(request: Request) -> Response:
    page, policy = _page_and_policy()
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff", "cache-control": "no-cache"}
    return Response(page, media_type="text/html", headers=headers)


@cache
def _page_and_policy() -> tuple[bytes, str]:
    """The page, which may run and ask nothing but what is its own."""
    page = files("himap_export.serve").joinpath("page.html").read_bytes()
    policy = "default-src 'none'; img-src data: blob:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'"
    for kind in ("script", "style"):
        inline = re.findall(rf"<{kind}>(.*?)</{kind}>".encode(), page, re.DOTALL)
        hashes = "".join(f" 'sha256-{b64encode(sha256(text).digest()).decode()}'" for text in inline)
        policy += f"; {kind}-src{hashes or ' ' + repr('none')}"
    return page, policy


async def _no_route(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, HTTPException)
    method, path = request.method[:20], request.scope["path"][:200]
    if problem.status_code == 405:
        raise ApiError(405, f"{path} does not take {method}", headers=dict(problem.headers or {}))
    raise ApiError(problem.status_code, f"there is no {path}")


def _json(document: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json")
