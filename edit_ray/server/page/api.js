// The routes that the page uses. An answer that refuses becomes a `Refused` with all its sentences.

export class Refused extends Error {
  constructor(status, problems) {
    super(problems.map((problem) => problem.message).join(" "));
    this.status = status;
    this.problems = problems; // [{message, param}]
  }
}

let askForToken = async () => false;

// `ask` shows a form for the token, and says whether it was accepted.
export function onMissingToken(ask) {
  askForToken = ask;
}

// JSON as values; a seed stays text, as it may be greater than the numbers of JavaScript are exact. Null if it is none.
export function parsed(text) {
  try {
    return JSON.parse(text, (key, value, context) => (key === "seed" && typeof value === "number" ? (context?.source ?? value) : value));
  } catch {
    return null;
  }
}

export async function request(path, { method = "GET", json, form, headers } = {}) {
  const options = { method, body: form, headers };
  if (json !== undefined) {
    options.body = JSON.stringify(json);
    options.headers = { "Content-Type": "application/json" };
  }
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Refused(0, [{ message: "The server does not answer.", param: null }]);
  }
  if (answer.status === 401 && path !== "/session" && (await askForToken())) return request(path, { method, json, form, headers });
  const body = answer.status === 204 ? null : parsed(await answer.text());
  if (answer.ok) return body;
  const error = body?.error ?? {};
  const one = { message: error.message ?? `The server answers ${answer.status}.`, param: error.param ?? null };
  throw new Refused(answer.status, error.edit_ray?.problems ?? [one]);
}

const at = (id, rest = "") => `/v1/videos/${encodeURIComponent(id)}${rest}`;

export const api = {
  session: (token) => request("/session", { method: "POST", json: { token } }),
  models: () => request("/v1/models"),
  videos: (after) => request(`/v1/videos?limit=20${after ? `&after=${encodeURIComponent(after)}` : ""}`),
  video: (id) => request(at(id)),
  create: (form, key) => request("/v1/videos", { method: "POST", form, headers: { "Idempotency-Key": key } }),
  remove: (id) => request(at(id), { method: "DELETE" }),
  steer: (id, edit) => request(at(id), { method: "PATCH", json: { steer: edit } }),
  pause: (id, paused) => request(at(id), { method: "PATCH", json: { paused } }),
  approve: (id, segment) => request(at(id), { method: "PATCH", json: { approve: segment } }),
  reroll: (id, change) => request(at(id, "/reroll"), { method: "POST", json: change }),
  branch: (id, change) => request(at(id, "/branch"), { method: "POST", json: change }),
  extend: (id, prompt, length) =>
    request("/v1/videos/extensions", { method: "POST", json: { video: { id }, prompt, seconds: length } }),
  events: (id) => new EventSource(at(id, "/events")),
  playlist: (id) => at(id, "/live.m3u8"),
  soFar: (id) => at(id, "/stream.mp4"),
  content: (id) => at(id, "/content"),
  thumbnail: (id) => at(id, "/content?variant=thumbnail"),
};
