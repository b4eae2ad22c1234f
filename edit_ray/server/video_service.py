"""What the door's routes do, over `Runs` and the folders of runs. A call may take time: routes make it in a thread."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edit_ray.actors.folder_state import remove_with_residuals
from edit_ray.config import Config, dump_yaml
from edit_ray.config.mistakes import show
from edit_ray.errors import RunExists, RunLocked, UnknownRun
from edit_ray.page.run_server import open_below, open_named
from edit_ray.runs.ids import new_run_id
from edit_ray.server import stills, uploads
from edit_ray.server.event_stream import Cursor, News, news, nothing_more
from edit_ray.server.refusals import Problem, Refusal, refuse
from edit_ray.server.run_shelf import Runs, RunShelf
from edit_ray.server.video_object import (
    DeletedVideo,
    RunView,
    SegmentObject,
    SegmentPage,
    Video,
    VideoPage,
    as_json,
    behind,
    segment_of,
    video_of,
)
from edit_ray.server.video_request import Offer, config_for

CANCEL_S = 30.0  # for a run to stop before it is removed
MOST_LISTED, LISTED = 100, 20
MOST_SEGMENTS = 1000
MOST_FOLLOWED = 64  # runs whose objects are kept for those that follow them
_KEY = re.compile(r"[\x20-\x7e]{1,255}")

Opened = tuple[int, str]
"""An open file's descriptor, and its media type."""


def keyed_id(owner: str, key: str) -> str:
    """The run id of a request with an `Idempotency-Key`: the same for the same owner and key. Raises Refusal."""
    if _KEY.fullmatch(key) is None:
        said = "it must be 1 to 255 printable characters of ASCII."
        raise refuse("invalid_value", f"Idempotency-Key is {show(key)}; {said}", "Idempotency-Key")
    return f"key-{hashlib.blake2b(f'{len(owner)}:{owner}{key}'.encode(), digest_size=16).hexdigest()}"


def seed_of(run_id: str) -> int:
    """The seed of a run whose request gives none: another one for each run, the same for a repeated request."""
    return int.from_bytes(hashlib.blake2b(run_id.encode(), digest_size=4).digest(), "big") >> 1


def whole_number(text: str, name: str, least: int, most: int) -> int:
    """A number of a URL. Raises Refusal."""
    if re.fullmatch(r"[0-9]{1,9}", text) is None or not least <= int(text) <= most:
        raise refuse(
            "invalid_value", f"{name} is {show(text)}; it must be a whole number from {least} to {most}.", name
        )
    return int(text)


