// A table that sorts by its headers; rows beyond a first screenful are made when asked for.

const FIRST_ROWS = 200;

class SortedTable {
  // columns: {name, numeric, show(value, row), title}; rows: arrays of values, sorted by value.
  constructor(columns, rows, options) {
    this.columns = columns;
    this.rows = rows;
    this.shown = rows;
    this.options = options || {};
    this.limit = FIRST_ROWS;
    this.sorted = null;
    this.nodes = new Map();
    this.body = el("tbody");
    this.headers = columns.map((column, index) => el("th", { scope: "col",
      class: column.numeric ? "number" : null, "aria-sort": "none" },
      el("button", { type: "button", onclick: () => this.sort(index) }, column.name,
        el("span", { class: "arrow", "aria-hidden": "true" }))));
    this.more = el("button", { type: "button", class: "more", onclick: () => {
      this.limit = Infinity;
      this.draw();
    } });
    this.node = el("div", {},
      el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": this.options.label },
        el("table", {}, el("thead", {}, el("tr", {}, this.headers)), this.body)),
      this.more);
    this.draw();
  }

  sort(index) {
    const down = this.sorted && this.sorted.index === index ? !this.sorted.down
      : Boolean(this.columns[index].numeric);
    this.sorted = { index, down };
    this.headers.forEach((header, at) => header.setAttribute("aria-sort",
      at !== index ? "none" : down ? "descending" : "ascending"));
    this.draw();
  }

  filter(keeps) {
    this.shown = this.rows.filter(keeps);
    this.draw();
  }

  ordered() {
    if (!this.sorted) return this.shown;
    const { index, down } = this.sorted;
    const sign = down ? -1 : 1;
    const empty = (value) => value === null || value === undefined;
    // What is missing comes last, whichever way the rest goes.
    return this.shown.slice().sort((one, other) => {
      const [a, b] = [one[index], other[index]];
      if (empty(a) || empty(b)) return empty(a) - empty(b);
      if (typeof a === "number" && typeof b === "number") return sign * (a - b);
      return sign * String(a).localeCompare(String(b), "en", { numeric: true });
    });
  }

  // A row is made once and moved ever after.
  made(row) {
    if (!this.nodes.has(row)) this.nodes.set(row, el("tr",
      { class: this.options.rowClass ? this.options.rowClass(row) : null },
      row.slice(0, this.columns.length).map((value, index) => {
        const column = this.columns[index];
        const shown = column.show ? column.show(value, row) : value;
        const cell = index === 0 && this.options.rowHeader ? "th" : "td";
        return el(cell, { class: column.numeric ? "number" : null,
          scope: cell === "th" ? "row" : null }, shown === null || shown === undefined ? "–" : shown);
      })));
    return this.nodes.get(row);
  }

  draw() {
    const rows = this.ordered();
    this.order = rows;
    this.body.replaceChildren(...rows.slice(0, this.limit).map((row) => this.made(row)));
    this.more.hidden = rows.length <= this.limit;
    this.more.textContent = `Show all ${rows.length.toLocaleString("en")} rows (${FIRST_ROWS} are shown)`;
  }
}
