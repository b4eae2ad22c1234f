// Keeps the choice of light or dark; the stylesheet alone carries it out.

const KEY = "edit-ray-theme";
const choices = [...document.querySelectorAll('[name="theme"]')];

for (const choice of choices) {
  choice.checked = choice.value === (localStorage.getItem(KEY) ?? "auto");
  choice.addEventListener("change", () => localStorage.setItem(KEY, choice.value));
}