class VideoService:
    """The videos of one folder of runs, for one owner."""

    def __init__(self, runs: Runs, offers: Sequence[Offer], most_queued: int) -> None:
        self.runs, self.shelf, self._most_queued = runs, RunShelf(runs), most_queued
        self._told: OrderedDict[str, tuple[RunView, dict[str, Any]]] = OrderedDict()  # to readers of events
        self.offers: Mapping[str, Offer] = {offer.name: offer for offer in offers}

    def create(self, body: Mapping[str, Any], key: str | None = None) -> Video:
        """Begin a run. The same `key` again returns the run that it began. Raises Refusal, EditRayError."""
        run_id = self.new_id(key)
        init, problems = self._uploaded(body.get("input_reference"), run_id)
        try:
            config, found = config_for(body, self.offers, seed=seed_of(run_id), init=str(init) if init else None)
            if problems or found or config is None:
                raise Refusal(*problems, *found)
            self._begin(run_id, config, repeated=key is not None)
        except BaseException:
            if init is not None:
                uploads.forget(self.runs.output, {init.name})
            raise
        return self.video(run_id, fresh=True)

    def new_id(self, key: str | None) -> str:
        """The id of a new run. Raises Refusal if too many wait already."""
        if self.shelf.queued() >= self._most_queued:
            said = f"{self._most_queued} videos wait already, which is the most; ask again when some are made."
            raise refuse("unavailable", said)
        if key is not None:
            return keyed_id(self.runs.owner.name, key)
        return new_run_id(datetime.now(UTC), secrets.token_hex(4))

    def _begin(self, run_id: str, config: Config, repeated: bool) -> None:
        path = self.runs.output / run_id
        if not repeated or not path.exists():
            try:
                self.runs.submit(config, run_id=run_id, checked=True)
                return
            except RunExists:
                if not repeated:
                    raise
        self.shelf.view(run_id)  # whether it is mine
        if (path / "run.yaml").read_text() != dump_yaml(config):
            raise self.other_key()

    def other_key(self) -> Refusal:
        """Why a key is refused that was given before."""
        said = "it must be a new one for a new request."
        return refuse("key_reused", f"The Idempotency-Key was given with another request; {said}", "Idempotency-Key")

    def _uploaded(self, reference: Any, run_id: str) -> tuple[Path | None, list[Problem]]:
        """The file that a request brings, stored, and what is wrong with it."""
        if reference is None:
            return None, []
        try:
            data = _bytes_of(reference)
            kind = uploads.checked_kind(data)
        except ValueError as error:
            return None, [Problem(f"input_reference {error}", "input_reference")]
        path = uploads.store(self.runs.output, run_id, data, kind)
        if path is None:
            raise self.other_key()
        return path, []

    def video(self, run_id: str, fresh: bool = False) -> Video:
        """One video; `fresh` asks the segment scheduler in any case."""
        return video_of(self.shelf.view(run_id, fresh), self.offers)

    def videos(self, after: str | None, limit: int, order: str) -> VideoPage:
        """A page of this owner's videos, the newest first unless `order` is asc."""
        ids = self.shelf.ids()
        found = list[Video]()
        for run_id in behind(ids if order == "desc" else ids[::-1], after):
            if (view := self.shelf.view_if_mine(run_id)) is not None:
                if len(found) == limit:
                    return _page(found, has_more=True)
                found.append(video_of(view, self.offers, whole=False))
        return _page(found, has_more=False)

    def delete(self, run_id: str) -> DeletedVideo:
        """Cancel a run, wait until it has stopped, and remove all of it. Raises Refusal if it does not stop in time."""
        view = self.shelf.view(run_id)
        folder, _ = self.shelf.manifest(run_id)
        if not view.status.ended and view.status.state != "open":
            with suppress(UnknownRun):
                self.runs.cancel(run_id)
        named = set[str]()
        with suppress(OSError, ValueError):
            named = uploads.named_in(folder.run_yaml.read_text())
        deadline = time.monotonic() + CANCEL_S
        while True:
            try:
                remove_with_residuals(folder)
                break
            except RunLocked:  # a process still works on it
                if time.monotonic() > deadline:
                    raise refuse("unavailable", "The run is being cancelled; ask again to remove it.") from None
            except UnknownRun:
                break
            time.sleep(0.1)
        self.shelf.forget(run_id)
        uploads.forget(self.runs.output, named)
        return DeletedVideo(id=run_id)

    def content(self, run_id: str, variant: str) -> Opened | bytes:
        """The file of a video that is whole, or has ended otherwise; or a picture of it."""
        folder, manifest = self.shelf.manifest(run_id)
        if variant != "video":
            return {"thumbnail": stills.thumbnail, "spritesheet": stills.spritesheet}[variant](folder, manifest)
        if manifest.end is None:
            said = f"meanwhile /v1/videos/{run_id}/live.m3u8 plays what is there."
            raise refuse("not_ready", f"The video is not whole yet; {said}")
        opened = open_named(folder.path, "final.mp4") or open_named(folder.path, "stream.mp4")
        if opened is None:
            raise refuse("not_ready", "Nothing of this video was committed.")
        return opened

    def media(self, run_id: str, name: str) -> Opened:
        """A file that plays while the run continues."""
        folder, _ = self.shelf.manifest(run_id)
        if (opened := open_named(folder.path, name)) is None:
            raise refuse("not_found", "There is no such file of this video (yet).")
        return opened

    def segments(self, run_id: str, after: int, limit: int) -> SegmentPage:
        """A page of the committed segments behind segment `after`."""
        _, manifest = self.shelf.manifest(run_id)
        chosen = manifest.segments[after + 1 : after + 1 + limit]
        data = [segment_of(manifest, record) for record in chosen]
        return SegmentPage(data=data, has_more=after + 1 + limit < len(manifest.segments))

    def segment(self, run_id: str, index: int) -> SegmentObject:
        """One committed segment."""
        _, manifest = self.shelf.manifest(run_id)
        return segment_of(manifest, stills.record_at(manifest, index))

    def thumbnail(self, run_id: str, index: int) -> bytes:
        """The first frame of a segment."""
        return stills.thumbnail(*self.shelf.manifest(run_id), index)

    def latents(self, run_id: str, index: int) -> Opened:
        """The latents that a segment added, as safetensors."""
        folder, manifest = self.shelf.manifest(run_id)
        record = stills.record_at(manifest, index)
        if (opened := open_below(folder.path, record.latents, "application/octet-stream")) is None:
            raise refuse("not_found", "The latents of this segment are not there any more.")
        return opened

    def over(self, run_id: str, cursor: Cursor) -> bool:
        """Whether a reader of the events knows all that there will be."""
        return nothing_more(self.shelf.manifest(run_id)[1], cursor)

    def news(self, run_id: str, cursor: Cursor, known: Mapping[str, Any]) -> News:
        """The events of a run since `cursor`."""
        folder, view = self.shelf.recent(run_id)
        told, video = self._told.get(run_id, (None, {}))
        if told is not view:
            video = as_json(video_of(view, self.offers))
            self._told[run_id] = view, video
            while len(self._told) > MOST_FOLLOWED:
                self._told.popitem(last=False)
        return news(folder, view.manifest, video, cursor, known)


def _page(found: list[Video], *, has_more: bool) -> VideoPage:
    ends = (found[0].id, found[-1].id) if found else (None, None)
    return VideoPage(data=found, first_id=ends[0], last_id=ends[1], has_more=has_more)


def _bytes_of(reference: Any) -> bytes:
    """What `input_reference` holds. Raises ValueError with a predicate."""
    if isinstance(reference, bytes):
        return reference
    if isinstance(reference, Mapping) and set(reference) == {"image_url"} and isinstance(reference["image_url"], str):
        return uploads.from_data_url(reference["image_url"])
    if isinstance(reference, Mapping) and "file_id" in reference:
        raise ValueError("has a file_id, and this server keeps no files; it must be a file or an image_url.")
    raise ValueError(f"is {show(reference)}; it must be a file, or a mapping with an image_url.")


def size_of(descriptor: int) -> int:
    """The bytes of an open file."""
    return os.fstat(descriptor).st_size
