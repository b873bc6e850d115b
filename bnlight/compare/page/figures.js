// The figures, each from the runs that the filter leaves: what plotly draws, and the same as a table of numbers.
// `legend` marks those whose lines are named by the page's legend alone.

const axisOf = Object.fromEntries(data.axes.map((axis, at) => [axis.key, { ...axis, at }]));
const settingOf = (cell, key) => data.cells[cell].settings[axisOf[key].at];
const words = name => data.words[name] ?? name;
const capital = text => text.charAt(0).toUpperCase() + text.slice(1);
const allCells = data.cells.map((_, cell) => cell);
const safe = text => String(text).replace(/[&<>]/g, sign => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[sign]);
const hidden = new Set();  // contenders that the legend has switched off

const chosenCells = condition => allCells.filter(cell =>
  data.cells[cell].chosen && data.conditions[data.cells[cell].condition] === condition
  && !hidden.has(data.cells[cell].contender) && doneRuns(cell).length);

// Everything that differs between the light and the dark page.
const themes = {
  light: { ink: "#20242b", rule: "#e4e7ec", paper: "#ffffff", good: "#0072b2", weak: "#8a909c", at: 0 },
  dark: { ink: "#e2e5ea", rule: "#323842", paper: "#14171c", good: "#56acf0", weak: "#7d8694", at: 1 },
};
let theme = themes.light;

// `name` is for plotly, which reads tags in it; `label` is for the page.
const look = contender => {
  const { name, colour, dash, symbol } = data.contenders[contender];
  return { label: name, name: safe(name), colour: colour[theme.at], dash, symbol };
};

function axisLayout(title, more = {}) {
  return {
    title: { text: title, standoff: 10, font: { size: 13 } }, gridcolor: theme.rule, linecolor: theme.rule,
    zeroline: false, automargin: true, ...more,
  };
}

const layoutOf = (x, y, height) => ({
  height, xaxis: x, yaxis: y, hovermode: "closest", margin: { l: 8, r: 16, t: 10, b: 8 }, showlegend: false,
  legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", itemclick: false, itemdoubleclick: false },
  font: { family: "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", size: 13, color: theme.ink },
  paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
});

// A log axis with whole numbers: 1, 2, 5 of each decade; only 1 over many decades.
function logAxis(low, high) {
  const decades = [];
  for (let at = Math.floor(Math.log10(low)); at <= Math.ceil(Math.log10(high)); at++) decades.push(at);
  const ticks = decades.flatMap(at => (decades.length <= 5 ? [1, 2, 5] : [1]).map(step => step * 10 ** at));
  return { type: "log", tickvals: ticks, ticktext: ticks.map(short) };
}

// The axis of a setting: its own values as ticks, by factors where they are spaced so.
function settingAxis({ label, levels, log }) {
  const ticks = levels.filter(level => !unset(level)).map(Number);
  const few = ticks.length <= 12 ? { tickvals: ticks, ticktext: ticks.map(short) } : {};
  return axisLayout(safe(label), { ...(log ? { type: "log" } : {}), ...few });
}

const errorBars = (halves, colour) => halves.some(half => half !== null)
  ? { type: "data", array: halves.map(half => half ?? 0), color: colour, thickness: 1.6, width: 4 } : undefined;

const draw = {};

// A metric against the optimizer step: the mean over seeds, and a band of what the reader asks for.
draw.curves = ({ metric, condition }, { band }) => {
  const cells = chosenCells(condition), bands = [], lines = [], rows = [];
  for (const cell of cells) {
    const curve = meanCurve(doneRuns(cell), metric);
    if (!curve) continue;
    const { label, name, colour, dash, symbol } = look(data.cells[cell].contender);
    const common = { type: "scatter", name, line: { color: colour, width: 2, dash } };
    const ends = curve.at.map(({ mean, half, n }, index) => {
      const values = curve.rows.map(row => row[index]);
      return band === "range" ? [Math.min(...values), Math.max(...values)] : n > 1 ? [mean - half, mean + half] : null;
    });
    curve.steps.forEach((step, index) => rows.push([
      label, step, curve.at[index].mean, ...(ends[index] ?? [null, null])]));
    if (band === "seeds") for (const { run, x, y } of curve.curves) lines.push({
      ...common, x, y, mode: "lines", showlegend: false, opacity: 0.45, line: { ...common.line, width: 1.2 },
      customdata: x.map(() => String(run)),
      hovertemplate: `${name}, seed ${safe(runs.seed[run])}<br>step %{x}: %{y:.4g}<extra></extra>`,
    });
    else if (curve.rows.length > 1) bands.push({
      type: "scatter", name, x: [...curve.steps, ...[...curve.steps].reverse()], mode: "lines", line: { width: 0 },
      y: [...ends.map(end => end[1]), ...ends.map(end => end[0]).reverse()],
      fill: "toself", fillcolor: colour + (cells.length <= 6 ? "26" : "16"), hoverinfo: "skip", showlegend: false,
    });
    lines.push({
      ...common, x: curve.steps, y: curve.at.map(point => point.mean), marker: { color: colour, symbol, size: 7 },
      mode: curve.steps.length > 12 ? "lines" : "lines+markers",
      customdata: curve.steps.map(() => curve.curves.map(each => each.run).join()),
      hovertemplate: `${name}<br>step %{x}: %{y:.4g}<extra></extra>`,
    });
  }
  if (!lines.length) return null;
  const means = lines.flatMap(line => line.y), low = Math.min(...means), high = Math.max(...means);
  const log = /loss/.test(metric) && low > 0;
  if (log) for (const trace of bands) trace.y = trace.y.map(value => Math.max(value, low / 2));
  const y = axisLayout(words(metric) + (log ? " (log scale)" : ""), log ? logAxis(low, high) : {});
  const names = band === "range" ? ["lowest", "highest"] : ["95 % low", "95 % high"];
  return {
    data: [...bands, ...lines], layout: layoutOf(axisLayout("optimizer steps", { rangemode: "tozero" }), y, 340),
    legend: true, table: { head: ["contender", "step", `mean ${words(metric)}`, ...names], rows },
  };
};

