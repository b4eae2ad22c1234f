// The segments as a film strip: a picture of each, how visible its seam is, and how much the cache reused.

import { el, percent, reused } from "./dom.js";

export class FilmStrip {
  constructor(choose) {
    this.choose = choose;
    this.items = []; // [{key, element}]
    this.chosen = null;
    this.element = el("ol", { className: "strip", "aria-label": "Segments", onkeydown: (event) => this.step(event) });
    this.coming = el("li", { className: "coming", hidden: true }, el("span", { className: "blank" }), el("span", { className: "caption" }));
    this.element.append(this.coming);
  }

  // Shows these segments; only those that are new are drawn.
  show(segments) {
    while (this.items.length > segments.length) this.items.pop().element.remove();
    segments.forEach((segment, index) => {
      const key = `${segment.index}-${segment.take}`;
      if (this.items[index]?.key === key) return;
      const element = this.item(segment, segments[index - 1]);
      if (this.items[index]) this.items[index].element.replaceWith(element);
      else this.coming.before(element);
      this.items[index] = { key, element };
    });
    this.mark();
  }

  // The segment that is being made, in words; null if there is none.
  await(text) {
    this.coming.hidden = text === null;
    if (text !== null) this.coming.lastChild.textContent = text;
  }

  select(index) {
    this.chosen = index;
    this.mark();
  }

  item(segment, before) {
    const { statistics } = segment;
    const parts = [`${segment.index}`];
    const share = reused(statistics);
    if (before && before.prompt !== segment.prompt) parts.push("new prompt");
    else if (statistics.seam_score !== undefined) parts.push(`seam ${statistics.seam_score.toFixed(2)}`);
    const cached = share === null ? [] : [`reused ${percent(share)}`];
    const picture = segment.thumbnail
      ? el("img", { src: `${segment.thumbnail}?t=${segment.take}`, alt: "", loading: "lazy", height: 96 })
      : el("span", { className: "blank" });
    const name = `Segment ${[...parts, ...cached].join(", ")}`;
    const button = el("button", { type: "button", tabIndex: -1, "aria-label": name, onclick: () => this.choose(segment.index) }, picture);
    const captions = [parts.join(" · "), ...cached].map((text) => el("span", { className: "caption", "aria-hidden": "true" }, text));
    return el("li", {}, button, ...captions);
  }

  // One segment at a time is in the order of the Tab key; the arrow keys reach the others.
  mark() {
    const at = Math.min(this.chosen ?? 0, this.items.length - 1);
    this.items.forEach(({ element }, index) => {
      element.firstChild.tabIndex = index === at ? 0 : -1;
      element.firstChild.setAttribute("aria-pressed", `${index === this.chosen}`);
    });
  }

  step(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (by === undefined || !this.items.length) return;
    event.preventDefault();
    const at = this.items.findIndex(({ element }) => element.contains(document.activeElement));
    const to = Math.max(0, Math.min(this.items.length - 1, at + by));
    this.choose(to);
    this.items[to].element.firstChild.focus();
  }
}
