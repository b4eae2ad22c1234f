// Elements, and how numbers are written. Text is only ever set as text.

export function el(tag, props = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made && name !== "list" && !name.startsWith("aria")) made[name] = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// A term that explains itself on hover and on focus.
export const word = (term, meaning) => el("abbr", { tabIndex: 0, title: meaning }, term);

export const note = (...children) => el("p", { className: "note" }, ...children);

export function field(label, input, hint = "") {
  return el("label", { className: "field" }, el("span", {}, label), input, hint ? el("small", { className: "note" }, hint) : null);
}

export function figures(pairs) {
  return el(
    "dl",
    { className: "values" },
    pairs.filter(([, value]) => value !== null && value !== undefined && value !== "").map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, `${value}`))),
  );
}

// The number of a field, every digit of it: a seed may be greater than the numbers of JavaScript are exact.
export function numberOf(input) {
  const text = input.value.trim();
  if (text === "") return undefined;
  return JSON.rawJSON && /^(0|[1-9][0-9]*)$/.test(text) ? JSON.rawJSON(text) : Number(text);
}

// Puts another text where it differs, so that a screen reader says only what is new.
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function seconds(value) {
  if (value < 99.95) return `${value.toFixed(1)} s`;
  const whole = Math.round(value);
  const minutes = Math.floor(whole / 60);
  return minutes < 60 ? `${minutes} min ${whole % 60} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// As precise as an estimate is.
export const about = (value) => (value < 99.5 ? `${Math.max(1, Math.round(value))} s` : seconds(value));

export const percent = (share) => `${Math.round(100 * share)}%`;

export function reused(statistics) {
  const computed = statistics.units_computed ?? 0;
  const skipped = statistics.units_skipped ?? 0;
  return computed + skipped > 0 ? skipped / (computed + skipped) : null;
}
