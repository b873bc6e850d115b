"""The style sheet and the script of the page: light, dark, phone and print."""

STYLE = """
:root { color-scheme: light dark;
  --page: #fff; --ink: #20242b; --soft: #5b6270; --rule: #e1e4e9; --panel: #f6f7f9; --link: #0b5cad;
  --bad: #b3261e; --bad-panel: #fdf1f0; --mark: #f0f5fb; }
@media (prefers-color-scheme: dark) { :root {
  --page: #14171c; --ink: #e2e5ea; --soft: #9aa3b2; --rule: #323842; --panel: #1b1f26; --link: #7db8f5;
  --bad: #ff9a90; --bad-panel: #2b1c1c; --mark: #1b2531; } }
@media print { :root { color-scheme: light;
  --page: #fff; --ink: #000; --soft: #444; --rule: #ccc; --panel: #f6f7f9; --link: #000; --bad: #8c1d18;
  --bad-panel: #fff; --mark: #f0f0f0; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main, footer { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
.kicker { margin: 40px 0 6px; color: var(--soft); font-size: 14px; letter-spacing: .02em; }
h1 { font-size: clamp(21px, 3.2vw, 29px); line-height: 1.3; font-weight: 640; margin: 0 0 14px;
  max-width: 34em; text-wrap: pretty; }
h2 { font-size: 20px; font-weight: 640; margin: 52px 0 6px; }
h3 { font-size: 16px; font-weight: 640; margin: 28px 0 4px; }
p, li { max-width: 72ch; }
p { margin: 6px 0; }
.soft, figcaption, footer { color: var(--soft); font-size: 14px; }
ul { padding-left: 1.2em; margin: 10px 0; }
li { margin: 4px 0; }
a { color: var(--link); text-underline-offset: 2px; }
.scroll { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 15px; }
th, td { padding: 7px 14px 7px 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--rule); }
th { font-weight: 600; font-size: 13px; color: var(--soft); vertical-align: bottom; }
th:last-child, td:last-child { padding-right: 4px; }
td.number, th.number { text-align: right; white-space: nowrap; }
td:first-child, th:first-child { padding-left: 4px; }
tr.lead td { font-weight: 640; background: var(--mark); }
tr.section td { border-top: 2px solid var(--rule); }
.runs { font-size: 14px; }
.runs td { padding-top: 5px; padding-bottom: 5px; }
.runs td.job { white-space: nowrap; }
.runs tr.lost td { background: var(--bad-panel); }
.bad { color: var(--bad); font-weight: 600; }
.error { border-left: 3px solid var(--bad); background: var(--bad-panel); padding: 10px 14px; margin: 10px 0;
  break-inside: avoid; }
.error code { display: block; margin: 4px 0; white-space: pre-wrap; overflow-wrap: anywhere; }
code { font: 13.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.figures { display: grid; gap: 12px 28px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); }
figure { margin: 8px 0; min-width: 0; break-inside: avoid; }
figcaption { color: var(--ink); font-weight: 600; }
.chart { width: 100%; overflow: hidden; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 6px; margin: 12px 0 4px; }
.legend button { font: inherit; font-size: 14px; color: inherit; background: none;
  border: 1px solid transparent; border-radius: 6px; padding: 3px 9px 3px 5px; cursor: pointer;
  display: inline-flex; align-items: center; gap: 6px; }
.legend button:hover, .legend button:focus-visible { border-color: var(--rule); background: var(--panel); }
.legend button[aria-pressed=false] { opacity: .4; text-decoration: line-through; }
.legend svg { flex: none; }
summary { cursor: pointer; color: var(--link); margin: 8px 0; }
footer { border-top: 1px solid var(--rule); margin-top: 56px; padding-top: 14px; padding-bottom: 40px; }
footer p { max-width: none; overflow-wrap: anywhere; }
@media (max-width: 600px) { main, footer { padding: 0 16px; }
  .kicker { margin-top: 22px; } h2 { margin-top: 38px; }
  table { font-size: 14px; } th, td { padding-right: 12px; } }
@media print { body { font-size: 11pt; } main, footer { max-width: none; padding: 0; }
  h1 { font-size: 17pt; }
  h2 { break-after: avoid; margin-top: 26px; } h3 { break-after: avoid; }
  .figures { grid-template-columns: 1fr 1fr; }
  .scroll { overflow: visible; } table, .runs { font-size: 9pt; } th, td { padding-right: 8px; }
  .runs td.job { white-space: normal; overflow-wrap: anywhere; min-width: 9em; }
  a { text-decoration: none; } tr { break-inside: avoid; } .legend button { padding-left: 0; } }
"""

SCRIPT = """
(() => {
  const read = id => JSON.parse(document.getElementById(id).textContent);
  const figures = read("figures"), darker = read("theme"), hidden = new Set();
  const dark = matchMedia("(prefers-color-scheme: dark)"), touch = matchMedia("(pointer: coarse)").matches;
  let printing = false;
  const themed = text => dark.matches && !printing
    ? text.replace(/(rgba?[(])([0-9]+,[0-9]+,[0-9]+)/g, (all, head, light) => head + (darker[light] || light))
    : text;
  function draw() {
    for (const [id, spec] of Object.entries(figures)) {
      const { data, layout } = JSON.parse(themed(JSON.stringify(spec)));
      for (const trace of data) trace.visible = !hidden.has(trace.meta);
      layout.dragmode = touch ? false : "zoom";  // on a phone a finger scrolls the page
      if (printing) layout.width = 335; else layout.autosize = true;
      Plotly.react(id, data, layout, { displayModeBar: false, responsive: true });
    }
    for (const line of document.querySelectorAll(".legend line"))
      line.setAttribute("stroke", themed(line.dataset.colour));
  }
  for (const button of document.querySelectorAll(".legend button")) button.addEventListener("click", () => {
    const index = Number(button.dataset.index), show = !hidden.delete(index);
    if (show) hidden.add(index);
    for (const twin of document.querySelectorAll(`.legend button[data-index="${index}"]`))
      twin.setAttribute("aria-pressed", String(!show));
    draw();
  });
  dark.addEventListener("change", draw);
  addEventListener("beforeprint", () => { printing = true; draw(); });
  addEventListener("afterprint", () => { printing = false; draw(); });
  draw();
})();
"""
