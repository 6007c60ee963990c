// What the policy said while it learnt: the replies to one prompt side by side, with the numbers that moved it.

const GROUPS_PER_PAGE = 4;

function flatGroups(run) {
  return run.groups.steps.flatMap((step) => step.groups.map((group) => ({ ...group, step: step.step, kl_coef: step.kl_coef })));
}

function sortedGroups(groups, by) {
  const keys = {
    step: (group) => group.step, latest: (group) => -group.step,
    spread: (group) => -(group.spread ?? -1), gain: (group) => -(group.gain ?? -9), loss: (group) => group.gain ?? 9,
    disagreement: (group) => -(group.disagreement ?? -1), low: (group) => group.mean, high: (group) => -group.mean,
    kl: (group) => -Math.max(...group.samples.map((sample) => sample.kl ?? 0)),
  };
  const key = keys[by];
  return groups.map((group, i) => [key(group), i, group]).sort((a, b) => a[0] - b[0] || a[1] - b[1]).map((row) => row[2]);
}

function chosenGroups(run) {
  const options = state.groups, text = options.search.trim().toLowerCase();
  return sortedGroups(flatGroups(run).filter((group) => {
    const prompt = run.prompts[group.prompt];
    return (options.prompt === null || group.prompt === options.prompt)
      && (options.step === "" || group.step === Number(options.step))
      && (options.kind === "" || prompt.kind === options.kind)
      && (options.category === "" || prompt.categories.includes(options.category))
      && (text === "" || promptHas(prompt, text) || group.samples.some((sample) => sample.text.toLowerCase().includes(text)));
  }), options.prompt === null ? options.sort : "step");
}

/** The reply with each token's KL as its background: orange where the policy moved up, blue where down. */
function coloured(sample) {
  const parts = [];
  let start = 0;
  sample.ends.forEach((length, i) => {
    const text = sample.text.slice(start, start + length), kl = sample.token_kl[i];
    start += length;
    if (!text && i < sample.ends.length - 1) return;
    const strength = Math.min(1, Math.abs(kl ?? 0) / 2);
    const colour = strength < 0.03 ? null : kl > 0 ? `rgba(240,140,30,${(0.5 * strength).toFixed(2)})` : `rgba(60,130,240,${(0.5 * strength).toFixed(2)})`;
    parts.push(h("span", { class: "token", background: colour, title: t("token_kl", { kl: compact(kl) }) }, text || "⏎"));
  });
  if (start < sample.text.length) parts.push(sample.text.slice(start));
  return parts;
}

function replyCard(sample, place, best) {
  const models = sample.models ? Object.entries(sample.models) : [];
  const colours_ = state.groups.colours && sample.token_kl;
  const numbers = [["logit", compact(sample.logit)], ["score", number(sample.score)], ["advantage", signed(sample.advantage)],
    ["reward", number(sample.reward)], ["kl_sum", compact(sample.kl)], ["tokens", sample.length]];
  return h("div", { class: `reply ${sample.score > 0.5 ? "safe" : "unsafe"}`, role: "group", "aria-label": t("reply_n", { n: place + 1 }) },
    h("p", { class: "head" }, h("b", {}, t("reply_n", { n: place + 1 })), best ? tag(t("best"), "good") : null,
      sample.refusal ? tag(t("refusal"), "warn") : null, sample.cut ? tag(t("cut")) : null),
    h("dl", {}, numbers.map(([name, value]) => h("div", {}, h("dt", {}, t(`reply_${name}`)), h("dd", {}, value))),
      models.map(([name, logit]) => h("div", {}, h("dt", {}, known(`model_${name}`, name)), h("dd", {}, compact(logit))))),
    h("p", { class: "text" }, sample.text === "" ? h("i", {}, t("empty_reply")) : colours_ ? coloured(sample) : sample.text));
}

