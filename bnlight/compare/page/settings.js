// Figures over several settings at once: maps and parallel coordinates.

const hasResult = run => isDone(run) && Number.isFinite(valueOf(run, data.metric));
const given = levels => levels.filter(level => !unset(level));

// Of one contender the done runs at each pair of levels, as rows of columns; null where there are none at all.
function fieldsOf(contender, x, y) {
  const fields = new Map();
  for (const cell of allCells) if (data.cells[cell].contender === contender) {
    const place = [settingOf(cell, x), settingOf(cell, y)].join("\n");
    fields.set(place, [...(fields.get(place) ?? []), ...doneRuns(cell).filter(hasResult)]);
  }
  if (![...fields.values()].some(which => which.length)) return null;
  return given(axisOf[y].levels).map(level => given(axisOf[x].levels).map(other => fields.get(`${other}\n${level}`) ?? []));
}

// Where each of several maps stands: its domains, in as many columns as the width allows.
function places(count, width) {
  const across = Math.min(count, width < 560 ? 1 : width < 860 ? 2 : 3), down = Math.ceil(count / across);
  const gap = [across > 1 ? 0.26 / across : 0, down > 1 ? Math.min(0.34 / down, 0.2) : 0];
  const size = [(1 - gap[0] * (across - 1)) / across, (1 - gap[1] * (down - 1)) / down];
  const domains = Array.from({ length: count }, (_, at) => {
    const left = at % across * (size[0] + gap[0]), top = 1 - Math.floor(at / across) * (size[1] + gap[1]);
    return { x: [left, left + size[0]], y: [Math.max(0, top - size[1]), top], first: at % across === 0, last: at + across >= count };
  });
  return { down, domains };
}

// The mean over two settings: one map per contender, all on one colour scale.
draw.heat = ({ x, y }, { width }) => {
  const seen = data.contenders.map((_, contender) => contender).filter(contender => !hidden.has(contender));
  const maps = seen.map(contender => ({ contender, fields: fieldsOf(contender, x, y) })).filter(({ fields }) => fields);
  if (!maps.length) return null;
  const columns = given(axisOf[x].levels), lines = given(axisOf[y].levels), names = [x, y].map(key => safe(axisOf[key].label));
  const { down, domains } = places(maps.length, width), traces = [], rows = [];
  const layout = layoutOf({}, {}, 128 + down * (64 + 30 * Math.max(lines.length, 4)));
  Object.assign(layout, { annotations: [], margin: { l: 62, r: 8, t: 84, b: 44 } });
  maps.forEach(({ contender, fields }, index) => {
    const suffix = index ? String(index + 1) : "", { name } = look(contender), domain = domains[index];
    const means = fields.map(line => line.map(which => estimate(valuesOf(which, data.metric))));
    const z = means.map(line => line.map(({ n, mean }) => n ? mean : null));
    const labels = z.map(line => line.map(value => value === null ? "" : value.toPrecision(3)));
    traces.push({
      type: "heatmap", name, x: columns, y: lines, z, coloraxis: "coloraxis", xaxis: `x${suffix}`, yaxis: `y${suffix}`,
      customdata: fields.map(line => line.map(which => which.join())), xgap: 2, ygap: 2,
      ...(columns.length <= 6 && lines.length <= 12 ? { text: labels, texttemplate: "%{text}" } : {}),
      hovertext: means.map(line => line.map(({ n }) => `n = ${n}`)),
      hovertemplate: `${name}<br>${names[0]} %{x}, ${names[1]} %{y}: %{z:.4g} (%{hovertext})<extra></extra>`,
    });
    const axis = { type: "category", showgrid: false, showline: false };
    layout[`xaxis${suffix}`] = axisLayout("", { ...axis, domain: domain.x, anchor: `y${suffix}` });
    layout[`yaxis${suffix}`] = axisLayout(domain.first ? names[1] : "", { ...axis, domain: domain.y, anchor: `x${suffix}` });
    const label = { showarrow: false, xref: "paper", yref: "paper" }, middle = (domain.x[0] + domain.x[1]) / 2;
    layout.annotations.push({ ...label, text: `<b>${name}</b>`, x: domain.x[0], y: domain.y[1], xanchor: "left", yanchor: "bottom" });
    if (domain.last) layout.annotations.push({
      ...label, text: names[0], x: middle, y: domain.y[0], xanchor: "center", yanchor: "top", yshift: -24,
    });
    means.forEach((line, j) => line.forEach(({ n, mean }, i) => {
      if (n) rows.push([look(contender).label, columns[i], lines[j], n, mean]);
    }));
  });
  const bar = { orientation: "h", thickness: 10, len: 0.6, yref: "container", y: 1, yanchor: "top", ypad: 2, outlinewidth: 0 };
  const title = { text: words(data.metric), side: "top" };
  layout.coloraxis = { colorscale: "Cividis", reversescale: data.lower, colorbar: { ...bar, title } };
  const head = ["contender", axisOf[x].label, axisOf[y].label, "n", `mean ${words(data.metric)}`];
  return { data: traces, layout, table: { head, rows } };
};