// The mean with its interval, one row per contender, and each seed as a faint point below it.
draw.dots = ({ metric, condition }) => {
  const timed = metric === "seconds_per_step", scale = timed ? 1000 : 1;
  const label = timed ? "milliseconds per step" : words(metric), traces = [], rows = [], names = [];
  for (const cell of chosenCells(condition)) {
    const done = doneRuns(cell).filter(run => Number.isFinite(valueOf(run, metric)));
    if (!done.length) continue;
    const seen = look(data.cells[cell].contender), { name, colour, symbol } = seen, row = names.push(name) - 1;
    const value = estimate(valuesOf(done, metric).map(each => each * scale));
    const base = { type: "scatter", mode: "markers", name };
    traces.push({
      ...base, x: done.map(run => valueOf(run, metric) * scale), y: done.map(() => row + 0.3),
      marker: { color: colour, size: 8, opacity: 0.5, symbol }, customdata: done.map(String),
      text: done.map(run => `${name}, seed ${safe(runs.seed[run])}`), hovertemplate: "%{text}: %{x:.4g}<extra></extra>",
    }, {
      ...base, x: [value.mean], y: [row], marker: { color: colour, size: 11, symbol }, customdata: [done.join()],
      error_x: errorBars([value.half], colour), hovertemplate: `${name}: mean %{x:.4g} (n = ${value.n})<extra></extra>`,
    });
    rows.push([seen.label, value.n, value.mean, value.half]);
  }
  if (!rows.length) return null;
  const y = axisLayout("", {
    tickvals: names.map((_, row) => row), ticktext: names, range: [names.length - 0.35, -0.6],
    gridcolor: "rgba(0,0,0,0)", ticklabelstandoff: 6,
  });
  return {
    data: traces, layout: layoutOf(axisLayout(label, { nticks: 6 }), y, 84 + 36 * names.length),
    table: { head: ["contender", "n", `mean ${label}`, "± 95 %"], rows },
  };
};

// One line per contender, or per combination of the other contending keys where the axis is one itself: of those the
// page's legend knows nothing, so they have looks and a legend of their `own`.
function seriesOf(cell, key) {
  const { contender } = data.cells[cell];
  if (axisOf[key].role !== "contenders") return { ...look(contender), order: contender };
  const others = data.axes.filter(axis => axis.role === "contenders" && axis.key !== key);
  const label = others.map(axis => `${axis.label} = ${settingOf(cell, axis.key)}`).join(", ") || "all";
  return { own: true, label, name: safe(label), order: label };
}

// Of the cells at one place, the one that stands for them: the chosen one, else, of those that lost the fewest runs
// to divergence, the best by validation.
function standsFor(cells) {
  const chosen = cells.find(cell => data.cells[cell].chosen);
  if (chosen !== undefined || !data.validation) return chosen ?? cells[0];
  const { name, lower } = data.validation;
  const lost = cell => keptRuns(cell).filter(isDiverged).length;
  const loss = cell => estimate(valuesOf(doneRuns(cell), name)).mean * (lower ? 1 : -1);
  const worth = cells.map(cell => ({ cell, lost: lost(cell), loss: loss(cell) })).filter(({ loss }) => Number.isFinite(loss));
  worth.sort((a, b) => a.lost - b.lost || a.loss - b.loss);
  return worth.length ? worth[0].cell : cells[0];
}

