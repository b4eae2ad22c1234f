// An estimate of the time left from the steps that were seen, until the server knows the pace of whole segments.

export class Pace {
  constructor(now = () => performance.now() / 1000) {
    this.now = now;
    this.first = null; // [seconds, steps]
  }

  // Seconds left; null if nothing can be said yet.
  left(video) {
    const { step, num_segments: segments } = video.edit_ray;
    if (!step || segments === null || video.status !== "in_progress") return null;
    const done = step.segment * step.num_steps + step.step;
    this.first ??= [this.now(), done];
    const [since, before] = this.first;
    if (done - before < 3) return null;
    return ((segments * step.num_steps - done) * (this.now() - since)) / (done - before);
  }
}
