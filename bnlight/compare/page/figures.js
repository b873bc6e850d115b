// The figures, each from the runs that the filter leaves: what plotly draws, and the same as a table of numbers.

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

const look = contender => {
  const { name, colour, dash, symbol } = data.contenders[contender];
  return { name: safe(name), colour: colour[theme.at], dash, symbol };
};

function axisLayout(title, more = {}) {
  return {
    title: { text: title, standoff: 10, font: { size: 13 } }, gridcolor: theme.rule, linecolor: theme.rule,
    zeroline: false, automargin: true, ...more,
  };
}

const layoutOf = (x, y, height) => ({
  height, xaxis: x, yaxis: y, hovermode: "closest", margin: { l: 8, r: 16, t: 10, b: 8 }, showlegend: false,
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
  const ticks = levels.filter(level => level !== "-").map(Number);
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
    const { name, colour, dash, symbol } = look(data.cells[cell].contender);
    const common = { type: "scatter", name, line: { color: colour, width: 2, dash } };
    const ends = curve.at.map(({ mean, half, n }, index) => {
      const values = curve.rows.map(row => row[index]);
      return band === "range" ? [Math.min(...values), Math.max(...values)] : n > 1 ? [mean - half, mean + half] : null;
    });
    curve.steps.forEach((step, index) => rows.push([
      data.contenders[data.cells[cell].contender].name, step, curve.at[index].mean, ...(ends[index] ?? [null, null])]));
    if (band === "seeds") for (const { run, x, y } of curve.curves) lines.push({
      ...common, x, y, mode: "lines", opacity: 0.45, line: { ...common.line, width: 1.2 },
      customdata: x.map(() => String(run)), hovertemplate: `${name}, seed ${safe(runs.seed[run])}<br>step %{x}: %{y:.4g}<extra></extra>`,
    });
    else if (curve.curves.length > 1) bands.push({
      type: "scatter", name, x: [...curve.steps, ...[...curve.steps].reverse()], mode: "lines", line: { width: 0 },
      y: [...ends.map(end => end[1]), ...ends.map(end => end[0]).reverse()],
      fill: "toself", fillcolor: colour + (cells.length <= 6 ? "26" : "16"), hoverinfo: "skip",
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
    table: { head: ["contender", "step", `mean ${words(metric)}`, ...names], rows },
  };
};

// The mean with its interval, one row per contender, and each seed as a faint point below it.
draw.dots = ({ metric, condition }) => {
  const timed = metric === "seconds_per_step", scale = timed ? 1000 : 1;
  const label = timed ? "milliseconds per step" : words(metric), traces = [], rows = [], names = [];
  for (const cell of chosenCells(condition)) {
    const done = doneRuns(cell).filter(run => Number.isFinite(valueOf(run, metric)));
    if (!done.length) continue;
    const { name, colour, symbol } = look(data.cells[cell].contender), row = names.push(name) - 1;
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
    rows.push([data.contenders[data.cells[cell].contender].name, value.n, value.mean, value.half]);
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

// One line per contender, or per combination of the other contending keys where the axis is one itself.
function seriesOf(cell, key) {
  const { contender } = data.cells[cell];
  if (axisOf[key].role !== "contenders") return { ...look(contender), order: contender };
  const others = data.axes.filter(axis => axis.role === "contenders" && axis.key !== key);
  const name = others.map(axis => `${axis.label} = ${settingOf(cell, axis.key)}`).join(", ") || "all";
  return { ...look(0), name: safe(name), order: name };
}

// Of the cells at one place, the one that stands for them: the chosen one, else the best by validation.
function standsFor(cells) {
  const chosen = cells.find(cell => data.cells[cell].chosen);
  if (chosen !== undefined || !data.validation) return chosen ?? cells[0];
  const rank = cell => estimate(valuesOf(doneRuns(cell), data.validation.name)).mean * (data.validation.lower ? 1 : -1);
  return cells.reduce((best, cell) => rank(cell) < rank(best) ? cell : best);
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
  return [...found.values()].sort((a, b) => a.look.order < b.look.order ? -1 : 1);
}

function lineFigure(key, title, height, points, format) {
  const traces = [], rows = [];
  for (const { look: { name, colour, dash, symbol }, at } of points) {
    const sorted = [...at].sort((a, b) => a[0] - b[0]);
    if (!sorted.length) continue;
    traces.push({
      type: "scatter", mode: "lines+markers", name, x: sorted.map(([x]) => x), y: sorted.map(([, { y }]) => y),
      error_y: errorBars(sorted.map(([, { half }]) => half ?? null), colour), line: { color: colour, width: 2, dash },
      marker: { color: colour, size: 9, symbol }, customdata: sorted.map(([, { which }]) => which.join()),
      hovertemplate: `${name}<br>${safe(axisOf[key].label)} %{x}: %{y:${format}}<extra></extra>`,
    });
    for (const [x, { y, half, n }] of sorted) rows.push([name, x, n, y, half ?? null]);
  }
  if (!traces.length) return null;
  return {
    data: traces, layout: layoutOf(settingAxis(axisOf[key]), axisLayout(title), height),
    table: { head: ["contender", axisOf[key].label, "n", title, "± 95 %"], rows },
  };
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
      const which = group.flatMap(keptRuns).filter(run => isDone(run) || runs.state[run] === "diverged");
      return [x, { y: which.filter(run => !isDone(run)).length / which.length * 100, n: which.length, which }];
    }).filter(([, { n }]) => n)),
  }));
  const figure = lineFigure(key, "diverged runs, %", 320, points, ".0f");
  if (figure) figure.layout.yaxis.range = [-4, 104];
  return figure;
};

