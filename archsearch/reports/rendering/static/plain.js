"use strict";
// Script of a page that only draws its charts.
archsearch.start(() => {
  for (const [id, figure] of Object.entries(archsearch.data.charts)) archsearch.draw(id, figure);
});
