// The page: what was chosen and typed becomes a request, and its answer a turn. Nothing is kept but a key, if that was asked for.

import { askDocuments, chat } from "./ask.js";
import { get, hasKey, useKey } from "./api.js";
import { $, el, plural } from "./dom.js";
import { openLibrary, setUpLibrary } from "./library.js";
import { loadModels, showPassport } from "./models.js";
import { notice, Turn } from "./turn.js";

const LOOK_AGAIN = 5000; // milliseconds, while the engine is not ready
const CHAT_EXAMPLES = ["Explain what an adapter is, in two sentences.", "List three uses of a small language model.", "Write a haiku about rivers."];

let about = null;
let running = null;
let history = [];

const mode = () => document.querySelector("input[name=mode]:checked").value;
const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
const text = (id) => $(id).value.trim() || undefined;

// ---- what there is to ask

async function load() {
  try {
    const [playground] = await Promise.all([get("v1/playground"), loadModels()]);
    about = playground;
    setLimits();
    showEmpty();
    await look();
  } catch (problem) {
    if (!problem.title) throw problem;
    showState(problem);
  }
}

/** Say whether the engine answers, and look again until it does. */
async function look() {
  try {
    await get("readyz");
    showState(null);
  } catch (problem) {
    showState(problem);
    setTimeout(look, LOOK_AGAIN);
  }
}

function showState(problem) {
  $("state").hidden = problem === null;
  if (problem) $("state").replaceChildren(notice(problem, problem.status === 401 ? keyButton() : null));
}

const keyButton = () => el("button", { type: "button", onclick: openKey }, "Give a key");

function setLimits() {
  const { limits } = about;
  Object.assign($("k"), { max: limits.max_k, placeholder: limits.k });
  Object.assign($("max-tokens"), { max: limits.max_tokens, placeholder: limits.default_max_tokens });
}

function showEmpty() {
  const documents = mode() === "rag";
  const { index, problem, examples } = about ?? { examples: [] };
  const lines = documents ? (index ? asked(index) : missing(problem)) : ["Chat with the model", "Nothing is looked up: it answers from what it learnt."];
  $("empty-title").textContent = lines[0];
  $("empty-text").textContent = lines[1];
  $("empty-next").textContent = lines[2] ?? "";
  $("empty-next").hidden = !lines[2];
  const shown = documents ? examples : CHAT_EXAMPLES;
  $("examples").replaceChildren(...shown.map((example) =>
    el("li", {}, el("button", { type: "button", onclick: () => ask(example) }, example))));
}

const asked = (index) => ["Ask your documents",
  `${plural(index.documents, "document")} in ${plural(index.chunks, "passage")}. Every answer shows the passages it rests on; where they hold none, it says so.`];
const missing = (problem) => ["There are no documents yet", problem?.message ?? "No index is open.", problem?.next];

// ---- asking

async function ask(question) {
  if (running || !question.trim()) return;
  const documents = mode() === "rag";
  const turn = new Turn(question, documents ? "rag" : "chat");
  $("empty").hidden = true;
  $("clear").hidden = false;
  $("turns").append(turn.element);
  turn.element.scrollIntoView({ block: "start" });
  begin();
  try {
    await (documents ? askDocuments(turn, ragBody(question), running.signal) : reply(turn, question));
  } catch (problem) {
    giveUp(turn, problem, question);
  } finally {
    end();
  }
}

const ragBody = (question) => ({ question, model: $("model").value || undefined, k: number("k"), max_tokens: number("max-tokens"), where: text("where") });

async function reply(turn, question) {
  const said = [...history, { role: "user", content: question }];
  const system = text("system");
  const messages = system ? [{ role: "system", content: system }, ...said] : said;
  const body = { model: $("model").value, messages, max_tokens: number("max-tokens"), temperature: number("temperature") };
  const answer = await chat(turn, body, running.signal);
  history = [...said, { role: "assistant", content: answer }];
}

function giveUp(turn, problem, question) {
  if (problem.name === "AbortError") turn.end("Stopped.");
  else if (!problem.title) { turn.fail({ title: "The connection broke", message: problem.message }, () => ask(question)); }
  else turn.fail(problem, () => ask(question));
  if (problem.status === 503 || problem.status === 0) look();
  if (problem.status === 401) openKey();
}

function begin() {
  running = new AbortController();
  $("send").hidden = true;
  $("stop").hidden = false;
}

function end() {
  running = null;
  const stopHadFocus = document.activeElement === $("stop");
  $("stop").hidden = true;
  $("send").hidden = false;
  if (stopHadFocus) $("question").focus();
}

// ---- controls

function setMode() {
  document.body.dataset.mode = mode();
  $("question").placeholder = mode() === "rag" ? "Ask the documents" : "Say something";
  showEmpty();
}

function submit() {
  const question = $("question").value;
  if (running || !question.trim()) return;
  $("question").value = "";
  ask(question.trim());
}

function clear() {
  running?.abort();
  history = [];
  $("turns").replaceChildren();
  $("empty").hidden = false;
  $("clear").hidden = true;
  $("question").focus();
}

function openKey() {
  if (!$("key").open) $("key").showModal();
}

function takeKey() {
  useKey($("key").returnValue === "use" ? $("key-value").value : "", $("key-keep").checked);
  $("key-value").value = "";
  $("key-open").textContent = hasKey() ? "Key: set" : "Key";
  load();
}

function setUp() {
  $("composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); submit(); }
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
  for (const choice of document.querySelectorAll("input[name=mode]")) choice.addEventListener("change", setMode);
  const actions = { stop: () => running?.abort(), clear, "passport-open": showPassport, "library-open": openLibrary, "key-open": openKey };
  for (const [id, action] of Object.entries(actions)) $(id).addEventListener("click", action);
  $("options-toggle").addEventListener("click", () => {
    $("options").hidden = !$("options").hidden;
    $("options-toggle").setAttribute("aria-expanded", String(!$("options").hidden));
  });
  $("key").addEventListener("close", () => { if ($("key").returnValue) takeKey(); $("key").returnValue = ""; });
  addEventListener("focus", () => loadModels().catch(() => {}));
  $("key-open").textContent = hasKey() ? "Key: set" : "Key";
  setUpLibrary();
}

setUp();
setMode();
load();
