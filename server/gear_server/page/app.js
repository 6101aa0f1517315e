// The chat: the form, the conversation, the key. Panel and metrics run beside it.

import { rememberKey, request, streamChat } from "./api.js";
import { render } from "./markdown.js";
import { watch } from "./metrics.js";
import { duration, Panel } from "./panel.js";

const byId = (id) => document.getElementById(id);
const prompt = byId("prompt");
const log = byId("log");
const welcome = byId("welcome");

let messages = []; // {role, content}: what the next request sends
let answering = null; // the AbortController of the answer that is being written
let keyWanted = false;

// Conversation

async function send() {
  const text = prompt.value.trim();
  if (!text || answering) return;
  const body = { ...parameters(), messages: [...system(), ...messages, { role: "user", content: text }] };
  showError("");
  welcome.remove();
  prompt.value = "";
  const question = addMessage("user", "You");
  question.text.textContent = text;
  const answer = addMessage("assistant", "Model");
  const content = await receive(body, answer);
  if (!answer.article.isConnected) return; // a new chat began meanwhile
  if (content) {
    messages.push({ role: "user", content: text }, { role: "assistant", content });
    byId("spoken").textContent = answer.text.textContent; // a screen reader hears the answer once, whole
  } else {
    question.article.remove();
    answer.article.remove();
    prompt.value ||= text; // nothing came of it: the words are back in the field
    byId("spoken").textContent = "";
  }
}

/** Writes the answer as it comes and returns its text, which is empty if none came. */
async function receive(body, answer) {
  const controller = (answering = new AbortController());
  const meter = new Meter();
  let content = "";
  let ending = "";
  setAnswering(true);
  const paint = painter(answer, () => content);
  try {
    for await (const { text, finish, usage } of streamChat(body, controller.signal)) {
      if (text) {
        content += text;
        meter.tick();
        paint();
      }
      if (finish) ending = finish;
      if (usage) meter.numTokens = usage.completion_tokens;
    }
  } catch (error) {
    ending = controller.signal.aborted ? "stopped" : "broken off";
    if (!controller.signal.aborted) fail(error);
  }
  paint.last();
  answer.note.textContent = meter.summary(ending);
  answering = null;
  setAnswering(false);
  return content;
}

/** Paints at most once a frame, and follows the text only where the reader has not scrolled up. */
function painter(answer, content) {
  let frame = 0;
  const now = () => {
    frame = 0;
    const follow = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    answer.text.replaceChildren(render(content()));
    if (follow) log.scrollTop = log.scrollHeight;
  };
  const paint = () => (frame ||= requestAnimationFrame(now));
  paint.last = () => {
    cancelAnimationFrame(frame);
    now();
    answer.article.setAttribute("aria-busy", "false");
  };
  return paint;
}

/** Times of one answer as this tab feels them. */
class Meter {
  #sentS = performance.now() / 1000;
  #firstS;
  #lastS;
  #pieces = 0;
  numTokens; // the server's count, when the answer came to its end

  tick() {
    this.#lastS = performance.now() / 1000;
    this.#firstS ??= this.#lastS;
    this.#pieces += 1;
  }

  summary(ending) {
    if (!this.#firstS) return ending;
    const tokens = this.numTokens ?? this.#pieces;
    const perS = (tokens - 1) / (this.#lastS - this.#firstS);
    const parts = [`${this.numTokens ? "" : "about "}${tokens} tokens`, `first after ${duration(this.#firstS - this.#sentS)}`];
    if (tokens > 1 && Number.isFinite(perS)) parts.push(`${perS.toFixed(1)} tokens/s`);
    if (ending === "length") parts.push("cut at max tokens");
    else if (ending !== "stop") parts.push(ending);
    return parts.join(" · ");
  }
}

function addMessage(role, name) {
  const article = element("article", { className: role });
  const text = element("div", { className: "text" });
  const note = element("p", { className: "note muted" });
  article.append(element("h3", { className: "unseen", textContent: name }), text, note);
  if (role === "assistant") article.setAttribute("aria-busy", "true");
  log.append(article);
  log.scrollTop = log.scrollHeight;
  return { article, text, note };
}

function element(tag, properties) {
  return Object.assign(document.createElement(tag), properties);
}

function newChat() {
  stop();
  messages = [];
  log.replaceChildren(welcome);
  showError("");
  prompt.focus();
}

function stop() {
  answering?.abort();
}

function setAnswering(on) {
  byId("send").hidden = on;
  byId("stop").hidden = !on;
  if (on) byId("spoken").textContent = "The model answers.";
}

// Parameters

function parameters() {
  const number = (id) => (byId(id).value === "" ? undefined : byId(id).valueAsNumber);
  return { temperature: number("temperature"), top_p: number("top-p"), max_tokens: number("max-tokens"), seed: number("seed") };
}

function system() {
  const content = byId("system").value.trim();
  return content ? [{ role: "system", content }] : [];
}

function summarise() {
  const { temperature, top_p, max_tokens, seed } = parameters();
  const parts = [`temperature ${temperature ?? 1}`, `top-p ${top_p ?? 1}`, max_tokens ? `${max_tokens} tokens` : "no token limit"];
  if (seed !== undefined) parts.push(`seed ${seed}`);
  if (system().length) parts.push("system prompt");
  byId("settings-summary").textContent = parts.join(", ");
}

// Errors and the key

function showError(sentence) {
  byId("error").textContent = sentence;
  byId("error").hidden = !sentence;
}

function fail(error) {
  if (error.status === 401) askForKey();
  showError(error.status === 401 && !sessionStorage.length ? "" : error.message);
}

function askForKey() {
  if (keyWanted) return;
  keyWanted = true;
  byId("docs").hidden = true; // a link cannot send the key
  byId("key-form").hidden = false;
  byId("key").focus();
}

async function useKey() {
  rememberKey(byId("key").value.trim());
  try {
    await describeModel();
  } catch (error) {
    showError(error.message);
    byId("key").select();
    return;
  }
  keyWanted = false;
  byId("key-form").hidden = true;
  byId("key").value = "";
  showError("");
  prompt.focus();
  scrapeNow();
}

async function describeModel() {
  const { data } = await (await request("v1/models")).json();
  const longest = data[0].max_model_len;
  byId("model").textContent = `${data[0].id}, ${longest.toLocaleString("en")} tokens of context`;
  const limit = byId("max-tokens");
  if (limit.value === limit.defaultValue) limit.value = Math.min(limit.value, Math.floor(longest / 2));
  summarise();
  document.title = `${data[0].id} · GearServe`;
}

// Wiring

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || !answering) return;
  stop();
  prompt.focus();
});
byId("stop").addEventListener("click", () => {
  stop();
  prompt.focus();
});
byId("new-chat").addEventListener("click", newChat);
byId("examples").addEventListener("click", ({ target }) => {
  if (target.tagName !== "BUTTON") return;
  prompt.value = target.textContent;
  prompt.focus();
  send();
});
byId("settings").addEventListener("input", summarise);
byId("toggle-panel").addEventListener("click", ({ currentTarget }) => {
  const shown = document.body.classList.toggle("panel-shown");
  currentTarget.setAttribute("aria-expanded", String(shown));
});

const panel = new Panel();
const scrapeNow = watch(
  (figures) => panel.show(figures),
  (error) => {
    panel.miss(error.status === 401 ? "They need the API key." : error.message);
    if (error.status === 401) askForKey();
  },
);
summarise();
describeModel().catch(fail);
prompt.focus();
