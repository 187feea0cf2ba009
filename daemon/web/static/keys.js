// One key per answer, for those who like it. The pages work without this file.
"use strict";

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.target.closest("input, textarea, select, summary")) return;
  const key = event.key.toLowerCase();
  const target = [...document.querySelectorAll("[data-key]")].find((one) => one.dataset.key === key && one.checkVisibility());
  if (target) {
    event.preventDefault();
    target.click();
  }
});
