// The last of it: export buttons, sorting, printing, and the first drawing.

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
    const body = $("#runs tbody"), shown = row => plain(row.cells[at]), missing = row => shown(row) === "-";
    const value = row => Number(row.cells[at].dataset.value ?? shown(row));
    const order = (a, b) => value(a) - value(b) || shown(a).localeCompare(shown(b));
    body.append(...[...body.rows].sort((a, b) => missing(a) - missing(b) || order(a, b) * (down ? -1 : 1)));
  });
  head.replaceChildren(sort);
}

// ---- begin

function followAddress() {
  setFilter(state());
  const linked = runs.key.indexOf(state().get("run"));
  if (linked >= 0) showRun(linked);
}

systemDark.addEventListener("change", () => { wear(); redraw(); });
addEventListener("beforeprint", () => {
  printing = true;
  wear();
  figures.filter(({ frame }) => frame.checkVisibility()).forEach(drawFigure);
});
addEventListener("afterprint", () => { printing = false; wear(); redraw(); });
addEventListener("hashchange", followAddress);
wear(remembered());
if (state().size) followAddress();
else redraw();
