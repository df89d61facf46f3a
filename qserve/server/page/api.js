// What the page asks of the server.

const url = (path) => new URL(path, document.baseURI);

async function request(path, apiKey, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (apiKey) headers.Authorization = `Bearer ${apiKey}`;
  const response = await fetch(url(path), { ...options, headers });
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  throw new Error(answer?.error?.message ?? `the server answered ${response.status}`);
}

export async function modelName(apiKey) {
  const models = await (await request("v1/models", apiKey)).json();
  return models.data[0].id;
}

/** The parts of a streamed chat completion, as they come. */
export async function* streamChat(body, apiKey, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const options = { method: "POST", body: JSON.stringify(asked), signal };
  const response = await request("v1/chat/completions", apiKey, options);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const part = JSON.parse(data);
    if (part.error) throw new Error(part.error.message);
    yield part;
  }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const whole = (rest + value).split("\n\n");
    rest = whole.pop();
    for (const event of whole) yield event.replace(/^data: /, "");
  }
}

/** The sum of each metric over its labels, by name. */
export async function metrics() {
  const text = await (await request("metrics")).text();
  const sums = {};
  for (const line of text.split("\n")) {
    const found = /^([\w:]+)(?:\{.*\})? (\S+)$/.exec(line);
    if (found) sums[found[1]] = (sums[found[1]] ?? 0) + Number(found[2]);
  }
  return sums;
}
