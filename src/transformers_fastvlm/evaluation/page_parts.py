# SPDX-License-Identifier: Apache-2.0
"""Style and script of the page of answers. They are in the page itself, which asks for nothing from anywhere."""

__all__ = ["SCRIPT", "STYLE"]

STYLE = """
:root { color-scheme: light dark; --line: #c5c9d0; --soft: #f3f4f6;
  --wrong: #b3261e; --partly: #8a5a00; --right: #1b6e3c; }
@media (prefers-color-scheme: dark) {
  :root { --line: #454a52; --soft: #22262c; --wrong: #ff8a80; --partly: #ffc766; --right: #7fd8a0; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; }
h2 { font-size: .9rem; margin: 0 0 .5rem; font-weight: 600; overflow-wrap: anywhere; }
header p { margin: .2rem 0; }
ul.runs { margin: .3rem 0; padding-left: 1.2rem; }
form { display: flex; flex-wrap: wrap; gap: .6rem 1.2rem; align-items: center; margin: .8rem 0; padding: .6rem .8rem;
  background: var(--soft); border-radius: .5rem; position: sticky; top: 0; z-index: 1; }
form[hidden], article[hidden] { display: none; }
fieldset { border: 0; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem .8rem; align-items: center; }
legend { float: left; padding: 0; margin-right: .8rem; }
select, input { font: inherit; max-width: 100%; accent-color: #0b57d0; }
fieldset label, form > label { min-height: 2rem; display: inline-flex; align-items: center; gap: .35rem; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: 1rem; }
article { border: 1px solid var(--line); border-top: 4px solid var(--line); border-radius: .5rem; padding: .8rem;
  content-visibility: auto; contain-intrinsic-size: auto 26rem; min-width: 0; }
article.wrong { border-top-color: var(--wrong); }
article.partly { border-top-color: var(--partly); }
article.right { border-top-color: var(--right); }
.pictures { display: flex; flex-wrap: wrap; gap: .4rem; }
.pictures button { padding: 0; border: 1px solid var(--line); background: none; cursor: zoom-in; border-radius: .3rem;
  max-width: 100%; line-height: 0; }
.pictures img { max-width: 100%; max-height: 18rem; width: auto; height: auto; border-radius: .3rem; }
.question, dd { white-space: pre-wrap; overflow-wrap: anywhere; }
.question { margin: .6rem 0; }
dl { margin: 0; }
dt { font-size: .85rem; }
dd { margin: 0 0 .4rem; font-weight: 600; }
.mark { font-weight: 600; white-space: nowrap; }
.wrong > .mark { color: var(--wrong); }
.partly > .mark { color: var(--partly); }
.right > .mark { color: var(--right); }
.empty { font-style: italic; font-weight: 400; }
:focus-visible { outline: 3px solid #0b57d0; outline-offset: 2px; }
dialog { border: 0; padding: .5rem; max-width: 96vw; max-height: 96vh; border-radius: .5rem; }
dialog::backdrop { background: rgb(0 0 0 / .7); }
dialog img { max-width: 100%; max-height: calc(96vh - 5rem); display: block; margin-bottom: .5rem; }
dialog button { font: inherit; padding: .4rem 1rem; }
@media (max-width: 40rem) { form { position: static; } body { padding: .6rem; } }
"""

SCRIPT = """
"use strict";
const form = document.getElementById("filter"), count = document.getElementById("count");
const samples = Array.from(document.querySelectorAll("article"));
function show() {
  const task = form.elements.task.value, state = form.elements.state.value;
  let shown = 0;
  for (const sample of samples) {
    const fits = (!task || sample.dataset.task === task)
      && (!state || sample.dataset.state === state || (state === "differ" && "differ" in sample.dataset));
    sample.hidden = !fits;
    shown += fits;
  }
  count.textContent = `${shown} of ${samples.length} shown`;
}
form.hidden = false;
form.addEventListener("change", show);
form.addEventListener("submit", (event) => event.preventDefault());
show();
const dialog = document.querySelector("dialog"), large = dialog.querySelector("img");
for (const button of document.querySelectorAll(".pictures button")) {
  button.addEventListener("click", () => {
    const picture = button.querySelector("img");
    large.src = picture.src;
    large.alt = picture.alt;
    dialog.showModal();
  });
}
dialog.querySelector("button").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
"""
