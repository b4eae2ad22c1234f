// Shows the view that the address names: #/ with all videos, or #/videos/ID with one.

import { api, onMissingToken } from "./api.js";
import { home } from "./home.js";
import { video } from "./video.js";

const view = document.getElementById("view");
let leave = () => {};

function show() {
  leave();
  const match = /^#\/videos\/([^/]+)$/.exec(location.hash);
  const shown = match ? video(decodeURIComponent(match[1])) : home();
  leave = shown.leave;
  view.replaceChildren(shown.element);
}

let asking = null;

onMissingToken(() => {
  asking ??= askForToken().finally(() => {
    asking = null;
  });
  return asking;
});

// True once the server has taken a token.
function askForToken() {
  const dialog = document.getElementById("entrance");
  const token = document.getElementById("token");
  const error = document.getElementById("entrance-error");
  return new Promise((resolve) => {
    dialog.onsubmit = async (event) => {
      event.preventDefault();
      try {
        await api.session(token.value);
        token.value = error.textContent = "";
        dialog.close();
        resolve(true);
      } catch (refused) {
        error.textContent = refused.message;
      }
    };
    dialog.oncancel = () => resolve(false);
    dialog.showModal();
  });
}

window.addEventListener("hashchange", () => {
  show();
  window.scrollTo(0, 0);
});
show();