const spread = (value, from, to) => to > from ? (value - from) / (to - from) : 0.5;

// How high a level stands on its axis, from 0 to 1: by its number where there are many, else in equal steps.
function heightOn({ levels, numeric, log }) {
  if (!numeric || levels.length <= 8) return level => spread(levels.indexOf(level), 0, levels.length - 1);
  const scale = level => log ? Math.log(level) : Number(level), numbers = given(levels).map(scale);
  return level => spread(scale(level), Math.min(...numbers), Math.max(...numbers));
}

// Parallel coordinates: one line per done run, from setting to setting to its result.
draw.parallel = () => {
  const shown = allCells.filter(cell => !hidden.has(data.cells[cell].contender));
  const drawn = shown.flatMap(doneRuns).filter(hasResult);
  if (!drawn.length) return null;
  const results = drawn.map(run => valueOf(run, data.metric)), low = Math.min(...results), high = Math.max(...results);
  const heights = data.axes.map(heightOn), count = data.axes.length;
  const traces = [...Map.groupBy(drawn, run => data.cells[runs.cell[run]].contender)].map(([contender, members]) => {
    const { name, colour, symbol } = look(contender), x = [], y = [], customdata = [];
    for (const run of members) {
      const shift = ((run * 7919) % 101 / 101 - 0.5) * 0.035;  // runs with the same settings lie side by side
      const levels = data.cells[runs.cell[run]].settings.map((level, at) => unset(level) ? null : heights[at](level) + shift);
      x.push(...levels.map((_, at) => at), count, null);
      y.push(...levels, spread(valueOf(run, data.metric), low, high), null);
      customdata.push(...Array(count + 1).fill(String(run)), null);
    }
    return {
      type: "scatter", mode: "lines+markers", name, x, y, customdata, opacity: drawn.length > 200 ? 0.35 : 0.6,
      line: { color: colour, width: 1.2 }, marker: { color: colour, size: 3.5, symbol }, hovertemplate: `${name}<extra></extra>`,
    };
  });
  const names = [...data.axes.map(axis => axis.label), words(data.metric)];
  const ends = levels => levels.length <= 8 ? levels : [levels[0], levels.at(-1)];
  const markAt = at => level => ({ x: at, y: heights[at](level), text: safe(level) });
  const marks = data.axes.flatMap(({ levels }, at) => ends(given(levels)).map(markAt(at)));
  marks.push({ x: count, y: 0, text: number(low) }, { x: count, y: 1, text: number(high) });
  const ticks = { tickvals: names.map((_, at) => at), ticktext: names.map(safe), range: [-0.35, count + 0.35] };
  const x = axisLayout("", { ...ticks, side: "top", showgrid: false, showline: false });
  const layout = layoutOf(x, axisLayout("", { visible: false, range: [-0.06, 1.06] }), 420);
  const line = { type: "line", y0: -0.04, y1: 1.04, line: { color: theme.weak, width: 1.2 } };
  layout.shapes = names.map((_, at) => ({ ...line, x0: at, x1: at }));
  const label = { showarrow: false, font: { size: 11 }, bgcolor: theme.paper, borderpad: 1 };
  layout.annotations = marks.map(mark => mark.x === count
    ? { ...label, ...mark, xanchor: "left", xshift: 5 } : { ...label, ...mark, xanchor: "right", xshift: -5 });
  const head = ["run", ...names.slice(0, -1), "seed", words(data.metric)];
  const rows = drawn.map(run => [runs.name[run], ...data.cells[runs.cell[run]].settings, runs.seed[run], valueOf(run, data.metric)]);
  return { data: traces, layout, table: { head, rows } };
};
