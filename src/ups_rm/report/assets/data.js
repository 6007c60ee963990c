// What it was trained on: rows, categories, lengths.

function countsTable(report) {
  const read = report.read || {}, rows = read.rows || {}, pairs = read.pairs || {};
  const written = Object.entries(report.written || {}).map(([name, part]) => [t("written", { name }), t("rows_prompts", { rows: compact(part.rows), prompts: compact(part.distinct_prompts) })]);
  return table(t("rows"), ["", t("count")], [
    [t("rows_read"), compact(rows.total)], [t("rows_train"), compact(rows.train)], [t("rows_test"), compact(rows.test)],
    ...Object.entries(pairs).map(([name, part]) => [known(`pairs_${name}`, name), part.share === undefined ? compact(part.rows) : `${compact(part.rows)} (${percent(part.share)})`]),
    [t("rows_rejected"), compact(report.rejected)], [t("shared_prompts"), compact(report.prompts_shared_by_train_and_validation)], ...written]);
}

function categoriesTable(report) {
  const subsets = Object.entries((report.read && report.read.by_subset) || {});
  const names = [...new Set(subsets.flatMap(([, part]) => Object.keys(part.categories)))];
  const total = (name) => subsets.reduce((sum, [, part]) => sum + (part.categories[name] || 0), 0);
  if (!names.length) return note(t("categories_absent"));
  const most = Math.max(...names.map(total));
  const bar = (n) => h("meter", { min: "0", max: String(most), value: n, "aria-label": compact(n) });
  return table(t("replies_by_category"), [t("category"), ...subsets.map(([name]) => name), t("total"), ""],
    names.sort((a, b) => total(b) - total(a)).map((name) => [name, ...subsets.map(([, part]) => compact(part.categories[name] || 0)), compact(total(name)), bar(total(name))]));
}

function lengthCharts(data) {
  const figures = [];
  for (const file of data.files || []) {
    if (file.characters) figures.push(barChart({ title: t("prompt_lengths", { file: file.file }), xLabel: t("characters"), edges: file.characters.edges, sets: [{ label: t("prompts"), counts: file.characters.counts, colour: css("--run-1") }] }));
  }
  for (const [label, found] of Object.entries(data.reply_characters || {})) {
    if (found) figures.push(barChart({ title: t(`reply_lengths_${label}`), xLabel: t("characters"), edges: found.edges, sets: [{ label: t(`label_${label}`), counts: found.counts, colour: css(`--${label}`) }] }));
  }
  return figures;
}

function dataPage() {
  const run = currentRun(), { data } = run;
  const lengths = lengthCharts(data);
  const kinds = (data.files || []).map((file) => [file.file, compact(file.rows), compact(file.kinds.unsafe), compact(file.kinds.benign)]);
  return [h("h2", {}, t("nav_data")), run.sources_kept ? null : note(t("sources_now")),
    data.source ? h("p", {}, t("source_is", { source: data.source })) : null,
    data.report ? [section(t("rows"), countsTable(data.report)), section(t("replies_by_category"), categoriesTable(data.report))] : note(t("data_report_absent")),
    kinds.length ? section(t("prompt_files"), table(t("prompt_files"), [t("file"), t("rows"), t("kind_unsafe"), t("kind_benign")], kinds)) : null,
    section(t("lengths"), lengths.length ? h("div", { class: "charts" }, lengths) : note(t("lengths_absent")), data.unread ? note(t("unread", { what: data.unread })) : null)];
}