function groupCard(run, group, follow) {
  const prompt = run.prompts[group.prompt];
  const times = flatGroups(run).filter((other) => other.prompt === group.prompt).length;
  const top = Math.max(...group.samples.map((sample) => sample.advantage ?? -Infinity));
  const figures = [["mean_score", number(group.mean)], ["spread", number(group.spread)]];
  if (group.gain !== null) figures.push(["gain", signed(group.gain)]);
  if (group.disagreement !== null) figures.push(["disagreement", number(group.disagreement, 2)]);
  return h("article", { class: "group" },
    h("header", {}, h("h3", {}, t("step_n", { n: group.step })), prompt.kind ? tag(kindWord(prompt.kind), prompt.kind) : null,
      prompt.categories.map((name) => tag(name)),
      figures.map(([name, value]) => h("span", { class: "figure" }, `${t(`group_${name}`)} ${value}`)),
      times > 1 && state.groups.prompt === null ? h("button", { type: "button", onclick: () => follow(group.prompt) }, t("follow_prompt", { n: times })) : null),
    promptText(prompt),
    group.samples.length < group.n ? note(t("replies_cut", { kept: group.samples.length, total: group.n })) : null,
    h("div", { class: "replies" }, group.samples.map((sample, i) => replyCard(sample, i, group.samples.length > 1 && sample.advantage === top && top > 0))));
}

function groupsPage() {
  const run = currentRun(), options = state.groups;
  const title = h("h2", {}, t("nav_groups"));
  if (!run.groups.steps.length) return [title, note(t("groups_absent"))];
  const all = flatGroups(run);
  const list = h("div", {});
  const judges = all.some((group) => group.disagreement !== null), gains = all.some((group) => group.gain !== null);
  const klThere = all.some((group) => group.samples.some((sample) => sample.token_kl));
  const draw = () => {
    const chosen = chosenGroups(run);
    const bar = pager(options, chosen.length, GROUPS_PER_PAGE, () => { draw(); title.scrollIntoView(); });
    const shown = chosen.slice(options.page * GROUPS_PER_PAGE, (options.page + 1) * GROUPS_PER_PAGE);
    list.replaceChildren(
      options.prompt === null ? "" : h("p", { class: "following" }, t("following"), " ", h("button", { type: "button", onclick: () => follow(null) }, t("all_prompts"))),
      bar, ...shown.map((group) => groupCard(run, group, follow)), ...(chosen.length ? [] : [note(t("nothing_found"))]));
  };
  const follow = (prompt) => { options.prompt = prompt; options.page = 0; draw(); };
  const pick = (name) => (value) => { options[name] = value; options.page = 0; draw(); };
  const sorts = ["spread", ...(gains ? ["gain", "loss"] : []), ...(judges ? ["disagreement"] : []), "low", "high", "kl", "step", "latest"];
  const steps = run.groups.steps.map((step) => step.step);
  const categories = categoryChoices(run.prompts);
  const controls = h("div", { class: "controls" }, searchBox(options.search, pick("search")),
    choice(t("sort_by"), options.sort, sorts.map((name) => [name, t(`sort_${name}`)]), pick("sort")),
    choice(t("step"), options.step, [["", t("all")], ...steps.map((step) => [String(step), String(step)])], pick("step")),
    choice(t("kind"), options.kind, kindChoices(run.prompts), pick("kind")),
    categories.length > 1 ? choice(t("category"), options.category, categories, pick("category")) : null,
    klThere ? h("label", { class: "inline" }, h("input", { type: "checkbox", checked: options.colours, onchange: (event) => { options.colours = event.target.checked; draw(); } }), t("kl_colours")) : null);
  if (!sorts.includes(options.sort)) options.sort = "spread";
  draw();
  const kept = all.length, { groups_total, steps_total } = run.groups;
  return [title, note(t("groups_how")), klThere ? note(t("kl_legend")) : note(t("kl_absent")), judges ? null : note(t("judges_absent")),
    categories.length > 1 ? null : note(t("categories_absent")),
    kept < groups_total || steps.length < steps_total ? note(t("groups_sampled", { kept, total: groups_total, steps: steps.length, of: steps_total })) : null,
    controls, list];
}
