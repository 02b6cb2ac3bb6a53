"use strict";
// What every page shares: its data, charts in the theme's colours, and the choice of the theme.
const archsearch = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const el = (id) => document.getElementById(id);
  const dark = matchMedia("(prefers-color-scheme: dark)");

  // Colours: figures name CSS variables; a probe says what they are under the present theme.
  const probe = document.body.appendChild(document.createElement("span"));
  probe.hidden = true;
  const colour = (value) => { probe.style.color = value; return getComputedStyle(probe).color; };
  const themed = (value) => {
    if (typeof value === "string") return value.startsWith("var(--") ? colour(value) : value;
    if (Array.isArray(value)) return value.map(themed);
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, themed(v)]));
    return value;
  };

  // Charts
  const config = { displaylogo: false, responsive: true, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
  const touch = matchMedia("(pointer: coarse)").matches;
  // Draws or redraws a figure; `first` is called with its element the first time.
  function draw(id, figure, first = () => {}) {
    const { data: traces, layout } = themed(figure);
    layout.font.family = getComputedStyle(document.body).fontFamily;
    if (touch) layout.dragmode = false; // a finger on the chart scrolls the page
    const chart = el(id);
    const isNew = !chart.data;
    Plotly.react(chart, traces, layout, config);
    if (isNew) first(chart);
  }

  // The theme: the system's, until a person chooses. Every change of it draws all anew.
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
