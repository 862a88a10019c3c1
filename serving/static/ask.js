// Asking: POST /v1/rag/query and POST /v1/chat/completions as streams, written into a turn while they come.

import { events, problem, Problem, send } from "./api.js";
import { figuresOf } from "./turn.js";

const CUT = "The stream ended before the answer did.";

/** Ask the documents and write the answer into a turn. */
export async function askDocuments(turn, body, signal) {
  const response = await send("v1/rag/query", { method: "POST", json: { ...body, stream: true }, signal });
  let answer = null;
  for await (const { kind, data } of events(response)) {
    if (kind === "passages") turn.show(data.passages);
    if (kind === "token") turn.add(data.text);
    if (kind === "citation") turn.cite(data);
    if (kind === "sentence") turn.check(data);
    if (kind === "error") throw problem(503, data.error);
    if (kind === "answer") answer = data;
  }
  if (!answer) throw new Problem(502, CUT);
  turn.finish(answer);
  const { ttft_seconds: first, generate_seconds: generation, total_seconds: total } = answer.timings;
  turn.measure(figuresOf(answer.model, answer.usage, first, generation, total));
}

/** Continue a chat and write the reply into a turn; return its text. */
export async function chat(turn, body, signal) {
  const began = performance.now();
  const json = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await send("v1/chat/completions", { method: "POST", json, signal });
  let first = null, usage = null, reason = null, whole = false;
  for await (const { data } of events(response)) {
    if (data === null) { whole = true; continue; }
    if (data.error) throw problem(503, data.error);
    usage = data.usage ?? usage;
    const [choice] = data.choices;
    reason = choice?.finish_reason ?? reason;
    if (choice?.delta?.content) {
      first ??= performance.now();
      turn.add(choice.delta.content);
    }
  }
  if (!whole) throw new Problem(502, CUT);
  turn.end(reason === "length" ? "Cut at the longest answer that was asked for." : "");
  const ended = performance.now();
  const at = first ?? ended;
  turn.measure(figuresOf(body.model, usage, first && (first - began) / 1000, (ended - at) / 1000, (ended - began) / 1000));
  return turn.raw;
}
