// The overview: comparisons, plots, published numbers, all settings, all runs.

class Overview {
  constructor(report) {
    this.report = report;
    this.node = el("div", { class: "overview" },
      this.summary(), report.data.blocks.map((block, index) => this.block(block, index)),
      this.paper(), this.runs(), this.settings(), this.method());
  }

  summary() {
    const { data } = this.report;
    const counts = {};
    const at = data.runs.columns.indexOf("status");
    for (const row of data.runs.rows) counts[row[at]] = (counts[row[at]] || 0) + 1;
    const order = ["finished", "running", "preempted", "failed", "malformed", "missing"];
    return el("section", { class: "summary", "aria-label": "Runs" },
      el("ul", { class: "counts" }, order.filter((status) => counts[status]).map((status) =>
        el("li", {}, el("button", { type: "button", onclick: () => this.only(status) },
          el("b", {}, counts[status].toLocaleString("en")), chip(status))))),
      data.notes.length ? el("p", { class: "note" },
        `${plural(data.notes.length, "run")} in no average: not finished, not readable, or a repeat. `,
        el("a", { href: "#not-counted" }, "Which and why")) : null);
  }

  only(status) {
    this.status.value = status;
    this.apply();
    this.list.scrollIntoView();
    this.status.focus({ preventScroll: true });
  }

  block(block, index) {
    const id = `block-${index}`;
    return el("section", { "aria-labelledby": id },
      el("h2", { id }, block.title),
      block.rows.length ? this.comparison(block) : el("p", {}, "No finished run."),
      block.warnings.length ? el("ul", { class: "warnings" },
        block.warnings.map((warning) => el("li", {}, warning))) : null,
      el("div", { class: "charts" }, block.figures.map((figure) => new Chart(
        { ...figure, id: `plot-${index}-${figure.key}` },
        (series) => this.report.colour(series.hue), this.report.data.dashes).node)));
  }

  comparison(block) {
    const ends = block.rows.flatMap((row) => row.interval || []);
    const reach = [Math.min(0, ...ends), Math.max(1e-12, ...ends)];
    const published = block.rows.some((row) => row.published.length);
    const heads = ["method · optimiser", block.metric, "difference to the best", "verdict", "chosen setting",
      "tried", "seeds", "validation loss", "start", "training", "all trials", "memory",
      ...(published ? ["published"] : [])];
    const numeric = new Set([block.metric, "tried", "seeds", "validation loss", "start", "training",
      "all trials", "memory"]);
    const rows = block.rows.map((row) => {
      const cells = [
        el("th", { scope: "row" }, el("span", { class: "arm" }, this.report.dot(row.hue), row.name)),
        el("td", { class: `number score${row.isBest ? " best" : ""}` }, row.isTie ? "≈ " : "",
          fixed(row.mean), row.sd === null ? "" : el("small", {}, ` ± ${fixed(row.sd)}`)),
        el("td", {}, this.whisker(row, reach, block)),
        el("td", {}, this.verdict(row)),
        el("td", {}, row.chosen, row.edge.length ? el("span", { class: "edge",
          title: "at the edge of the grid that was tried" }, " edge") : ""),
        el("td", { class: "number", title: this.grid(row) }, `${row.tried}`,
          el("small", {}, ` (${plural(row.runs, "run")})`)),
        el("td", { class: "number" }, row.seeds),
        el("td", { class: "number" }, fixed(row.loss),
          row.lossSd === null ? "" : el("small", {}, ` ± ${fixed(row.lossSd)}`)),
        el("td", { class: "number" }, seconds(row.initSeconds)),
        el("td", { class: "number" }, seconds(row.trainSeconds)),
        el("td", { class: "number" }, seconds(row.allSeconds)),
        el("td", { class: "number" }, `${row.memory.toFixed(2)} GB`),
      ];
      if (published) cells.push(el("td", {}, row.published.map((one) => this.published(one))));
      return el("tr", {}, cells);
    });
    return el("div", { class: "scroll", tabindex: "0", role: "region",
      "aria-label": `Comparison, ${block.title}` },
      el("table", { class: "comparison" },
        el("thead", {}, el("tr", {}, heads.map((name) =>
          el("th", { scope: "col", class: numeric.has(name) ? "number" : null }, name)))),
        el("tbody", {}, rows)));
  }

