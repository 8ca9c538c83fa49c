"""Who asks, and what they may have: by their key, or by a token that is in the addresses that were given out."""

from typing import Annotated

from fastapi import Depends, Query, Request

from engine.errors import NotFound
from engine.serve.archive import Job
from engine.serve.desk import Desk
from engine.serve.keys import Keys, Owner


def desk_of(request: Request) -> Desk:
    return request.app.state.desk


def owner_of(request: Request) -> Owner:
    """Whose key a request carries. Raises Unauthorized, before a byte of the body is read."""
    keys: Keys = request.app.state.keys
    return keys.owner(request.headers.get("authorization"))


AtDesk = Annotated[Desk, Depends(desk_of)]
Asker = Annotated[Owner, Depends(owner_of)]


def own_job(job_id: str, desk: AtDesk, owner: Asker) -> Job:
    return desk.job(job_id, owner)


def shown_job(request: Request, job_id: str, desk: AtDesk, token: Annotated[str, Query(max_length=64)] = "") -> Job:
    """A job that the caller may look at: with its key, or with the token that is in its addresses."""
    if desk.is_token(job_id, token):
        return desk.job(job_id, None)
    owner = owner_of(request)
    if token:
        raise NotFound("0 jobs have this id and this token")
    return desk.job(job_id, owner)


OwnJob = Annotated[Job, Depends(own_job)]
ShownJob = Annotated[Job, Depends(shown_job)]


def identified(request: Request, identifier: str, parts: int) -> tuple[Job, list[str]]:
    """The job of `id~...~token` or `id~...`, and what is between. Raises Unauthorized and NotFound."""
    job_id, *rest = identifier.split("~")
    token = rest[parts] if len(rest) == parts + 1 else ""
    job = shown_job(request, job_id, desk_of(request), token)
    if len(rest) != parts + bool(token):
        raise NotFound("0 pictures of this key have this identifier")
    return job, rest[:parts]
