// A field above every long table that hides the rows without the words in it. What a row's footnotes say counts, too, and
// shows where the pointer rests on their numbers.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("article table")) {
    const rows = [...table.tBodies[0].rows];
    if (rows.length < 100) continue;
    for (const row of rows) row.cells[0].style.cssText = "overflow-wrap: anywhere; min-width: 8em";
    const texts = rows.map((row) => {
      const links = [...row.querySelectorAll("a.footnote-reference")];
      for (const link of links) link.title = document.querySelector(`${link.hash} p`).textContent;
      return [row.textContent, ...links.map((link) => link.title)].join(" ").toLowerCase();
    });
    const field = document.createElement("input");
    field.type = "search";
    field.placeholder = `Filter ${rows.length} rows, such as: llama, or: skipped`;
    field.setAttribute("aria-label", "Filter the rows of the table");
    field.style.cssText = "width: 100%; box-sizing: border-box; padding: 0.5em; margin: 0.5em 0; font: inherit;";
    field.addEventListener("input", () => {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      rows.forEach((row, number) => {
        row.hidden = !words.every((word) => texts[number].includes(word));
      });
    });
    (table.closest(".table-wrapper") || table).before(field);
  }
});
