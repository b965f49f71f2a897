// Clicking a column's head sorts the table by it; clicking again reverses the order. Teachers stay first, and rows
// without a value in the column stay last.
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
  const descending = heads[column].getAttribute("aria-sort") === "ascending";
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", descending ? "descending" : "ascending");
  const rows = [...table.tBodies[0].rows].map((row) => ({ row, key: row.cells[column].dataset.key ?? "" }));
  rows.sort((one, other) => compare(one, other, descending));
  table.tBodies[0].append(...rows.map(({ row }) => row));
}

function compare(one, other, descending) {
  const [first, second] = [one, other].map(({ row }) => row.classList.contains("teacher"));
  if (first !== second) return first ? -1 : 1;
  if (!one.key || !other.key) return (one.key ? 0 : 1) - (other.key ? 0 : 1);
  const [a, b] = [Number(one.key), Number(other.key)];
  const order = Number.isNaN(a) || Number.isNaN(b) ? one.key.localeCompare(other.key, "en", { numeric: true }) : a - b;
  return descending ? -order : order;
}
