"""OpenAI's HTTP API: vLLM's own routes on the service's engine, with adapters and their versions as models.

vLLM parses requests, lays chats out and streams. What is done here is to turn a model's name into a version when a
request is admitted, and to keep that version until the response has ended, however it ends.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import re
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import structlog
import uvicorn
from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.openai.chat_completion.api_router import create_chat_completion
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.api_router import create_completion
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.engine.protocol import ModelCard, ModelList
from vllm.entrypoints.openai.models.api_router import show_available_models
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.utils.api_utils import validate_json_request
from vllm.entrypoints.serve.utils.server_utils import (
    exception_handler,
    http_exception_handler,
    validation_exception_handler,
)
from vllm.exceptions import VLLMNotFoundError
from vllm.lora.request import LoRARequest
from vllm.renderers.online_renderer import OnlineRenderer

from sampler_service import openai_body
from sampler_service.engine import Engine, lora_request
from sampler_service.sampler import Sampler
from sampler_service.versions import Version
from service_common import errors
from service_common.errors import Code, ServiceError

log = structlog.get_logger(__name__)

_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"

# ADAPTER follows the latest version, ADAPTER@VERSION names one.
_MODEL = re.compile(r"([^@]+)(?:@([1-9][0-9]{0,18}))?")

_STATUS = {
    Code.INVALID_ARGUMENT: (400, "invalid_request_error"),
    Code.NOT_FOUND: (404, "invalid_request_error"),
    Code.RESOURCE_EXHAUSTED: (429, "rate_limit_error"),
}


class HttpServer:
    """Listens for as long as it is told to; the service's own signals and engine stay the service's."""

    def __init__(self, listener: socket.socket, sampler: Sampler, engine: Engine):
        """`listener` is bound. ServiceError FAILED_PRECONDITION when the base model has no tokenizer."""
        if engine.llm.tokenizer is None:
            raise errors.failed_precondition(
                "NO_TOKENIZER", "the base model comes without a tokenizer, which --http needs; leave that out"
            )
        self._listener = listener
        app = _application(sampler, engine)
        self._server = _Server(
            uvicorn.Config(app, lifespan="off", log_config=None, log_level="warning", access_log=False)
        )
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Accepts connections when it returns."""
        self._serving = asyncio.create_task(self._server.serve([self._listener]))
        while not (self._server.started or self._serving.done()):  # noqa: ASYNC110  uvicorn sets no event
            await asyncio.sleep(0.01)
        if self._serving.done():
            self._serving.result()
        log.info("listening_http", address="{}:{}".format(*self._listener.getsockname()))

    async def drain(self, grace_seconds: float) -> None:
        """No new requests; running ones get `grace_seconds` to finish."""
        self._server.config.timeout_graceful_shutdown = math.ceil(grace_seconds)
        self._server.should_exit = True
        if self._serving:
            await self._serving


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Models(OpenAIServingModels):
    """What vLLM's routes know of models: all live versions to list, and to run those that requests were admitted to."""

    def __init__(self, sampler: Sampler, engine: Engine):
        name = sampler.base_model.name
        # A folder on this host means nothing to a client.
        self.base_name = Path(name).name if Path(name).is_dir() else name
        super().__init__(engine.llm, [BaseModelPath(name=self.base_name, model_path=self.base_name)])
        self._sampler = sampler
        self._engine = engine
        self._numbers = itertools.count()

    @contextlib.asynccontextmanager
    async def serving(self, version: Version | None) -> AsyncIterator[str]:
        """The name by which vLLM's routes find the version. Its work has ended when the context has."""
        if version is None:
            yield self.base_name
            return
        name = f"{version.lora_name}/{next(self._numbers)}"
        lora = self.lora_requests[name] = lora_request(version)
        try:
            yield name
        finally:
            del self.lora_requests[name]
            # A stream that was abandoned ends when Python collects it, and the version may not wait for that.
            await self._engine.abort(lora)

    def model_name(self, lora_request: LoRARequest | None = None) -> str:  # named as vLLM does
        """What a response says of who answered: ADAPTER@VERSION, or the base model's name."""
        return lora_request.lora_name.partition("#")[0] if lora_request else self.base_name

    async def show_available_models(self) -> ModelList:
        """The base model, and each adapter by its name, which is its latest version, and by those of all versions."""
        models = ModelList(data=[self._card(self.base_name)])
        for adapter_id, versions in self._sampler.registry.adapters().items():
            names = [f"{adapter_id}@{live.version.version}" for live in versions]
            models.data.append(self._card(adapter_id, root=names[-1], parent=self.base_name))
            models.data.extend(self._card(name, root=name, parent=self.base_name) for name in names)
        return models

    def _card(self, name: str, **relations: str) -> ModelCard:
        return ModelCard(
            id=name, owned_by="tinkerbell", max_model_len=self._sampler.base_model.max_sequence_length, **relations
        )


