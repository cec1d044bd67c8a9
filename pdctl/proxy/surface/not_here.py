"""Errors for paths that are not served. Endpoints of OpenAI's API that this service does not have are named."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from pdctl.net import asgi
from pdctl.net.openai.api import ApiError
from pdctl.proxy.translation import APIS, Api

# Endpoints of OpenAI's API, vLLM's and Anthropic's, each with all paths below it.
_NAMED = {
    "/v1/embeddings": "embeddings",
    "/v1/audio": "audio",
    "/v1/images": "images",
    "/v1/videos": "videos",
    "/v1/moderations": "moderation",
    "/v1/files": "files",
    "/v1/uploads": "uploads",
    "/v1/batches": "batches",
    "/v1/messages/batches": "batches",
    "/v1/rerank": "reranking",
    "/v2/rerank": "reranking",
    "/rerank": "reranking",
    "/v1/score": "scoring",
    "/score": "scoring",
    "/pooling": "pooling",
    "/classify": "classification",
    "/v1/assistants": "assistants",
    "/v1/threads": "threads",
    "/v1/conversations": "conversations",
    "/v1/vector_stores": "vector stores",
    "/v1/fine_tuning": "fine-tuning",
    "/v1/realtime": "realtime sessions",
    "/v1/complete": "Anthropic's text completions",
}
_INSTEAD = "it generates text, at /v1/chat/completions, /v1/completions, /v1/responses and /v1/messages"
_STORED = "/v1/responses/"


def _explained(path: str) -> str:
    """Why a path is not served; "" if there is no more to say than that."""
    if path.startswith(_STORED):
        return "this service stores no responses: it only has POST /v1/responses and POST /v1/responses/input_tokens"
    # 404, not 501: clients retry statuses from 500.
    found = next((what for head, what in _NAMED.items() if path == head or path.startswith(f"{head}/")), None)
    return f"this service has no {found}; {_INSTEAD}" if found else ""


async def _refused(request: Request, failure: Exception) -> Response:
    """Starlette's own errors in the format of the API that the path belongs to."""
    assert isinstance(failure, HTTPException)
    path = request.url.path
    told = (_explained(path) if failure.status_code == 404 else "") or failure.detail
    error = ApiError(failure.status_code, f"{request.method} {path}: {told}")
    api = _api_of(path)
    body = error.body() if api is None else api.error_body(error, asgi.request_id(dict(request.headers.raw)))
    return Response(body, error.status, failure.headers, media_type="application/json")


def _api_of(path: str) -> Api | None:
    return next((api for api in APIS.values() if path.startswith(f"{api.path}/")), None)


# For Starlette, as `pdctl.net.asgi.OPENAI_ERRORS`.
API_ERRORS = {HTTPException: _refused}
