// The same held-out prompt before and after the training, and what changed sides.

const PAIRS_PER_PAGE = 8;
const FLIPS = ["unsafe_to_safe", "safe_to_unsafe", "answered_to_refused", "refused_to_answered"];
const BAD_FLIPS = ["safe_to_unsafe", "answered_to_refused"];

function chosenPairs(run) {
  const options = state.pairs, text = options.search.trim().toLowerCase();
  const change = (pair) => pair.after.score - pair.before.score;
  const keys = { gain: (pair) => -change(pair), loss: change, order: () => 0, disagreement: (pair) => -(pair.disagreement ?? -1),
    longer: (pair) => pair.before.length - pair.after.length, shorter: (pair) => pair.after.length - pair.before.length };
  const rows = run.outcome.pairs.filter((pair) => {
    const prompt = run.prompts[pair.prompt];
    return (options.flip === "" || pair.flips.includes(options.flip)) && (options.kind === "" || prompt.kind === options.kind)
      && (options.category === "" || prompt.categories.includes(options.category))
      && (text === "" || promptHas(prompt, text) || [pair.before, pair.after].some((reply) => reply.text.toLowerCase().includes(text)));
  });
  return rows.map((pair, i) => [keys[options.sort](pair), i, pair]).sort((a, b) => a[0] - b[0] || a[1] - b[1]).map((row) => row[2]);
}

function pairCard(run, pair) {
  const prompt = run.prompts[pair.prompt];
  const side = (name, reply) => h("div", { class: `reply ${reply.score > 0.5 ? "safe" : "unsafe"}`, role: "group", "aria-label": t(name) },
    h("p", { class: "head" }, h("b", {}, t(name)), reply.refusal ? tag(t("refusal"), "warn") : null,
      h("span", { class: "figure" }, `${t("reply_score")} ${number(reply.score)}`), h("span", { class: "figure" }, `${t("reply_logit")} ${compact(reply.logit)}`),
      h("span", { class: "figure" }, `${t("length")} ${reply.length}`),
      Object.entries(reply.judges || {}).map(([judge, score]) => h("span", { class: "figure" }, `${judge} ${number(score)}`))),
    h("p", { class: "text" }, reply.text === "" ? h("i", {}, t("empty_reply")) : reply.text));
  return h("article", { class: "group" },
    h("header", {}, h("h3", {}, signed(pair.after.score - pair.before.score)), prompt.kind ? tag(kindWord(prompt.kind), prompt.kind) : null,
      prompt.categories.map((name) => tag(name)), pair.flips.map((name) => tag(t(`flip_${name}`), BAD_FLIPS.includes(name) ? "warn" : "good")),
      pair.disagreement === null ? null : h("span", { class: "figure" }, `${t("group_disagreement")} ${number(pair.disagreement)}`)),
    promptText(prompt), h("div", { class: "replies two" }, side("before", pair.before), side("after", pair.after)));
}

function pairsPage() {
  const run = currentRun(), options = state.pairs;
  const title = h("h2", {}, t("nav_pairs"));
  if (!run.outcome) return [title, note(t("pairs_absent"))];
  if (!run.outcome.pairs.length) return [title, note(t("pairs_file_absent"))];
  const list = h("div", {});
  const draw = () => {
    const chosen = chosenPairs(run);
    const bar = pager(options, chosen.length, PAIRS_PER_PAGE, () => { draw(); title.scrollIntoView(); });
    list.replaceChildren(bar, ...chosen.slice(options.page * PAIRS_PER_PAGE, (options.page + 1) * PAIRS_PER_PAGE).map((pair) => pairCard(run, pair)),
      ...(chosen.length ? [] : [note(t("nothing_found"))]));
  };
  const pick = (name) => (value) => { options[name] = value; options.page = 0; draw(); };
  const used = run.outcome.pairs.map((pair) => run.prompts[pair.prompt]);
  const counts = FLIPS.map((name) => [name, run.outcome.pairs.filter((pair) => pair.flips.includes(name)).length]);
  const categories = categoryChoices(used);
  const judged = run.outcome.pairs.some((pair) => pair.disagreement !== null);
  const sorts = ["gain", "loss", ...(judged ? ["disagreement"] : []), "longer", "shorter", "order"];
  if (!sorts.includes(options.sort)) options.sort = "gain";
  const controls = h("div", { class: "controls" }, searchBox(options.search, pick("search")),
    choice(t("flips"), options.flip, [["", t("all")], ...counts.map(([name, n]) => [name, `${t(`flip_${name}`)} (${n})`])], pick("flip")),
    choice(t("sort_by"), options.sort, sorts.map((name) => [name, t(`pairs_${name}`)]), pick("sort")),
    choice(t("kind"), options.kind, kindChoices(used), pick("kind")),
    categories.length > 1 ? choice(t("category"), options.category, categories, pick("category")) : null);
  draw();
  const { pairs, pairs_total } = run.outcome;
  return [title, note(t("pairs_how")), note(t(judged ? "pairs_judges" : "pairs_judges_absent")), pairs.length < pairs_total ? note(t("pairs_cut", { kept: pairs.length, total: pairs_total })) : null, controls, list];
}
