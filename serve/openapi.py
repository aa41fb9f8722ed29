"""openapi.json: what FastAPI knows of the routes, and what it cannot know, as it does not read the bodies.

Bodies, problems, keys, limits and an example of each are added here; /docs is made of it.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from serve.body import FORM_TYPE, JSON_TYPE
from serve.schemas import PROBLEMS, ProblemAnswer
from serve.settings import ServeArgs

PICTURE = (  # of 8 x 8 px
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAJElEQVQIHW3BAQEAAAABIP4fa5YDqshT5CnyFHmKPEWeIk+RZxyk"
    "EskvcOowAAAAAElFTkSuQmCC"
)
BOX = {
    "type": "array",
    "items": {"type": "number"},
    "minItems": 4,
    "maxItems": 4,
    "description": "x, y, w, h in px of the displayed picture.",
}
BOXES = {"type": "array", "items": BOX}
FORM = {
    "type": "object",
    "required": ["image"],
    "properties": {
        "image": {
            "type": "array",
            "items": {"type": "string", "format": "binary"},
            "minItems": 1,
            "description": "One or more pictures (JPEG, PNG and what else is read).",
        },
        "boxes": {
            "type": "string",
            "description": "JSON [[x, y, w, h], ...] in px of the displayed picture, a person a box. Several "
            "pictures: a list of such lists. Left out, or null for one of several: as boxes_from says.",
            "examples": ["[[120, 80, 200, 400]]", "[[[120, 80, 200, 400]], null]"],
        },
    },
}
BASE64 = {"type": "string", "format": "byte"}
JSON = {
    "type": "object",
    "required": ["image"],
    "additionalProperties": False,
    "properties": {
        "image": {"anyOf": [BASE64, {"type": "array", "items": BASE64, "minItems": 1}]},
        "boxes": {
            "anyOf": [
                BOXES,
                {"type": "array", "items": {"anyOf": [BOXES, {"type": "null"}]}},
                {"type": "null"},
            ],
            "description": "As in the form, not quoted.",
        },
    },
}
REQUEST_BODY = {
    "required": True,
    "content": {
        FORM_TYPE: {"schema": FORM},
        JSON_TYPE: {"schema": JSON, "example": {"image": PICTURE, "boxes": [[1, 1, 6, 6]]}},
    },
}
ANSWER: dict[str, Any] = {
    "request_id": "0b6a1c1e-6a0e-4f8e-9a57-0c5a7c3f7a11",
    "model": {
        "name": "hrnet-pose",
        "version": "3",
        "sha256": "5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef",
        "mode": "float32",
        "flip_test": True,
        "detector": None,
    },
    "results": [
        {
            "image": {"width": 640, "height": 480, "exif_rotated": False},
            "boxes_source": "request",
            "persons": [
                {
                    "bbox": [120, 80, 200, 400],
                    "box_score": None,
                    "score": 0.81,
                    "keypoints": [[214.3, 121.9, 0.93]] * 17,
                }
            ],
            "warnings": [],
        }
    ],
    "timings_ms": {"read": 0.4, "decode": 3.1, "queue": 0.1, "infer": 41.0, "total": 44.9},
}
FOUND = {
    **ANSWER,
    "model": {
        **ANSWER["model"],
        "detector": {
            "name": "person.onnx",
            "sha256": "c4e5d1a5c3a1d0a9f4b4b1f6b7ad5c1d2f2f6a6a3c0b52d2a7c1a1c5ab9b7f10",
        },
    },
    "results": [
        {
            "image": {"width": 640, "height": 480, "exif_rotated": False},
            "boxes_source": "detector",
            "persons": [
                {
                    "bbox": [118.62, 79.41, 203.08, 398.77],
                    "box_score": 0.94,
                    "score": 0.77,
                    "keypoints": [[214.3, 121.9, 0.93]] * 17,
                }
            ],
            "warnings": [],
        }
    ],
    "timings_ms": {"read": 0.4, "decode": 3.1, "detect": 38.2, "queue": 0.1, "infer": 41.0, "total": 83.1},
}
COCO = [
    {
        "image_id": 1,
        "category_id": 1,
        "keypoints": [214.3, 121.9, 0.93] * 17,
        "score": 0.81,
        "bbox": [120.0, 80.0, 200.0, 400.0],
    }
]
DETAILS = {
    "malformed-body": "multipart/form-data: the body of 20,480 bytes ends before its closing boundary: it "
    "was cut off. Send it again, whole.",
    "unauthorized": "send the header Authorization: Bearer KEY. Whoever runs this endpoint gives keys.",
    "invalid-boxes": "boxes[1]: lies outside of the picture, which is displayed as 640 x 480 px.",
    "overloaded": "64 requests are in progress here, as many as are taken. Try again later.",
}
"""Of the examples of problems; others are said in the words of their title."""


def describe(app: FastAPI, args: ServeArgs, keys: bool) -> None:
    """Make the application answer with the whole description. keys: whether requests must bring them."""
    plain = app.openapi

    def whole() -> dict[str, Any]:
        schema = plain()
        if "x-limits" not in schema["info"]:
            _add_problems(schema)
            _add_examples(schema)
            _add_keys(schema, keys)
            limits = {
                **args.limits.model_dump(),
                "max_requests": args.max_requests,
                "deadline_s": args.deadline_s,
            }
            schema["info"]["x-limits"] = limits
            schema["info"]["x-problems"] = [
                {"slug": slug, "status": status, "title": title} for slug, (status, title) in PROBLEMS.items()
            ]
        return schema

    app.openapi = whole  # type: ignore[method-assign]  # as FastAPI says to extend it


def _add_problems(schema: dict[str, Any]) -> None:
    """Each operation with the statuses that it may answer beside 200."""
    schema["components"]["schemas"]["ProblemAnswer"] = ProblemAnswer.model_json_schema()
    by_status: dict[int, list[str]] = {}
    for slug, (status, _) in PROBLEMS.items():
        by_status.setdefault(status, []).append(slug)
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            mine = by_status if "requestBody" in operation else {421: by_status[421], 503: by_status[503]}
            for status, slugs in mine.items():
                if status not in (404, 405):
                    operation["responses"][str(status)] = _problem(path, status, slugs)


def _problem(path: str, status: int, slugs: list[str]) -> dict[str, Any]:
    examples = {}
    for slug in slugs:
        title = PROBLEMS[slug][1]
        value = {"type": f"urn:hrnet:problem:{slug}", "title": title, "status": status}
        value |= {"detail": DETAILS.get(slug, f"{title}."), "instance": path, "request_id": "abc-1"}
        examples[slug] = {"value": value}
    schema = {"$ref": "#/components/schemas/ProblemAnswer"}
    content = {"application/problem+json": {"schema": schema, "examples": examples}}
    return {"description": f"{', '.join(slugs)}.", "content": content}


def _add_examples(schema: dict[str, Any]) -> None:
    content = schema["paths"]["/v1/poses"]["post"]["responses"]["200"]["content"]["application/json"]
    content["examples"] = {
        "native": {"value": ANSWER},
        "found": {"summary": "of a picture without boxes, by the endpoint's detector", "value": FOUND},
        "coco": {"summary": "?format=coco", "value": COCO},
    }


def _add_keys(schema: dict[str, Any], keys: bool) -> None:
    if not keys:
        return
    schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for methods in schema["paths"].values():
        for operation in methods.values():
            if "requestBody" in operation:
                operation["security"] = [{"key": []}]
    schema["paths"]["/v1/models"]["get"]["security"] = [{}, {"key": []}]
