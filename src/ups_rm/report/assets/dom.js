"use strict";
// Elements, words and numbers. Text from models enters the page here, and only as text nodes: no markup is ever parsed.

const state = {
  data: null, page: "answer", run: 0, language: "en", theme: "auto",
  groups: { search: "", sort: "spread", kind: "", category: "", step: "", prompt: null, colours: true, page: 0 },
  pairs: { search: "", sort: "gain", kind: "", category: "", flip: "", page: 0 },
  curves: { smooth: 0, hidden: {}, extra: "" },
};

function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value") element.value = value;
    else if (name === "background") element.style.backgroundColor = value;
    else if (name === "colour") element.style.setProperty("--colour", value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(4).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

// ---- words

function t(key, values = {}) {
  const row = state.data.labels[key];
  if (!row) throw new Error(`no label ${key}`);
  return row[state.language].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}
function known(key, otherwise) {
  return state.data.labels[key] ? t(key) : otherwise;
}

// ---- numbers

const missing = "–";
function number(value, digits = 3) {
  return value === null || value === undefined ? missing : value.toFixed(digits);
}
function signed(value, digits = 3) {
  if (value === null || value === undefined) return missing;
  const size = Math.abs(value).toFixed(digits);
  return (Number(size) === 0 ? "±" : value > 0 ? "+" : "−") + size;
}
function percent(value) {
  return value === null || value === undefined ? missing : `${(100 * value).toFixed(1)}%`;
}
function compact(value) {
  if (value === null || value === undefined) return missing;
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(4)));
}
const colours = ["--run-1", "--run-2", "--run-3", "--run-4", "--run-5", "--run-6"];
function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// ---- pieces that several pages use

function section(title, ...children) {
  return h("section", {}, h("h2", {}, title), ...children);
}
function note(text) {
  return h("p", { class: "note" }, text);
}
function scrolling(label, ...children) {
  return h("div", { class: "scrolling", role: "region", tabindex: "0", "aria-label": label }, ...children);
}
function table(label, heads, rows, numeric = true) {
  const cell = (value, i) => (i === 0 ? h("th", { scope: "row" }, value) : h("td", { class: numeric ? "number" : null }, value));
  const first = heads[0] === "" ? h("td", {}) : h("th", { scope: "col" }, heads[0]);
  return scrolling(label, h("table", {},
    h("thead", {}, h("tr", {}, first, heads.slice(1).map((head) => h("th", { scope: "col", class: numeric ? "number" : null }, head)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map(cell))))));
}
function labelled(text, control) {
  control.setAttribute("aria-label", text); // the label's own text would take in the options
  return h("label", {}, h("span", {}, text), control);
}
function choice(text, value, options, onpick) {
  const select = h("select", { onchange: (event) => onpick(event.target.value) },
    options.map(([name, word]) => h("option", { value: name }, word)));
  select.value = options.some(([name]) => name === value) ? value : options[0][0];
  return labelled(text, select);
}
function searchBox(value, onsearch) {
  let waiting = null;
  return labelled(t("search"), h("input", {
    type: "search", value,
    oninput: (event) => { clearTimeout(waiting); waiting = setTimeout(() => onsearch(event.target.value), 150); },
  }));
}
function pager(options, total, size, redraw) {
  const last = Math.max(0, Math.ceil(total / size) - 1);
  options.page = Math.min(options.page, last);
  const go = (page) => () => { options.page = page; redraw(); };
  return h("div", { class: "pager" },
    h("button", { type: "button", onclick: go(options.page - 1), disabled: options.page === 0 }, t("previous")),
    h("span", { "aria-live": "polite" }, t("page_of", { page: options.page + 1, pages: last + 1, total })),
    h("button", { type: "button", onclick: go(options.page + 1), disabled: options.page === last }, t("next")));
}
function promptText(prompt) {
  const turns = prompt.messages;
  return turns.map((turn) => h("p", { class: "prompt" },
    turns.length > 1 ? h("b", {}, `${turn.role}: `) : null, turn.content));
}
function promptHas(prompt, text) {
  return prompt.messages.some((turn) => turn.content.toLowerCase().includes(text));
}
function kindWord(kind) {
  return kind === "unsafe" || kind === "benign" ? t(`kind_${kind}`) : kind;
}
function tag(text, style = "") {
  return h("span", { class: `tag ${style}` }, text);
}
function kindChoices(prompts) {
  const kinds = [...new Set(prompts.map((prompt) => prompt.kind).filter(Boolean))].sort();
  return [["", t("all")], ...kinds.map((kind) => [kind, kindWord(kind)])];
}
function categoryChoices(prompts) {
  const names = [...new Set(prompts.flatMap((prompt) => prompt.categories))].sort();
  return [["", t("all")], ...names.map((name) => [name, name])];
}
function currentRun() {
  return state.data.runs[state.run];
}
