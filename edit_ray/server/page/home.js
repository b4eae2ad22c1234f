// All videos, and a form for another one.

import { api } from "./api.js";
import { about, el, say, seconds } from "./dom.js";
import { newVideo } from "./new_video.js";

const POLL_MS = 3000;

const STATES = {
  queued: "waiting",
  in_progress: "being made",
  completed: "done",
  failed: "failed",
};

// One sentence on where a video stands. `left`: an estimate in seconds for where the server has none yet.
export function standing(video, left = null) {
  const run = video.edit_ray;
  if (video.error) return video.error.message;
  if (run.warning) return run.warning;
  if (video.status === "completed") return `${seconds(Number(video.seconds))}, ${run.committed} segments`;
  if (run.awaiting_approval) return `Segment ${run.committed - 1} waits for your yes.`;
  if (run.paused) return `Paused after ${run.committed} segments.`;
  const place = run.queue_position;
  if (video.status === "queued") return place ? `${place} before it` : "It is next.";
  const done = run.num_segments === null ? `${run.committed} segments done` : `${run.committed} of ${run.num_segments} segments done`;
  const making = run.step ? `; segment ${run.step.segment}: step ${run.step.step} of ${run.step.num_steps}` : run.committed ? "" : "; starting";
  const eta = run.eta_s ?? left;
  return `${done}${making}${eta === null ? "" : `; about ${about(eta)} left`}`;
}

export const stateOf = (video) => (video.error?.code === "cancelled" ? "cancelled" : STATES[video.status]);

// A video in the list. It is changed in place, so that nothing is taken from under a finger or a focus.
class Row {
  constructor(video) {
    this.picture = el("span", { className: "blank" });
    this.title = el("span", { className: "title" });
    this.told = el("span", { className: "note" });
    this.progress = el("progress", { max: 100, "aria-label": "Progress" });
    const about = el("span", { className: "about" }, this.title, this.told, this.progress);
    const href = `#/videos/${encodeURIComponent(video.id)}`;
    this.element = el("li", {}, el("a", { className: "video panel", href }, this.picture, about));
    this.show(video);
  }

  show(video) {
    this.video = video;
    if (video.edit_ray.committed > 0 && this.picture.tagName !== "IMG") {
      const picture = el("img", { src: api.thumbnail(video.id), alt: "", loading: "lazy", width: 96, height: 96 });
      this.picture.replaceWith(picture);
      this.picture = picture;
    }
    say(this.title, video.prompt ?? video.id);
    say(this.told, `${stateOf(video)} · ${standing(video)}`);
    this.progress.hidden = video.status !== "in_progress" && video.status !== "queued";
    this.progress.value = video.progress;
  }
}

export function home() {
  const list = el("ul", { className: "videos" });
  const told = el("p", { className: "note", role: "status" }, "");
  const more = el("button", { type: "button", hidden: true, onclick: () => older() }, "Show older ones");
  const rows = new Map(); // by id
  let order = []; // the ids, the newest first
  let timer = null;
  let gone = false;

  function draw(videos, ids) {
    for (const video of videos) {
      if (rows.has(video.id)) rows.get(video.id).show(video);
      else rows.set(video.id, new Row(video));
    }
    if (`${ids}` !== `${order}`) list.replaceChildren(...ids.map((id) => rows.get(id).element));
    order = ids;
    say(told, ids.length ? "" : "Nothing was made yet.");
  }

  async function look() {
    try {
      const page = await api.videos();
      if (gone) return;
      const newest = page.data.map((video) => video.id);
      const rest = page.has_more ? order.slice(order.indexOf(newest.at(-1)) + 1) : [];
      if (!rest.length) more.hidden = !page.has_more;
      draw(page.data, [...newest, ...(order.includes(newest.at(-1)) ? rest : [])]);
    } catch (refused) {
      say(told, refused.message);
    }
    if (!gone) timer = setTimeout(look, POLL_MS);
  }

  async function older() {
    const page = await api.videos(order.at(-1));
    draw(page.data, [...order, ...page.data.map((video) => video.id)]);
    more.hidden = !page.has_more;
  }

  look();
  const form = newVideo((made) => {
    location.hash = `#/videos/${encodeURIComponent(made.id)}`;
  });
  return {
    element: el("div", {}, form, el("section", {}, el("h2", {}, "Videos"), told, list, more)),
    leave: () => {
      gone = true;
      clearTimeout(timer);
    },
  };
}
