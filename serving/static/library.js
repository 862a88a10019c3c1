// The documents of the index over the API: list, add, remove. It needs the admin key.

import { get, send } from "./api.js";
import { $, el, plural } from "./dom.js";
import { notice } from "./turn.js";

const LOOK_AGAIN = 2000; // milliseconds, while the index follows
let timer = null;

/** Open the documents, and let forms in it act. */
export function openLibrary() {
  $("library").showModal();
  list();
}

export function setUpLibrary() {
  $("upload").addEventListener("submit", (event) => { event.preventDefault(); add(); });
  $("file").addEventListener("change", () => { $("path").value = $("file").files[0]?.name ?? ""; });
  $("library").addEventListener("close", () => clearTimeout(timer));
}

async function list() {
  clearTimeout(timer);
  await guarded(async () => {
    const { data, index } = await get("v1/documents");
    $("upload").hidden = false;
    const waits = index.syncing || data.some(({ status }) => ["pending", "deleting"].includes(status));
    const syncing = waits ? "; the index follows" : "";
    $("library-state").textContent = `${plural(data.length, "document")} added here${syncing}. ` +
      `The index ${index.name} has ${plural(index.documents, "document")} in ${plural(index.chunks, "passage")}.`;
    $("library-list").replaceChildren(...data.map(item));
    if (index.problem) $("library-problem").replaceChildren(el("p", { class: "note warn" }, index.problem.message));
    if (waits && $("library").open) timer = setTimeout(list, LOOK_AGAIN);
  });
}

async function add() {
  const file = $("file").files[0];
  if (!file) { $("file").focus(); return; }
  const form = new FormData();
  form.append("file", file);
  if ($("path").value.trim()) form.append("path", $("path").value.trim());
  await guarded(async () => {
    await send("v1/documents", { method: "POST", form });
    $("upload").reset();
    await list();
  });
}

function item({ path, status, reason, chunks }) {
  const state = reason ?? (status === "indexed" ? plural(chunks, "passage") : status);
  const remove = () => guarded(async () => {
    await send(`v1/documents/${path.split("/").map(encodeURIComponent).join("/")}`, { method: "DELETE" });
    await list();
  });
  return el("li", {}, el("span", { class: "title" }, path), el("span", { class: `where ${status}` }, state),
    el("button", { type: "button", "aria-label": `Remove ${path}`, disabled: status === "deleting", onclick: remove }, "Remove"));
}

async function guarded(action) {
  $("library-problem").replaceChildren();
  try {
    await action();
  } catch (problem) {
    if (!problem.title) throw problem;
    if ([401, 403].includes(problem.status)) $("upload").hidden = true;
    $("library-problem").replaceChildren(notice(problem));
  }
}
