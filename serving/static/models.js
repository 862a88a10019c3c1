// Which model answers: base or adapter, from /v1/models, and its passport.

import { get } from "./api.js";
import { $, el, facts } from "./dom.js";

let cards = [];

/** Load the models anew; the choice stays if it is still served, and an adapter is chosen first. */
export async function loadModels() {
  const select = $("model");
  const before = select.value;
  cards = (await get("v1/models")).data.filter(({ task }) => task === "generate");
  select.replaceChildren(...cards.map(({ id, passport }) => el("option", { value: id }, passport.run ? `${id} (adapter)` : id)));
  const names = cards.map((card) => card.id);
  select.value = names.includes(before) ? before : names[1] ?? names[0]; // the base comes first, then its newest adapter
}

/** Show where the chosen model comes from. */
export function showPassport() {
  const card = cards.find(({ id }) => id === $("model").value);
  $("passport-title").textContent = card ? `Passport of ${card.id}` : "Passport";
  $("passport-body").replaceChildren(card ? facts(flat(card.passport), "passport") : el("p", {}, "No model is known yet."));
  $("passport").showModal();
}

function flat(tree, path = "") {
  return Object.entries(tree).flatMap(([name, value]) => {
    const key = path ? `${path} ${name}` : name;
    if (value !== null && typeof value === "object" && !Array.isArray(value)) return flat(value, key);
    return [[key.replaceAll("_", " "), shown(value)]];
  });
}

function shown(value) {
  if (Array.isArray(value)) return value.map(shown).join(", ") || "none";
  if (value !== null && typeof value === "object") return Object.values(value).map(shown).join(" ");
  return typeof value === "number" && !Number.isInteger(value) ? value.toPrecision(4) : String(value);
}
