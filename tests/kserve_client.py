"""KServe's clients, in a Python of their own: they want other versions of protobuf and pandas than we have.

python tests/kserve_client.py http://HOST:PORT HOST:GRPC_PORT PHOTO BOXES [KEY]

Prints what was found over HTTP, all in binary or the boxes as JSON, and over gRPC:
{"rest raw" | "rest mixed" | "grpc": {"keypoints", "counts"}}
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig

MODEL = "hrnet-pose"


def asked(photo: bytes, boxes: list[list[float]], raw: bool) -> InferRequest:
    """raw: the boxes as bytes, too, not as JSON."""
    image = InferInput("image", [1], "BYTES")
    image.set_data_from_numpy(np.array([photo], object))
    places = InferInput("boxes", [len(boxes), 4], "FP32")
    places.set_data_from_numpy(np.array(boxes, np.float32), binary_data=raw)
    return InferRequest(MODEL, [image, places], request_id="mine")


def told(answer: Any) -> dict[str, Any]:
    outputs = {one.name: one.as_numpy().tolist() for one in answer.outputs}
    assert (answer.model_name, answer.id) == (MODEL, "mine")
    return {name: outputs[name] for name in ("keypoints", "counts")}


async def main(rest_url: str, grpc_url: str, photo: str, boxes: str, key: str = "") -> None:
    data, places = Path(photo).read_bytes(), json.loads(boxes)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    rest = InferenceRESTClient(RESTConfig(protocol="v2"))
    assert await rest.is_server_live(rest_url)
    assert await rest.is_server_ready(rest_url)
    assert await rest.is_model_ready(rest_url, MODEL)
    found = {
        f"rest {name}": told(await rest.infer(rest_url, asked(data, places, raw), MODEL, dict(headers)))
        for name, raw in (("raw", True), ("mixed", False))
    }
    async with InferenceGRPCClient(grpc_url) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready(MODEL)
        answer = await client.infer(asked(data, places, True), headers=list(headers.items()))
        found["grpc"] = told(answer)
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
