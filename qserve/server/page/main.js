// Wires the page's controls to the conversation and the engine's view.

import { modelName } from "./api.js";
import { Chat } from "./chat.js";
import { watchEngine } from "./engine.js";

const byId = (id) => document.getElementById(id);
const chat = new Chat();
const prompt = byId("prompt");
const apiKey = byId("api-key");

// Sending.

byId("chat").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = prompt.value.trim();
  if (!text || chat.isBusy || !byId("sampling").reportValidity()) return;
  prompt.value = "";
  fitPrompt();
  await chat.say(text, settings(), apiKey.value);
  prompt.focus();
});

prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("chat").requestSubmit();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") chat.stop();
});

byId("stop").addEventListener("click", () => chat.stop());
byId("new-chat").addEventListener("click", () => {
  chat.clear();
  prompt.focus();
});

prompt.addEventListener("input", fitPrompt);

function fitPrompt() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

// Settings.

function settings() {
  const { system, ...fields } = Object.fromEntries(new FormData(byId("sampling")));
  const given = Object.entries(fields).filter(([, value]) => value !== "");
  return {
    system: system.trim() ? [{ role: "system", content: system.trim() }] : [],
    sampling: Object.fromEntries(given.map(([name, value]) => [name, Number(value)])),
  };
}

for (const range of document.querySelectorAll("input[type=range]")) {
  const shown = document.querySelector(`output[for=${range.id}]`);
  const show = () => (shown.textContent = Number(range.value).toFixed(2));
  range.addEventListener("input", show);
  show();
}

byId("sampling").addEventListener("submit", (event) => event.preventDefault());

// The model, and the key it may need.

async function showModel() {
  try {
    byId("model").textContent = await modelName(apiKey.value);
  } catch (error) {
    byId("model").textContent = error.message;
  }
}

apiKey.value = sessionStorage.getItem("api-key") ?? "";
apiKey.addEventListener("change", () => {
  sessionStorage.setItem("api-key", apiKey.value);
  showModel();
});

// Light and dark: the system's choice until another is made.

const root = document.documentElement;
const systemTheme = () => (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");

byId("theme").addEventListener("click", () => {
  root.dataset.theme = (root.dataset.theme ?? systemTheme()) === "dark" ? "light" : "dark";
  localStorage.setItem("theme", root.dataset.theme);
});
const chosenTheme = localStorage.getItem("theme");
if (chosenTheme) root.dataset.theme = chosenTheme;

showModel();
watchEngine();
