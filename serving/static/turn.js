// One question and its answer on the page: the text with citations, what was checked, the sources beside it, the figures.

import { el, facts, plural, seconds } from "./dom.js";
import { parts, pieces } from "./marks.js";

const UNSUPPORTED = "not found in the sources";
let turns = 0;

/** A question whose answer is being written. `kind` is "rag" or "chat"; only the former has sources. */
export class Turn {
  constructor(question, kind) {
    this.id = `turn-${++turns}`;
    this.raw = "";
    this.sentences = [];
    this.passages = [];
    this.state = el("p", { class: "progress" }, kind === "rag" ? "Searching the documents" : "Waiting for the model");
    this.answer = el("div", { class: "answer" });
    this.notes = el("div", { class: "notes" });
    this.sources = el("ol", { class: "passages" });
    this.beside = el("section", { class: "sources", "aria-labelledby": `${this.id}-sources`, hidden: true },
      el("h3", { id: `${this.id}-sources` }, "Sources"), this.sources);
    this.element = el("article", { class: `turn ${kind}`, "aria-labelledby": `${this.id}-question`, "aria-busy": "true" },
      el("div", { class: "said" }, el("h2", { id: `${this.id}-question` }, question), this.state, this.answer, this.notes),
      this.beside);
  }

  /** Take the next piece of the answer. */
  add(text) {
    this.state.hidden = true;
    this.raw += text;
    this.#draw();
  }

  /** Show the passages that the model is given. */
  show(passages) {
    this.passages = passages;
    this.state.textContent = passages.length ? `Reading ${plural(passages.length, "passage")}` : "No passage was found";
    this.beside.hidden = passages.length === 0;
    this.sources.replaceChildren(...passages.map((passage) => this.#passage(passage)));
  }

  /** Take what the check of a sentence said. */
  check(sentence) {
    this.sentences.push(sentence);
    this.#draw();
  }

  /** Mark a passage as cited and open it. */
  cite({ number, valid }) {
    const passage = valid && this.#place(number);
    if (passage) {
      passage.classList.add("cited");
      passage.open = true;
    }
  }

  /** Show the whole answer of the documents, as it came last. */
  finish(answer) {
    if (answer.abstained) this.#abstain(answer);
    else this.#draw();
    const left = [...answer.held_back, ...answer.left_out];
    if (left.length) this.note("quiet", `${plural(left.length, "passage")} not given to the model`,
      ...left.map(({ title, source, reason }) => `${named(title)} (${source}): ${reason}`));
    const wrong = answer.invalid_citations;
    if (wrong.length) this.note("warn", `Cites ${wrong.join(", ")}, which no passage has`);
    const unsupported = answer.sentences.filter((sentence) => sentence.supported === false).length;
    if (unsupported) this.note("warn", `${plural(unsupported, "sentence")} ${UNSUPPORTED}: underlined above`);
    this.end();
  }

  /** Show tokens and times; `figures` are [name, value] pairs. */
  measure(figures) {
    this.notes.append(facts(figures, "figures"));
  }

  /** Add a remark: `tone` is quiet, warn or bad. */
  note(tone, title, ...lines) {
    this.notes.append(el("div", { class: `note ${tone}` }, el("strong", {}, title), ...lines.map((line) => el("p", {}, line))));
  }

  /** Show why there is no answer, or no more of it, and offer to ask again. */
  fail(problem, again) {
    const retry = el("button", { type: "button", onclick: again }, "Ask again");
    this.notes.append(notice(problem, retry));
    this.end();
  }

  /** Say that nothing more comes. */
  end(remark = "") {
    this.state.hidden = true;
    if (remark) this.note("quiet", remark);
    this.element.setAttribute("aria-busy", "false");
  }

  #draw() {
    this.answer.replaceChildren(...parts(this.raw, this.sentences).map((part) => this.#part(part)));
  }

  #part({ text, supported }) {
    const inner = pieces(text).map((piece) => (piece.cited ? this.#citation(piece.cited) : piece.text));
    if (supported !== false) return el("span", {}, ...inner);
    return el("mark", { class: "unsupported", title: UNSUPPORTED }, ...inner, el("span", { class: "hidden" }, ` (${UNSUPPORTED})`));
  }

  #citation(number) {
    const passage = this.passages[number - 1];
    if (!passage) return el("span", { class: "no-such", title: "no passage has this number" }, `[${number}]`);
    const open = (event) => { event.preventDefault(); this.#goTo(number); };
    const label = `Source ${number}: ${named(passage.title)}`;
    return el("a", { class: "cite", href: `#${this.id}-${number}`, "aria-label": label, title: label, onclick: open }, `${number}`);
  }

  #place(number) {
    return this.sources.querySelector(`#${this.id}-${number}`);
  }

  #goTo(number) {
    const passage = this.#place(number);
    passage.open = true;
    passage.querySelector("summary").focus({ preventScroll: true });
    passage.scrollIntoView({ block: "nearest" });
    passage.classList.remove("found");
    requestAnimationFrame(() => passage.classList.add("found"));
  }

  #passage({ number, title, source, page, score, text }) {
    const where = page === null ? source : `${source}, page ${page}`;
    return el("li", {}, el("details", { id: `${this.id}-${number}` },
      el("summary", {}, el("span", { class: "number" }, `${number}`), el("span", { class: "title" }, named(title)),
        el("span", { class: "where" }, `${where} · score ${score.toFixed(2)}`)),
      el("p", { class: "text" }, text)));
  }

  #abstain({ answer, abstained_by: by, sign }) {
    const who = by === "retrieval" ? `Retrieval said so before the model was asked: sign ${sign.toFixed(2)} is below the threshold.`
      : "The model said so after reading the passages.";
    this.answer.replaceChildren();
    this.element.classList.add("abstained");
    this.answer.append(el("div", { class: "abstention" }, el("strong", {}, answer), el("p", {}, who)));
    this.beside.querySelector("h3").textContent = "Nearest passages";
  }
}

/** Return an element that says what went wrong and what to do; `action` is a button, or null. */
export function notice(problem, action = null) {
  const said = [problem.message, problem.next].some((line) => line?.includes(`in ${problem.retryAfter} s`));
  const wait = problem.retryAfter && !said ? `Ask again in ${problem.retryAfter} s.` : "";
  const lines = [problem.message, problem.expected && `Expected: ${problem.expected}`, problem.next, wait].filter(Boolean);
  return el("div", { class: "note bad", role: "alert" }, el("strong", {}, problem.status ? `${problem.title} (${problem.status})` : problem.title),
    ...lines.map((line) => el("p", {}, line)), action);
}

/** Return the figures of an answer: usage, seconds to the first token, seconds of generation, seconds in all. */
export function figuresOf(model, usage, first, generation, total) {
  const made = usage?.completion_tokens;
  const rate = made > 1 && generation > 0 ? `${((made - 1) / generation).toFixed(0)} tokens/s` : null;
  return [["Model", model], ["First token", first === null ? null : seconds(first)], ["Speed", rate], ["Total", seconds(total)],
    ["Tokens", usage?.prompt_tokens === undefined ? null : `${usage.prompt_tokens} in, ${made} out`]].filter(([, value]) => value);
}

const named = (title) => title.replaceAll(" > ", " › ");
