// A conversation: its messages, and the answer that is being written.

import { streamChat } from "./api.js";

const byId = (id) => document.getElementById(id);
const log = byId("log");
const welcome = byId("welcome");

export class Chat {
  #messages = [];
  #abort = null;

  get isBusy() {
    return this.#abort !== null;
  }

  stop() {
    this.#abort?.abort();
  }

  clear() {
    this.stop();
    this.#messages = [];
    log.replaceChildren(welcome);
  }

  /** Send what the user says, and show the answer as it comes. */
  async say(text, settings, apiKey) {
    const messages = this.#messages;
    const abort = (this.#abort = new AbortController());
    messages.push({ role: "user", content: text });
    bubble("user", text);
    const answer = new Answer();
    showBusy(true);
    try {
      const body = { ...settings.sampling, messages: [...settings.system, ...messages] };
      for await (const part of streamChat(body, apiKey, abort.signal)) answer.take(part);
    } catch (error) {
      if (error.name !== "AbortError") bubble("error", error.message);
    }
    answer.end();
    if (answer.text) messages.push({ role: "assistant", content: answer.text });
    else messages.pop();
    this.#abort = null;
    showBusy(false);
  }
}

class Answer {
  text = "";
  #start = performance.now();
  #first = null;
  #tokens = null;
  #bubble = bubble("assistant busy", "");

  take(part) {
    const added = part.choices[0]?.delta.content;
    if (part.usage) this.#tokens = part.usage.completion_tokens;
    if (!added) return;
    this.#first ??= performance.now();
    this.text += added;
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    this.#bubble.querySelector(".text").append(added);
    if (atEnd) log.scrollTop = log.scrollHeight;
  }

  end() {
    this.#bubble.classList.remove("busy");
    if (!this.text) this.#bubble.remove();
    else if (this.#tokens) this.#bubble.append(this.#timing());
  }

  #timing() {
    const seconds = (performance.now() - this.#first) / 1000;
    const rate = this.#tokens > 1 && seconds > 0 ? (this.#tokens - 1) / seconds : 0;
    const timing = document.createElement("small");
    timing.className = "timing";
    const wait = ((this.#first - this.#start) / 1000).toFixed(2);
    timing.textContent = `${this.#tokens} tokens · ${rate.toFixed(1)} tokens/s · first after ${wait} s`;
    return timing;
  }
}

function bubble(kind, text) {
  welcome.remove();
  const message = document.createElement("div");
  message.className = `message ${kind}`;
  const content = document.createElement("span");
  content.className = "text";
  content.textContent = text;
  message.append(content);
  log.append(message);
  log.scrollTop = log.scrollHeight;
  return message;
}

function showBusy(busy) {
  log.setAttribute("aria-busy", busy);
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
}
