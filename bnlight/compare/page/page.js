// The page itself: theme, filters, legend, table, figures drawn when they come into sight, and the run panel.

const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// ---- theme

const systemDark = matchMedia("(prefers-color-scheme: dark)");
let printing = false;

// A browser may forbid storage to a file: then the choice lasts as long as the page.
function remembered(choice) {
  try {
    if (choice !== undefined) localStorage.setItem("bnlight-theme", choice);
    return localStorage.getItem("bnlight-theme");
  } catch { return choice ?? null; }
}

function wear(choice) {
  if (choice === "dark" || choice === "light") document.documentElement.dataset.theme = choice;
  const dark = (document.documentElement.dataset.theme ?? (systemDark.matches ? "dark" : "light")) === "dark";
  theme = dark && !printing ? themes.dark : themes.light;
  const other = dark ? "light" : "dark", control = $("#theme");
  control.hidden = false;
  control.textContent = `${capital(other)} theme`;
  control.onclick = () => { wear(remembered(other) ?? other); redraw(); };
  for (const line of $$(".legend [data-contender]")) line.replaceWith(swatch(Number(line.dataset.contender)));
}

// ---- figures

const figures = data.figures.map((spec, at) => ({ spec, frame: $(`[data-figure="${at}"]`), stale: true }));
const touch = matchMedia("(pointer: coarse)").matches;

const build = (figure, width) => draw[figure.spec.kind](figure.spec, { width, band: $("[name=band]:checked")?.value });

function drawFigure(figure) {
  figure.stale = false;
  const chart = $(".chart", figure.frame), width = printing ? (figure.frame.classList.contains("wide") ? 690 : 335) : chart.clientWidth;
  const made = build(figure, width);
  figure.frame.classList.toggle("empty", !made);
  if (!made) {
    if (chart.data) Plotly.purge(chart);
    chart.textContent = "No done run under this filter.";
    return;
  }
  if (!chart.data) chart.textContent = "";
  const layout = { ...made.layout, dragmode: touch ? false : "zoom", ...(printing ? { width } : { autosize: true }) };
  Plotly.react(chart, made.data, layout, { displayModeBar: false, responsive: true });
  if (!figure.listens) chart.on("plotly_click", ({ points }) => showRuns(points[0].customdata));
  figure.listens = true;
  const numbers = $("details.numbers", figure.frame);
  if (numbers?.open) fillNumbers(figure, numbers);
}

const sight = new IntersectionObserver(entries => {
  for (const { target, isIntersecting } of entries) {
    const figure = figures[target.dataset.figure];
    if (isIntersecting && figure.stale) drawFigure(figure);
  }
}, { rootMargin: "200px" });

// What is in sight is drawn at once, the rest when it comes into sight.
function redraw() {
  for (const figure of figures) {
    figure.stale = true;
    sight.unobserve(figure.frame);
    sight.observe(figure.frame);
  }
}

// The same numbers as text: for a screen reader, and for whoever wants them.
function fillNumbers(figure, place) {
  const { table: { head, rows } } = build(figure, 900) ?? { table: { head: [], rows: [] } };
  const numeric = head.map((_, at) => rows.every(row => row[at] === null || typeof row[at] === "number"));
  const cellsOf = row => row.map((value, at) => {
    const cell = element("td", { className: numeric[at] ? "number" : "" }, typeof value === "number" ? short(value) : value ?? "-");
    if (typeof value === "number") cell.dataset.value = value;
    return cell;
  });
  const titles = head.map((title, at) => element("th", { scope: "col", className: numeric[at] ? "number" : "" }, title));
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...titles)),
    element("tbody", {}, ...rows.map(row => element("tr", {}, ...cellsOf(row)))));
  const exports = element("div", { className: "exports" });
  offerTable(exports, table, figure.frame.querySelector("figcaption").textContent);
  $("summary", place).nextSibling?.remove();
  place.append(element("div", {}, element("div", { className: "scroll", tabIndex: 0 }, table), exports));
}

