"use strict";
// A page of charts alone.
archsearch.start(() => {
  for (const [id, figure] of Object.entries(archsearch.data.charts)) archsearch.draw(id, figure);
});
