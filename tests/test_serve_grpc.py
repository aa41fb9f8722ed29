"""The Open Inference Protocol over gRPC, as Triton's client speaks it: real server and messages, no Serve."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from ray.serve.grpc_util import RayServegRPCContext
from test_serve import BOXES, photo, service_of
from test_serve_protocols import running as over_http

from hrnet_core.images import encode_jpeg, encode_png
from hrnet_core.predictor import PosePredictor
from serve import routes, v2_grpc
from serve.metrics import Outcome
from serve.service import PoseService
from serve.settings import Limits, LiveSettings
from serve.v2_grpc import METHODS, SERVICE, answer_call, is_ready, make_app, message

triton = pytest.importorskip("tritonclient.grpc", reason="tritonclient of the dev extra")
ROOT = Path(__file__).parents[1]
KEY = "0123456789abcdef-triton"
PNG = encode_png(photo())
Code = grpc.StatusCode


@contextmanager
def running(service: PoseService) -> Iterator[str]:
    """HOST:PORT of a service over gRPC, called as Serve calls it."""
    app, loop = make_app(service), asyncio.new_event_loop()

    def call(method: str) -> Callable[..., Any]:
        async def handle(content: bytes, context: grpc.aio.ServicerContext) -> bytes:
            given = RayServegRPCContext(context)
            given.set_trailing_metadata([("request_id", "of-serve")])
            answer = await answer_call(app, method, content, given)
            given._set_on_grpc_context(context)
            return answer.SerializeToString()

        return handle

    async def start() -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server()
        servicer = type("Servicer", (), {method: staticmethod(call(method)) for method in METHODS})
        v2_grpc.add_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server, port = asyncio.run_coroutine_threadsafe(start(), loop).result(60)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(None), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(scope="module")
def service(checkpoint: Path) -> PoseService:
    return service_of(checkpoint, limits=Limits(max_body_bytes=900_000, max_people=6, max_images=3))


@pytest.fixture(scope="module")
def address(service: PoseService) -> Iterator[str]:
    with running(service) as address:
        yield address


def tensor(name: str, array: Any, datatype: str, dtype: Any) -> Any:
    values = np.array(array, dtype)
    given = triton.InferInput(name, values.shape, datatype)
    given.set_data_from_numpy(values)
    return given


def image(*files: bytes) -> Any:
    return tensor("image", files, "BYTES", object)


def raw_call(address: str, asked: Any, **options: Any) -> Any:
    """The answer to a message of ModelInfer, and the call."""
    with grpc.insecure_channel(address) as channel:
        infer = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        content = asked if isinstance(asked, bytes) else asked.SerializeToString()
        answer, call = infer.with_call(content, **options)
    return message("ModelInferResponse").FromString(answer), call


def refused(ask: Callable[[], Any]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        ask()
    return caught.value


def request(**fields: Any) -> Any:
    return message("ModelInferRequest")(model_name="hrnet-pose", **fields)


TYPED = {"name": "image", "datatype": "BYTES", "contents": {"bytes_contents": [PNG]}}
RAW_PNG = len(PNG).to_bytes(4, "little") + PNG


# --- answers ------------------------------------------------------------------------------------


def test_tritonclient_gets_what_the_predictor_finds(address: str, predictor: PosePredictor) -> None:
    with triton.InferenceServerClient(address) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("hrnet-pose")
        assert client.is_model_ready("hrnet-pose", "7")
        assert client.get_server_metadata().name == "hrnet"
        described = client.get_model_metadata("hrnet-pose")
        assert described.versions == ["7"]
        assert {one.name: (one.datatype, list(one.shape)) for one in described.outputs} == {
            "keypoints": ("FP32", [-1, 17, 3]),
            "scores": ("FP32", [-1]),
            "boxes": ("FP32", [-1, 4]),
            "counts": ("INT32", [-1]),
            "box_scores": ("FP32", [-1]),
        }
        given = [
            image(PNG, encode_png(photo(2))),
            tensor("boxes", BOXES, "FP32", np.float32),
            tensor("counts", [2, 1], "INT32", np.int32),
        ]
        found = client.infer("hrnet-pose", given, request_id="mine")
        few = client.infer("hrnet-pose", given, outputs=[triton.InferRequestedOutput("scores")])
    expected = predictor([photo(), photo(2)], [BOXES[:2], BOXES[2:]])
    keypoints = np.concatenate([poses.keypoints.data for poses in expected])
    assert (found.get_response().id, found.get_response().model_version) == ("mine", "7")
    np.testing.assert_allclose(found.as_numpy("keypoints"), keypoints, rtol=1e-5, atol=1e-3)
    np.testing.assert_array_equal(found.as_numpy("boxes"), np.array(BOXES, np.float32))
    np.testing.assert_array_equal(found.as_numpy("counts"), [2, 1])
    np.testing.assert_array_equal(few.as_numpy("scores"), found.as_numpy("scores"))
    assert [one.name for one in few.get_response().outputs] == ["scores"]


def test_typed_contents_are_read_as_raw_ones(address: str, predictor: PosePredictor) -> None:
    flat = [value for box in BOXES for value in box]
    numbers = ({"fp32_contents": flat}, {"fp64_contents": flat})
    for contents in numbers:
        boxes = {"name": "boxes", "datatype": "FP32", "shape": [3, 4], "contents": contents}
        counts = {"name": "counts", "datatype": "INT32", "shape": [1], "contents": {"int_contents": [3]}}
        answer, _ = raw_call(address, request(inputs=[TYPED, boxes, counts]))
        keypoints = np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(answer.outputs[0].shape)
        np.testing.assert_allclose(
            keypoints, predictor(photo(), BOXES)[0].keypoints.data, rtol=1e-5, atol=1e-3
        )
    whole, _ = raw_call(address, request(inputs=[TYPED]))
    assert np.frombuffer(whole.raw_output_contents[2], "<f4").tolist() == [0, 0, 320, 240]


def test_damaged_pictures_are_warned_of(address: str) -> None:
    damaged = bytearray(encode_jpeg(photo()))
    damaged[len(damaged) // 2 : len(damaged) // 2 + 20] = b"\xa5" * 20
    answer, _ = raw_call(
        address, request(inputs=[{**TYPED, "contents": {"bytes_contents": [bytes(damaged)]}}])
    )
    assert "The JPEG data are damaged" in answer.parameters["warnings"].string_param


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({}, Code.INVALID_ARGUMENT, "image: missing"),
        ({"inputs": [TYPED, TYPED]}, Code.INVALID_ARGUMENT, "image: unknown or twice"),
        ({"inputs": [{**TYPED, "name": "picture"}]}, Code.INVALID_ARGUMENT, "picture: unknown"),
        (
            {"inputs": [{**TYPED, "contents": {"bytes_contents": [b"none"]}}]},
            Code.INVALID_ARGUMENT,
            "image[0]: the file begins with",
        ),
        (
            {"inputs": [{"name": "image", "contents": {"fp32_contents": [1.0]}}]},
            Code.INVALID_ARGUMENT,
            "image: expected BYTES, got fp32_contents",
        ),
        (
            {"inputs": [TYPED, {"name": "boxes", "contents": {"bytes_contents": [b"1"]}}]},
            Code.INVALID_ARGUMENT,
            "boxes: expected FP32, got bytes_contents",
        ),
        (
            {"inputs": [TYPED, {"name": "boxes", "contents": {"bool_contents": [True] * 4}}]},
            Code.INVALID_ARGUMENT,
            "boxes[0]",
        ),
        (
            {"inputs": [TYPED, {"name": "boxes", "contents": {"fp32_contents": [1, 2, float("nan"), 4]}}]},
            Code.INVALID_ARGUMENT,
            "boxes[0]",
        ),
        (
            {"inputs": [TYPED, {"name": "boxes", "contents": {"fp32_contents": [5.0] * 28}}]},
            Code.INVALID_ARGUMENT,
            "7 people in one request, at most 6",
        ),
        ({"inputs": [TYPED], "outputs": [{"name": "heatmaps"}]}, Code.INVALID_ARGUMENT, "heatmaps: no such"),
        (
            {"inputs": [{"name": "image"}], "raw_input_contents": [RAW_PNG, b""]},
            Code.INVALID_ARGUMENT,
            "raw_input_contents has 2 entries, inputs 1",
        ),
        (
            {"inputs": [{"name": "image"}], "raw_input_contents": [RAW_PNG[:-1]]},
            Code.INVALID_ARGUMENT,
            "end within an element",
        ),
        ({"model_version": "8"}, Code.NOT_FOUND, "here is hrnet-pose 7"),
        ({"inputs": [{**TYPED, "name": "\U0001f600" * 9000}]}, Code.INVALID_ARGUMENT, "\U0001f600" * 200),
    ],
)
def test_a_bad_message_says_what_is_wrong(address: str, fields: Any, code: Code, words: str) -> None:
    error = refused(lambda: raw_call(address, request(**fields)))
    assert error.code() == code, error
    assert words in error.details()


def test_what_is_no_message_is_refused(address: str) -> None:
    error = refused(lambda: raw_call(address, b"\xff"))
    assert (error.code(), error.details()) == (
        Code.INVALID_ARGUMENT,
        "the message: not a ModelInferRequest of inference.proto.",
    )


def test_a_message_that_is_too_long_is_refused(address: str) -> None:
    long = {**TYPED, "contents": {"bytes_contents": [b"0" * 900_001]}}
    error = refused(lambda: raw_call(address, request(inputs=[long])))
    assert error.code() == Code.RESOURCE_EXHAUSTED
    assert "at most 900,000 bytes" in error.details()
    assert dict(error.trailing_metadata())["problem"] == "urn:hrnet:problem:body-too-large"


def test_keys_are_asked_for(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.keys.time", SimpleNamespace(monotonic=lambda: 100.0))  # all in a moment
    (tmp_path / "keys").write_text(f"camera {KEY} rate=0.5\n")
    asked = request(inputs=[TYPED])
    with running(service_of(checkpoint, keys=str(tmp_path / "keys"))) as address:
        for metadata in ((), (("authorization", f"Bearer {KEY}x"),)):
            error = refused(lambda metadata=metadata: raw_call(address, asked, metadata=metadata))
            assert error.code() == Code.UNAUTHENTICATED, error
            assert KEY not in error.details()
        key = {"authorization": f"Bearer {KEY}"}
        with triton.InferenceServerClient(address) as client:
            assert client.infer("hrnet-pose", [image(PNG)], headers=key).as_numpy("counts") == [1]
            with pytest.raises(Exception, match=r"camera may make 0\.5 requests a second"):
                client.infer("hrnet-pose", [image(PNG)], headers=key)
        again = refused(lambda: raw_call(address, asked, metadata=(("authorization", f"Bearer {KEY}"),)))
        assert again.code() == Code.RESOURCE_EXHAUSTED
        assert dict(again.trailing_metadata())["retry-after"] == "2"


def test_a_full_draining_or_slow_replica_says_so(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = service_of(checkpoint, max_requests=1, deadline_s=0.5)
    asked = request(inputs=[TYPED])
    with running(service) as address, triton.InferenceServerClient(address) as client:
        assert is_ready(address, 20)
        with place_taken(service):
            full = refused(lambda: raw_call(address, asked))
        assert full.code() == Code.RESOURCE_EXHAUSTED
        assert "1 requests are in progress here" in full.details()
        with monkeypatch.context() as slow:
            slow.setattr(service, "_infer_portion", lambda _: asyncio.sleep(60))
            late = refused(lambda: raw_call(address, asked))
        assert late.code() == Code.DEADLINE_EXCEEDED
        service.live = LiveSettings(checkpoint="x", draining=True)
        draining = refused(lambda: raw_call(address, asked))
        assert draining.code() == Code.UNAVAILABLE
        assert dict(draining.trailing_metadata())["retry-after"] == "5"
        assert client.is_server_live()
        assert not client.is_server_ready()
        assert not is_ready(address, 20)


def test_people_are_found_over_grpc_too(checkpoint: Path, tmp_path: Path) -> None:
    from test_serve_detector import PNG as red
    from test_serve_detector import crowd
    from test_serve_detector import service_of as with_detector

    with (
        running(with_detector(checkpoint, crowd(tmp_path))) as address,
        triton.InferenceServerClient(address) as client,
    ):
        found = client.infer(
            "hrnet-pose", [image(red)], parameters={"max_found": 2, "score_threshold": "0.1"}
        )
        np.testing.assert_allclose(found.as_numpy("box_scores"), [0.9, 0.8], rtol=1e-6)
        assert found.get_response().parameters["boxes_source"].string_param == "detector"
        whole = client.infer("hrnet-pose", [image(red)], parameters={"boxes_from": "whole_image"})
        assert whole.as_numpy("boxes").tolist() == [[0, 0, 640, 320]]
        with pytest.raises(triton.InferenceServerException, match="max_found: at most 64"):
            client.infer("hrnet-pose", [image(red)], parameters={"max_found": 65})


@contextmanager
def place_taken(service: PoseService) -> Iterator[None]:
    service.room.in_progress += 1
    yield
    service.room.in_progress -= 1


def test_other_machines_are_not_answered_where_the_endpoint_is_for_its_own(checkpoint: Path) -> None:
    class Context:
        """Of a call, as Serve hands it over."""

        def __init__(self, peer: str) -> None:
            self.told: dict[str, Any] = {}
            self.peer = lambda: peer

        def invocation_metadata(self) -> list[Any]:
            return []

        trailing_metadata = invocation_metadata

        def __getattr__(self, name: str) -> Any:
            return lambda value: self.told.update({name: value})

    def code(peer: str, here_only: bool) -> Any:
        app, context = make_app(service_of(checkpoint, here_only=here_only)), Context(peer)
        asyncio.run(answer_call(app, "ServerLive", b"", context))  # type: ignore[arg-type]
        return context.told.get("set_code", Code.OK)

    for peer in ("ipv4:127.0.0.1:5000", "ipv6:%5B::1%5D:5000", "ipv6:[::1]:5000"):
        assert code(peer, here_only=True) == Code.OK
    for peer in ("ipv4:203.0.113.5:5000", "ipv6:%5B2001:db8::1%5D:5000", "unix:somewhere", ""):
        assert code(peer, here_only=True) == Code.PERMISSION_DENIED
        assert code(peer, here_only=False) == Code.OK


# --- beside the answer --------------------------------------------------------------------------


def test_calls_have_ids_and_are_counted_under_their_method(
    address: str, service: PoseService, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[Outcome] = []
    monkeypatch.setattr(service.metrics, "ended", outcomes.append)
    asked = request(inputs=[TYPED])
    answer, call = raw_call(address, asked, metadata=(("x-request-id", "mine-1"),))
    trailing = dict(call.trailing_metadata())
    assert trailing["x-request-id"] == "mine-1"
    assert answer.parameters["request_id"].string_param == "mine-1"
    _, call = raw_call(address, asked)
    assert [tuple(one) for one in call.trailing_metadata()] == [
        ("request_id", "of-serve"),
        ("x-request-id", "of-serve"),
    ]
    error = refused(lambda: raw_call(address, request(), metadata=(("x-request-id", "mine-2"),)))
    assert dict(error.trailing_metadata())["x-request-id"] == "mine-2"
    told = [(one.path, one.status, one.slug) for one in outcomes]
    infer = f"/{SERVICE}/ModelInfer"
    assert told == [(infer, 200, ""), (infer, 200, ""), (infer, 422, "invalid-field")]
    assert outcomes[0].stages.keys() == {"read", "decode", "queue", "infer"}


# --- the protocol -------------------------------------------------------------------------------


def test_messages_have_tritons_names_and_numbers() -> None:
    def described(kind: Any) -> dict[str, Any]:
        fields = {
            one.name: (
                one.number,
                one.type,
                one.is_repeated,
                one.message_type and described(one.message_type),
            )
            for one in kind.fields
        }
        return {"fields": fields, "oneofs": [one.name for one in kind.oneofs]}

    theirs = triton.service_pb2.DESCRIPTOR
    compared = 0
    for method in theirs.services_by_name["GRPCInferenceService"].methods:
        if method.name in METHODS:
            for kind in (method.input_type, method.output_type):
                assert described(message(kind.name).DESCRIPTOR) == described(kind)
                compared += 1
    assert compared == 2 * len(METHODS)


def test_the_compiled_protocol_is_the_written_one(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools of the dev extra")
    made = tmp_path / "made.binpb"
    tool = [sys.executable, "-m", "grpc_tools.protoc", "-Iserve", f"--descriptor_set_out={made}"]
    subprocess.run([*tool, "serve/inference.proto"], cwd=ROOT, check=True)
    assert made.read_bytes() == (ROOT / "serve" / "inference.binpb").read_bytes()


@pytest.mark.slow
def test_kserves_clients_get_what_the_predictor_finds(
    checkpoint: Path, predictor: PosePredictor, tmp_path: Path
) -> None:
    """In a Python of their own (tests/kserve_client.py), over HTTP and gRPC."""
    python = os.environ.get("HRNET_KSERVE_PYTHON")
    if not python:
        pytest.skip("HRNET_KSERVE_PYTHON names no Python that has kserve")
    (tmp_path / "keys").write_text(f"kserve {KEY}\n")
    (tmp_path / "photo.png").write_bytes(PNG)
    service = service_of(checkpoint, keys=str(tmp_path / "keys"))
    with running(service) as address, over_http(routes.make_app(service)) as http:
        script = [python, str(ROOT / "tests" / "kserve_client.py"), f"http://{http}", address]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        said = subprocess.run(
            [*script, str(tmp_path / "photo.png"), json.dumps(BOXES), KEY],
            env=environment,
            capture_output=True,
            text=True,
        )
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout.splitlines()[-1])
    assert set(found) == {"rest raw", "rest mixed", "grpc"}
    for answer in found.values():
        assert answer["counts"] == [3]
        expected = predictor(photo(), BOXES)[0].keypoints.data
        np.testing.assert_allclose(answer["keypoints"], expected, rtol=1e-5, atol=1e-3)
