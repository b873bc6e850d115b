// The panel of a run: its results, its config, and where its files are.

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
  const pairOf = ([name, text]) => [element("dt", {}, name), element("dd", {}, text)];
  const definitions = pairs => element("dl", {}, ...pairs.flatMap(pairOf));
  const links = [
    ...(runs.path[run] ? [["Directory", ""], ["job.log", "job.log"], ["config.yaml", "config.yaml"]] : [])
      .map(([name, file]) => [name, `${runs.path[run]}/${file}`]),
    ...(runs.url[run] ? [["W&B", runs.url[run]]] : []),
  ].map(([name, href]) => element("a", { href }, name));
  const results = Object.keys(runs.columns).filter(name => Number.isFinite(valueOf(run, name)))
    .map(name => [words(name), amount(name, valueOf(run, name))]);
  const differs = Object.entries(data.configs.varying).map(([key, column]) => [key, value(column)])
    .filter(([, text]) => text !== "-");
  const lost = ["failed", "diverged"].includes(runs.state[run]);
  const parts = [
    element("p", {}, element("span", { className: lost ? "bad" : "" }, runs.state[run]), `, seed ${runs.seed[run]}`),
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
  if (panel.open) close.focus();
  else panel.showModal();
  panel.scrollTop = 0;
}

document.addEventListener("click", event => {
  const link = event.target.closest?.("a[data-run]");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  showRun(Number(link.dataset.run));
});

