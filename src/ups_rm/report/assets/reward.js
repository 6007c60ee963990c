// May the reward model be trusted: its reliability, its logits by label, the doctor's verdicts.

function reliabilityChart(curves) {
  const rows = curves.reliability;
  return lineChart({ title: t("reliability"), unit: t("observed"), xLabel: t("predicted"), diagonal: true, sync: false, height: 300,
    range: { x: [0, 1], y: [0, 1] },
    lines: [{ label: t("observed"), x: rows.map((row) => row[0]), y: rows.map((row) => row[1]), colour: css("--run-1"), points: true }] });
}

function verdicts(check) {
  const bySection = {};
  for (const one of check.checks) (bySection[one.section] ||= []).push(one);
  const counts = ["fail", "warn", "pass", "skip"].map((name) => [name, check.checks.filter((one) => one.verdict === name).length]);
  return [h("p", {}, counts.filter(([, n]) => n).map(([name, n]) => [tag(`${t(`verdict_${name}`)} ${n}`, `verdict-${name}`), " "])),
    Object.entries(bySection).map(([name, checks]) => h("details", { open: checks.some((one) => one.verdict === "fail" || one.verdict === "warn") },
      h("summary", {}, `${name} (${checks.length})`),
      table(name, [t("question"), t("verdict"), t("finding")], checks.map((one) => [one.name, tag(t(`verdict_${one.verdict}`), `verdict-${one.verdict}`),
        one.way_out ? [one.finding, h("br", {}), h("span", { class: "quiet" }, one.way_out)] : one.finding]), false)))];
}

function rewardModel(model) {
  const { curves, figures, check, card } = model;
  const histogram = curves && curves.histogram;
  const rows = figures ? [["texts", figures.texts], ["auc", number(figures.auc)], ["accuracy", percent(figures.accuracy)],
    ["ece", number(figures.ece)], ["pairs", figures.pairs], ["pairwise_accuracy", percent(figures.pairwise_accuracy)]].filter(([, value]) => value !== undefined) : [];
  const categories = figures && figures.by_category ? Object.entries(figures.by_category) : [];
  return section(model.name, h("p", { class: "quiet" }, model.where),
    figures ? table(t("held_out_figures"), ["", t("held_out")], rows.map(([name, value]) => [t(`figure_${name}`), String(value)])) : note(t("rm_figures_absent")),
    curves ? h("div", { class: "charts" }, reliabilityChart(curves),
      histogram ? barChart({ title: t("logits_by_label"), xLabel: t("logit_axis"), edges: histogram.edges, height: 300,
        sets: [{ label: t("label_safe"), counts: histogram.safe, colour: css("--safe") }, { label: t("label_unsafe"), counts: histogram.unsafe, colour: css("--unsafe") }] }) : null) : null,
    categories.length ? h("details", { open: charts.printing }, h("summary", {}, t("by_category")), table(t("by_category"), [t("category"), t("figure_texts"), t("figure_auc"), t("figure_accuracy"), t("figure_ece")],
      categories.map(([name, row]) => [name, row.texts, number(row.auc), percent(row.accuracy), number(row.ece)]))) : null,
    h("h3", {}, t("doctor")), check ? verdicts(check) : note(t("check_absent", { where: model.where })),
    card ? [h("h3", {}, t("card")), table(t("card"), ["", t("value")], Object.entries(card).map(([name, value]) => [name, Array.isArray(value) ? value.join(", ") : String(value)]), false)] : note(t("card_absent")));
}

function rewardPage() {
  const run = currentRun();
  return [h("h2", {}, t("nav_reward")), run.sources_kept ? null : note(t("sources_now")),
    run.reward_models.length ? run.reward_models.map(rewardModel) : note(t("reward_absent"))];
}
