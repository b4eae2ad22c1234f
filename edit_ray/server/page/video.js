// One video: what plays, its segments, what the cache does, and what can be changed.

import { api, parsed } from "./api.js";
import { bars } from "./charts.js";
import { Buttons, extending, remaking, steering } from "./controls.js";
import { el, figures, note, percent, reused, say, seconds, word } from "./dom.js";
import { FilmStrip } from "./film_strip.js";
import { standing, stateOf } from "./home.js";
import { Pace } from "./pace.js";
import { Player } from "./player.js";

const MIB = 2 ** 20;
const SEAM = "where one segment ends and the next begins; 0 is invisible, 1 twice the usual motion";
const REUSED = "the part of the model’s work that the cache took from an earlier step or segment";

export function video(id) {
  const shown = new Shown(id);
  shown.follow();
  return { element: shown.element, leave: () => shown.leave() };
}

class Shown {
  constructor(id) {
    this.id = id;
    this.video = null;
    this.segments = [];
    this.chosen = null;
    this.source = null;
    this.drawing = null; // a timer
    this.live = null; // what is on the page for a video that is being made, or has ended
    this.player = new Player(api.playlist(id), api.soFar(id));
    this.strip = new FilmStrip((index) => this.choose(index, true));
    this.title = el("h1", {}, "…");
    this.badge = el("span", { className: "badge" });
    this.told = el("p", { role: "status" }, "Asking the server …");
    this.note = note();
    this.pace = new Pace();
    this.progress = el("progress", { max: 100, value: 0, "aria-label": "Progress" });
    this.first = el("p", { className: "prompt" });
    this.before = el("section", { className: "panel before", hidden: true }, el("h2", {}, "Nothing to see yet"), this.first);
    this.buttons = new Buttons(
      id,
      (video) => this.update(video),
      () => this.leave(),
      () => {
        location.hash = "#/";
      },
    );
    this.about = el("section", { className: "chosen" });
    this.prompts = el("section", { hidden: true });
    this.change = el("section", { className: "change-of" });
    this.cache = el("section", { className: "cache" });
    this.film = el(
      "section",
      { hidden: true },
      el("h2", {}, "Segments"),
      note("Below each: how visible its ", word("seam", SEAM), " is, and how much was ", word("reused", REUSED), "."),
      this.strip.element,
    );
    this.element = el(
      "article",
      {},
      el("header", { className: "top" }, this.title, this.badge),
      this.told,
      this.progress,
      this.note,
      this.before,
      this.player.element,
      this.buttons.element,
      this.film,
      this.about,
      this.prompts,
      this.change,
      this.cache,
    );
    this.player.element.addEventListener("timeupdate", () => this.choose(this.at(), false));
  }

  follow() {
    this.source?.close();
    const source = api.events(this.id);
    this.source = source;
    source.addEventListener("segment", (event) => this.commit(parsed(event.data)));
    source.addEventListener("status", (event) => this.update(parsed(event.data)));
    source.addEventListener("ended", () => source.close());
    source.onerror = () => this.lost(source);
  }

  // A stream that cannot be had: the request for the video itself says why.
  async lost(source) {
    let over = false;
    try {
      this.update(await api.video(this.id));
      over = !this.isLive();
    } catch (refused) {
      say(this.told, refused.message);
      over = refused.status === 404;
      if (over) say(this.title, "No such video");
    }
    if (source !== this.source) return;
    if (over) source.close();
    else if (source.readyState === EventSource.CLOSED) setTimeout(() => source === this.source && this.follow(), 2000);
  }

  leave() {
    this.source?.close();
    this.source = null;
    clearTimeout(this.drawing);
    this.player.end();
  }

  isLive() {
    return this.video?.status === "queued" || this.video?.status === "in_progress";
  }

  // A branch has segments from its beginning, and a playlist once it is prepared.
  isPlayable() {
    return this.video !== null && !["queued", "waiting", "preparing"].includes(this.video.edit_ray.state);
  }

  // The first look at a long video brings many segments at once: they are drawn together.
  commit(segment) {
    this.segments.splice(segment.index, Infinity, segment);
    this.drawing ??= setTimeout(() => this.draw(), 50);
  }

  update(video) {
    this.video = video;
    const run = video.edit_ray;
    if (run.committed < this.segments.length) this.segments = this.segments.slice(0, run.committed);
    const first = run.storyboard?.[0]?.prompt ?? video.prompt ?? video.id; // `video.prompt` is the latest one
    say(this.title, first);
    document.title = `${first} – EDiT on Ray`;
    say(this.badge, stateOf(video));
    say(this.told, standing(video, this.pace.left(video)));
    say(this.note, run.note ?? "");
    this.progress.hidden = !this.isLive();
    this.progress.value = video.progress;
    this.before.hidden = run.committed > 0 || !this.isLive();
    say(this.first, first);
    this.buttons.show(video);
    this.draw();
    this.form();
  }

