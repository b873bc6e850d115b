// The runs of the page, what the reader's filter leaves of them, and the statistics over those.

const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;
const everyRun = runs.name.map((_, run) => run);
const runsOf = data.cells.map(() => []);
everyRun.forEach(run => runs.cell[run] >= 0 && runsOf[runs.cell[run]].push(run));

// Of each field the values that are ticked; none ticked means all.
const ticked = data.filters.map(() => new Set());
let kept = everyRun.map(() => true);

const filtering = () => ticked.some(values => values.size);

function applyFilter() {
  kept = everyRun.map(run => data.filters.every((field, at) => !ticked[at].size || ticked[at].has(field.codes[run])));
}

const keptRuns = cell => runsOf[cell].filter(run => kept[run]);
const isDone = run => runs.state[run] === "done";
const isDiverged = run => runs.state[run] === "diverged";
const doneRuns = cell => keptRuns(cell).filter(isDone);
const endedRuns = cell => keptRuns(cell).filter(run => isDone(run) || isDiverged(run));
const valueOf = (run, name) => runs.columns[name]?.[run] ?? NaN;
const sum = values => values.reduce((total, value) => total + value, 0);

// One finite value per seed: the mean over the runs that have it.
function valuesOf(which, name) {
  const known = which.filter(run => Number.isFinite(valueOf(run, name)));
  const groups = Map.groupBy(known, run => runs.repeat[run]);
  return [...groups.values()].map(group => sum(group.map(run => valueOf(run, name))) / group.length);
}

// n, mean, standard deviation (n - 1), half-width of the 95 % interval t(0.975, n - 1) s / sqrt(n), median, worst.
function estimate(values, lower = data.lower) {
  const n = values.length;
  if (!n) return { n, mean: NaN, std: NaN, half: null, median: NaN, worst: NaN };
  const mean = sum(values) / n;
  const std = n > 1 ? Math.sqrt(sum(values.map(value => (value - mean) ** 2)) / (n - 1)) : NaN;
  const half = n > 1 ? data.t[n - 2] * std / Math.sqrt(n) : null;
  return { n, mean, std, half, median: median(values), worst: lower ? Math.max(...values) : Math.min(...values) };
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b), middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

// Whether a run has no such setting, or it is null.
const unset = level => level === "-" || level === "null";

// About four digits, as everywhere in a comparison; "-" for a missing number.
const number = value => Number.isFinite(value) ? value.toFixed(decimals(value)) : "-";

function decimals(value) {
  const size = Math.abs(value);
  if (!Number.isFinite(size) || size === 0) return 4;
  return size >= 1 ? Math.max(0, 4 - String(Math.trunc(size)).length) : Math.max(4, 2 - Math.floor(Math.log10(size)));
}

function interval({ mean, half }) {
  if (half === null) return number(mean);
  const digits = decimals(Math.max(Math.abs(mean), half));
  return `${mean.toFixed(digits)}\u00a0±\u00a0${half.toFixed(digits)}`;
}

function milliseconds(seconds) {
  if (!Number.isFinite(seconds)) return "-";
  const [value, unit] = seconds >= 1 ? [seconds, "s"] : [seconds * 1e3, "ms"];
  return `${value.toFixed(value >= 100 ? 0 : value >= 10 ? 1 : 2)} ${unit}`;
}

// A number of a run in the unit that its name implies.
function amount(name, value) {
  if (name === "peak_memory" && Number.isFinite(value)) return `${(value / 2 ** 20).toFixed(0)} MiB`;
  return name === "seconds_per_step" ? milliseconds(value) : number(value);
}

// Six digits without trailing zeros, for settings and ticks.
const short = value => String(Number(value.toPrecision(6)));

// Mean of a metric over seeds by step, as far as all runs got, with the values the band and the seeds need.
// Where runs were measured at different steps, each is interpolated linearly between its own.
function meanCurve(which, metric) {
  const { grids, grid, values } = data.history[metric];
  const curves = which.filter(run => values[run]).map(run => ({ run, x: grids[grid[run]], y: values[run] }));
  if (!curves.length) return null;
  const first = Math.max(...curves.map(curve => curve.x[0]));
  const last = Math.min(...curves.map(curve => curve.x.at(-1)));
  const steps = [...new Set(curves.flatMap(curve => curve.x))].filter(x => x >= first && x <= last);
  steps.sort((a, b) => a - b);
  const seeds = [...Map.groupBy(curves, ({ run }) => runs.repeat[run]).values()];
  const rows = seeds.map(group => meanOf(group.map(curve => interpolate(curve, steps))));
  return { curves, steps, at: steps.map((_, index) => estimate(rows.map(row => row[index]))), rows };
}

const meanOf = rows => rows[0].map((_, at) => sum(rows.map(row => row[at])) / rows.length);

function interpolate({ x, y }, steps) {
  let left = 0;
  return steps.map(step => {
    while (left < x.length - 2 && x[left + 1] <= step) left++;
    if (x[left] === step || x.length === 1) return y[left];
    return y[left] + (y[left + 1] - y[left]) * (step - x[left]) / (x[left + 1] - x[left]);
  });
}
