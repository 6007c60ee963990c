// The frame: pages, run, language, light and dark, printing, and, where a server stands behind it, news.

const PAGES = { answer: answerPage, curves: curvesPage, groups: groupsPage, pairs: pairsPage, reward: rewardPage, data: dataPage, recipe: recipePage };
const RUN_PAGES = ["groups", "pairs", "reward", "data", "recipe"];
const LIVE_SECONDS = 2;

function remember(name, value) {
  try { localStorage.setItem(`ups-rm.${name}`, value); } catch { /* a page from a file may not store */ }
}
function remembered(name) {
  try { return localStorage.getItem(`ups-rm.${name}`); } catch { return null; }
}

function show(page) {
  state.page = PAGES[page] ? page : "answer";
  draw();
}

function setTheme(theme) {
  state.theme = theme;
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

function header() {
  const { runs, live } = state.data;
  const others = { en: "中文", zh: "English" };
  return h("header", { class: "top" },
    h("div", { class: "bar" }, h("h1", {}, runs.map((run) => run.name).join(", ")), h("span", { class: "quiet" }, `UPS-RM ${state.data.version}`),
      live ? h("span", { id: "live", role: "status" }, liveWord()) : null,
      h("span", { class: "space" }),
      h("button", { type: "button", id: "language", lang: state.language === "en" ? "zh" : "en", onclick: () => { state.language = state.language === "en" ? "zh" : "en"; remember("language", state.language); draw("language"); } }, others[state.language]),
      choice(t("theme"), state.theme, ["auto", "light", "dark"].map((name) => [name, t(`theme_${name}`)]), (value) => { setTheme(value); remember("theme", value); draw("theme"); })),
    h("nav", { "aria-label": t("pages") }, Object.keys(PAGES).map((name) => h("a", { href: `#${name}`, "aria-current": name === state.page ? "page" : null }, t(`nav_${name}`)))));
}

function pageOf(name) {
  const { runs } = state.data;
  return h("div", { class: "page", "data-page": name },
    runs.length > 1 && RUN_PAGES.includes(name) ? h("div", { class: "controls" }, choice(t("run"), String(state.run), runs.map((run, i) => [String(i), run.name]), (value) => {
      state.run = Number(value);
      state.groups = { ...state.groups, prompt: null, step: "", page: 0 };
      state.pairs.page = 0;
      draw();
    })) : null,
    PAGES[name]());
}

function draw(focus = null, pages = [state.page]) {
  charts.clear();
  document.documentElement.lang = state.language === "zh" ? "zh-CN" : "en";
  const app = document.getElementById("app");
  app.replaceChildren(h("a", { class: "skip", href: "#main", onclick: (event) => { event.preventDefault(); document.getElementById("main").focus(); } }, t("skip")),
    header(), h("main", { id: "main", tabindex: "-1" }, pages.map(pageOf)), h("footer", { class: "quiet" }, t("footer")));
  if (focus === "language") document.getElementById("language").focus();
  if (focus === "theme") document.querySelector(".bar select").focus();
}

// ---- printing: every page, in light colours

function printing(start) {
  charts.printing = start;
  setThemeForPrint(start);
  draw(null, start ? Object.keys(PAGES) : [state.page]);
  if (start) charts.drawWaiting();
}
function setThemeForPrint(start) {
  if (start) document.documentElement.dataset.theme = "light";
  else setTheme(state.theme);
}

// ---- live

const news = { tag: null, failed: false };
function liveWord() {
  const run = state.data.runs[0];
  if (news.failed) return t("live_lost");
  return t(run.finished ? "live_finished" : "live_step", { step: run.steps, total: run.total_steps ?? "?" });
}
async function ask() {
  try {
    const answer = await fetch("data", { headers: news.tag ? { "if-none-match": news.tag } : {}, cache: "no-store" });
    news.failed = !(answer.ok || answer.status === 304);
    if (answer.status === 200) {
      news.tag = answer.headers.get("etag");
      state.data = await unpack(await answer.text());
      if (!editing()) redrawInPlace();
    }
  } catch { news.failed = true; }
  const word = document.getElementById("live");
  if (word && word.textContent !== liveWord()) word.textContent = liveWord();
  setTimeout(ask, 1000 * LIVE_SECONDS);
}
/** Somebody types, has opened a menu, or has text selected: the page stays as it is until the next news. */
function editing() {
  const active = document.activeElement;
  return (active && ["INPUT", "SELECT"].includes(active.tagName)) || !getSelection().isCollapsed;
}
function redrawInPlace() {
  const top = scrollY, range = charts.open.length ? { ...charts.open[0].scales.x } : null;
  const whole = range && charts.open[0].data[0];
  const zoomed = whole && (range.min > whole[0] || range.max < whole[whole.length - 1]);
  draw();
  scrollTo(0, top);
  if (zoomed) requestAnimationFrame(() => requestAnimationFrame(() => charts.open.forEach((plot) => plot.setScale("x", { min: range.min, max: range.max }))));
}

// ---- start

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

async function start() {
  state.data = await unpack(document.getElementById("payload").textContent);
  state.language = remembered("language") || ((navigator.language || "").toLowerCase().startsWith("zh") ? "zh" : "en");
  setTheme(remembered("theme") || "auto");
  show(location.hash.slice(1));
  addEventListener("hashchange", () => { if (location.hash.slice(1) !== "main") { show(location.hash.slice(1)); scrollTo(0, 0); } });
  addEventListener("resize", () => charts.resize());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
  addEventListener("beforeprint", () => printing(true));
  addEventListener("afterprint", () => printing(false));
  if (state.data.live) ask();
}
start().catch((error) => {
  document.querySelector(".unopened")?.classList.remove("unopened");
  throw error;
});
