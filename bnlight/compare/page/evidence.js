// The figures of the evidence. Python has computed it from all runs, so the filter does not touch them.

const contenderAt = name => data.contenders.findIndex(each => each.name === name);
const lookOf = name => look(contenderAt(name));

// Demšar's critical-difference diagram: an axis of mean ranks, and a bar over those that are not told apart.
draw.ranks = () => {
  const { contenders, mean_ranks: ranks, groups, critical_difference: apart } = data.ranking;
  const order = ranks.map((_, at) => at).sort((a, b) => ranks[a] - ranks[b]), count = order.length;
  const bars = groups.filter(group => group.length > 1).map(group => group.map(name => ranks[contenders.indexOf(name)]));
  const first = 0.7 + 0.32 * bars.length, half = Math.ceil(count / 2), traces = [], annotations = [];
  const line = (x, y, color, width) => ({ type: "scatter", mode: "lines", x, y, line: { color, width }, hoverinfo: "skip" });
  const edge = { left: 1 - 0.06 * count, right: count + 0.06 * count };
  order.forEach((at, place) => {
    const left = place < half, depth = first + 0.5 * (left ? place : count - 1 - place);
    const { name, colour, symbol } = lookOf(contenders[at]);
    traces.push(line([ranks[at], ranks[at], left ? edge.left : edge.right], [0, depth, depth], colour, 1.5), {
      type: "scatter", mode: "markers", x: [ranks[at]], y: [0], marker: { color: colour, symbol, size: 9 }, name,
      hovertemplate: `${name}: mean rank %{x:.2f}<extra></extra>`,
    });
    annotations.push({
      x: left ? edge.left : edge.right, y: depth, text: `${name} <b>${ranks[at].toFixed(2)}</b>`, showarrow: false,
      xanchor: left ? "right" : "left", xshift: left ? -5 : 5,
    });
  });
  bars.forEach((group, at) => traces.push(
    line([Math.min(...group) - 0.04, Math.max(...group) + 0.04], [0.35 + 0.32 * at, 0.35 + 0.32 * at], theme.ink, 5)));
  traces.push(line([1, 1 + apart], [-1.3, -1.3], theme.ink, 2));
  const text = `critical difference ${apart.toFixed(2)}`;
  annotations.push({ x: 1, y: -1.3, text, showarrow: false, xanchor: "left", yanchor: "bottom", yshift: 3 });
  const depth = first + 0.5 * half, longest = Math.max(...contenders.map(name => name.length)) + 5;
  const margin = Math.min(170, 20 + 7.4 * longest);
  const ticks = Array.from({ length: count }, (_, at) => at + 1);
  const label = { y: 0, showarrow: false, yanchor: "bottom", yshift: 8 };
  annotations.push(...ticks.map(rank => ({ ...label, x: rank, text: String(rank) })));
  const hiddenAxis = range => axisLayout("", { visible: false, range });
  const layout = layoutOf(hiddenAxis([edge.left, edge.right]), hiddenAxis([depth, -2.1]), 60 + 46 * (depth + 1));
  const stroke = (x0, x1, y0, y1) => ({ type: "line", x0, x1, y0, y1, line: { color: theme.ink, width: 1.5 } });
  layout.shapes = [stroke(1, count, 0, 0), ...ticks.map(rank => stroke(rank, rank, 0, -0.16))];
  return {
    data: traces, layout: { ...layout, annotations, margin: { l: margin, r: margin, t: 4, b: 4 } },
    table: { head: ["contender", "mean rank"], rows: order.map(at => [contenders[at], ranks[at]]) },
  };
};

