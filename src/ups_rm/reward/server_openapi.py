"""What `/openapi.json` of the reward server says beyond what FastAPI finds out by itself: bodies, errors, the token.

Endpoints read their bodies themselves (limits come first), so FastAPI sees neither the request models nor the errors.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from ups_rm.reward.server_schemas import ErrorResponse

PLACE = "#/components/schemas/{model}"
ERRORS = {
    400: "not JSON",
    408: "the body did not come in time",
    413: "too large, or more conversations than are ever accepted",
    422: "JSON that is no request, or conversations that can't be rendered",
    429: "the queue is full; Retry-After says when to come again",
    500: "the model failed",
    503: "too many connections, no answer in time, or the server is ending",
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text} for status, text in ERRORS.items()
}
"""`responses=` of the endpoints that score."""


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra=` of an endpoint whose JSON body is `model`; `describe` puts the model itself in."""
    schema = {"$ref": PLACE.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe(app: FastAPI, bodies: list[type[BaseModel]], *, token: bool, open_paths: frozenset[str]) -> None:
    """Have the app's document name the models of the bodies, and the token where one is needed."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = plain()
            _, models = models_json_schema([(body, "validation") for body in bodies], ref_template=PLACE)
            components = document.setdefault("components", {})
            components.setdefault("schemas", {}).update(models["$defs"])
            if token:
                components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
                refused = {"description": "no token, or a wrong one", "content": _content(ErrorResponse)}
                for path, operations in document["paths"].items():
                    for operation in operations.values() if path not in open_paths else ():
                        operation["security"] = [{"token": []}]
                        operation["responses"]["401"] = refused
        assert app.openapi_schema is not None  # FastAPI keeps what `plain` made
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend it


def _content(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": PLACE.format(model=model.__name__)}}}
