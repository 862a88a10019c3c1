// The gateway, as the page sees it: requests with the key, errors in one form, and streams of events.

const KEEP = "llmlab-key";
let key = sessionStorage.getItem(KEEP) ?? "";

export const hasKey = () => key !== "";

/** Use a key from now on; it stays in memory, and in this tab's session if `keep` is true. */
export function useKey(value, keep) {
  key = value.trim();
  if (key && keep) sessionStorage.setItem(KEEP, key);
  else sessionStorage.removeItem(KEEP);
}

const TITLES = { 0: "The server cannot be reached", 401: "A key is needed", 403: "This is not allowed", 404: "Not found",
  413: "This is too large", 429: "Too many requests", 503: "Not available now", 504: "The engine took too long" };

/** Why a request did not work: what came, what was expected, what to do, and the seconds after which to ask again. */
export class Problem extends Error {
  constructor(status, message, { expected = "", next = "", retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.title = TITLES[status] ?? (status < 500 ? "The request was not accepted" : "The server failed");
    Object.assign(this, { expected, next, retryAfter });
  }
}

/** Return the answer to a request; throws a `Problem` for an error, and AbortError if the signal aborts. */
export async function send(path, { method = "GET", json = null, form = null, signal = null } = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (json) headers["Content-Type"] = "application/json";
  let response;
  try {
    const body = json ? JSON.stringify(json) : form;
    response = await fetch(path, { method, headers, body, signal, credentials: "omit", redirect: "error", cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, "No answer came.", { next: "Is it running? Start it with make serve." });
  }
  if (!response.ok) throw await problemOf(response);
  return response;
}

export const get = async (path) => (await send(path)).json();

async function problemOf(response) {
  const retryAfter = Number(response.headers.get("Retry-After")) || null;
  try {
    const { error } = await response.json();
    return problem(response.status, error, retryAfter);
  } catch {
    return new Problem(response.status, `The server answered ${response.status}.`, { retryAfter });
  }
}

/** Return the `Problem` for an error object, in the form of either API. */
export function problem(status, error, retryAfter = null) {
  return new Problem(status, error.message, { expected: error.expected, next: error.next, retryAfter });
}

/** Yield {kind, data} for each server-sent event of a response; `kind` is "message" where the stream names none. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) yield event(block);
  }
}

function event(block) {
  const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: ?(.*)/s, 2)));
  return { kind: fields.event ?? "message", data: fields.data === "[DONE]" ? null : JSON.parse(fields.data) };
}
