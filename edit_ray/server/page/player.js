// Plays a video while it grows: by hls.js where it is installed, else by what the browser has.

import { el } from "./dom.js";

export class Player {
  constructor(playlist, soFar) {
    this.playlist = playlist;
    this.soFar = soFar;
    this.take = null; // which of the playlists is loaded
    this.hls = null;
    this.element = el("video", { controls: true, muted: true, autoplay: true, playsInline: true, hidden: true });
  }

  // Loads the newest playlist of a take, from a second on.
  load(take, from = 0) {
    if (this.take === take) return;
    this.take = take;
    this.element.hidden = false;
    this.hls?.destroy();
    if (window.Hls?.isSupported()) {
      this.hls = new window.Hls({ startPosition: from });
      this.hls.on(window.Hls.Events.ERROR, (_event, error) => {
        if (!error.fatal) return;
        if (error.type === window.Hls.ErrorTypes.MEDIA_ERROR) this.hls.recoverMediaError();
        else setTimeout(() => this.again(), 2000);
      });
      this.hls.loadSource(this.playlist);
      this.hls.attachMedia(this.element);
    } else {
      this.element.src = this.element.canPlayType("application/vnd.apple.mpegurl") ? this.playlist : this.soFar;
      this.element.addEventListener("loadedmetadata", () => this.seek(from), { once: true });
    }
  }

  again() {
    const take = this.take;
    if (take === null) return;
    this.take = null;
    this.load(take, this.element.currentTime);
  }

  seek(second) {
    this.element.currentTime = second;
  }

  end() {
    this.take = null;
    this.hls?.destroy();
    this.element.removeAttribute("src");
    this.element.load();
  }
}