for (const figure of figures) {
  const title = $("figcaption", figure.frame).textContent + (figure.spec.condition ? `, ${figure.spec.condition}` : "");
  const numbers = element("details", { className: "numbers" }, element("summary", {}, "Numbers"));
  numbers.addEventListener("toggle", () => numbers.open && fillNumbers(figure, numbers));
  const exports = element("div", { className: "exports" });
  for (const format of ["svg", "png"]) exports.append(button(format.toUpperCase(), `${title}: save as ${format.toUpperCase()}`,
    () => saveFigure(width => build(figure, width), title, format)));
  figure.frame.append(element("div", { className: "tools" }, numbers, exports));
}

for (const band of $$("[name=band]")) band.addEventListener("change", redraw);

// ---- legend

const dashes = { solid: "", dash: "7 4", dot: "2 3", dashdot: "7 3 2 3" };
const shapes = {
  circle: "M13 1a4 4 0 1 0 .01 0Z", square: "M9.5 1.5h7v7h-7Z", diamond: "M13 0l5 5-5 5-5-5Z", "triangle-up": "M13 0l5 9H8Z",
  "triangle-down": "M13 10L8 1h10Z", cross: "M11.3 0h3.4v3.3H18v3.4h-3.3V10h-3.4V6.7H8V3.3h3.3Z", pentagon: "M13 0l5 3.8-1.9 5.9H9.9L8 3.8Z",
  star: "M13 0l1.3 3.5 3.7.2-2.9 2.3 1 3.6L13 7.6 9.9 9.6l1-3.6L8 3.7l3.7-.2Z",
};

function swatch(contender) {
  const { colour, dash, symbol } = look(contender), holder = document.createElement("span");
  holder.innerHTML = `<svg width="26" height="10" viewBox="0 0 26 10" aria-hidden="true" data-contender="${contender}"><path d="M0 5h26" `
    + `stroke="${colour}" stroke-width="2" stroke-dasharray="${dashes[dash]}"/><path d="${shapes[symbol]}" fill="${colour}"/></svg>`;
  return holder.firstChild;
}

for (const legend of $$(".legend")) data.contenders.forEach(({ name }, contender) => {
  if (!allCells.some(cell => data.cells[cell].contender === contender && runsOf[cell].some(isDone))) return;
  const toggle = button("", `${name}: show or hide`, () => {
    if (!hidden.delete(contender)) hidden.add(contender);
    toggle.setAttribute("aria-pressed", String(!hidden.has(contender)));
    redraw();
  });
  toggle.setAttribute("aria-pressed", "true");
  toggle.append(swatch(contender), name);
  legend.append(toggle);
});

// ---- the table under a filter

const table = $("#cells"), asWritten = table ? [...table.tBodies[0].rows].map(row => ({ row, className: row.className, html: row.innerHTML })) : [];

const entries = {
  n: which => [String(which.length)],
  interval: (which, of) => { const found = estimate(valuesOf(which, of)); return [interval(found), found.mean, found.half]; },
  time: (which, of) => { const { mean } = estimate(valuesOf(which, of)); return [milliseconds(mean), mean]; },
  steps: (which, of) => {
    if (!which.length) return ["-"];
    const values = which.map(run => runs.columns[of][run] ?? Infinity), middle = median(values);
    return [`${Number.isFinite(middle) ? short(middle) : "-"} (${values.filter(Number.isFinite).length}/${which.length})`, middle];
  },
  boot: () => ["all runs only"],
};
for (const kind of ["mean", "std", "median", "worst"])
  entries[kind] = (which, of) => { const value = estimate(valuesOf(which, of))[kind]; return [number(value), value]; };

function lost(cell) {
  const counts = {};
  for (const run of keptRuns(cell)) if (!["done", "duplicate"].includes(runs.state[run])) counts[runs.state[run]] = (counts[runs.state[run]] ?? 0) + 1;
  return Object.keys(counts).sort().map(state => `${counts[state]} ${state}`).join(", ");
}