  draw() {
    clearTimeout(this.drawing);
    this.drawing = null;
    const { segments } = this;
    this.film.hidden = segments.length === 0;
    this.strip.show(segments);
    const step = this.video?.edit_ray.step;
    const coming = step && step.segment >= segments.length;
    this.strip.await(this.isLive() && coming ? `${step.segment} · step ${step.step} of ${step.num_steps}` : null);
    if (segments.length) {
      const newest = segments.reduce((one, other) => (other.take > one.take ? other : one));
      if (this.isPlayable()) this.player.load(newest.take, newest.take ? this.start(newest.index) : 0);
      if (this.chosen === null || this.chosen >= segments.length) this.choose(Math.min(this.chosen ?? 0, segments.length - 1), false);
    }
    this.drawCache();
    this.drawPrompts();
  }

  // Every prompt with its beginning, edits included.
  drawPrompts() {
    const scenes = this.video?.edit_ray.storyboard ?? [];
    const written = JSON.stringify(scenes);
    if (written === this.written) return;
    this.written = written;
    const rows = scenes.map((scene) => el("li", {}, el("span", { className: "note" }, `from segment ${scene.segment} `), scene.prompt));
    this.prompts.hidden = scenes.length < 2;
    this.prompts.replaceChildren(el("h2", {}, "Prompts"), el("ol", { className: "prompts" }, ...rows));
  }

  start(index) {
    return this.segments[index].first_frame / this.video.edit_ray.fps;
  }

  // The segment that plays.
  at() {
    const fps = this.video?.edit_ray.fps;
    const frame = this.player.element.currentTime * fps + 0.01;
    return this.segments.findLastIndex((segment) => segment.first_frame <= frame);
  }

  choose(index, seek) {
    if (index < 0 || !this.segments[index] || !this.video) return;
    if (seek) this.player.seek(this.start(index));
    if (index === this.chosen && this.describes === this.segments[index]) return;
    if (!seek && this.about.contains(document.activeElement)) return; // nothing is taken from under the hands
    this.chosen = index;
    this.strip.select(index);
    this.describe(this.segments[index]);
  }

  describe(segment) {
    const { statistics } = segment;
    const share = reused(statistics);
    this.describes = segment;
    const written = (name, digits, unit = "") => (statistics[name] === undefined ? null : `${statistics[name].toFixed(digits)}${unit}`);
    const values = [
      ["begins at", seconds(this.start(segment.index))],
      ["frames", segment.num_frames],
      ["seed", segment.seed],
      ["take", segment.take || null],
      ["seam", written("seam_score", 2)],
      ["reused", share === null ? null : percent(share)],
      ["denoised in", written("denoise_s", 1, " s")],
    ];
    const folded = el("details", {}, el("summary", {}, "Make again or branch from here"));
    folded.append(
      remaking(
        this.id,
        segment,
        (video) => this.again(video),
        (video) => this.open(video),
      ),
    );
    this.about.replaceChildren(
      el("h2", {}, `Segment ${segment.index}`),
      el("p", { className: "prompt" }, segment.prompt),
      figures(values),
      folded,
    );
  }

  again(video) {
    this.update(video);
    this.follow();
  }

  open(video) {
    location.hash = `#/videos/${encodeURIComponent(video.id)}`;
  }

  // The form that fits the state: it stays while the state does, so that no half-written prompt is lost.
  form() {
    const live = this.isLive();
    const form = this.change.querySelector("form");
    if (form && this.live === live) return;
    this.live = live;
    const last = this.segments[this.segments.length - 1]?.prompt ?? this.video.prompt ?? "";
    if (live) this.change.replaceChildren(steering(this.id, (video) => this.update(video)));
    else if (this.video.edit_ray.committed > 0) this.change.replaceChildren(extending(this.id, last, (video) => this.open(video)));
    else this.change.replaceChildren();
  }

  drawCache() {
    const of = (name, unit) => this.segments.map(({ statistics }) => (statistics[name] === undefined ? null : statistics[name] / unit));
    const mib = (value) => `${value.toFixed(1)} MiB`;
    const charts = [
      bars("Reused", this.segments.map(({ statistics }) => reused(statistics)), percent, 1),
      bars("Stored in memory", of("host_bytes", MIB), mib),
      bars("Stored on disk", of("disk_bytes", MIB), mib),
    ].filter((chart) => chart !== null);
    const sum = (name) => this.segments.reduce((total, { statistics }) => total + (statistics[name] ?? 0), 0);
    const counts = figures([
      ["computed by the model", sum("units_computed")],
      ["taken from the cache", sum("units_skipped")],
      ["read from the store", sum("entries_read")],
      ["written to the store", sum("entries_written")],
    ]);
    this.cache.replaceChildren(...(charts.length ? [el("h2", {}, "Cache"), counts, el("div", { className: "charts" }, ...charts)] : []));
  }
}
