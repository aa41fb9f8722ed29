"""Asking an endpoint as Triton's gRPC client does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


def ask_grpc(address: str, picture: bytes, boxes: list[list[float]]) -> Any:
    """What Triton's client is answered by HOST:PORT."""
    triton = pytest.importorskip("tritonclient.grpc", reason="tritonclient of the dev extra")
    image = triton.InferInput("image", [1], "BYTES")
    of_people = triton.InferInput("boxes", [len(boxes), 4], "FP32")
    image.set_data_from_numpy(np.array([picture], object))
    of_people.set_data_from_numpy(np.array(boxes, np.float32))
    with triton.InferenceServerClient(address) as client:
        assert client.is_server_ready()
        return client.infer("hrnet-pose", [image, of_people])
