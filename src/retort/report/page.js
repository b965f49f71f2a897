// A table whose head is clicked is sorted by that column; clicked again, the other way round. Rows without a number
// there (a dash) stay last, and the teacher first: it is what the runs are read against.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => sort(table, heads, column));
  });
}

function sort(table, heads, column) {
  const falls = heads[column].getAttribute("aria-sort") === "ascending";
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", falls ? "descending" : "ascending");
  const rows = [...table.tBodies[0].rows].map((row) => ({ row, key: row.cells[column].dataset.key ?? "" }));
  rows.sort((one, other) => compare(one, other, falls));
  table.tBodies[0].append(...rows.map(({ row }) => row));
}

function compare(one, other, falls) {
  const [first, second] = [one, other].map(({ row }) => row.classList.contains("teacher"));
  if (first !== second) return first ? -1 : 1;
  if (!one.key || !other.key) return (one.key ? 0 : 1) - (other.key ? 0 : 1);
  const [a, b] = [Number(one.key), Number(other.key)];
  const order = Number.isNaN(a) || Number.isNaN(b) ? one.key.localeCompare(other.key, "en", { numeric: true }) : a - b;
  return falls ? -order : order;
}
