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

const titleOf = ({ frame }) => $(".chart", frame).getAttribute("aria-label");  // with its condition

const build = (figure, width) => draw[figure.spec.kind](figure.spec, { width, band: $("[name=band]:checked")?.value });

function drawFigure(figure) {
  figure.stale = false;
  figure.frame.classList.add("drawn");
  const chart = $(".chart", figure.frame), paper = figure.frame.classList.contains("wide") ? 690 : 335;
  const width = printing ? paper : chart.clientWidth;
  const made = build(figure, width);
  figure.frame.classList.toggle("empty", !made);
  if (!made) {
    if (chart.data) Plotly.purge(chart);
    chart.textContent = "Filter and legend leave nothing to draw here.";
    return;
  }
  const first = !chart.data;
  if (first) chart.textContent = "";
  const layout = { ...made.layout, dragmode: touch ? false : "zoom", ...(printing ? { width } : { autosize: true }) };
  Plotly.react(chart, made.data, layout, { displayModeBar: false, responsive: true });
  if (first) chart.on("plotly_click", ({ points }) => showRuns(points[0].customdata));
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
  const title = titleOf(figure);
  const { table: { head, rows } } = build(figure, 900) ?? { table: { head: [], rows: [] } };
  const numeric = value => value === null || typeof value === "number";
  const classes = head.map((_, at) => rows.every(row => numeric(row[at])) ? "number" : "");
  const cellsOf = row => row.map((value, at) => {
    const exact = typeof value === "number";
    const cell = element("td", { className: classes[at] }, exact ? short(value) : value ?? "-");
    if (exact) cell.dataset.value = value;
    return cell;
  });
  const titles = head.map((title, at) => element("th", { scope: "col", className: classes[at] }, title));
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...titles)),
    element("tbody", {}, ...rows.map(row => element("tr", {}, ...cellsOf(row)))));
  const exports = element("div", { className: "exports" });
  offerTable(exports, table, title);
  $("summary", place).nextSibling?.remove();
  const scroll = element("div", { className: "scroll", tabIndex: 0, role: "region", ariaLabel: `Numbers of ${title}` }, table);
  place.append(element("div", {}, scroll, exports));
}

for (const figure of figures) {
  const title = titleOf(figure);
  const numbers = element("details", { className: "numbers" }, element("summary", {}, "Numbers"));
  numbers.addEventListener("toggle", () => numbers.open && fillNumbers(figure, numbers));
  const exports = element("div", { className: "exports" });
  for (const format of ["svg", "png"]) {
    const name = format.toUpperCase(), action = () => saveFigure(width => build(figure, width), title, format);
    exports.append(button(name, `${title}: save as ${name}`, action));
  }
  figure.frame.append(element("div", { className: "tools" }, numbers, exports));
}

for (const band of $$("[name=band]")) band.addEventListener("change", redraw);

// ---- legend

const dashes = { solid: "", dash: "7 4", dot: "2 3", dashdot: "7 3 2 3" };
const shapes = {
  circle: "M13 1a4 4 0 1 0 .01 0Z", square: "M9.5 1.5h7v7h-7Z", diamond: "M13 0l5 5-5 5-5-5Z",
  "triangle-up": "M13 0l5 9H8Z", "triangle-down": "M13 10L8 1h10Z", pentagon: "M13 0l5 3.8-1.9 5.9H9.9L8 3.8Z",
  cross: "M11.3 0h3.4v3.3H18v3.4h-3.3V10h-3.4V6.7H8V3.3h3.3Z",
  star: "M13 0l1.3 3.5 3.7.2-2.9 2.3 1 3.6L13 7.6 9.9 9.6l1-3.6L8 3.7l3.7-.2Z",
};

function swatch(contender) {
  const { colour, dash, symbol } = look(contender), holder = document.createElement("span");
  const line = `<path d="M0 5h26" stroke="${colour}" stroke-width="2" stroke-dasharray="${dashes[dash]}"/>`;
  const size = `width="26" height="10" viewBox="0 0 26 10" aria-hidden="true"`;
  holder.innerHTML = `<svg ${size} data-contender="${contender}">${line}<path d="${shapes[symbol]}" fill="${colour}"/></svg>`;
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
