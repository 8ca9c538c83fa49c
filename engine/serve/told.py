"""What a client is told of a job, and of what may go wrong."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from engine.errors import NotFound
from engine.serve import problems
from engine.serve.archive import Job
from engine.serve.desk import Desk
from engine.serve.gallery import DIFFERENCE, LAYERS, MASK, ORIGINAL
from engine.serve.schema import Problem, Restoration

RESULTS: Mapping[str, tuple[str, str]] = {
    "tiff": (".tif", "image/tiff"),
    "png": (".png", "image/png"),
    "jpeg": (".jpg", "image/jpeg"),
    "ome-zarr": (".ozx", "application/zip"),
}
"""The suffix and the media type of each format."""
REFUSED: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Problem, "description": "Refused; `code` says why.", "content": {problems.MEDIA_TYPE: {}}},
    "5XX": {"model": Problem, "description": "Not now; `code` says why.", "content": {problems.MEDIA_TYPE: {}}},
}


def described(desk: Desk, job: Job) -> Restoration:
    """A job as clients see it."""
    found, failure = desk.progress(job.picture)
    picture = desk.archive.pictures.get(job.picture)
    if picture is None:
        raise NotFound("the job was deleted")
    token = desk.token(job.id)
    made_from = {ORIGINAL: picture.image, DIFFERENCE: picture.image, MASK: picture.mask}
    layers = [layer for layer in LAYERS if made_from.get(layer, "restored")]
    here = f"/v1/restorations/{job.id}"
    return Restoration.model_validate(
        {
            "id": job.id,
            "name": job.name,
            "state": found.state.value,
            "progress": round(found.share, 4),
            "megapixels": round(picture.output.num_pixels / 1e6, 3),
            "queue_position": found.position,
            "seconds_left": None if found.seconds_left is None else round(found.seconds_left, 1),
            "width": picture.output.w,
            "height": picture.output.h,
            "created": datetime.fromtimestamp(job.created, UTC).isoformat(timespec="seconds"),
            "problem": None if failure is None else problems.problem_of(failure),
            "links": {
                "self": here,
                "events": f"{here}/events?token={token}",
                "view": f"/#{job.id}.{token}",
                "manifest": f"/iiif/manifest/{job.id}~{token}",
                "iiif": {layer: f"/iiif/3/{job.id}~{layer}~{token}" for layer in layers},
                "result": {name: f"{here}/result?format={name}&token={token}" for name in RESULTS},
            },
        }
    )