// Groups of cells by series and by the value of `key`: Map series name -> {look, at: Map value -> cells}.
function lines(cells, key) {
  const found = new Map();
  for (const cell of cells) {
    const x = Number(settingOf(cell, key));
    if (!Number.isFinite(x) || hidden.has(data.cells[cell].contender)) continue;
    const series = seriesOf(cell, key);
    const line = found.get(series.name) ?? found.set(series.name, { look: series, at: new Map() }).get(series.name);
    line.at.set(x, [...(line.at.get(x) ?? []), cell]);
  }
  const sorted = [...found.values()].sort((a, b) => a.look.order < b.look.order ? -1 : 1);
  return sorted.map((line, place) => line.look.own ? { ...line, look: { ...look(place), ...line.look } } : line);
}

// Lines with an error bar at the same value lie side by side.
function dodge(key, at, count, x) {
  const values = axisOf[key].levels.map(Number).filter(Number.isFinite);
  const low = Math.min(...values), high = Math.max(...values);
  const shift = (at - (count - 1) / 2) * Math.min(0.008, 0.06 / count);
  return axisOf[key].log ? x * (high / low) ** shift : x + (high - low) * shift;
}

// The range of an axis that one wild interval would stretch until nothing else could be read; it may leave the frame.
function frame(points) {
  const means = points.map(({ y }) => y), low = Math.min(...means), high = Math.max(...means);
  const room = 0.3 * (high - low) || 0.1 * Math.abs(high);
  const bottom = Math.min(...points.map(({ y, half }) => y - (half ?? 0)));
  const top = Math.max(...points.map(({ y, half }) => y + (half ?? 0)));
  if (bottom >= low - room && top <= high + room) return {};
  const range = [Math.max(bottom, low - room), Math.min(top, high + room)], edge = 0.05 * (range[1] - range[0]);
  return { range: [range[0] - edge, range[1] + edge] };
}

function lineFigure(key, title, height, points, format) {
  const traces = [], rows = [];
  for (const [place, { look: { label, name, colour, dash, symbol }, at }] of points.entries()) {
    const sorted = [...at].sort((a, b) => a[0] - b[0]);
    if (!sorted.length) continue;
    traces.push({
      type: "scatter", mode: "lines+markers", name, text: sorted.map(([x]) => short(x)),
      x: sorted.map(([x]) => dodge(key, place, points.length, x)), y: sorted.map(([, { y }]) => y),
      error_y: errorBars(sorted.map(([, { half }]) => half ?? null), colour), line: { color: colour, width: 2, dash },
      marker: { color: colour, size: 9, symbol }, customdata: sorted.map(([, { which }]) => which.join()),
      hovertemplate: `${name}<br>${safe(axisOf[key].label)} %{text}: %{y:${format}}<extra></extra>`,
    });
    for (const [x, { y, half, n }] of sorted) rows.push([label, x, n, y, half ?? null]);
  }
  if (!traces.length) return null;
  const y = axisLayout(title, frame(points.flatMap(({ at }) => [...at.values()])));
  const layout = layoutOf(settingAxis(axisOf[key]), y, height);
  layout.showlegend = Boolean(points[0].look.own) && points.length > 1;  // plotly has an idea of its own if undefined
  const head = ["contender", axisOf[key].label, "n", title, "± 95 %"];
  return { data: traces, layout, legend: true, table: { head, rows } };
}

// The metric against one numeric setting.
draw.line = ({ x: key, where }) => {
  const tuned = axisOf[key].role === "tuned";
  const cells = allCells.filter(cell => (tuned || data.cells[cell].chosen) && doneRuns(cell).length
    && Object.entries(where).every(([other, level]) => settingOf(cell, other) === level));
  const points = lines(cells, key).map(({ look: seen, at }) => ({
    look: seen, at: new Map([...at].map(([x, group]) => {
      const which = doneRuns(standsFor(group)), value = estimate(valuesOf(which, data.metric));
      return [x, { y: value.mean, half: value.half, n: value.n, which }];
    }).filter(([, { n }]) => n)),
  }));
  return lineFigure(key, words(data.metric), 380, points, ".4g");
};

// The part of the runs that diverged, of those that trained to an end.
draw.divergence = ({ x: key }) => {
  const points = lines(allCells, key).map(({ look: seen, at }) => ({
    look: seen, at: new Map([...at].map(([x, group]) => {
      const which = group.flatMap(endedRuns);
      return [x, { y: which.filter(run => !isDone(run)).length / which.length * 100, n: which.length, which }];
    }).filter(([, { n }]) => n)),
  }));
  const figure = lineFigure(key, "diverged runs, %", 320, points, ".0f");
  if (figure) figure.layout.yaxis.range = [-4, 104];
  return figure;
};
