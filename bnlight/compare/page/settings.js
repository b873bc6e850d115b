// Figures over several settings at once: maps and parallel coordinates.

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
  const layout = layoutOf(axisLayout("", { tickvals: names.map((_, at) => at), ticktext: names.map(safe), range: [-0.35, count + 0.35], side: "top", showgrid: false, showline: false }), axisLayout("", { visible: false, range: [-0.06, 1.06] }), 420);
  layout.shapes = names.map((_, at) => ({ type: "line", x0: at, x1: at, y0: -0.04, y1: 1.04, line: { color: theme.weak, width: 1.2 } }));
  layout.annotations = marks.map(mark => ({ ...mark, showarrow: false, xanchor: mark.x === count ? "left" : "right", xshift: mark.x === count ? 5 : -5, font: { size: 11 }, bgcolor: theme.paper, borderpad: 1 }));
  const rows = done.map(run => [runs.name[run], ...data.cells[runs.cell[run]].settings, runs.seed[run], valueOf(run, data.metric)]);
  return { data: traces, layout, table: { head: ["run", ...names.slice(0, -1), "seed", words(data.metric)], rows } };
};
