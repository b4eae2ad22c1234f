// The form for a new video.

import { api } from "./api.js";
import { el, field, note, numberOf, say, seconds, word } from "./dom.js";
import { asFields, lengthOf } from "./scenes.js";
import { Storyboard } from "./storyboard.js";

const SEGMENT = "a piece of the video that is made and saved at once";
const SEED = "the same seed gives the same video again";

// The names of the fields in a request, and their labels here.
const LABELS = [
  ["edit_ray.num_inference_steps", "Steps for each segment"],
  ["edit_ray.guidance_scale", "How closely it follows the prompt"],
  ["edit_ray.negative_prompt", "What should not be seen"],
  ["edit_ray.seed", "Seed"],
  ["edit_ray.storyboard", "Prompts"],
  ["input_reference", "The picture or clip"],
  [/^prompt\b/, "Prompt"],
  [/^seconds\b/, "Seconds"],
  [/^model\b/, "Model"],
];

const newKey = () => `page-${Date.now()}-${Math.random()}`;

const inWords = (sentence) => LABELS.reduce((text, [name, label]) => text.replace(name, label), sentence);

export function newVideo(made) {
  const board = new Storyboard();
  const models = new Map();
  const model = el("select", { onchange: () => fit() });
  const length = el("input", { type: "number", min: 0.1, step: 0.1, value: 4, required: true, oninput: () => fit() });
  const seed = el("input", { type: "number", min: 0, step: 1, placeholder: "any" });
  const start = el("input", { type: "file", accept: "image/png,image/jpeg,image/webp,image/bmp,video/*" });
  const negative = el("input", { type: "text", maxLength: 10000 });
  const steps = el("input", { type: "number", min: 1, step: 1, placeholder: "the model’s" });
  const guidance = el("input", { type: "number", min: 0, step: 0.1, placeholder: "the model’s" });
  const ask = el("input", { type: "checkbox" });
  const lasts = el("small", { className: "note" });
  const errors = el("div", { className: "bad errors", role: "alert" });
  const button = el("button", { className: "main" }, "Make the video");

  function fit() {
    const layout = models.get(model.value);
    if (layout === undefined) return;
    const { segments, seconds: whole } = lengthOf(layout, Math.max(0.1, Number(length.value) || 0));
    board.fit(layout, segments);
    say(lasts, `${segments} ${segments === 1 ? "segment" : "segments"}, ${seconds(whole)}`);
  }

  async function fill() {
    try {
      for (const { id, edit_ray: layout } of (await api.models()).data) {
        models.set(id, layout);
        model.append(el("option", { value: id }, `${id}, ${layout.width} × ${layout.height}`));
      }
      fit();
    } catch (refused) {
      tell([refused.message]);
    }
  }

  // A request whose answer was lost may be sent again: the same fields have the same key, and begin no second video.
  let key = null;
  let sent = null;

  function keyOf(form) {
    const fields = [...form.values()].map((value) => value.name ?? value).join("\n");
    if (fields !== sent) key = newKey();
    sent = fields;
    return key;
  }

  const tell = (sentences) => errors.replaceChildren(...sentences.map((sentence) => el("p", {}, inWords(sentence))));

  function body() {
    const { prompt, storyboard } = asFields(board.scenes);
    const ours = { storyboard, negative_prompt: negative.value || undefined, approve: ask.checked ? "each" : undefined };
    for (const [name, input] of [["seed", seed], ["num_inference_steps", steps], ["guidance_scale", guidance]]) {
      ours[name] = numberOf(input);
    }
    const form = new FormData();
    form.append("model", model.value);
    form.append("seconds", length.value);
    if (prompt !== undefined) form.append("prompt", prompt);
    form.append("edit_ray", JSON.stringify(ours));
    if (start.files.length) form.append("input_reference", start.files[0]);
    return form;
  }

  async function send(event) {
    event.preventDefault();
    tell([]);
    if (board.missing() >= 0) return;
    button.disabled = true;
    try {
      const form = body();
      made(await api.create(form, keyOf(form)));
    } catch (refused) {
      tell(refused.problems.map((problem) => problem.message));
    }
    button.disabled = false;
  }

  fill();
  return el(
    "section",
    {},
    el("h1", {}, "New video"),
    el(
      "form",
      { className: "panel form", onsubmit: send, "aria-label": "New video" },
      board.element,
      note("A longer video may have several prompts. Add one, and drag the borders between them to where it begins."),
      el(
        "div",
        { className: "fields" },
        el("label", { className: "field" }, el("span", {}, "Seconds"), length, lasts),
        field("Model", model),
        field("Seed", seed),
        field("Picture or clip to begin with", start),
      ),
      el(
        "details",
        {},
        el("summary", {}, "More"),
        el(
          "div",
          { className: "fields" },
          field("What should not be seen", negative),
          field("Steps for each segment", steps),
          field("How closely it follows the prompt", guidance),
        ),
        el("label", { className: "check" }, ask, "Ask me after each segment"),
        note("A ", word("segment", SEGMENT), " is finished before the next begins. A ", word("seed", SEED), " is a number."),
      ),
      errors,
      el("div", { className: "row" }, button),
    ),
  );
}
