"""The door's routes, as a FastAPI application that knows no Ray: each reads a request and asks `VideoService`."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from edit_ray.config.mistakes import show
from edit_ray.errors import EditRayError
from edit_ray.runs.run_plan import EDITABLE
from edit_ray.server import openapi
from edit_ray.server.answers import add_handlers, answered, changed, read, readable, segment_index
from edit_ray.server.bodies import body_of, file_answer, query_of
from edit_ray.server.event_response import EventResponse, ReaderPlaces
from edit_ray.server.event_stream import KEEP_ALIVE_S, POLL_S, Cursor, message
from edit_ray.server.gate import COOKIE, Entrance, Gate, Limits
from edit_ray.server.page_files import PAGE_FILES
from edit_ray.server.refusals import Refusal, refuse
from edit_ray.server.request_counts import Count, Counted
from edit_ray.server.run_shelf import Runs
from edit_ray.server.video_changes import VideoChanges
from edit_ray.server.video_object import DeletedVideo, SegmentObject, SegmentPage, Video, VideoPage
from edit_ray.server.video_request import Offer
from edit_ray.server.video_service import LISTED, MOST_LISTED, MOST_SEGMENTS, VideoService, whole_number

POLL_AFTER_MS = 1000
_ANY = ("t",)  # of a file: it changes nothing, but browsers keep what has the same URL
_VARIANTS = {"video": "video/mp4", "thumbnail": "image/webp", "spritesheet": "image/jpeg"}

_OURS = {"type": "object", "properties": {"seed": openapi.NUMBER}}
_CHANGE = openapi.body(
    openapi.change_schema(
        (),
        (),
        steer=openapi.change_schema((), EDITABLE, from_segment=openapi.NUMBER),
        paused={"type": "boolean"},
        approve=openapi.NUMBER,
    )
)
_SOURCE = {"type": "object", "properties": {"id": openapi.TEXT}, "required": ["id"]}
_EXTENSION = openapi.body(
    openapi.change_schema(("video", "seconds"), ("prompt",), video=_SOURCE, seconds=openapi.TEXT, edit_ray=_OURS)
)
_REMIX = openapi.body(openapi.change_schema(("prompt",), ("prompt",), edit_ray=_OURS))
_BRANCH = openapi.body(
    openapi.change_schema(("at",), ("prompt", "seed"), at=openapi.NUMBER, num_segments=openapi.NUMBER)
)
_REROLL = openapi.body(openapi.change_schema(("from_segment",), ("prompt", "seed"), from_segment=openapi.NUMBER))


def make_app(
    runs: Runs,
    offers: Sequence[Offer],
    entrance: Entrance | None = None,
    limits: Limits | None = None,
    count: Count | None = None,
) -> FastAPI:
    """The application.

    Args:
        runs: the client of runs.
        offers: the models, of which the first is the default.
        entrance: who may come in; by default this machine, without a token, at any port.
        limits: what is accepted.
        count: is told of each request.
    """
    entrance, limits = entrance or Entrance(), limits or Limits()
    service = VideoService(runs, offers, limits.queued)
    app = FastAPI(
        docs_url=None,  # such a page would load from elsewhere
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    app.add_middleware(Gate, entrance=entrance, limits=limits)
    if count is not None:
        app.add_middleware(Counted, count=count)
    add_handlers(app)
    app.openapi = lambda: schema_of(app)  # type: ignore[method-assign]
    changes = VideoChanges(service)
    _add_videos(app, service, changes)
    _add_changes(app, changes)
    _add_media(app, service)
    _add_segments(app, service)
    _add_events(app, service, limits)
    _add_others(app, service, entrance)
    return app


def _add_videos(app: FastAPI, service: VideoService, changes: VideoChanges) -> None:
    @app.post("/v1/videos", response_model=Video, openapi_extra=openapi.body(openapi.create_schema()))
    async def create_video(request: Request) -> Response:
        """Begin a video. With an `Idempotency-Key` a repeated request is answered with the same video."""
        query_of(request)
        body = await body_of(request)
        return await changed(service.create, body, request.headers.get("idempotency-key"))

    order = {"enum": ["asc", "desc"]}
    page = openapi.query(after={"type": "string"}, limit={"type": "integer"}, order=order)

    @app.get("/v1/videos", response_model=VideoPage, openapi_extra=page)
    async def list_videos(request: Request) -> Response:
        """The videos, the newest first unless `order` is asc."""
        given = query_of(request, "after", "limit", "order")
        limit = whole_number(given.get("limit", str(LISTED)), "limit", 1, MOST_LISTED)
        if (order := given.get("order", "desc")) not in ("asc", "desc"):
            raise refuse("invalid_value", f"order is {show(order)}; it must be one of asc, desc.", "order")
        return await answered(service.videos, given.get("after"), limit, order)

    @app.get("/v1/videos/{video_id}", response_model=Video)
    async def retrieve_video(request: Request, video_id: str) -> Response:
        """A video, whatever has become of it."""
        query_of(request)
        answer = await answered(service.video, video_id)
        answer.headers["openai-poll-after-ms"] = str(POLL_AFTER_MS)
        return answer

    @app.delete("/v1/videos/{video_id}", response_model=DeletedVideo)
    async def delete_video(request: Request, video_id: str) -> Response:
        """Cancel a video if it is being made, and remove all of it."""
        query_of(request)
        return await changed(service.delete, video_id)

    @app.post("/v1/videos/extensions", response_model=Video, openapi_extra=_EXTENSION)
    async def extend_video(request: Request) -> Response:
        """A new video that begins as an ended one and goes on."""
        query_of(request)
        return await changed(changes.extension, await body_of(request), request.headers.get("idempotency-key"))

    @app.post("/v1/videos/edits", response_model=Video)
    async def edit_video() -> Response:
        """Refused: a segment is made as a whole, and nothing in it is painted over."""
        said = "Edits of a finished video's pictures are not supported: its segments are made as wholes."
        raise refuse("not_supported", f"{said} A remix makes them again with another prompt.")


def _add_changes(app: FastAPI, changes: VideoChanges) -> None:
    @app.patch("/v1/videos/{video_id}", response_model=Video, openapi_extra=_CHANGE)
    async def change_video(request: Request, video_id: str) -> Response:
        """Steer, pause or approve a video that is being made; `applied_from` says from which segment an edit holds."""
        query_of(request)
        body = await body_of(request)
        return await changed(changes.change, video_id, body, request.headers.get("idempotency-key"))

    @app.post("/v1/videos/{video_id}/remix", response_model=Video, openapi_extra=_REMIX)
    async def remix_video(request: Request, video_id: str) -> Response:
        """A new video of the same length from another prompt."""
        query_of(request)
        body = await body_of(request)
        return await changed(changes.remix, video_id, body, request.headers.get("idempotency-key"))

    @app.post("/v1/videos/{video_id}/branch", response_model=Video, openapi_extra=_BRANCH)
    async def branch_video(request: Request, video_id: str) -> Response:
        """A new video that shares the segments before `at`."""
        query_of(request)
        body = await body_of(request)
        return await changed(changes.branch, video_id, body, request.headers.get("idempotency-key"))

    @app.post("/v1/videos/{video_id}/reroll", response_model=Video, openapi_extra=_REROLL)
    async def reroll_video(request: Request, video_id: str) -> Response:
        """The segments from `from_segment` on again, in the same video; it must have ended, or wait."""
        query_of(request)
        return await changed(changes.reroll, video_id, await body_of(request))


def _add_media(app: FastAPI, service: VideoService) -> None:
    content = openapi.query(variant={"enum": list(_VARIANTS)})
    played = _player(service)

    @readable(app, "/v1/videos/{video_id}/content", openapi_extra=content, response_class=Response)
    async def download_content(request: Request, video_id: str) -> Response:
        """The whole video as MP4, or a picture of it: `thumbnail` (WebP) or `spritesheet` (JPEG)."""
        variant = query_of(request, "variant", *_ANY).get("variant", "video")
        if variant not in _VARIANTS:
            said = f"it must be one of {', '.join(_VARIANTS)}."
            raise refuse("invalid_value", f"variant is {show(variant)}; {said}", "variant")
        found = await read(service.content, video_id, variant)
        return (
            Response(found, media_type=_VARIANTS[variant]) if isinstance(found, bytes) else file_answer(request, found)
        )

    @readable(app, "/v1/videos/{video_id}/live.m3u8", response_class=Response)
    async def live_playlist(request: Request, video_id: str) -> Response:
        """The HLS playlist that plays a video while it grows."""
        return await played(request, video_id, "live.m3u8")

    @readable(app, "/v1/videos/{video_id}/{name}.mp4", response_class=Response)
    async def media_file(request: Request, video_id: str, name: str) -> Response:
        """`init.mp4`, which every fragment needs before it, `stream.mp4` with all so far, or `final.mp4`."""
        return await played(request, video_id, f"{name}.mp4")

    @readable(app, "/v1/videos/{video_id}/live-{number}.m3u8", response_class=Response)
    async def media_playlist(request: Request, video_id: str, number: str) -> Response:
        """A media playlist: a re-roll or an extension begins another one."""
        return await played(request, video_id, f"live-{number}.m3u8")


def _add_segments(app: FastAPI, service: VideoService) -> None:
    page = openapi.query(after={"type": "integer"}, limit={"type": "integer"})
    played = _player(service)

    @app.get("/v1/videos/{video_id}/segments", response_model=SegmentPage, openapi_extra=page)
    async def list_segments(request: Request, video_id: str) -> Response:
        """The committed segments, in order."""
        given = query_of(request, "after", "limit")
        after = whole_number(given["after"], "after", 0, 10**9) if "after" in given else -1
        limit = whole_number(given.get("limit", "100"), "limit", 1, MOST_SEGMENTS)
        return await answered(service.segments, video_id, after, limit)

    @readable(app, "/v1/videos/{video_id}/segments/{segment}", response_model=SegmentObject)
    async def retrieve_segment(request: Request, video_id: str, segment: str) -> Response:
        """A committed segment by its number; by the name that a playlist has, its fragment."""
        if segment.endswith(".m4s"):
            return await played(request, video_id, f"segments/{segment}")
        query_of(request)
        return await answered(service.segment, video_id, segment_index(segment))

    @readable(app, "/v1/videos/{video_id}/segments/{segment}/latents", response_class=Response)
    async def download_latents(request: Request, video_id: str, segment: str) -> Response:
        """The latents that a segment has added, as safetensors."""
        query_of(request)
        return file_answer(request, await read(service.latents, video_id, segment_index(segment)))

    @app.get("/v1/videos/{video_id}/segments/{segment}/thumbnail", response_class=Response)
    async def download_thumbnail(request: Request, video_id: str, segment: str) -> Response:
        """A segment's first frame, as WebP."""
        query_of(request, *_ANY)
        picture = await read(service.thumbnail, video_id, segment_index(segment))
        return Response(picture, media_type="image/webp")