  grid(row) {
    const parts = Object.entries(row.grid).map(([key, values]) => `${key}: ${values.join(", ")}`);
    return parts.join("; ") || "one setting";
  }

  verdict(row) {
    if (row.isBest) return el("span", { class: "chip best" }, "best");
    const kind = row.isTie ? "tie" : row.interval ? "real" : "open";
    return el("span", { class: `chip ${kind}` }, row.verdict);
  }

  // The difference with its interval, on an axis that all rows of the block share.
  whisker(row, reach, block) {
    if (row.difference === null) return row.isBest ? el("span", { class: "quiet" }, "reference") : "–";
    if (!row.interval) return signed(row.difference);
    const width = 120;
    const x = (value) => 6 + ((value - reach[0]) / (reach[1] - reach[0])) * (width - 12);
    const colour = this.report.colour(row.hue);
    const words = `${signed(row.difference)}, 95 % interval ${signed(row.interval[0])} to ` +
      `${signed(row.interval[1])}, ${plural(row.pairs, "pair")}; bootstrap alone ` +
      `${signed(row.bootstrap[0])} to ${signed(row.bootstrap[1])}`;
    return el("span", { class: "whisker", title: words },
      svg("svg", { width, height: 18, viewBox: `0 0 ${width} 18`, role: "img", "aria-label": words },
        svg("path", { d: `M${x(0)},1V17`, class: "zero" }),
        svg("path", { d: `M${x(row.interval[0])},9H${x(row.interval[1])}`, stroke: colour,
          "stroke-width": 2.5 }),
        svg("circle", { cx: x(row.difference), cy: 9, r: 4, fill: colour })),
      el("small", {}, signed(row.difference)));
  }

  published(one) {
    const unknown = one.unknown.length ? ` Not published: ${one.unknown.join(", ")}.` : "";
    const doubt = one.doubt ? ` Doubtful: ${one.doubt}.` : "";
    return el("div", { class: "published", title: `${one.notes.join(" ")}${unknown}${doubt}` },
      el("b", {}, one.text + one.mark), ` ${one.metric}`,
      el("small", {}, ` ${one.table}, ${one.kind}${one.doubt ? ", doubtful" : ""}`));
  }