class _Admission:
    """ASGI middleware: admits a request to a version, which vLLM's routes then find under the request's model."""

    def __init__(self, app: ASGIApp, sampler: Sampler, models: _Models):
        self._app = app
        self._sampler = sampler
        self._models = models

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in (_CHAT, _COMPLETIONS):
            await self._app(scope, receive, send)
            return
        try:
            body = openai_body.parsed(await _read(receive), self._sampler.base_model.vocab_size)
            num_sequences = openai_body.num_sequences(body)
            with self._sampler.admitted(*self._asked(body.get("model")), num_sequences) as version:
                async with self._models.serving(version) as model:
                    named = json.dumps(body | {"model": model}).encode()
                    await self._app(scope, _given_back(named, receive), self._signed(send, version))
        except _DisconnectedError:
            return
        except ServiceError as error:
            await self._refusal(error)(scope, receive, send)

    def _asked(self, model: object) -> tuple[str, int]:
        """Adapter and version, as requests over gRPC name them."""
        if not isinstance(model, str) or not model:
            raise errors.invalid_argument("MODEL_MISSING", "the request names no model", field="model")
        if model == self._models.base_name:
            return "", 0
        named = _MODEL.fullmatch(model)
        return (named[1], int(named[2] or 0)) if named else (model, 0)

    def _refusal(self, error: ServiceError) -> JSONResponse:
        """In OpenAI's format; `code` is the reason, as in docs/errors.md."""
        status, kind = _STATUS[error.code]
        message, field = error.message, error.field or None
        if error.code is Code.NOT_FOUND:
            message, field = f"{message}; the base model is {self._models.base_name!r}", "model"
        headers = {} if error.retry_seconds is None else {"retry-after": str(math.ceil(error.retry_seconds))}
        content = {"message": message, "type": kind, "param": field, "code": error.reason}
        return JSONResponse({"error": content}, status, headers)

    def _signed(self, send: Send, version: Version | None) -> Send:
        """Adds headers with what AdapterVersion says."""

        async def signed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-tinkerbell-adapter"] = version.adapter_id if version else ""
                headers["x-tinkerbell-version"] = str(version.version if version else 0)
                headers["x-tinkerbell-digest"] = version.digest if version else self._sampler.base_model.fingerprint
            await send(message)

        return signed


class _DisconnectedError(Exception):
    pass


def _application(sampler: Sampler, engine: Engine) -> ASGIApp:
    """Three of vLLM's routes, and nothing that loads, unloads, changes or stops anything."""
    models = _Models(sampler, engine)
    renderer = OnlineRenderer(
        engine.llm.model_config,
        engine.llm.renderer,
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
    )
    app = FastAPI(openapi_url=None)
    app.state.args = argparse.Namespace(log_error_stack=False)  # for the handlers of exceptions
    app.state.openai_serving_models = models
    app.state.openai_serving_chat = OpenAIServingChat(
        engine.llm,
        models,
        "assistant",
        online_renderer=renderer,
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
    )
    app.state.openai_serving_completion = OpenAIServingCompletion(
        engine.llm, models, online_renderer=renderer, request_logger=None
    )
    is_json = [Depends(validate_json_request)]
    app.add_api_route("/v1/models", show_available_models, methods=["GET"])
    app.add_api_route(_CHAT, create_chat_completion, methods=["POST"], dependencies=is_json, response_model=None)
    app.add_api_route(_COMPLETIONS, create_completion, methods=["POST"], dependencies=is_json, response_model=None)
    app.exception_handler(HTTPException)(http_exception_handler)
    app.exception_handler(RequestValidationError)(validation_exception_handler)
    for kind in (ValueError, TypeError, OverflowError, NotImplementedError, VLLMNotFoundError, Exception):
        app.exception_handler(kind)(exception_handler)
    return _Admission(app, sampler, models)


async def _read(receive: Receive) -> bytes:
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _DisconnectedError
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > openai_body.MAX_BODY_BYTES:
            raise errors.invalid_argument("BODY_INVALID", f"the body has more than {openai_body.MAX_BODY_BYTES} bytes")
    return bytes(body)


def _given_back(body: bytes, receive: Receive) -> Receive:
    """A `receive` that starts with the whole body and goes on with what `receive` has, which is the disconnection."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return first.pop() if first else await receive()

    return again
