"use strict";
// Shared by all pages: the data, charts in the colors of the theme, and the theme switch.
const archsearch = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const el = (id) => document.getElementById(id);
  const dark = matchMedia("(prefers-color-scheme: dark)");

  // Figures name CSS variables; a hidden probe element resolves them under the current theme.
  const probe = document.body.appendChild(document.createElement("span"));
  probe.hidden = true;
  const resolve = (value) => { probe.style.color = value; return getComputedStyle(probe).color; };
  const themed = (value) => {
    if (typeof value === "string") return value.startsWith("var(--") ? resolve(value) : value;
    if (Array.isArray(value)) return value.map(themed);
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, themed(v)]));
    return value;
  };

  // Charts
  const config = { displaylogo: false, responsive: true, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
  const touch = matchMedia("(pointer: coarse)").matches;
  // Draw or redraw a figure; `onCreate` is called with its element the first time.
  function draw(id, figure, onCreate = () => {}) {
    const { data: traces, layout } = themed(figure);
    layout.font.family = getComputedStyle(document.body).fontFamily;
    if (touch) layout.dragmode = false; // let a finger on the chart scroll the page
    const chart = el(id);
    const isNew = !chart.data;
    Plotly.react(chart, traces, layout, config);
    if (isNew) onCreate(chart);
  }

  // The theme follows the system until the user switches it; every change redraws all charts.
  function start(drawAll) {
    const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
    function retheme() {
      el("theme").textContent = isDark() ? "Light" : "Dark";
      el("theme").setAttribute("aria-label", `Use the ${isDark() ? "light" : "dark"} theme`);
      drawAll();
    }
    el("theme").addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; retheme(); });
    dark.addEventListener("change", retheme);
    retheme();
  }
  return { data, el, draw, start };
})();