// Paired differences with their intervals, one row per pair; filled where the two are told apart.
draw.forest = ({ pairs }) => {
  const shown = pairs.map(at => data.pairs[at]).filter(pair => pair.difference !== null);
  if (!shown.length) return null;
  const tested = p => p === null ? "" : `, p (Holm) = ${p.toPrecision(2)}`;
  const hoverOf = pair => `${safe(pair.better)} over ${safe(pair.worse)}, n = ${pair.n}${tested(pair.p_holm)}`;
  const half = ({ low, high }) => low === null ? null : (high - low) / 2;
  const traces = [true, false].map(apart => {
    const rows = shown.map((pair, row) => ({ ...pair, row })).filter(pair => pair.told_apart === apart);
    const colour = apart ? theme.good : theme.weak;
    return {
      type: "scatter", mode: "markers", x: rows.map(pair => pair.difference), y: rows.map(pair => pair.row),
      marker: { color: colour, size: 10, symbol: apart ? "circle" : "circle-open" },
      error_x: errorBars(rows.map(half), colour),
      name: apart ? "told apart" : "not told apart",
      text: rows.map(hoverOf),
      hovertemplate: "%{text}<br>%{x:.4g}<extra></extra>",
    };
  });
  const y = axisLayout("", {
    tickvals: shown.map((_, row) => row), ticktext: shown.map(pair => `${safe(pair.better)} − ${safe(pair.worse)}`),
    range: [shown.length - 0.4, -0.6], gridcolor: "rgba(0,0,0,0)", ticklabelstandoff: 6,
  });
  const x = axisLayout("difference (better to the right)", { nticks: 6 });
  const layout = layoutOf(x, y, 84 + 26 * shown.length), line = { color: theme.weak, width: 1.2, dash: "dot" };
  layout.shapes = [{ type: "line", x0: 0, x1: 0, y0: 0, y1: 1, yref: "paper", line }];
  const rows = shown.map(pair => [pair.better, pair.worse, pair.n, pair.difference, pair.low, pair.high, pair.p_holm,
    pair.told_apart ? "yes" : "no"]);
  const head = ["better", "worse", "n", "difference", "low", "high", "p (Holm)", "told apart"];
  return { data: traces, layout, table: { head, rows } };
};

const units = {
  seconds_per_step: [1e3, "milliseconds per step"], seconds: [1, "seconds of the whole run"],
  peak_memory: [2 ** -20, "peak memory, MiB"],
};

// Quality against cost; the front is joined and filled, what it dominates is hollow.
draw.front = ({ front: at, condition }) => {
  const { quality, cost, points } = data.fronts[at], [scale, label] = units[cost] ?? [1, words(cost)];
  const shown = points.filter(point => point.condition === condition && !hidden.has(contenderAt(point.contender)));
  if (!shown.length) return null;
  const front = shown.filter(point => point.on_front).sort((a, b) => a.cost - b.cost);
  const costs = shown.map(point => point.cost * scale);
  const joined = {
    type: "scatter", mode: "lines", x: front.map(point => point.cost * scale), y: front.map(point => point.quality),
    line: { color: theme.weak, width: 1.4, dash: "dot", shape: "hv" }, hoverinfo: "skip",
  };
  const traces = shown.map(point => {
    const { name, colour, symbol } = lookOf(point.contender);
    const at = contenderAt(point.contender), place = data.conditions.indexOf(condition);
    const cell = data.cells.findIndex(each => each.chosen && each.contender === at && each.condition === place);
    return {
      type: "scatter", mode: "markers+text", x: [point.cost * scale], y: [point.quality], name, cliponaxis: false,
      text: [name], textposition: "top center", textfont: { size: 11 }, customdata: [runsOf[cell].filter(isDone).join()],
      marker: { color: colour, size: 11, symbol: symbol + (point.on_front ? "" : "-open"), line: { width: 2, color: colour } },
      hovertemplate: `${name}<br>%{x:.4g} ${label}<br>%{y:.4g} ${words(quality)}<extra></extra>`,
    };
  });
  const log = Math.min(...costs) > 0 && Math.max(...costs) / Math.min(...costs) > 8;
  const x = axisLayout(label, log ? logAxis(Math.min(...costs), Math.max(...costs)) : { nticks: 6 });
  const rows = shown.map(point => [point.contender, point.cost * scale, point.quality, point.on_front ? "yes" : "no"]);
  const layout = layoutOf(x, axisLayout(words(quality)), 340);
  return { data: [joined, ...traces], layout, table: { head: ["contender", label, words(quality), "on the front"], rows } };
};
