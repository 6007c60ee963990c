// How to get the same run again: command, versions, recipe.

function copyButton(text) {
  const button = h("button", { type: "button", onclick: async () => {
    try { await navigator.clipboard.writeText(text); button.textContent = t("copied"); } catch { button.textContent = t("copy_failed"); }
  } }, t("copy"));
  return button;
}

function code(text, label) {
  return [h("pre", { tabindex: "0", role: "region", "aria-label": label }, text), copyButton(text)];
}

function differences(runs) {
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))].filter((key) => new Set(runs.map((run) => run.settings[key])).size > 1);
  return section(t("differences"), keys.length
    ? table(t("differences"), [t("setting"), ...runs.map((run) => run.name)], keys.map((key) => [key, ...runs.map((run) => run.settings[key] ?? missing)]), false)
    : note(t("no_differences")));
}

function recipePage() {
  const run = currentRun(), { runs } = state.data, made = run.made_with;
  return [h("h2", {}, t("nav_recipe")),
    section(t("again"), run.command ? [h("p", {}, t("again_how")), code(run.command, t("again"))] : note(t("recipe_absent"))),
    section(t("versions"), made ? table(t("versions"), ["", t("value")], Object.entries(made).map(([name, value]) => [name, String(value)]), false) : note(t("versions_absent"))),
    runs.length > 1 ? differences(runs) : null,
    section(t("recipe"), run.recipe ? code(run.recipe, t("recipe")) : note(t("recipe_absent")))];
}
