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
  const making = run.step ? `; segment ${run.step.segment}: step ${run.step.step} of ${run.step.num_steps}` : "; starting";
  const eta = run.eta_s ?? left;
  return `${done}${making}${eta === null ? "" : `; about ${about(eta)} left`}`;
}

export const stateOf = (video) => (video.error?.code === "cancelled" ? "cancelled" : STATES[video.status]);

function row(video) {
  const run = video.edit_ray;
  const picture =
    run.committed > 0
      ? el("img", { src: api.thumbnail(video.id), alt: "", loading: "lazy", width: 96, height: 96 })
      : el("span", { className: "blank" });
  const progress = el("progress", { max: 100, value: video.progress, "aria-label": "Progress" });
  return el(
    "li",
    {},
    el(
      "a",
      { className: "video panel", href: `#/videos/${encodeURIComponent(video.id)}` },
      picture,
      el(
        "span",
        { className: "about" },
        el("span", { className: "title" }, video.prompt ?? video.id),
        el("span", { className: "note" }, `${stateOf(video)} · ${standing(video)}`),
        video.status === "in_progress" || video.status === "queued" ? progress : null,
      ),
    ),
  );
}

export function home() {
  const list = el("ul", { className: "videos" });
  const told = el("p", { className: "note", role: "status" }, "");
  const more = el("button", { type: "button", hidden: true, onclick: () => older() }, "Show older ones");
  let shown = [];
  let timer = null;
  let gone = false;

  function draw(hasMore) {
    list.replaceChildren(...shown.map(row));
    more.hidden = !hasMore;
    say(told, shown.length ? "" : "Nothing was made yet.");
  }

  async function look() {
    try {
      const page = await api.videos();
      if (gone) return;
      const known = new Set(page.data.map((video) => video.id));
      const rest = page.has_more ? shown.filter((video) => !known.has(video.id)) : [];
      const before = JSON.stringify(shown);
      shown = [...page.data, ...rest];
      if (JSON.stringify(shown) !== before || !shown.length) draw(page.has_more && !rest.length);
    } catch (refused) {
      say(told, refused.message);
    }
    if (!gone) timer = setTimeout(look, POLL_MS);
  }

  async function older() {
    const page = await api.videos(shown[shown.length - 1].id);
    shown = [...shown, ...page.data];
    draw(page.has_more);
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
