// A storyboard to edit: blocks along the time of the video, whose borders are dragged or moved with the arrow keys.

import { el, field, seconds } from "./dom.js";
import { endOf, fitted, moved, split, startOf, without } from "./scenes.js";

export class Storyboard {
  constructor() {
    this.scenes = [{ segment: 0, prompt: "" }];
    this.chosen = 0;
    this.layout = null;
    this.segments = 1;
    this.board = el("div", { className: "board", role: "group", "aria-label": "Timeline of the prompts" });
    this.prompt = el("textarea", { rows: 3, required: true, maxLength: 10000, oninput: () => this.write() });
    this.label = el("span", {});
    this.add = el("button", { type: "button", onclick: () => this.split() }, "Add a prompt");
    this.drop = el("button", { type: "button", onclick: () => this.remove() }, "Remove this prompt");
    this.element = el(
      "div",
      {},
      this.board,
      el("label", { className: "field" }, this.label, this.prompt),
      el("div", { className: "row" }, this.add, this.drop),
    );
  }

  // Another model, or another length in segments.
  fit(layout, segments) {
    this.layout = layout;
    this.segments = segments;
    this.scenes = fitted(this.scenes, segments);
    this.choose(Math.min(this.chosen, this.scenes.length - 1));
  }

  choose(index, focus = false) {
    this.chosen = index;
    this.prompt.value = this.scenes[index].prompt;
    this.draw();
    if (focus) this.prompt.focus();
  }

  write() {
    this.scenes[this.chosen] = { ...this.scenes[this.chosen], prompt: this.prompt.value };
    this.board.querySelectorAll(".scene")[this.chosen].textContent = this.prompt.value || "…";
  }

  split() {
    const scenes = split(this.scenes, this.chosen, this.segments);
    if (scenes === null) return;
    this.scenes = scenes;
    this.choose(this.chosen + 1, true);
    this.prompt.select();
  }

  remove() {
    this.scenes = without(this.scenes, this.chosen);
    this.choose(Math.max(0, this.chosen - 1), true);
  }

  // The first scene without a prompt, chosen; -1 if there is none.
  missing() {
    const index = this.scenes.findIndex((scene) => scene.prompt.trim() === "");
    if (index >= 0) this.choose(index, true);
    return index;
  }

  draw() {
    const { scenes, segments, layout, chosen } = this;
    const blocks = scenes.map((scene, index) => {
      const block = el(
        "button",
        { type: "button", className: "scene", "aria-pressed": `${index === chosen}`, onclick: () => this.choose(index, true) },
        scene.prompt || "…",
      );
      block.style.flexGrow = endOf(scenes, index, segments) - scene.segment;
      return block;
    });
    this.board.replaceChildren(...blocks.flatMap((block, index) => (index ? [this.border(index), block] : [block])));
    const from = startOf(layout, scenes[chosen].segment);
    const to = startOf(layout, endOf(scenes, chosen, segments));
    this.label.textContent =
      scenes.length === 1 ? "Prompt" : `Prompt ${chosen + 1} of ${scenes.length}, from ${seconds(from)} to ${seconds(to)}`;
    this.add.disabled = split(scenes, chosen, segments) === null;
    this.drop.hidden = scenes.length === 1;
  }

  // The border before a scene: a slider over segments.
  border(index) {
    const { scenes, segments, layout } = this;
    const at = scenes[index].segment;
    const handle = el("div", {
      className: "border",
      role: "slider",
      tabIndex: 0,
      "aria-label": `Start of prompt ${index + 1}`,
      "aria-valuemin": scenes[index - 1].segment + 1,
      "aria-valuemax": endOf(scenes, index, segments) - 1,
      "aria-valuenow": at,
      "aria-valuetext": `segment ${at}, ${seconds(startOf(layout, at))}`,
      onkeydown: (event) => {
        const step = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }[event.key];
        if (step === undefined) return;
        event.preventDefault();
        this.move(index, scenes[index].segment + step);
      },
      onpointerdown: (event) => this.drag(event, index),
    });
    return handle;
  }

  move(index, segment) {
    this.scenes = moved(this.scenes, index, segment, this.segments);
    this.draw();
    this.board.querySelectorAll(".border")[index - 1].focus();
  }

  drag(event, index) {
    event.preventDefault();
    const to = (moving) => {
      const box = this.board.getBoundingClientRect();
      this.move(index, Math.round(((moving.clientX - box.left) / box.width) * this.segments));
    };
    const end = () => {
      window.removeEventListener("pointermove", to);
      window.removeEventListener("pointerup", end);
      window.removeEventListener("pointercancel", end);
    };
    window.addEventListener("pointermove", to);
    window.addEventListener("pointerup", end);
    window.addEventListener("pointercancel", end);
  }
}
