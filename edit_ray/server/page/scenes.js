// The storyboard as plain values: scenes [{segment, prompt}] in order, the first from segment 0. Nothing here draws.

// How many whole segments a video of so many seconds has, and how long they last.
export function lengthOf(layout, length) {
  const frames = Math.max(1, Math.ceil(length * layout.fps - 1e-6));
  const later = Math.max(0, Math.ceil((frames - layout.num_frames) / layout.frames_of_a_later_segment));
  return { segments: 1 + later, seconds: startOf(layout, 1 + later) };
}

// The second at which a segment begins.
export function startOf(layout, segment) {
  if (segment === 0) return 0;
  return (layout.num_frames + (segment - 1) * layout.frames_of_a_later_segment) / layout.fps;
}

export const endOf = (scenes, index, segments) => (index + 1 < scenes.length ? scenes[index + 1].segment : segments);

// Another scene in the second half of one; null where that has only one segment.
export function split(scenes, index, segments) {
  const { segment, prompt } = scenes[index];
  const end = endOf(scenes, index, segments);
  if (end - segment < 2) return null;
  const middle = segment + Math.ceil((end - segment) / 2);
  return [...scenes.slice(0, index + 1), { segment: middle, prompt }, ...scenes.slice(index + 1)];
}

// Without a scene: the one before it lasts until the next, or the next begins where the first did.
export function without(scenes, index) {
  if (scenes.length === 1) return scenes;
  const rest = scenes.filter((_, at) => at !== index);
  return [{ ...rest[0], segment: 0 }, ...rest.slice(1)];
}

// A scene that begins elsewhere, as far as its neighbours allow.
export function moved(scenes, index, segment, segments) {
  const least = scenes[index - 1].segment + 1;
  const most = endOf(scenes, index, segments) - 1;
  return scenes.map((scene, at) => (at === index ? { ...scene, segment: Math.max(least, Math.min(most, segment)) } : scene));
}

// The scenes that fit into fewer segments.
export function fitted(scenes, segments) {
  return scenes.filter((scene) => scene.segment < segments);
}

// The fields of a request: one prompt, or a storyboard.
export function asFields(scenes) {
  if (scenes.length === 1) return { prompt: scenes[0].prompt };
  return { storyboard: scenes.map(({ segment, prompt }) => ({ segment, prompt })) };
}
