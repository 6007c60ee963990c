// How the training went: one chart per question, all runs in it.

const CURVES = [
  ["score", ["critic/score/mean", /^val-core\/.*reward\/mean@\d+$/]],
  ["score_by_kind", ["score/mean_unsafe_prompts", "score/mean_benign_prompts"]],
  ["judge", ["val-aux/judge_rm_score", "val-aux/judge_score", "judge/rm_score_mean", "judge/score_mean"]],
  ["reward", ["reward/mean"]],
  ["helpfulness", ["objective/helpfulness_mean"]],
  ["cost", ["objective/cost_mean", "objective/cost_limit"]],
  ["lambda", ["objective/lambda"]],
  ["kl", ["kl/mean", "val-aux/kl"]],
  ["loss", ["actor/loss"]],
  ["length", ["response_length/mean", "val-aux/response_length/mean"]],
  ["refusal", ["text/refusal_rate_unsafe_prompts", "text/refusal_rate_benign_prompts", "val-aux/unsafe/refusal_rate", "val-aux/benign/refusal_rate"]],
  ["entropy", ["actor/entropy"]],
  ["zero_std", ["group/zero_std_share"]],
  ["distinct", ["text/distinct_2", "val-aux/distinct_2"]],
  ["repetition", ["text/repetition", "val-aux/repetition"]],
  ["saturated", ["score/saturated_share"]],
  ["time", [/^timing_s\/(?!step$)/]],
];
const DASHES = [undefined, [8, 4], [2, 3], [12, 4, 2, 4], [4, 8], [1, 6], [16, 4], [6, 2, 2, 2]];

function metricWord(name) {
  return name.startsWith("val-core/") ? t("metric_val") : known(`metric_${name}`, name.replace("timing_s/", ""));
}

function linesOf(patterns) {
  const { runs } = state.data, several = runs.length > 1;
  const names = [];
  for (const pattern of patterns) {
    for (const run of runs) {
      for (const name of Object.keys(run.metrics.series)) {
        if ((typeof pattern === "string" ? pattern === name : pattern.test(name)) && !names.includes(name)) names.push(name);
      }
    }
  }
  const lines = [];
  runs.forEach((run, number_) => {
    if (state.curves.hidden[run.name]) return;
    names.forEach((name, i) => {
      const values = run.metrics.series[name];
      if (!values || values.every((value) => value === null)) return;
      const there = values.map((value, place) => [run.metrics.steps[place], value]).filter(([, value]) => value !== null);
      const x = there.map(([step]) => step), y = there.map(([, value]) => value);
      const sparse = name.startsWith("val");
      lines.push({
        label: (several ? `${run.name}: ` : "") + metricWord(name),
        x, y: sparse ? y : smoothed(y, state.curves.smooth), points: sparse,
        colour: css(colours[(several ? number_ : i) % colours.length]), dash: several || names.length > colours.length ? DASHES[i % DASHES.length] : undefined,
      });
    });
  });
  return lines;
}

function curvesPage() {
  const { runs } = state.data;
  const holder = h("div", { class: "charts" });
  const draw = () => {
    charts.clear();
    const names = [...CURVES];
    if (state.curves.extra) names.unshift(["extra", [state.curves.extra]]);
    const absent = [];
    const figures = [];
    for (const [name, patterns] of names) {
      const lines = linesOf(patterns);
      const title = name === "extra" ? state.curves.extra : t(`curve_${name}`);
      if (!lines.length) { absent.push(title); continue; }
      figures.push(lineChart({ title, unit: name === "extra" ? "" : t(`unit_${name}`), lines, explain: name === "extra" ? "" : t(`about_${name}`) }));
    }
    holder.replaceChildren(...figures, ...(absent.length ? [note(t("curves_absent", { names: absent.join(", ") }))] : []));
  };
  const all = [...new Set(runs.flatMap((run) => Object.keys(run.metrics.series)))].sort();
  const thinned = runs.filter((run) => run.metrics.steps_total > run.metrics.steps.length);
  const controls = h("div", { class: "controls" },
    labelled(t("smoothing"), h("input", { type: "range", min: "0", max: "0.95", step: "0.05", value: state.curves.smooth,
      onchange: (event) => { state.curves.smooth = Number(event.target.value); draw(); } })),
    choice(t("another_metric"), state.curves.extra, [["", missing], ...all.map((name) => [name, name])], (value) => { state.curves.extra = value; draw(); }),
    runs.length > 1 ? h("fieldset", {}, h("legend", {}, t("runs")), runs.map((run, i) => h("label", { class: "inline" },
      h("input", { type: "checkbox", checked: !state.curves.hidden[run.name], onchange: (event) => { state.curves.hidden[run.name] = !event.target.checked; draw(); } }),
      h("span", { class: "swatch", colour: `var(${colours[i % colours.length]})` }), run.name))) : null);
  draw();
  return [h("h2", {}, t("nav_curves")), note(t("curves_how")), controls, holder,
    thinned.map((run) => note(t("curves_thinned", { run: run.name, kept: run.metrics.steps.length, total: run.metrics.steps_total })))];
}