def _player(service: VideoService) -> Callable[[Request, str, str], Awaitable[Response]]:
    """What answers a player's request for a file; players may add parameters of HLS."""

    async def played(request: Request, video_id: str, name: str) -> Response:
        query_of(request, "_HLS_msn", "_HLS_part", "_HLS_skip", *_ANY)
        return file_answer(request, await read(service.media, video_id, name))

    return played


def _add_events(app: FastAPI, service: VideoService, limits: Limits) -> None:
    places = ReaderPlaces(limits.readers)

    async def follow(video_id: str, cursor: Cursor) -> AsyncIterator[bytes]:
        known: dict[str, Any] = {}
        silent_since = time.monotonic()
        while True:
            try:
                news = await read(service.news, video_id, cursor, known)
            except (Refusal, EditRayError, OSError) as error:
                refusal = error if isinstance(error, Refusal) else refuse("unavailable", str(error))
                yield message("gone", refusal.body)
                return
            cursor, known = news.cursor, news.status
            if news.sent:
                yield news.sent
                silent_since = time.monotonic()
            elif time.monotonic() - silent_since > KEEP_ALIVE_S:
                yield b": still here\n\n"
                silent_since = time.monotonic()
            if news.ended:
                return
            await asyncio.sleep(POLL_S)

    @app.get("/v1/videos/{video_id}/events", response_class=StreamingResponse)
    async def follow_video(request: Request, video_id: str) -> Response:
        """What happens to a video, as Server-Sent Events, behind `Last-Event-ID` if it is given."""
        query_of(request)
        cursor = Cursor.of(request.headers.get("last-event-id"))
        if await read(service.over, video_id, cursor):
            return Response(status_code=204)  # with which browsers stop to ask again
        return EventResponse(follow(video_id, cursor), places)


