// A chat with the model that this server has. Everything that was said is kept in this page alone.
"use strict";

const byId = (id) => document.getElementById(id);
const conversation = []; // {role, content}, without the system message
let running = null; // an AbortController, while a reply is made

function headers() {
  const key = byId("key").value;
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function settings() {
  const fields = { stream: true, stream_options: { include_usage: true } };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    const { value, valueAsNumber } = byId(name);
    if (value !== "") fields[name] = valueAsNumber;
  }
  return fields;
}

function show(role, text) {
  const item = document.createElement("li");
  item.className = role;
  item.textContent = text;
  byId("messages").append(item);
  item.scrollIntoView({ block: "end" });
  return item;
}

function showState() {
  byId("send").disabled = running !== null;
  byId("stop").disabled = running === null;
  byId("again").disabled = running !== null || conversation.at(-1)?.role !== "assistant";
}

function inBytes(bytes) {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; bytes >= 1024 && unit < units.length - 1; unit++) bytes /= 1024;
  return `${bytes.toFixed(unit === 0 ? 0 : 1)} ${units[unit]}`;
}

// The events of a response, parsed as they come.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function failure(response) {
  const body = await response.json().catch(() => null);
  return new Error(body?.error?.message ?? `${response.status} ${response.statusText}`);
}

async function reply() {
  const mine = new AbortController();
  running = mine;
  showState();
  const system = byId("system").value.trim();
  const messages = system ? [{ role: "system", content: system }, ...conversation] : conversation;
  const began = performance.now();
  const item = show("assistant", "");
  const message = { role: "assistant", content: "" };
  let first = null;
  let pieces = 0;
  let tokens = null;
  const tell = () => {
    const seconds = (performance.now() - (first ?? began)) / 1000;
    const made = tokens ?? pieces;
    const speed = made > 1 && seconds > 0 ? `, ${((made - 1) / seconds).toFixed(1)} tokens/s` : "";
    const wait = first === null ? "" : `, first after ${((first - began) / 1000).toFixed(2)} s`;
    byId("status").textContent = `${made} tokens${speed}${wait}`;
  };
  const telling = setInterval(() => (tell(), showCache()), 1000);
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers() },
      body: JSON.stringify({ messages, ...settings() }),
      signal: mine.signal,
    });
    if (!response.ok) throw await failure(response);
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.usage) tokens = chunk.usage.completion_tokens;
      const piece = chunk.choices[0]?.delta.content;
      if (!piece) continue;
      first ??= performance.now();
      pieces++;
      message.content += piece;
      item.textContent = message.content;
      tell();
    }
    tell();
  } catch (error) {
    if (error.name !== "AbortError") show("error", error.message);
  } finally {
    clearInterval(telling);
    if (running === mine) { // and not a new chat by now
      if (message.content) conversation.push(message);
      else item.remove();
      running = null;
      showState();
    }
    showCache();
  }
}

// The bytes of all caches, and how many requests there are.
async function showCache() {
  const response = await fetch("metrics", { headers: headers() }).catch(() => null);
  if (!response?.ok) return;
  const text = await response.text();
  const number = (name) => Number(text.match(new RegExp(`^mustafar_${name} (\\S+)$`, "m"))?.[1]);
  const budget = number("kv_budget_bytes");
  const used = inBytes(number("kv_bytes")) + (budget ? ` of ${inBytes(budget)}` : "");
  byId("cache").textContent = `${setting}KV cache ${used}, ${number("requests_running")} running`;
}

let setting = "";

async function showModel() {
  const response = await fetch("v1/models", { headers: headers() }).catch(() => null);
  if (!response?.ok) {
    byId("status").textContent = response?.status === 401 ? "An API key is needed: Settings" : "";
    return;
  }
  const model = (await response.json()).data[0];
  byId("model").textContent = model.id;
  const { kv } = model;
  const sparsity = kv.sparsity > 0 ? `, ${Math.round(kv.sparsity * 100)} % pruned` : "";
  setting = `${kv.value_dtype}${sparsity}. `;
  byId("status").textContent = "";
  showCache();
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = byId("text").value.trim();
  if (running || !text) return;
  byId("text").value = "";
  conversation.push({ role: "user", content: text });
  show("user", text);
  reply();
});
byId("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("form").requestSubmit();
  }
});
byId("stop").addEventListener("click", () => running?.abort());
byId("again").addEventListener("click", () => {
  conversation.pop();
  byId("messages").replaceChildren();
  for (const { role, content } of conversation) show(role, content);
  reply();
});
byId("clear").addEventListener("click", () => {
  running?.abort();
  running = null;
  conversation.length = 0;
  byId("messages").replaceChildren();
  byId("status").textContent = "";
  showState();
});
byId("settings").addEventListener("submit", (event) => event.preventDefault());
byId("key").addEventListener("change", showModel);
showModel();
