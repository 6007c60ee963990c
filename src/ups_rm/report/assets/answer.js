// Did it get safer, and what did it cost: one sentence, the table, the alarms.

const percentRows = /refusal|rate|share|judged_unsafe|language_kept|agrees/;
/** Rows of one group of prompts, one harm category or one further judge stand in tables of their own. */
const PARTS = /^(groups|categories|judges)\.(.+)\.([^.]+)$/;
function rowName(key) {
  return known(`row_${key}`, known(`row_${key.split(".").slice(-1)[0]}`, key));
}
function tableRow(row) {
  const name = rowName(row.key);
  if (row.rate !== undefined) return [name, missing, percent(row.rate), missing, row.low === null ? missing : `[${percent(row.low)}, ${percent(row.high)}]`];
  if (row.before === null || row.after === null) {
    return [name, missing, row.after === null ? missing : number(row.after, 4), missing, missing];
  }
  const change = row.after - row.before;
  const shares = percentRows.test(row.key);
  const digits = row.key.includes("length") ? 1 : 3;
  const write = shares ? percent : (value) => number(value, digits);
  const differ = shares ? (value) => t("points", { n: signed(100 * value, 1) }) : (value) => signed(value, digits);
  const interval = row.low === undefined || row.low === null ? missing : `[${differ(row.low)}, ${differ(row.high)}]`;
  return [name, write(row.before), write(row.after), differ(change), interval];
}

function answerSentence(run) {
  if (!run.outcome) return t(run.finished ? "answer_none_finished" : "answer_none_running", { step: run.steps });
  const score = run.outcome.score;
  const change = score.after - score.before;
  const verdict = score.low > 0 ? "safer" : score.high < 0 ? "less_safe" : "undecided";
  const values = { before: number(score.before), after: number(score.after), change: signed(change),
    low: signed(score.low), high: signed(score.high), n: score.n, steps: run.steps };
  const benign = run.outcome.rows.find((row) => row.key === "refusal_rate.benign");
  const cost = benign && benign.before !== null ? " " + t("answer_cost", { before: percent(benign.before), after: percent(benign.after) }) : "";
  return t(`answer_${verdict}`, values) + cost;
}

function partTables(rows) {
  const parts = {};
  for (const row of rows) {
    const found = PARTS.exec(row.key);
    if (found) ((parts[found[1]] ||= {})[found[2]] ||= []).push(row);
  }
  return Object.entries(parts).map(([name, tables]) => h("details", { open: charts.printing }, h("summary", {}, t(`part_${name}`)),
    Object.entries(tables).map(([title, list]) => [h("h3", {}, partTitle(name, title)),
      table(partTitle(name, title), ["", t("before"), t("after"), t("change"), t("interval")], list.map(tableRow))])));
}

/** A group's or harm category's name; of a further judge "judge: group". */
function partTitle(part, title) {
  const at = part === "judges" ? title.lastIndexOf(".") + 1 : 0, group = title.slice(at);
  return (at ? `${title.slice(0, at - 1)}: ` : "") + known(`group_name_${group}`, group);
}

function alarmsOf(run) {
  if (run.alarms === null) return note(t("alarms_absent"));
  if (!run.alarms.length) return note(t("alarms_none"));
  const first = {};
  for (const alarm of run.alarms) (first[alarm.name] ||= []).push(alarm);
  return h("ul", { class: "alarms" }, Object.entries(first).map(([name, list]) => h("li", {},
    h("b", {}, known(`alarm_${name}`, name)), ` ${t("alarm_steps", { steps: list.map((alarm) => alarm.step).slice(0, 8).join(", ") + (list.length > 8 ? " …" : ""), n: list.length })}`,
    h("br", {}), list[list.length - 1].message || t("alarm_value", { value: compact(list[0].value), threshold: compact(list[0].threshold) }))));
}

function answerPage() {
  const { runs } = state.data;
  const parts = runs.map((run) => h("section", { class: "answer" },
    h("h2", {}, runs.length > 1 ? run.name : t("nav_answer")),
    h("p", { class: "sentence" }, answerSentence(run)),
    run.outcome && run.outcome.rm_check ? note(t("rm_check_skipped")) : null,
    run.outcome ? table(t("before_after_table"), ["", t("before"), t("after"), t("change"), t("interval")], run.outcome.rows.filter((row) => !PARTS.test(row.key)).map(tableRow)) : null,
    run.outcome ? partTables(run.outcome.rows) : null,
    h("h3", {}, t("alarms")), alarmsOf(run),
    run.problems.length ? [h("h3", {}, t("problems")), h("ul", {}, run.problems.map((line) => h("li", {}, line)))] : null));
  return [studyOf(state.data.study), runs.length > 1 ? comparison(runs) : null, parts, note(t("read_replies"))];
}

/** What a study found over all its seeds: its tables as they stand in study.md, and its picture; null where the page is of runs alone. */
function studyOf(study) {
  if (!study) return null;
  return section(t("study"), h("p", {}, t("study_explain")), h("img", { src: study.picture, alt: t("study_picture"), class: "picture" }),
    study.tables.map(({ heads, rows }) => table(t("study"), heads, rows)));
}

function comparison(runs) {
  const keys = [...new Set(runs.flatMap((run) => (run.outcome ? run.outcome.rows.map((row) => row.key) : [])))].filter((key) => !PARTS.test(key));
  const cell = (run, key) => {
    const row = run.outcome && run.outcome.rows.find((one) => one.key === key);
    if (!row) return missing;
    const [, before, after, change] = tableRow(row);
    return before === missing ? after : `${before} → ${after} (${change})`;
  };
  return section(t("runs_compared"), h("div", { class: "charts" }, TRADES.map(([key, scale]) => tradeChart(runs, key, scale))),
    table(t("runs_compared"), ["", ...runs.map((run) => run.name)],
      keys.map((key) => [rowName(key), ...runs.map((run) => cell(run, key))])));
}

/** What safety is bought with: the row across, and what its values are multiplied by. */
const TRADES = [["refusal_rate.benign", 100], ["groups.benign.helpfulness", 1]];

/** The change in safe score, upwards, against the change of another row: a point for each run; null where fewer than two have one. */
function tradeChart(runs, key, scale) {
  const changes = (run, name) => {
    const row = run.outcome && run.outcome.rows.find((one) => one.key === name);
    return row && row.before !== null && row.after !== null ? row.after - row.before : null;
  };
  const lines = runs.map((run, i) => ({ label: run.name, x: [scale * changes(run, key)], y: [changes(run, "safe_score")], points: true,
    colour: css(colours[i % colours.length]), there: changes(run, key) !== null && changes(run, "safe_score") !== null })).filter((line) => line.there);
  if (lines.length < 2) return null;
  const ends = (values) => {
    const low = Math.min(0, ...values), high = Math.max(0, ...values), room = (high - low || 1) * 0.1;
    return [low - room, high + room];
  };
  return lineChart({ title: t(`trade_${key.split(".").slice(-1)[0]}`), explain: t("trade_explain"), xLabel: t(scale === 100 ? "trade_points" : "trade_logits"),
    unit: t("trade_score"), lines, sync: false, range: { x: ends(lines.map((line) => line.x[0])), y: ends(lines.map((line) => line.y[0])) } });
}
