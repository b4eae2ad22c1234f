// Small charts over the segments: bars in percent of the width, as in the report.

import { el, svg } from "./dom.js";

const HEIGHT = 80;
const MOST = 200; // bars; of more segments the latest are shown

// Bars from 0 on for `values`, null where there is none; `tell` puts a value into words.
export function bars(name, values, tell, top = Math.max(...values.filter((value) => value !== null))) {
  const first = Math.max(0, values.length - MOST);
  const shown = values.slice(first);
  const width = 100 / Math.max(1, shown.length);
  const known = shown.filter((value) => value !== null);
  if (!known.length) return null;
  const drawing = svg("svg", { role: "img", "aria-label": `${name}, by segment`, height: HEIGHT + 20 });
  shown.forEach((value, index) => {
    if (value === null) return;
    const height = top > 0 ? (HEIGHT * value) / top : 0;
    const bar = svg("rect", { class: "mark blue", x: `${index * width}%`, width: `${width}%`, y: HEIGHT - height, height });
    const title = svg("title");
    title.textContent = `segment ${first + index}: ${tell(value)}`;
    bar.append(title);
    drawing.append(bar);
  });
  drawing.append(svg("line", { class: "grid", x1: 0, x2: "100%", y1: HEIGHT, y2: HEIGHT }));
  for (const [index, anchor] of [[0, "start"], [shown.length - 1, "end"]]) {
    if (index === 0 && anchor === "end") continue;
    const label = svg("text", { x: anchor === "start" ? "0%" : "100%", y: HEIGHT + 14, "text-anchor": anchor });
    label.textContent = `${first + index}`;
    drawing.append(label);
  }
  const latest = el("span", { className: "note" }, `latest ${tell(known[known.length - 1])}`);
  return el("div", { className: "chart" }, el("h3", {}, name, " ", latest), drawing);
}
