"""Open Inference Protocol v2 over gRPC: inference.proto, its messages taken and given as v2.py's tensors.

Serve's gRPC servers hand a call to the replica's method of that name, its message as bytes. Here it is put to
an application of its own (`make_app`), so that keys, room, deadline, metrics and log are those of HTTP.
"""

from __future__ import annotations

import functools
import ipaddress
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import ray
from fastapi import Depends, FastAPI, Request, Response
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message
from ray.serve.grpc_util import RayServegRPCContext
from starlette.types import ASGIApp, Scope

from serve.body import Upload
from serve.envelope import Envelope, as_response
from serve.routes import model_named
from serve.schemas import Problem
from serve.service import PoseService, Protocol
from serve.settings import Limits
from serve.v2 import INPUTS, OUTPUTS, SERVER, arrays_of, find_of, metadata, uploads_of_inputs, wish_of

SERVICE = "inference.GRPCInferenceService"
METHODS = ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer")
SERVICER = "serve.v2_grpc:add_to_server"
"""For Serve's gRPCOptions."""
TAKEN = ("authorization", "x-request-id")
"""Metadata of a call that the application sees as headers."""
LONGEST_DETAIL = 600
"""Characters, of up to 12 bytes each: names that a client invents stand in it, and gRPC sends 8 KB."""
CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,  # as gRPC itself says of a message that is too long
    421: grpc.StatusCode.PERMISSION_DENIED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""Status of a problem as gRPC's; any other: INVALID_ARGUMENT."""


def add_to_server(servicer: Any, server: grpc.aio.Server) -> None:
    """The methods that Serve's gRPC servers take. Messages stay bytes until a replica has them."""
    methods = {name: grpc.unary_unary_rpc_method_handler(getattr(servicer, name)) for name in METHODS}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))


def is_ready(address: str, timeout_s: float) -> bool:
    """Whether HOST:PORT says over gRPC that a model answers."""
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = channel.unary_unary(f"/{SERVICE}/ServerReady")(b"", timeout=timeout_s)
        except grpc.RpcError:
            return False
    return message("ServerReadyResponse").FromString(answer).ready


@functools.cache
def _pool() -> descriptor_pool.DescriptorPool:
    """The protocol. Not in the common pool, where it would clash with other programs' files of its names."""
    compiled = Path(__file__).with_name("inference.binpb").read_bytes()
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(compiled).file:
        pool.Add(file)
    return pool


@functools.cache
def message(name: str) -> type[Message]:
    """Class of a message of inference.proto."""
    pool = _pool()
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"inference.{name}"))


@dataclass(frozen=True)
class Given:
    """What a method returns to Serve, which asks it for its bytes."""

    content: bytes

    def SerializeToString(self) -> bytes:
        return self.content


class PoseEndpoint(PoseService):
    """The deployment with the methods that gRPC calls by name."""

    def __serve_build_asgi_app__(self) -> FastAPI:
        self._grpc_app = make_app(self)
        return super().__serve_build_asgi_app__()

    async def _asked(self, method: str, content: bytes, context: RayServegRPCContext) -> Given:
        return await answer_call(self._grpc_app, method, content, context)

    async def ServerLive(self, content: bytes, grpc_context: RayServegRPCContext) -> Given:
        return await self._asked("ServerLive", content, grpc_context)

    async def ServerReady(self, content: bytes, grpc_context: RayServegRPCContext) -> Given:
        return await self._asked("ServerReady", content, grpc_context)

    async def ModelReady(self, content: bytes, grpc_context: RayServegRPCContext) -> Given:
        return await self._asked("ModelReady", content, grpc_context)

    async def ServerMetadata(self, content: bytes, grpc_context: RayServegRPCContext) -> Given:
        return await self._asked("ServerMetadata", content, grpc_context)

    async def ModelMetadata(self, content: bytes, grpc_context: RayServegRPCContext) -> Given:
        return await self._asked("ModelMetadata", content, grpc_context)

    async def ModelInfer(self, content: bytes, grpc_context: RayServegRPCContext) -> Given:
        return await self._asked("ModelInfer", content, grpc_context)


