"use strict";
(() => {
  const { data, el } = archsearch;
  let selected = data.best;

  // Charts
  function draw(id, figure) {
    for (const trace of figure.data) {
      if (trace.hoverinfo === "text" && trace.customdata) trace.hovertext = trace.customdata.map((n) => data.candidates[n].hover);
    }
    archsearch.draw(id, figure, (chart) => {
      chart.on("plotly_click", (event) => select(event.points[0].customdata));
      chart.on("plotly_hover", (event) => { if (event.points[0].customdata !== undefined) show(event.points[0].customdata); });
      chart.on("plotly_unhover", () => show(selected));
    });
  }
  function drawFront() {
    const y = el("axis-y").value;
    // There is no chart of a number against itself: choose another one for the horizontal axis.
    if (!data.fronts[`${y}/${el("axis-x").value}`]) el("axis-x").value = [...el("axis-x").options].find((o) => data.fronts[`${y}/${o.value}`]).value;
    const figure = data.fronts[`${y}/${el("axis-x").value}`];
    draw("front-chart", { layout: figure.layout, data: [...figure.data, ring(figure)] });
  }
  // Ring around the selected candidate, in the chart or in its strip of infeasible candidates.
  function ring(figure) {
    const at = { x: [], y: [] };
    let yaxis = "y";
    for (const trace of figure.data) {
      const i = (trace.customdata || []).indexOf(selected);
      if (i >= 0) { at.x = [trace.x[i]]; at.y = [trace.y[i]]; yaxis = trace.yaxis || "y"; }
    }
    const marker = { symbol: "circle-open", size: 17, color: "var(--ink)", line: { width: 1.5 } };
    return { type: "scatter", mode: "markers", name: "selected", ...at, yaxis, marker, hoverinfo: "skip" };
  }
  function drawAll() {
    drawFront();
    for (const [id, figure] of Object.entries(data.charts)) draw(id, figure);
  }

  // The details panel. Names may contain markup, so text is only set by textContent.
  function add(parent, tag, text, className) {
    const child = parent.appendChild(document.createElement(tag));
    if (text !== undefined) child.textContent = text;
    if (className) child.className = className;
    return child;
  }
  function show(number) {
    const candidate = data.candidates[number];
    const panel = el("panel");
    if (!candidate || panel.dataset.number === String(number)) return;
    panel.dataset.number = number;
    panel.replaceChildren();
    add(panel, "h3", candidate.title);
    const state = add(panel, "p", `${candidate.state} · `, "state");
    add(state, "code", candidate.id);
    const uri = data.samples[number];
    if (uri) {
      const image = add(panel, "img");
      image.alt = `Samples of ${candidate.title}`;
      image.src = uri;
    }
    add(panel, "p", candidate.description, "words");
    const list = add(panel, "dl", undefined, "pairs");
    for (const [label, text] of candidate.numbers) {
      const row = add(list, "div");
      add(row, "dt", label);
      add(row, "dd", text);
    }
    if (candidate.differences.length) {
      add(panel, "h4", "Differences from the base");
      const items = add(panel, "ul");
      for (const text of candidate.differences) add(items, "li", text);
    }
  }
  function select(number) {
    if (number === undefined || !data.candidates[number]) return;
    selected = number;
    el("pick").value = number;
    for (const row of rows) row.classList.toggle("selected", row.dataset.number === String(number));
    show(number);
    drawFront();
  }

  const picture = el("recommended-samples");
  if (data.samples[data.best]) { picture.src = data.samples[data.best]; picture.hidden = false; }

  // The table
  const table = el("table");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  const sortKey = (cell) => ("value" in cell.dataset ? (cell.dataset.value === "" ? null : Number(cell.dataset.value)) : cell.textContent.trim().toLowerCase());
  // Sort by a column, in the other direction if it is already sorted; missing numbers come last.
  function sort(column) {
    const down = heads[column].ariaSort === "ascending";
    heads.forEach((head, i) => { head.ariaSort = i !== column ? "none" : down ? "descending" : "ascending"; });
    const keyed = rows.map((row, i) => ({ row, i, value: sortKey(row.cells[column]) }));
    keyed.sort((a, b) => {
      if (a.value === null || b.value === null) return (a.value === null) - (b.value === null) || a.i - b.i;
      const order = a.value < b.value ? -1 : a.value > b.value ? 1 : 0;
      return (down ? -order : order) || a.i - b.i;
    });
    body.append(...keyed.map(({ row }) => row));
  }
  function filter() {
    const words = el("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const kind = document.querySelector("input[name=show]:checked").value;
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !(kind === "all" || row.dataset[kind] === "true") || !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    el("count").textContent = `${shown} of ${rows.length}`;
  }
  heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => sort(i)));
  body.addEventListener("click", (event) => {
    if (!event.target.closest(".open")) return;
    select(Number(event.target.closest("tr").dataset.number));
    el("front").scrollIntoView();
  });
  el("filter").addEventListener("input", filter);
  for (const radio of document.querySelectorAll("input[name=show]")) radio.addEventListener("change", filter);
  el("show-knobs").addEventListener("change", (event) => table.classList.toggle("with-knobs", event.target.checked));

  for (const id of ["axis-x", "axis-y"]) el(id).addEventListener("change", drawFront);
  el("pick").addEventListener("change", (event) => select(Number(event.target.value)));
  filter();
  archsearch.start(drawAll);
  select(selected);
})();
