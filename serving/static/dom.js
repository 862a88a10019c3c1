// Elements from names and text. Text only ever becomes a text node; nothing here reads HTML.

export const $ = (id) => document.getElementById(id);

/** Return an element. `attributes` go through setAttribute, `on...` functions become listeners, children are elements or text. */
export function el(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Return a description list of [term, value] pairs; a value may be an element. */
export function facts(pairs, className = "facts") {
  return el("dl", { class: className }, ...pairs.map(([term, value]) =>
    el("div", {}, el("dt", {}, term), el("dd", {}, value instanceof Node ? value : String(value)))));
}

export const seconds = (value) => (value < 0.995 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(2)} s`);
export const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
