// Light, dark, or as the system says; runs before the page is drawn, so that nothing flashes.
"use strict";
(() => {
  const themes = ["auto", "light", "dark"];
  const root = document.documentElement;
  const stored = localStorage.getItem("theme");
  root.dataset.theme = themes.includes(stored) ? stored : "auto";
  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const show = () => { button.textContent = `Theme: ${root.dataset.theme}`; };
    button.addEventListener("click", () => {
      root.dataset.theme = themes[(themes.indexOf(root.dataset.theme) + 1) % themes.length];
      localStorage.setItem("theme", root.dataset.theme);
      show();
    });
    show();
  });
})();
