"""What clients of the endpoint send and get."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.errors import BadRequest
from engine.serve.archive import Options

_EXAMPLE_ID = "0f3b9c2e5d7a41f8a6c0e1d2b3c4f5a6"
_EXAMPLE_TOKEN = "6c1f0e9d8b7a45c2b1a0f9e8d7c6b5a4"


class OptionsIn(BaseModel):
    """How a picture is to be restored."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"scale": 4}]})

    scale: Annotated[Literal[1, 2, 4, 8, 16], Field(description="Enlargement; 1 fills holes alone.")] = 1
    long_side_px: Annotated[
        int | None, Field(ge=1, le=1 << 24, description="Long side of the output, in the place of scale.")
    ] = None
    page: Annotated[int | None, Field(ge=0, le=1 << 20, description="Of a TIFF with several, counted from 0.")] = None
    strip_metadata: Annotated[bool, Field(description="Carry nothing but the colour profile.")] = False


def parse_options(text: bytes) -> Options:
    """The options of a form. Raises BadRequest."""
    try:
        return Options(**OptionsIn.model_validate_json(text or b"{}", strict=True).model_dump())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part)[:40] for part in first["loc"])
        raise BadRequest(f"options: {where or 'the text'}: {first['msg']}; see the schema `OptionsIn`") from None


class Problem(BaseModel):
    """RFC 9457. `code` is stable."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:cra-srgan-engine:problem:too-many-pixels",
                    "title": "too many pixels",
                    "status": 413,
                    "code": "too-many-pixels",
                    "detail": "image: the header says 900,000,000 pixels, 268,435,456 are the most; send less",
                }
            ]
        }
    )

    type: str
    title: str
    status: int
    code: str
    detail: str


class Links(BaseModel):
    """Addresses. All but `self` carry a token: who has one may look at this job without a key."""

    self: str
    events: str
    view: str
    manifest: str
    iiif: Annotated[dict[str, str], Field(description="IIIF Image API 3.0, by layer.")]
    result: Annotated[dict[str, str], Field(description="Files, by format; when the state is done.")]


class Restoration(BaseModel):
    """A job, and how far it is."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": _EXAMPLE_ID,
                    "name": "scan.png",
                    "state": "running",
                    "progress": 0.25,
                    "megapixels": 67.1,
                    "queue_position": None,
                    "seconds_left": 31.5,
                    "width": 8192,
                    "height": 8192,
                    "created": "2026-11-21T20:30:00+00:00",
                    "problem": None,
                    "links": {
                        "self": f"/v1/restorations/{_EXAMPLE_ID}",
                        "events": f"/v1/restorations/{_EXAMPLE_ID}/events?token={_EXAMPLE_TOKEN}",
                        "view": f"/#{_EXAMPLE_ID}.{_EXAMPLE_TOKEN}",
                        "manifest": f"/iiif/manifest/{_EXAMPLE_ID}~{_EXAMPLE_TOKEN}",
                        "iiif": {"restored": f"/iiif/3/{_EXAMPLE_ID}~restored~{_EXAMPLE_TOKEN}"},
                        "result": {"tiff": f"/v1/restorations/{_EXAMPLE_ID}/result?format=tiff&token={_EXAMPLE_TOKEN}"},
                    },
                }
            ]
        }
    )

    id: str
    name: Annotated[str, Field(description="Of the file that was sent.")]
    state: Literal["queued", "running", "done", "failed"]
    progress: Annotated[float, Field(ge=0, le=1)]
    megapixels: Annotated[float, Field(description="Of the output.")]
    queue_position: Annotated[int | None, Field(description="Counted from 1, while it is queued.")]
    seconds_left: Annotated[float | None, Field(description="An estimate; null where no rate is known yet.")]
    width: Annotated[int, Field(description="Of the output, pixels.")]
    height: int
    created: Annotated[str, Field(description="UTC.")]
    problem: Annotated[Problem | None, Field(description="Why it failed.")]
    links: Links