# --- the application ----------------------------------------------------------------------------


def make_app(service: PoseService) -> FastAPI:
    """The gRPC side of a service: each method under its path, message in and out."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, dependencies=[Depends(_from_here)])
    app.state.here_only = service.args.here_only
    # A call has no Host header, and no page can make a browser send one.
    app.add_middleware(Envelope, service=service, hosts=())
    app.add_exception_handler(Problem, as_response)

    @app.post(f"/{SERVICE}/ServerLive")
    async def server_live() -> Response:
        return _said("ServerLiveResponse", live=True)

    @app.post(f"/{SERVICE}/ServerReady")
    async def server_ready() -> Response:
        try:
            service.ready()
        except Problem:
            return _said("ServerReadyResponse", ready=False)
        return _said("ServerReadyResponse", ready=True)

    @app.post(f"/{SERVICE}/ModelReady")
    async def model_ready(request: Request) -> Response:
        asked = _read("ModelReadyRequest", await request.body())
        model_named(service, asked.name, asked.version or None)
        return _said("ModelReadyResponse", ready=True)

    @app.post(f"/{SERVICE}/ServerMetadata")
    async def server_metadata() -> Response:
        return _said("ServerMetadataResponse", **SERVER)

    @app.post(f"/{SERVICE}/ModelMetadata")
    async def model_metadata(request: Request) -> Response:
        asked = _read("ModelMetadataRequest", await request.body())
        served = model_named(service, asked.name, asked.version or None)
        keypoints = served.predictor.spec.skeleton.num_keypoints
        return _said("ModelMetadataResponse", **metadata(served.info(), keypoints))

    async def uploads_of(request: Request, content: bytes, limits: Limits) -> list[Upload]:
        asked = _read("ModelInferRequest", content)
        model_named(service, asked.model_name, asked.model_version or None)
        outputs = [{"name": one.name} for one in asked.outputs]
        request.state.wish = wish_of({"id": asked.id, "outputs": outputs})
        request.state.find = find_of(_parameters(asked))
        return uploads_of_inputs(_inputs(asked), b"".join(asked.raw_input_contents), limits)

    @app.post(f"/{SERVICE}/ModelInfer")
    async def model_infer(request: Request) -> Response:
        answered = await service.answer(request, protocol=Protocol((), uploads_of))
        model, wish, arrays = answered.answer.model, request.state.wish, arrays_of(answered.poses)
        sources = [result.boxes_source for result in answered.answer.results]
        told = {"request_id": answered.answer.request_id, "boxes_source": "\n".join(sources)}
        if warnings := [warning for result in answered.answer.results for warning in result.warnings]:
            told["warnings"] = "\n".join(warnings)
        outputs = [{"name": n, "datatype": OUTPUTS[n], "shape": arrays[n].shape} for n in wish.outputs]
        return _said(
            "ModelInferResponse",
            model_name=model.name,
            model_version=model.version,
            id=wish.id,
            parameters={name: {"string_param": text} for name, text in told.items()},
            outputs=outputs,
            raw_output_contents=[arrays[name].tobytes() for name in wish.outputs],
        )

    return app


async def _from_here(request: Request) -> None:
    """Problem (421) for a call of another machine, where the endpoint is for this one alone: Serve's gRPC
    servers listen on every interface."""
    host = request.client.host if request.client else ""
    if request.app.state.here_only and not is_of_this_machine(host):
        what = "is another machine, and the endpoint is for its own alone (--serve.host)."
        raise Problem("misdirected", f"{host or 'nameless'}: {what}")


def is_of_this_machine(host: str) -> bool:
    """Whether a peer's address is loopback, or the one by which HAProxy reaches the replicas of its node."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or host == ray.util.get_node_ip_address()


def _read(name: str, content: bytes) -> Any:
    try:
        return message(name).FromString(content)
    except DecodeError:
        raise Problem("malformed-body", f"the message: not a {name} of inference.proto.") from None


