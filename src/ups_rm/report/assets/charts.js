// Plots by uPlot: hover, drag to zoom, double click to zoom out; the same by keyboard. Every plot can be read as a table.

const WHOLE = [1, 2, 5].flatMap((n) => [0, 1, 2, 3, 4, 5].map((zeros) => n * 10 ** zeros)).sort((a, b) => a - b); // there is no half step
const PRINTED_WIDTH = 660; // fits A4 and letter
const charts = {
  open: [],
  waiting: [],
  printing: false,
  sync: uPlot.sync("steps"),
  clear() { this.open.forEach((plot) => plot.destroy()); this.open = []; this.waiting = []; },
  width(box) { return this.printing ? PRINTED_WIDTH : Math.max(240, box.clientWidth); },
  /** What waits for its box to stand in the page. */
  drawWaiting() { this.waiting.splice(0).forEach((draw) => draw()); },
  resize() {
    for (const plot of this.open) {
      const width = plot.root.parentElement.clientWidth;
      if (width > 0 && width !== plot.width) plot.setSize({ width, height: plot.height });
    }
  },
};

function axis(label, more = {}) {
  return { stroke: css("--text"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line"), width: 1 },
    font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif", label, labelSize: 18, ...more };
}

/** A line chart. lines: [{label, x: [...], y: [...], colour, dash, points}], x rising. unit: of y. */
function lineChart({ title, unit, lines, explain = "", xLabel = t("step"), height = 220, diagonal = false, sync = true, range = null }) {
  const box = h("div", { class: "plot" });
  const figure = h("figure", { class: "chart", tabindex: "0", role: "group", "aria-label": `${title}. ${t("chart_keys")}` },
    h("figcaption", {}, h("h3", {}, title), explain ? h("span", { class: "quiet" }, explain) : null), box, valuesTable(title, xLabel, lines));
  const joined = uPlot.join(lines.map((line) => [line.x, line.y]));
  const series = lines.map((line) => ({
    label: line.label, stroke: line.colour, width: 1.6, dash: line.dash, spanGaps: true,
    points: { show: line.points || line.x.length < 3, size: 6, fill: line.colour },
    value: (_, value) => compact(value),
  }));
  const options = {
    width: 400, height, cursor: { drag: { x: true, y: false }, ...(sync ? { sync: { key: charts.sync.key, setSeries: false } } : {}) },
    scales: { x: { time: false, ...(range ? { range: range.x } : {}) }, y: { range: range ? range.y : withRoom } },
    axes: [axis(xLabel, sync ? { incrs: WHOLE } : {}), axis(unit, { size: 70, values: (_, ticks) => ticks.map(compact) })],
    series: [{ label: xLabel, value: (_, value) => compact(value) }, ...series], legend: { live: true },
    hooks: diagonal ? { draw: [drawDiagonal] } : {},
  };
  whenShown(box, () => {
    const plot = new uPlot({ ...options, width: charts.width(box) }, joined, box);
    charts.open.push(plot);
    figure.addEventListener("keydown", (event) => chartKey(event, plot));
  });
  return figure;
}

/** Bars of a histogram. sets: [{label, counts, colour}], edges: one more than counts. */
function barChart({ title, xLabel, edges, sets, height = 220 }) {
  const middles = edges.slice(1).map((edge, i) => (edge + edges[i]) / 2);
  const box = h("div", { class: "plot" });
  const lines = sets.map((set) => ({ label: set.label, x: middles, y: set.counts, colour: set.colour }));
  const figure = h("figure", { class: "chart", tabindex: "0", role: "group", "aria-label": `${title}. ${t("chart_keys")}` },
    h("figcaption", {}, h("h3", {}, title)), box, valuesTable(title, xLabel, lines));
  const bars = uPlot.paths.bars({ size: [0.95, 60], align: 0 });
  whenShown(box, () => {
    const plot = new uPlot({
      width: charts.width(box), height, scales: { x: { time: false, range: [edges[0], edges[edges.length - 1]] }, y: { range: (_, low, high) => [0, (high || 1) * 1.05] } },
      axes: [axis(xLabel), axis(t("count"), { size: 58 })],
      series: [{ label: xLabel, value: (_, value) => compact(value) }, ...sets.map((set) => ({ label: set.label, stroke: set.colour, fill: set.colour + "66", paths: bars, points: { show: false } }))],
      cursor: { drag: { x: true, y: false } },
    }, [middles, ...sets.map((set) => set.counts)], box);
    charts.open.push(plot);
    figure.addEventListener("keydown", (event) => chartKey(event, plot));
  });
  return figure;
}

/** Some room above and below; a line that stays at one value gets a range that does not pretend otherwise. */
function withRoom(_, low, high) {
  if (low === null) return [0, 1];
  if (low === high) return low === 0 ? [0, 1] : [low - Math.abs(low) / 2, low + Math.abs(low) / 2];
  return uPlot.rangeNum(low, high, 0.1, true);
}

/** A plot needs the width of its box: in the next frame, or when all is in place for the printer, which waits for no frame. */
function whenShown(box, draw) {
  charts.waiting.push(() => { if (box.isConnected) draw(); });
  requestAnimationFrame(() => charts.drawWaiting());
}

function drawDiagonal(plot) {
  const at = (value, scale) => plot.valToPos(value, scale, true);
  plot.ctx.save();
  plot.ctx.strokeStyle = css("--quiet");
  plot.ctx.setLineDash([6, 6]);
  plot.ctx.beginPath();
  plot.ctx.moveTo(at(0, "x"), at(0, "y"));
  plot.ctx.lineTo(at(1, "x"), at(1, "y"));
  plot.ctx.stroke();
  plot.ctx.restore();
}

function chartKey(event, plot) {
  const x = plot.data[0], { min, max } = plot.scales.x;
  const zoom = (factor) => {
    const half = ((max - min) / 2) * factor, place = plot.cursor.idx;
    const middle = place === null || place === undefined ? (min + max) / 2 : x[place];
    plot.setScale("x", { min: Math.max(x[0], middle - half), max: Math.min(x[x.length - 1], middle + half) });
  };
  const move = (by) => {
    const now = plot.cursor.idx ?? 0, place = Math.min(x.length - 1, Math.max(0, now + by));
    plot.setCursor({ left: plot.valToPos(x[place], "x"), top: plot.over.clientHeight / 2 });
  };
  const keys = { ArrowLeft: () => move(-1), ArrowRight: () => move(1), "+": () => zoom(0.5), "-": () => zoom(2),
    0: () => plot.setScale("x", { min: x[0], max: x[x.length - 1] }) };
  if (keys[event.key] && x.length > 1) { keys[event.key](); event.preventDefault(); }
}

/** The same numbers for screen readers and for copying: filled when it is opened. */
function valuesTable(title, xLabel, lines) {
  const details = h("details", {}, h("summary", {}, t("as_table")));
  details.addEventListener("toggle", () => {
    if (!details.open || details.children.length > 1) return;
    const joined = uPlot.join(lines.map((line) => [line.x, line.y]));
    const rows = joined[0].map((x, i) => [compact(x), ...joined.slice(1).map((values) => compact(values[i]))]);
    details.append(table(title, [xLabel, ...lines.map((line) => line.label)], rows));
  });
  return details;
}

/** Exponential mean over the values that are there. */
function smoothed(values, share) {
  if (share <= 0) return values;
  let mean = null;
  return values.map((value) => {
    if (value === null || value === undefined) return value;
    mean = mean === null ? value : share * mean + (1 - share) * value;
    return mean;
  });
}