def _add_others(app: FastAPI, service: VideoService, entrance: Entrance) -> None:
    def model_of(offer: Offer) -> dict[str, Any]:
        sampling, layout = offer.base.sampling, offer.base.layout
        ours = {name: getattr(sampling, name) for name in ("width", "height", "num_frames", "fps")}
        steps = {"width_step": offer.width_step, "height_step": offer.height_step}
        more = {"frames_of_a_later_segment": layout.frames_of(1)}
        return {
            "id": offer.name,
            "object": "model",
            "created": 0,
            "owned_by": "edit_ray",
            "edit_ray": ours | steps | more,
        }

    @app.get("/v1/models")
    async def list_models(request: Request) -> Response:
        """The models that requests may name."""
        query_of(request)
        return JSONResponse({"object": "list", "data": [model_of(offer) for offer in service.offers.values()]})

    @app.get("/v1/models/{model:path}")
    async def retrieve_model(request: Request, model: str) -> Response:
        """One model."""
        query_of(request)
        if model not in service.offers:
            raise refuse("not_found", f"There is no such model; there are: {', '.join(service.offers)}.", "model")
        return JSONResponse(model_of(service.offers[model]))

    @readable(app, "/", include_in_schema=False)
    async def page(request: Request) -> Response:
        """The page."""
        return _page_file(request, "index.html")

    @readable(app, "/page/{name}", include_in_schema=False)
    async def page_file(request: Request, name: str) -> Response:
        """A file of the page."""
        return _page_file(request, name)

    @app.get("/healthz")
    async def health() -> Response:
        """Whether the replica answers."""
        return JSONResponse({"status": "ok"})

    @app.get("/openapi.json")
    async def openapi_schema() -> Response:
        """This schema."""
        return JSONResponse(app.openapi())

    @app.post("/session", status_code=204, response_class=Response)
    async def begin_session(request: Request) -> Response:
        """Exchange the token, as {"token": …}, for a cookie: players and event streams of browsers send no header."""
        given = (await body_of(request)).get("token")
        if entrance.token is not None and not (isinstance(given, str) and entrance.is_token(given)):
            raise refuse("invalid_api_key", "The token is not this server's.", "token")
        answer = Response(status_code=204)
        secure = request.url.scheme == "https"
        answer.set_cookie(COOKIE, entrance.cookie, httponly=True, samesite="strict", secure=secure, path="/")
        return answer


def _page_file(request: Request, name: str) -> Response:
    if name not in PAGE_FILES:
        raise refuse("not_found", "The page has no such file.")
    path, kind = PAGE_FILES[name]
    return file_answer(request, (os.open(path, os.O_RDONLY), kind))


def schema_of(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI schema, made once."""
    if app.openapi_schema is None:
        made = get_openapi(
            title=openapi.TITLE, version=openapi.VERSION, description=openapi.DESCRIPTION, routes=app.routes
        )
        app.openapi_schema = openapi.completed(made)
    return app.openapi_schema
