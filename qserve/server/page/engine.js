// The live view of the engine: its metrics, read once a second.

import { metrics } from "./api.js";

const PERIOD = 1000;
const HISTORY = 120;
const rates = [];
let previous = null;

export function watchEngine() {
  refresh().finally(() => setTimeout(watchEngine, PERIOD));
}

async function refresh() {
  if (document.hidden) return;
  try {
    const now = { time: performance.now(), ...(await metrics()) };
    show(now, previous ?? now);
    previous = now;
    showState("live", false);
  } catch {
    previous = null;
    showState("not reached", true);
  }
}

function show(now, before) {
  const gained = (name) => now[name] - before[name];
  const seconds = gained("time") / 1000;
  const steps = gained("qserve:engine_steps_total");
  const looked = now["vllm:prefix_cache_queries_total"];
  const total = now["qserve:kv_cache_pages"];
  const share = now["vllm:kv_cache_usage_perc"];
  showRate(seconds > 0 ? gained("vllm:generation_tokens_total") / seconds : 0);
  put("running", now["vllm:num_requests_running"]);
  put("waiting", now["vllm:num_requests_waiting"]);
  put("pages", `${Math.round(share * total)} / ${total}`);
  document.getElementById("pages-bar").value = share;
  if (steps > 0) put("step-time", duration(gained("qserve:engine_step_seconds_total") / steps));
  if (looked > 0) put("prefix-hits", percent(now["vllm:prefix_cache_hits_total"] / looked));
}

function showRate(rate) {
  put("tokens-per-second", rate < 10 ? rate.toFixed(1) : Math.round(rate));
  rates.push(rate);
  if (rates.length > HISTORY) rates.shift();
  const highest = Math.max(...rates, 1);
  const left = HISTORY - rates.length;
  const points = rates.map((r, i) => `${left + i + 0.5},${(35 - (33 * r) / highest).toFixed(2)}`);
  const line = `M${points.join("L")}`;
  document.querySelector("#sparkline .line").setAttribute("d", line);
  document.querySelector("#sparkline .area").setAttribute("d", `${line}V36H${left + 0.5}Z`);
}

function showState(text, isBad) {
  const state = document.getElementById("engine-state");
  if (state.textContent !== text) state.textContent = text;
  state.classList.toggle("bad", isBad);
}

const put = (id, value) => (document.getElementById(id).textContent = value);
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const duration = (seconds) =>
  seconds < 1 ? `${(1000 * seconds).toPrecision(3)} ms` : `${seconds.toPrecision(3)} s`;
