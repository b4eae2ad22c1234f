// Plays the run's newest playlist from its start, and says where the run stands.
"use strict";

const POLL_MS = 1000;
const video = document.getElementById("video");
const shown = (id) => document.getElementById(id);
let playing = null; // the playlist that is loaded
let hls = null;

function play(playlist) {
  if (playlist === playing) return;
  playing = playlist;
  if (window.Hls && Hls.isSupported()) {
    if (hls) hls.destroy();
    hls = new Hls({ startPosition: 0 });
    hls.on(Hls.Events.ERROR, (_event, error) => {
      if (!error.fatal) return;
      if (error.type === Hls.ErrorTypes.MEDIA_ERROR) hls.recoverMediaError();
      else playing = null; // the next look at the run's status loads it again
    });
    hls.loadSource(playlist);
    hls.attachMedia(video);
  } else {
    // Without hls.js: what a browser plays by itself.
    video.src = video.canPlayType("application/vnd.apple.mpegurl") ? playlist : "stream.mp4";
  }
}

function promptAt(segments, seconds) {
  const begun = segments.filter((segment) => segment.start_s <= seconds + 1e-3);
  return begun.length ? begun[begun.length - 1].prompt : "";
}

async function look() {
  try {
    const run = await (await fetch("status")).json();
    document.title = run.run_id;
    shown("run").textContent = run.run_id;
    const of = run.num_segments === null ? "" : ` of ${run.num_segments}`;
    shown("told").textContent = run.error ? `${run.state}: ${run.error}` : `${run.state}, ${run.committed}${of} segments`;
    shown("committed").max = run.num_segments ?? Math.max(1, run.committed);
    shown("committed").value = run.committed;
    shown("prompt").textContent = promptAt(run.prompts, video.currentTime);
    shown("said").hidden = shown("files").hidden = run.committed === 0; // before it nothing is there to fetch
    shown("final").hidden = !run.final;
    if (run.playlist) play(run.playlist);
  } catch {
    shown("told").textContent = "The server does not answer.";
  }
}

async function watch() {
  await look(); // the next look is a while after the answer, however long that takes
  setTimeout(watch, POLL_MS);
}

watch();