// The mean over two settings: one map per contender, all on one colour scale.
draw.heat = ({ x, y }, { width }) => {
  const shown = data.contenders.map((_, at) => at).filter(at => !hidden.has(at));
  const maps = shown.map(contender => {
    const fields = new Map();
    for (const cell of allCells) if (data.cells[cell].contender === contender) {
      const place = [settingOf(cell, x), settingOf(cell, y)].join("\n");
      fields.set(place, [...(fields.get(place) ?? []), ...doneRuns(cell).filter(run => Number.isFinite(valueOf(run, data.metric)))]);
    }
    return { contender, fields: new Map([...fields].filter(([, which]) => which.length)) };
  }).filter(({ fields }) => fields.size);
  if (!maps.length) return null;
  const columns = axisOf[x].levels.filter(level => level !== "-"), lines_ = axisOf[y].levels.filter(level => level !== "-");
  const across = Math.min(maps.length, width < 560 ? 1 : width < 860 ? 2 : 3), down = Math.ceil(maps.length / across);
  const layout = { ...layoutOf({}, {}, 60 + down * (64 + 30 * Math.max(lines_.length, 4))), annotations: [], margin: { l: 62, r: 8, t: 28, b: 44 } };
  const traces = [], rows = [], gap = [across > 1 ? 0.26 / across : 0, down > 1 ? Math.min(0.34 / down, 0.2) : 0];
  maps.forEach(({ contender, fields }, index) => {
    const suffix = index ? String(index + 1) : "", column = index % across, row = Math.floor(index / across);
    const size = [(1 - gap[0] * (across - 1)) / across, (1 - gap[1] * (down - 1)) / down];
    const left = column * (size[0] + gap[0]), top = 1 - row * (size[1] + gap[1]);
    const at = lines_.map(level => columns.map(other => fields.get(`${other}\n${level}`) ?? []));
    const z = at.map(line => line.map(which => which.length ? estimate(valuesOf(which, data.metric)).mean : null));
    const few = columns.length <= 6 && lines_.length <= 12;
    traces.push({
      type: "heatmap", x: columns, y: lines_, z, coloraxis: "coloraxis", xaxis: `x${suffix}`, yaxis: `y${suffix}`,
      customdata: at.map(line => line.map(which => which.join())), name: look(contender).name, xgap: 2, ygap: 2,
      ...(few ? { text: z.map(line => line.map(value => value === null ? "" : value.toPrecision(3))), texttemplate: "%{text}" } : {}),
      hovertemplate: `${look(contender).name}<br>${safe(axisOf[x].label)} %{x}, ${safe(axisOf[y].label)} %{y}: %{z:.4g}<extra></extra>`,
    });
    const axis = { type: "category", showgrid: false, showline: false };
    layout[`xaxis${suffix}`] = axisLayout("", { ...axis, domain: [left, left + size[0]], anchor: `y${suffix}` });
    layout[`yaxis${suffix}`] = axisLayout(column ? "" : safe(axisOf[y].label), { ...axis, domain: [Math.max(0, top - size[1]), top], anchor: `x${suffix}` });
    const label = { showarrow: false, xref: "paper", yref: "paper" };
    layout.annotations.push({ ...label, text: `<b>${look(contender).name}</b>`, x: left, y: top, xanchor: "left", yanchor: "bottom" });
    if (index + across >= maps.length) layout.annotations.push({
      ...label, text: safe(axisOf[x].label), x: left + size[0] / 2, y: Math.max(0, top - size[1]), xanchor: "center", yanchor: "top", yshift: -24 });
    at.forEach((line, j) => line.forEach((which, i) => which.length && rows.push([data.contenders[contender].name, columns[i], lines_[j], which.length, z[j][i]])));
  });
  layout.coloraxis = { colorscale: "Cividis", reversescale: data.lower, colorbar: { orientation: "h", thickness: 10, len: 0.6, y: 1, yanchor: "bottom", ypad: 26, outlinewidth: 0, title: { text: words(data.metric), side: "top" } } };
  layout.margin.t = 96;
  layout.height += 68;
  return { data: traces, layout, table: { head: ["contender", axisOf[x].label, axisOf[y].label, "n", `mean ${words(data.metric)}`], rows } };
};

