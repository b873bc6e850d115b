// The table under a filter, and the filter itself.

// ---- the table under a filter

const table = $("#cells");
const asWritten = [...table.tBodies[0].rows].map(row => ({ row, className: row.className, html: row.innerHTML }));

const entries = {
  runs: which => [String(which.length)],
  n: (which, of) => [String(valuesOf(which, of).length)],
  interval: (which, of) => {
    const found = estimate(valuesOf(which, of));
    return [interval(found), found.mean, found.half];
  },
  time: (which, of) => { const { mean } = estimate(valuesOf(which, of)); return [milliseconds(mean), mean]; },
  steps: (_, of, cell) => {
    const ended = endedRuns(cell);
    if (!ended.length) return ["-"];
    const values = ended.map(run => runs.columns[of][run] ?? Infinity), middle = median(values);
    const reached = `(${values.filter(Number.isFinite).length}/${ended.length})`;
    return [`${Number.isFinite(middle) ? short(middle) : "-"} ${reached}`, middle];
  },
  boot: () => ["all runs only"],
};
for (const kind of ["mean", "std", "median", "worst"])
  entries[kind] = (which, of) => { const value = estimate(valuesOf(which, of))[kind]; return [number(value), value]; };

function lost(cell) {
  const counts = {};
  for (const state of keptRuns(cell).map(run => runs.state[run]))
    if (state !== "done" && state !== "duplicate") counts[state] = (counts[state] ?? 0) + 1;
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
      const [text, value, half] = kind === "lost" ? [lost(cell)] : entries[kind](which, of, cell);
      entry.replaceChildren(text, ...$$(".star", entry));
      for (const [name, exact] of Object.entries({ value, half })) {
        delete entry.dataset[name];
        if (Number.isFinite(exact)) entry.dataset[name] = exact;
      }
    });
  }
  if (filtering()) rank(means);
}

// Within a setting the best mean first, and of the chosen ones the first in bold.
function rank(means) {
  const condition = row => data.cells[row.dataset.cell].condition;
  const worth = row => Number.isFinite(means.get(row)) ? means.get(row) * (data.lower ? 1 : -1) : Infinity;
  const order = (a, b) => condition(a) - condition(b) || (worth(a) > worth(b)) - (worth(a) < worth(b));
  const sorted = [...means.keys()].filter(row => !row.hidden).sort(order);
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
  const chosen = data.filters.map(({ key, levels }, at) => [key, levels.filter((_, code) => ticked[at].has(code))]);
  return chosen.filter(([, levels]) => levels.length);
}

function filterChanged() {
  applyFilter();
  fillTable();
  // Who asks for one tuned setting asks for those that were not chosen too.
  const tuned = data.filters.some(({ key }, at) => ticked[at].size && axisOf[key]?.role === "tuned"), tried = $("#tried");
  if (tuned && tried) tried.checked = true;
  for (const row of $$("#runs tbody tr")) row.hidden = !kept[row.dataset.run];
  tellFilter();
  redraw();
}

function tellFilter() {
  if (!note) return;
  note.hidden = !filtering();
  if (note.hidden) return note.replaceChildren();
  const quoted = text => /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'"'"'`)}'`;
  const asked = where().map(([key, levels]) => `${key}=${levels.join(",")}`);
  const command = [data.command, "--where", ...[...data.where, ...asked].map(quoted)].join(" ");
  note.replaceChildren(
    element("p", {}, element("strong", {}, `Filter on: ${kept.filter(Boolean).length} of ${kept.length} runs. `),
      "The table, the runs and the figures drawn from runs show these alone. The verdict, the evidence and the ",
      "settings chosen (*) remain those of all runs. To compute everything again:"),
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