  paper() {
    const { paper } = this.report.data;
    if (!paper) return null;
    return el("section", { "aria-labelledby": "paper" },
      el("h2", { id: "paper" }, "Beside the published table"),
      el("p", {}, paper.title),
      el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": paper.title },
        el("table", {}, el("thead", {}, el("tr", {}, paper.columns.map((name) =>
          el("th", { scope: "col" }, name)))),
          el("tbody", {}, paper.rows.map((row) => el("tr", {}, row.map((cell, index) =>
            el(index ? "td" : "th", { scope: index ? null : "row" }, cell))))))),
      el("ul", { class: "quiet" }, paper.notes.map((note) => el("li", {}, note))));
  }

  runs() {
    const { columns, rows } = this.report.data.runs;
    const names = rows.map((row) => row[0]);
    const prefix = commonPrefix(names);
    this.query = el("input", { type: "search", id: "query", placeholder: "Filter: pissa lr0.006 s1",
      autocomplete: "off", spellcheck: "false", oninput: () => this.apply() });
    const choose = (name) => {
      const at = columns.indexOf(name);
      const values = [...new Set(rows.map((row) => row[at]).filter((value) => value !== null))].sort();
      return el("select", { "aria-label": name, "data-column": at, onchange: () => this.apply() },
        el("option", { value: "" }, `every ${name}`),
        values.map((value) => el("option", { value }, value)));
    };
    this.status = choose("status");
    this.selects = [this.status, choose("method"), choose("optimiser")];
    this.found = el("output", { class: "quiet" });
    const textual = new Set(["run", "status", "method", "optimiser", "ended"]);
    const shows = {
      run: (value) => el("a", { href: `#run/${encodeURIComponent(value)}`, title: value },
        value.slice(prefix.length) || value),
      status: (value) => chip(value),
      method: (value) => (value === null ? "–"
        : el("span", { class: "arm" }, this.report.dot(value), value)),
      lr: rate,
      seed: (value) => value,
      ended: (value) => (value === null ? "–" : value.slice(0, 16).replace("T", " ")),
      "init s": (value) => (value === null ? "–" : value.toFixed(1)),
      "train s": (value) => (value === null ? "–" : value.toFixed(1)),
      "memory GB": (value) => (value === null ? "–" : value.toFixed(2)),
    };
    this.table = new SortedTable(columns.map((name) => ({
      name, numeric: !textual.has(name), show: shows[name] || (textual.has(name) ? null : fixed) })), rows,
    { label: "All runs", rowHeader: true, rowClass: (row) => (row[1] === "finished" ? null : "off") });
    this.list = el("section", { "aria-labelledby": "runs", id: "all-runs" },
      el("h2", { id: "runs" }, "Runs"),
      el("div", { class: "filters", role: "search" },
        el("label", { class: "unseen", for: "query" }, "Filter runs"), this.query, this.selects, this.found),
      this.table.node,
      this.notCounted());
    this.apply();
    return this.list;
  }

  apply() {
    const words = this.query.value.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = this.selects.filter((select) => select.value)
      .map((select) => [Number(select.dataset.column), select.value]);
    const { rows } = this.report.data.runs;
    this.texts = this.texts || new Map(rows.map((row) => [row, row.join(" ").toLowerCase()]));
    this.table.filter((row) => chosen.every(([at, value]) => String(row[at]) === value)
      && words.every((word) => this.texts.get(row).includes(word)));
    this.found.textContent = `${this.table.shown.length.toLocaleString("en")} of ` +
      plural(rows.length, "run");
  }

  notCounted() {
    const { notes } = this.report.data;
    if (!notes.length) return null;
    return el("details", { class: "notes", id: "not-counted", open: notes.length <= 12 },
      el("summary", {}, `In no average: ${plural(notes.length, "run")}`),
      el("ul", {}, notes.map((note) => el("li", {}, note))));
  }

  settings() {
    const { columns, rows, marks } = this.report.data.settings;
    if (!rows.length) return null;
    const mark = new Map(marks.map(([row, column, kind]) => [`${row},${column}`, kind]));
    const place = new Map(rows.map((row, index) => [row, index]));
    const value = (text) => (text !== "-" && text !== "None" && !Number.isNaN(parseFloat(text))
      ? parseFloat(text) : text === "-" ? null : text);
    const data = rows.map((row) => {
      const values = row.map(value);
      values.source = row;
      return values;
    });
    const table = new SortedTable(columns.map((name, index) => ({
      name, numeric: index >= 2, show: (_, row) => {
        const kind = mark.get(`${place.get(row.source)},${index}`);
        const text = row.source[index];
        if (kind === "best") return el("strong", {}, text);
        return kind === "tie" ? `≈ ${text}` : text;
      } })), data, { label: "All settings", rowHeader: false });
    return el("section", { "aria-labelledby": "settings" },
      el("h2", { id: "settings" }, "Settings"),
      el("p", { class: "quiet" }, "Runs that differ in nothing but their seed are one row: " +
        "mean ± standard deviation (n − 1)."),
      table.node);
  }

  method() {
    const { rule, common } = this.report.data;
    return el("section", { "aria-labelledby": "method" },
      el("h2", { id: "method" }, "How to read this"),
      el("p", {}, "Each method and optimiser is shown at the setting with the lowest mean validation " +
        "loss of those tried, so that the test rows choose nothing. “All trials” is what start and " +
        "training of all its runs cost. Only finished runs count."),
      el("p", {}, rule),
      el("p", {}, "A published number stands beside a row only if every known setting of its recipe " +
        "is the row's own. † second-hand: quoted by another paper; ‡ re-run by somebody else."),
      el("details", {}, el("summary", {}, "Settings that all runs share"), settingsTable(common)));
  }
}

function settingsTable(settings) {
  return el("table", { class: "pairs" }, el("tbody", {}, Object.keys(settings).sort().map((key) =>
    el("tr", {}, el("th", { scope: "row" }, key), el("td", {}, shown(settings[key]))))));
}

const shown = (value) => (typeof value === "string" ? value : JSON.stringify(value));
const chip = (status) => el("span", { class: `chip status ${status}` }, status);

function commonPrefix(names) {
  if (names.length < 2) return "";
  let [first] = names;
  for (const name of names) while (!name.startsWith(first)) first = first.slice(0, -1);
  return first.slice(0, first.lastIndexOf("-") + 1);
}