function fillTable() {
  const heads = [...table.tHead.rows[0].cells];
  const means = new Map();
  for (const { row, className, html } of asWritten) {
    row.innerHTML = html;
    row.className = className;
    row.hidden = false;
    table.tBodies[0].append(row);
    if (!filtering()) continue;
    const cell = Number(row.dataset.cell), which = doneRuns(cell);
    row.hidden = !keptRuns(cell).length;
    means.set(row, estimate(valuesOf(which, data.metric)).mean);
    heads.forEach(({ dataset: { kind, of } }, at) => {
      const entry = row.cells[at];
      if (kind === "setting") return;
      const [text, value, half] = kind === "lost" ? [lost(cell)] : entries[kind](which, of);
      entry.replaceChildren(text, ...$$(".star", entry));
      for (const [name, exact] of Object.entries({ value, half })) Number.isFinite(exact) ? entry.dataset[name] = exact : delete entry.dataset[name];
    });
  }
  if (filtering()) rank(means);
}

// Within a setting the best mean first, and of the chosen ones the first in bold.
function rank(means) {
  const condition = row => data.cells[row.dataset.cell].condition;
  const worth = row => Number.isFinite(means.get(row)) ? means.get(row) * (data.lower ? 1 : -1) : Infinity;
  const sorted = [...means.keys()].filter(row => !row.hidden).sort((a, b) => condition(a) - condition(b) || (worth(a) > worth(b)) - (worth(a) < worth(b)));
  const led = new Set();
  let before = null;
  for (const row of sorted) {
    const leads = data.cells[row.dataset.cell].chosen && Number.isFinite(means.get(row)) && !led.has(condition(row));
    if (leads) led.add(condition(row));
    row.classList.toggle("lead", leads);
    row.classList.toggle("section", before !== null && before !== condition(row));
    before = condition(row);
    table.tBodies[0].append(row);
  }
}

// ---- filters, kept in the address so that a view can be shared

const form = $("#filters"), note = $("#filtered");

function where() {
  return data.filters.flatMap(({ key, levels }, at) => ticked[at].size ? [[key, [...ticked[at]].sort((a, b) => a - b).map(code => levels[code])]] : []);
}

function filterChanged() {
  applyFilter();
  if (table) fillTable();
  for (const row of $$("#runs tbody tr")) row.hidden = !kept[row.dataset.run];
  tellFilter();
  redraw();
}

function tellFilter() {
  if (!note) return;
  note.hidden = !filtering();
  if (note.hidden) return note.replaceChildren();
  const quoted = text => /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'"'"'`)}'`;
  const asked = where().map(([key, levels]) => `${key}=${levels.map(level => level === "-" ? "null" : level).join(",")}`);
  const command = [data.command, "--where", ...[...data.where, ...asked].map(quoted)].join(" ");
  note.replaceChildren(
    element("p", {}, element("strong", {}, `Filter on: ${kept.filter(Boolean).length} of ${kept.length} runs. `),
      "The table, the runs and the figures drawn from runs show these alone. The verdict and the evidence remain those of all runs. To compute everything again:"),
    element("code", {}, command), button("Show all runs", "Clear the filter", () => setFilter(new URLSearchParams())));
}

// The hash holds one entry per field, and the run whose panel is open.
const state = () => new URLSearchParams(location.hash.slice(1));

function setFilter(parameters) {
  data.filters.forEach(({ key, levels }, at) => {
    ticked[at].clear();
    for (const level of parameters.getAll(key)) if (levels.includes(level)) ticked[at].add(levels.indexOf(level));
  });
  if (form) for (const box of $$("input", form)) box.checked = ticked[box.name].has(Number(box.value));
  writeState();
  filterChanged();
}

function writeState(run = state().get("run")) {
  const parameters = new URLSearchParams(where().flatMap(([key, levels]) => levels.map(level => [key, level])));
  if (run) parameters.set("run", run);
  const hash = parameters.toString();
  try { history.replaceState(null, "", hash ? `#${hash}` : location.pathname); } catch { location.hash = hash; }
}

if (form) {
  form.hidden = false;
  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("change", ({ target: { name, value, checked } }) => {
    ticked[name][checked ? "add" : "delete"](Number(value));
    writeState();
    filterChanged();
  });
}

// ---- the panel of a run

