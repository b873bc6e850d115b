// What can be taken away: every figure as SVG and PNG, every table as CSV, LaTeX and Markdown.

function save(name, type, content) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

const fileName = title => title.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-+|-+$/g, "") || "figure";

// The light theme on white, whatever the page wears, and with a legend: a figure goes into a paper.
async function saveFigure(build, title, format) {
  const before = theme;
  theme = themes.light;
  const { data: traces, layout, legend } = build(900);
  theme = before;
  const margin = { ...layout.margin, t: layout.margin.t + 12 };
  const showlegend = legend || layout.showlegend, white = { paper_bgcolor: "#ffffff", plot_bgcolor: "#ffffff" };
  const figure = { data: traces, layout: { ...layout, margin, showlegend, ...white } };
  const size = { width: 900, height: Math.max(layout.height, 320), scale: format === "png" ? 2 : 1 };
  const url = await Plotly.toImage(figure, { format, ...size }), content = url.slice(url.indexOf(",") + 1);
  if (format === "svg") save(`${fileName(title)}.svg`, "image/svg+xml", decodeURIComponent(content));
  else save(`${fileName(title)}.png`, "image/png", Uint8Array.from(atob(content), sign => sign.charCodeAt(0)));
}

const visible = element => !element.hidden && getComputedStyle(element).display !== "none";

const plain = element => element.textContent.replace(/[\u00a0\u2007]/g, " ").trim();

// The rows of a table as they are seen, or, `exact`, with the numbers behind what is shown and nothing where there is none.
function contents(table, exact = false) {
  const heads = [...table.tHead.rows[0].cells], lines = [...table.tBodies[0].rows].filter(visible);
  const columns = heads.map((head, at) => ({
    at, head: plain(head), numeric: head.classList.contains("number"), shown: exact || visible(head),
    half: exact && lines.some(row => row.cells[at].dataset.half !== undefined),
  })).filter(column => column.shown);
  const head = columns.flatMap(column => column.half ? [column.head.replace(/ ± .*/, ""), "± 95 % CI"] : [column.head]);
  const rows = lines.map(row => columns.flatMap(({ at, half }) => {
    const { dataset } = row.cells[at];
    const seen = plain(row.cells[at]), missing = /^-( |$)/.test(seen);
    const value = !exact ? seen : missing ? "" : dataset.value ?? seen;
    return half ? [value, dataset.half ?? ""] : [value];
  }));
  return { head, rows, numeric: columns.map(column => column.numeric) };
}

const writers = {
  CSV: ["csv", "text/csv", table => {
    const { head, rows } = contents(table, true);
    const field = value => /[",\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value;
    return [head, ...rows].map(row => row.map(field).join(",")).join("\n") + "\n";
  }],
  LaTeX: ["tex", "application/x-tex", table => {
    const { head, rows, numeric } = contents(table);
    const signs = {
      "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}",
      "±": "$\\pm$", "−": "$-$", "≥": "$\\geq$", "<": "$<$", ">": "$>$",
    };
    const field = value => value.replace(/[\\~^±−≥<>&%$#_{}]/g, sign => signs[sign] ?? `\\${sign}`);
    const line = row => `${row.map(field).join(" & ")} \\\\`;
    return [`\\begin{tabular}{${numeric.map(right => right ? "r" : "l").join("")}}`, "\\toprule", line(head), "\\midrule",
      ...rows.map(line), "\\bottomrule", "\\end{tabular}", ""].join("\n");
  }],
  Markdown: ["md", "text/markdown", table => {
    const { head, rows, numeric } = contents(table);
    const line = row => `| ${row.map(value => value.replace(/[\\|]/g, "\\$&")).join(" | ")} |`;
    return [line(head), `|${numeric.map(right => right ? "-:" : "-").join("|")}|`, ...rows.map(line), ""].join("\n");
  }],
};

function button(label, title, action) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = label;
  made.title = title;
  made.addEventListener("click", action);
  return made;
}

// The buttons below a table.
function offerTable(place, table, title) {
  for (const [label, [ending, type, write]] of Object.entries(writers))
    place.append(button(label, `${title}: save as ${label}`, () => save(`${fileName(title)}.${ending}`, type, write(table))));
}