def _said(kind: str, /, **fields: Any) -> Response:
    return Response(message(kind)(**fields).SerializeToString(), media_type="application/x-protobuf")


def _parameters(asked: Any) -> dict[str, Any]:
    chosen = {name: (one, one.WhichOneof("parameter_choice")) for name, one in asked.parameters.items()}
    return {name: getattr(one, field) for name, (one, field) in chosen.items() if field}


def _inputs(asked: Any) -> list[dict[str, Any]]:
    """The inputs of a ModelInferRequest as `uploads_of_inputs` reads them."""
    raw = asked.raw_input_contents
    if raw and len(raw) != len(asked.inputs):
        what = f"raw_input_contents has {len(raw)} entries, inputs {len(asked.inputs)}: one for each."
        raise Problem("malformed-body", f"the message: {what}")
    sizes: list[dict[str, Any]]
    if raw:
        sizes = [{"parameters": {"binary_data_size": len(one)}} for one in raw]
    else:
        sizes = [{"data": _contents(one)} for one in asked.inputs]
    named = [{"name": one.name, "datatype": one.datatype} for one in asked.inputs]
    return [{**one, **more} for one, more in zip(named, sizes, strict=True)]


def _contents(tensor: Any) -> list[Any]:
    """Its typed contents. Problem where they are bytes and should be numbers, or the other way round."""
    data: list[Any] = []
    expected = INPUTS[tensor.name][0] if tensor.name in INPUTS else ""
    for field, values in tensor.contents.ListFields():
        if expected and (field.name == "bytes_contents") != (expected == "BYTES"):
            raise Problem.of_field(tensor.name, "invalid-field", f"expected {expected}, got {field.name}.")
        data += values
    return data


# --- a call as a request to the application -----------------------------------------------------


async def answer_call(app: FastAPI, method: str, content: bytes, context: RayServegRPCContext) -> Given:
    """Put a call to the application. A problem becomes code, details and trailing metadata of `context`."""
    given = dict(context.invocation_metadata())
    of_serve = dict(context.trailing_metadata()).get("request_id", "")
    headers = {"x-request-id": of_serve, **{name: given[name] for name in TAKEN if name in given}}
    headers["content-length"] = str(len(content))
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "2",
        "method": "POST",
        "scheme": "http",
        "path": f"/{SERVICE}/{method}",
        "query_string": b"",
        "headers": [(name.encode(), str(value).encode()) for name, value in headers.items()],
        "client": peer_address(context.peer()),
        "state": {},
    }
    status, answer_headers, answer = await _through(app, scope, content)
    trailing = {"x-request-id": scope["state"]["request_id"]}
    if status != 200:
        problem = json.loads(answer)
        trailing["problem"] = problem["type"]
        if retry := answer_headers.get("retry-after"):
            trailing["retry-after"] = retry
        context.set_code(CODES.get(status, grpc.StatusCode.INVALID_ARGUMENT))
        context.set_details(problem["detail"][:LONGEST_DETAIL])
        answer = b""  # an exception would be logged as a defect
    context.set_trailing_metadata(list(trailing.items()))
    return Given(answer)


async def _through(app: ASGIApp, scope: Scope, content: bytes) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of the application's answer."""
    started: dict[str, Any] = {}
    body = bytearray()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            started.update(message)
        else:
            body.extend(message.get("body", b""))

    await app(scope, receive, send)
    headers = {name.decode(): value.decode() for name, value in started["headers"]}
    return started["status"], headers, bytes(body)


def peer_address(peer: str) -> tuple[str, int] | None:
    """ipv4:10.0.0.1:5000 or ipv6:[::1]:5000, as gRPC has it -> (host, port); None for anything else."""
    kind, _, place = peer.replace("%5B", "[").replace("%5D", "]").partition(":")
    parts = urlsplit(f"//{place}")
    return (parts.hostname, parts.port or 0) if kind in ("ipv4", "ipv6") and parts.hostname else None
