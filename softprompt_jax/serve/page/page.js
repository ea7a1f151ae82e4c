"use strict";
// Asks /v1/generate once for each chosen prompt, all at the same time: the server answers them in one batch.

const at = (id) => document.getElementById(id);
const made = (tag, attributes = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), attributes);
  element.append(...children);
  return element;
};

let prompts = [];
let running = null; // what a new question ends

function headers() {
  const token = at("token").value;
  return token ? { Authorization: `Bearer ${token}` } : {};
}

async function problem(response) {
  const told = await response.json().catch(() => ({}));
  return `${response.status}: ${told.error?.message ?? response.statusText}`;
}

async function list() {
  const response = await fetch("v1/prompts", { headers: headers() });
  if (response.status === 401) at("guard").hidden = false;
  if (!response.ok) throw new Error(await problem(response));
  const found = await response.json();
  prompts = found.prompts;
  at("about").textContent = `${prompts.length} prompts, backbone: ${found.backbone} (frozen).`;
  const boxes = prompts.map((prompt, index) => {
    const box = made("input", { type: "checkbox", value: prompt.name, checked: index < 4 });
    const rows = prompt.rows ? [`${prompt.rows} row${prompt.rows === 1 ? "" : "s"}`] : [];
    const task = [...(prompt.task ? [prompt.task] : []), ...rows, ...prompt.extras].join(", ");
    const about = made("span", {}, `${prompt.name} `, made("span", { className: "task", textContent: task }));
    return made("label", {}, box, about);
  });
  at("prompts").replaceChildren(...boxes);
  count();
}

const chosen = () => [...at("prompts").querySelectorAll("input:checked")].map((box) => box.value);
const shown = () => [...at("prompts").querySelectorAll("label:not([hidden]) input")];

function count() {
  at("chosen").textContent = `(${chosen().length} of ${prompts.length})`;
}

function wordsFor(name) {
  const typed = at("words").value.split(",").map((word) => word.trim()).filter(Boolean);
  return typed.length ? typed : prompts.find((prompt) => prompt.name === name).label_words;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const [, kind, data] = /^event: (\w+)\ndata: (.*)$/s.exec(part);
      yield { kind, data: JSON.parse(data) };
    }
  }
}

function scores(words, best) {
  const largest = Math.max(...words.map((word) => word.score));
  const weights = words.map((word) => Math.exp(word.score - largest));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  const rows = words.map((word, index) => {
    const share = weights[index] / total;
    const meter = made("meter", { max: 1, value: share });
    meter.setAttribute("aria-label", `share of ${word.word}`);
    const row = made("tr", {}, made("th", { scope: "row", textContent: word.word }), made("td", {}, meter),
      made("td", { textContent: `${(100 * share).toFixed(1)}%` }));
    row.title = `log-probability ${word.score.toFixed(3)}`;
    row.className = word.word === best ? "best" : "";
    return row;
  });
  const caption = made("caption", { textContent: "Among these words alone (together 100%)" });
  return made("table", {}, caption, made("tbody", {}, ...rows));
}

async function ask(name, card, signal) {
  const text = card.querySelector(".text");
  const sampling = at("kind").value === "sampling";
  const body = {
    inputs: at("inputs").value,
    prompt: name,
    words: wordsFor(name),
    max_tokens: at("tokens").value === "" ? null : Number(at("tokens").value),
    decoding: sampling ? { kind: "sampling", temperature: Number(at("temperature").value) } : { kind: "greedy" },
    stream: true,
  };
  const options = { method: "POST", headers: { "Content-Type": "application/json", ...headers() } };
  try {
    const response = await fetch("v1/generate", { ...options, body: JSON.stringify(body), signal });
    if (!response.ok) throw new Error(await problem(response));
    for await (const { kind, data } of events(response)) {
      if (kind === "text") text.textContent += data.text;
      if (kind === "error") throw new Error(`${data.status}: ${data.error.message}`);
      if (kind !== "done") continue;
      text.textContent = data.answers.length ? data.answers[0].text || "(nothing)" : data.best_word;
      const score = data.answers.length ? `Free answer, log-probability ${data.answers[0].score.toFixed(3)}` : "Best word";
      card.append(made("p", { className: "score", textContent: score }));
      if (data.words.length) card.append(scores(data.words, data.best_word));
    }
  } catch (error) {
    if (error.name === "AbortError") return;
    text.className = "text wrong";
    text.textContent = error.message;
  }
}

async function submit(event) {
  event?.preventDefault();
  if (!at("form").reportValidity()) return;
  running?.abort();
  running = new AbortController();
  const names = chosen();
  at("told").textContent = names.length ? "" : "No prompt is chosen; choose at least one.";
  const cards = names.map((name) => made("article", {}, made("h2", { textContent: name }), made("p", { className: "text" })));
  at("answers").replaceChildren(...cards);
  at("answers").setAttribute("aria-busy", "true");
  await Promise.all(names.map((name, index) => ask(name, cards[index], running.signal)));
  at("answers").setAttribute("aria-busy", "false");
}

async function refresh() {
  try {
    await list();
    at("told").textContent = "";
  } catch (error) {
    at("told").textContent = error.message;
  }
}

at("form").addEventListener("submit", submit);
at("token").addEventListener("change", refresh);
at("prompts").addEventListener("change", count);
at("kind").addEventListener("change", () => { at("temperature").disabled = at("kind").value !== "sampling"; });
at("filter").addEventListener("input", () => {
  for (const label of at("prompts").children) {
    label.hidden = !label.firstChild.value.toLowerCase().includes(at("filter").value.toLowerCase());
  }
});
for (const [id, on] of [["all", true], ["none", false]]) {
  at(id).addEventListener("click", () => { shown().forEach((box) => { box.checked = on; }); count(); });
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit(event);
});
refresh();