const panel = $("#panel");
panel.addEventListener("close", () => writeState(null));
panel.addEventListener("click", event => { if (event.target === panel) panel.close(); });

// `which` is a list of runs, as the points of a figure carry it: one run, or those behind a mean.
function showRuns(which) {
  const listed = String(which ?? "").split(",").filter(Boolean).map(Number);
  if (listed.length === 1) return showRun(listed[0]);
  if (!listed.length) return;
  const rows = listed.map(run => element("li", {}, button(runs.name[run], "Show this run", () => showRun(run)),
    ` seed ${runs.seed[run]}: ${words(data.metric)} ${number(valueOf(run, data.metric))}`));
  fillPanel(`${listed.length} runs behind this point`, element("ul", { className: "listed" }, ...rows));
}

function showRun(run) {
  const value = ({ levels, codes }) => codes[run] < 0 ? "-" : levels[codes[run]];
  const definitions = pairs => element("dl", {}, ...pairs.flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, text)]));
  const links = [
    ...(runs.path[run] ? [["Directory", `${runs.path[run]}/`], ["job.log", `${runs.path[run]}/job.log`], ["config.yaml", `${runs.path[run]}/config.yaml`]] : []),
    ...(runs.url[run] ? [["W&B", runs.url[run]]] : []),
  ].map(([name, href]) => element("a", { href }, name));
  const results = Object.keys(runs.columns).filter(name => Number.isFinite(valueOf(run, name)))
    .map(name => [words(name), amount(name, valueOf(run, name))]);
  const differs = Object.entries(data.configs.varying).map(([key, column]) => [key, value(column)]).filter(([, text]) => text !== "-");
  const parts = [
    element("p", {}, element("span", { className: ["failed", "diverged"].includes(runs.state[run]) ? "bad" : "" }, runs.state[run]), `, seed ${runs.seed[run]}`),
    element("p", { className: "links" }, ...links),
    ...(runs.error[run] ? [element("code", { className: "trace" }, runs.error[run])] : []),
    element("h3", {}, "Results"), definitions(results),
    element("h3", {}, "Config, where runs differ"), definitions(differs),
    element("details", {}, element("summary", {}, "Config, the same in all runs"), definitions(Object.entries(data.configs.same))),
  ];
  fillPanel(runs.name[run], ...parts);
  writeState(runs.key[run]);
}

function fillPanel(title, ...parts) {
  const close = button("Close", "Close this panel (Escape)", () => panel.close());
  close.className = "close";
  panel.replaceChildren(close, element("h2", { id: "panel-title" }, title), ...parts);
  if (!panel.open) panel.showModal();
  panel.scrollTop = 0;
}

document.addEventListener("click", event => {
  const link = event.target.closest?.("a[data-run]");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  showRun(Number(link.dataset.run));
});

// ---- tables: exports everywhere, and columns of the runs that sort

for (const place of $$(".exports[data-table]")) {
  const target = document.getElementById(place.dataset.table);
  offerTable(place, target, target.closest("[aria-label]").getAttribute("aria-label"));
}

for (const [at, head] of $$("#runs th").entries()) {
  const sort = button(head.textContent, "Sort by this column", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of $$("#runs th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = $("#runs tbody"), key = row => row.cells[at].dataset.value ?? row.cells[at].textContent;
    const order = (a, b) => key(a).localeCompare(key(b), "en", { numeric: true });
    const missing = row => key(row) === "-";
    body.append(...[...body.rows].sort((a, b) => missing(a) - missing(b) || order(a, b) * (down ? -1 : 1)));
  });
  head.replaceChildren(sort);
}

// ---- begin

systemDark.addEventListener("change", () => { wear(); redraw(); });
addEventListener("beforeprint", () => { printing = true; wear(); figures.filter(({ frame }) => frame.offsetParent).forEach(drawFigure); });
addEventListener("afterprint", () => { printing = false; wear(); redraw(); });
addEventListener("hashchange", () => setFilter(state()));
wear(remembered());
if (state().size) setFilter(state());
else redraw();
const linked = runs.key.indexOf(state().get("run"));
if (linked >= 0) showRun(linked);
