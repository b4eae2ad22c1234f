// What can be done with a video: steer, pause, approve, make again, branch, extend, download, remove.

import { api } from "./api.js";
import { el, field, note, numberOf, say } from "./dom.js";

const text = (input) => (input.value.trim() === "" ? undefined : input.value);

// A form whose button asks the server, and which says what came of it.
function form(name, title, fields, button, ask) {
  const told = el("p", { role: "status" });
  const press = el("button", { className: "main" }, button);
  const send = async (event) => {
    event.preventDefault();
    press.disabled = true;
    told.className = "note";
    try {
      say(told, (await ask()) ?? "");
    } catch (refused) {
      told.className = "bad";
      say(told, refused.message);
    }
    press.disabled = false;
  };
  return el(
    "form",
    { className: `panel form ${name}`, onsubmit: send, "aria-label": title },
    el("h2", {}, title),
    ...fields,
    el("div", { className: "row" }, press),
    told,
  );
}

// The prompt of the rest of a video that is being made.
export function steering(id, changed) {
  const prompt = el("textarea", { rows: 3, maxLength: 10000 });
  const negative = el("input", { type: "text", maxLength: 10000 });
  const guidance = el("input", { type: "number", min: 0, step: 0.1 });
  const seed = el("input", { type: "number", min: 0, step: 1 });
  const from = el("input", { type: "number", min: 0, step: 1, placeholder: "the next one" });
  const more = el(
    "details",
    {},
    el("summary", {}, "More"),
    el(
      "div",
      { className: "fields" },
      field("From segment", from),
      field("What should not be seen", negative),
      field("How closely it follows the prompt", guidance),
      field("Seed", seed),
    ),
  );
  return form("steer", "Steer", [field("New prompt", prompt), more], "Change what comes", async () => {
    const edit = {
      from_segment: numberOf(from),
      prompt: text(prompt),
      negative_prompt: text(negative),
      guidance_scale: numberOf(guidance),
      seed: numberOf(seed),
    };
    const video = await api.steer(id, edit);
    changed(video);
    prompt.value = "";
    return `It holds from segment ${video.edit_ray.applied_from} on.`;
  });
}

// Another take of a video from a segment on, or a video of its own that begins as this one does.
export function remaking(id, segment, again, branched) {
  const prompt = el("textarea", { rows: 2, maxLength: 10000, value: segment.prompt });
  const seed = el("input", { type: "number", min: 0, step: 1, placeholder: "another one" });
  const change = () => ({ prompt: prompt.value === segment.prompt ? undefined : text(prompt), seed: numberOf(seed) });
  const fields = [field("Prompt from here on", prompt), field("Seed", seed)];
  const remake = form("reroll", `Make again from segment ${segment.index}`, fields, "Make again from here", async () => {
    again(await api.reroll(id, { from_segment: segment.index, ...change() }));
    return "The segments before it stay.";
  });
  const branch = el("button", { type: "button", onclick: () => split() }, "Branch here");
  const told = remake.querySelector("[role=status]");
  async function split() {
    branch.disabled = true;
    try {
      branched(await api.branch(id, { at: segment.index, ...change() }));
    } catch (refused) {
      told.className = "bad";
      say(told, refused.message);
    }
    branch.disabled = false;
  }
  remake.querySelector(".row").append(branch);
  remake.append(note("A branch is a new video with the same beginning; this one stays as it is."));
  return remake;
}

// A new video that begins with all of this one.
export function extending(id, prompt, made) {
  const wanted = el("textarea", { rows: 2, maxLength: 10000, value: prompt, required: true });
  const length = el("input", { type: "number", min: 0.1, step: 0.1, value: 4, required: true });
  return form("extend", "Extend", [field("Prompt of what follows", wanted), field("Seconds", length)], "Extend", async () => {
    made(await api.extend(id, wanted.value, length.value));
  });
}

// The buttons above a video, for its state.
export class Buttons {
  constructor(id, changed, removing, removed) {
    this.id = id;
    this.video = null;
    this.told = el("p", { className: "bad", role: "alert" });
    this.approve = el("button", { type: "button", className: "main approve", onclick: () => this.ask(this.yes()) }, "");
    this.pause = el("button", { type: "button", className: "pause", onclick: () => this.ask(this.turn()) }, "Pause");
    this.file = el("a", { className: "button", download: "" }, "Download");
    this.remove = el("button", { type: "button", className: "remove", onclick: () => this.drop() }, "Delete");
    this.changed = changed;
    this.removing = removing;
    this.removed = removed;
    this.element = el("div", {}, el("div", { className: "row" }, this.approve, this.pause, this.file, this.remove), this.told);
  }

  show(video) {
    this.video = video;
    const run = video.edit_ray;
    const live = video.status === "queued" || video.status === "in_progress";
    this.approve.hidden = !run.awaiting_approval;
    say(this.approve, `Approve segment ${run.committed - 1}`);
    this.pause.hidden = !live;
    say(this.pause, run.paused ? "Continue" : "Pause");
    this.file.hidden = run.committed === 0;
    this.file.href = live ? api.soFar(this.id) : api.content(this.id);
    this.file.download = `${this.id}.mp4`;
    say(this.file, live ? "Download what is there" : "Download");
  }

  yes() {
    return api.approve(this.id, this.video.edit_ray.committed - 1);
  }

  turn() {
    return api.pause(this.id, !this.video.edit_ray.paused);
  }

  async ask(answer) {
    say(this.told, "");
    try {
      this.changed(await answer);
    } catch (refused) {
      say(this.told, refused.message);
    }
  }

  // Asks once more in the button itself.
  async drop() {
    if (this.remove.textContent === "Delete") {
      say(this.remove, "Really delete it?");
      setTimeout(() => say(this.remove, "Delete"), 5000);
      return;
    }
    this.removing();
    try {
      await api.remove(this.id);
      this.removed();
    } catch (refused) {
      say(this.told, refused.message);
    }
  }
}