// Parallel coordinates: one line per done run, from setting to setting to its result.
draw.parallel = () => {
  const done = everyRun.filter(run => kept[run] && isDone(run) && runs.cell[run] >= 0 && Number.isFinite(valueOf(run, data.metric)) && !hidden.has(data.cells[runs.cell[run]].contender));
  if (!done.length) return null;
  const results = done.map(run => valueOf(run, data.metric)), low = Math.min(...results), high = Math.max(...results);
  const spread = (value, from, to) => to > from ? (value - from) / (to - from) : 0.5;
  const places = data.axes.map(({ levels, numeric, log }) => {
    const scale = level => log ? Math.log(level) : Number(level), numbers = levels.filter(level => level !== "-").map(scale);
    return numeric && levels.length > 8 ? level => spread(scale(level), Math.min(...numbers), Math.max(...numbers))
      : level => spread(levels.indexOf(level), 0, levels.length - 1);
  });
  const count = data.axes.length, groups = new Map();
  for (const run of done) {
    const { contender, settings } = data.cells[runs.cell[run]];
    const trace = groups.get(contender) ?? groups.set(contender, { x: [], y: [], customdata: [] }).get(contender);
    const shift = ((run * 7919) % 101 / 101 - 0.5) * 0.035;  // runs with the same settings lie side by side
    const heights = settings.map((level, at) => level === "-" ? null : places[at](level) + shift);
    trace.x.push(...settings.map((_, at) => at), count, null);
    trace.y.push(...heights, spread(valueOf(run, data.metric), low, high), null);
    trace.customdata.push(...Array(count + 1).fill(String(run)), null);
  }
  const traces = [...groups].map(([contender, trace]) => ({
    type: "scatter", mode: "lines+markers", ...trace, name: look(contender).name, opacity: done.length > 200 ? 0.35 : 0.6,
    line: { color: look(contender).colour, width: 1.2 }, marker: { color: look(contender).colour, size: 3.5, symbol: look(contender).symbol },
    hovertemplate: `${look(contender).name}<extra></extra>`,
  }));
  const names = [...data.axes.map(axis => axis.label), words(data.metric)];
  const marks = data.axes.flatMap(({ levels }, at) => (levels.length <= 8 ? levels : [levels[0], levels.at(-1)])
    .filter(level => level !== "-").map(level => ({ x: at, y: places[at](level), text: safe(level) })));
  marks.push({ x: count, y: 0, text: number(low) }, { x: count, y: 1, text: number(high) });
  const layout = layoutOf(axisLayout("", { tickvals: names.map((_, at) => at), ticktext: names.map(safe), range: [-0.35, count + 0.35], side: "top", showgrid: false }), axisLayout("", { visible: false, range: [-0.06, 1.06] }), 420);
  layout.shapes = names.map((_, at) => ({ type: "line", x0: at, x1: at, y0: -0.04, y1: 1.04, line: { color: theme.weak, width: 1.2 } }));
  layout.annotations = marks.map(mark => ({ ...mark, showarrow: false, xanchor: mark.x === count ? "left" : "right", xshift: mark.x === count ? 5 : -5, font: { size: 11 }, bgcolor: theme.paper, borderpad: 1 }));
  const rows = done.map(run => [runs.name[run], ...data.cells[runs.cell[run]].settings, runs.seed[run], valueOf(run, data.metric)]);
  return { data: traces, layout, table: { head: ["run", ...names.slice(0, -1), "seed", words(data.metric)], rows } };
};
