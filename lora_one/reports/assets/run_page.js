// One run: facts, curves, the start, the configuration, sample predictions.

// What a start's singular values are those of; where it says nothing else, the weight.
const DECOMPOSED = {
  lora_ga: "one-step gradient",
  lora_one: "one-step gradient",
  eva: "centred inputs",
  corda: "weight times the inputs' second moment",
};

async function unpack(index) {
  const packed = document.getElementById(`run-${index}`).textContent;
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

class RunPage {
  constructor(report, index, run, neighbours) {
    this.report = report;
    this.run = run;
    const [name, status] = report.data.runs.rows[index];
    this.status = status;
    const link = (to, text, key) => (to === null ? el("span", { class: "quiet" }, text)
      : el("a", { href: `#run/${encodeURIComponent(to)}`, "data-key": key }, text));
    this.node = el("article", { class: "run" },
      el("nav", { class: "crumbs", "aria-label": "Runs" },
        el("a", { href: "#all-runs", "data-key": "up" }, "← all runs"),
        link(neighbours[0], "previous", "k"), link(neighbours[1], "next", "j"),
        el("span", { class: "quiet keys" }, "keys: k, j, Escape")),
      el("h2", { class: "run-name", tabindex: "-1" }, name, " ", chip(status)),
      this.trouble(), this.facts(), this.curves(), this.start(), this.replies(), this.config());
  }

  trouble() {
    const { error, problem, preempted } = this.run;
    if (this.status === "preempted" && preempted && typeof preempted === "object")
      return el("section", { class: "trouble" }, el("h3", {}, "Preempted"), el("p", {}, preempted.reason || ""));
    if (problem) return el("section", { class: "trouble" }, el("h3", {}, "Not readable"), el("p", {}, problem));
    if (!error || typeof error !== "object") return null;
    return el("section", { class: "trouble" },
      el("h3", {}, `${error.type || "Error"}${error.phase ? `, during ${error.phase}` : ""}`),
      el("p", {}, error.message || ""),
      error.traceback ? el("details", {}, el("summary", {}, "Traceback"), el("pre", {}, error.traceback)) : null);
  }

  facts() {
    const { metrics, losses, phases, facts } = this.run;
    const groups = [
      ["Metrics", Object.entries(metrics).map(([key, value]) => [key, number(value)])],
      ["Losses", Object.entries(losses).map(([key, value]) => [key, number(value)])],
      ["Cost", Object.entries(phases).map(([key, value]) => [key, phase(value)])
        .concat(flat(facts.train || {}, "").map(([key, value]) => [key, number(value)]))],
      ["Provenance", flat({ ...facts.provenance, started: facts.started, ended: facts.ended }, "")
        .map(([key, value]) => [key, brief(value)])],
    ];
    return el("section", { class: "facts", "aria-label": "Facts" },
      facts.command ? el("pre", { class: "command" }, facts.command) : null,
      el("div", { class: "cards" }, groups.filter(([, pairs]) => pairs.length).map(([title, pairs]) =>
        el("div", { class: "card" }, el("h3", {}, title),
          el("dl", {}, pairs.filter(([, value]) => value !== undefined && value !== "null")
            .map(([key, value]) => [el("dt", {}, key), el("dd", {}, value)]))))));
  }

  curves() {
    const { loss, validation, metric, angles, norms, spectra, log } = this.run;
    const hue = this.run.facts.method || "";
    const series = (curve, name) => ({ name, hue, optimiser: "", kind: "line", ...curve });
    const one = (title, xLabel, yLabel, curve) => {
      if (curve.x.length < 2) return null;
      const caption = curve.low
        ? `${curve.points.toLocaleString("en")} logged values as ${curve.x.length} means; the band ` +
          "keeps the smallest and the largest value of each, so no spike is lost."
        : `All ${curve.points.toLocaleString("en")} logged values.`;
      const [low, high] = [Math.min(...curve.y), Math.max(...curve.y)];
      return this.chart({ title, xLabel, yLabel, caption, series: [series(curve, title)],
        xLog: false, yLog: yLabel.includes("loss") && low > 0 && high > 12 * low });
    };
    const perLayer = (title, yLabel, caption, layers, more = {}) => (Object.keys(layers).length
      ? this.chart({ title, xLabel: "step", yLabel, caption, xLog: false, yLog: false, ...more,
        series: Object.entries(layers).map(([layer, curve]) =>
          ({ ...series(curve, layer), faint: true })) })
      : null);
    const layered = Object.entries(angles).map(([side, layers]) => perLayer(
      `Principal angle of ${side}`, "largest angle, degrees",
      "Between the factor and the one-step gradient's singular space, per layer.", layers));
    layered.push(perLayer("Norm of the update", "Frobenius norm", "Per layer.", norms));
    const updates = Object.entries(spectra).map(([layer, values]) => [layer, spectrum(values)]);
    layered.push(perLayer("Singular values of the update", "singular value",
      "At the last step, per layer.",
      Object.fromEntries(updates.filter(([, { y }]) => y.length)), { xLabel: "index", yLog: true }));
    const charts = [one("Training loss", "step", "training loss", loss),
      one("Validation loss", "epoch", "validation loss", validation),
      one("Metric", "epoch", this.run.facts.primary_metric || "metric", metric), ...layered];
    const notes = [];
    if (log.skipped) notes.push(`${plural(log.skipped, "line")} of metrics.jsonl could not be read.`);
    if (log.notFinite) notes.push(`${plural(log.notFinite, "training loss")} without a finite value: not drawn.`);
    return el("section", { "aria-label": "Curves" },
      el("div", { class: "charts" }, charts), notes.map((note) => el("p", { class: "note" }, note)));
  }

  chart(figure) {
    return new Chart(figure, (series) => this.report.colour(series.hue), this.report.data.dashes).node;
  }

  start() {
    const { init, layers, layersInAll } = this.run;
    if (!init.method) return null;
    const facts = ["equation", "source", "offset", "scale", "stable_gamma", "tokens", "loss_before",
      "loss_after", "seconds", "cached"].filter((key) => init[key] !== null && init[key] !== undefined);
    const short = commonStart(layers.map((layer) => layer.name));
    const spectra = layers.filter((layer) => layer.singular_values.length);
    const decomposed = DECOMPOSED[init.method] || "weight";
    return el("section", { "aria-labelledby": "start" },
      el("h3", { id: "start" }, "Start"),
      init.summary ? el("p", {}, init.summary) : null,
      (init.warnings || []).map((warning) => el("p", { class: "note" }, warning)),
      el("dl", { class: "wide" }, facts.map((key) => [el("dt", {}, key.replaceAll("_", " ")),
        el("dd", {}, typeof init[key] === "number" ? number(init[key]) : String(init[key]).replaceAll("``", ""))])),
      spectra.length ? this.chart({ title: `Singular values of the ${decomposed}, per layer`,
        xLabel: "index", yLabel: "singular value", xLog: false, yLog: true,
        caption: "One line per layer; the last value is the largest one left out.",
        series: spectra.map((layer) => {
          const values = layer.singular_values.concat(layer.next_singular_value ?? []);
          return { name: layer.name.slice(short.length), hue: init.method, optimiser: "",
            kind: "line", faint: true, ...spectrum(values) };
        }) }) : null,
      layers.length ? el("details", {},
        el("summary", {}, `${plural(layers.length, "layer")}` +
          (layersInAll > layers.length ? ` of ${layersInAll}; the others are in init.json` : "")),
        new SortedTable([
          { name: "layer" }, { name: "shape" }, { name: "rank", numeric: true },
          { name: "captured energy", numeric: true, show: plain },
          { name: "‖sBA‖ / ‖W‖", numeric: true, show: plain },
          { name: "σ₁", numeric: true, show: plain }, { name: "σ left out", numeric: true, show: plain },
        ], layers.map((layer) => [layer.name.slice(short.length), (layer.shape || []).join(" × "),
          layer.rank, layer.captured_energy ?? null, layer.norm_ratio ?? null,
          layer.singular_values[0] ?? null, layer.next_singular_value ?? null]),
        { label: "Layers", rowHeader: true }).node) : null);
  }

  replies() {
    const { rows, of, skipped } = this.run.replies;
    if (!rows.length) return null;
    const wrong = rows.filter((row) => !row.right).length;
    const cards = rows.map((row) => el("li", { class: row.right ? "reply right" : "reply wrong" },
      el("div", { class: "verdict" }, row.right ? "✓ right" : "✗ wrong",
        el("small", {}, ` ${row.id || ""}${row.stop === "length" ? ", cut at the length limit" : ""}`)),
      el("h4", {}, "Prompt"), el("pre", {}, row.prompt ?? "none"),
      el("h4", {}, "Reply"), el("pre", {}, row.reply ?? "none"),
      el("dl", { class: "answers" }, el("dt", {}, "gold"), el("dd", {}, row.gold ?? "none"),
        Object.entries(row.scores).map(([scorer, score]) => [el("dt", {}, `parsed, ${scorer}`),
          el("dd", {}, score.parsed === null ? el("em", {}, "no answer") : score.parsed,
            score.right ? " ✓" : " ✗")]))));
    const list = el("ol", { class: "replies" }, cards);
    const show = el("select", { "aria-label": "Which predictions", onchange: () =>
      cards.forEach((card) => { card.hidden = show.value !== "" && !card.classList.contains(show.value); }) },
      el("option", { value: "" }, "right and wrong"), el("option", { value: "right" }, "right"),
      el("option", { value: "wrong" }, "wrong"));
    return el("section", { "aria-labelledby": "replies" },
      el("h3", { id: "replies" }, "Sample predictions"),
      el("p", { class: "quiet" }, `The first right and wrong ones among ${plural(of, "row")} of ` +
        `predictions.jsonl: ${rows.length - wrong} right, ${wrong} wrong. A choice for reading, not a rate.` +
        (skipped ? ` ${plural(skipped, "line")} could not be read.` : "")),
      show, list);
  }

  config() {
    return el("section", { "aria-labelledby": "config" },
      el("h3", { id: "config" }, "Configuration"),
      el("h4", {}, "In which runs here differ"), settingsTable(this.run.settings),
      el("details", {}, el("summary", {}, "What all runs here share"), settingsTable(this.report.data.common)),
      el("details", {}, el("summary", {}, "Everything else in run.json"),
        el("pre", {}, JSON.stringify(this.run.facts, null, 1))));
  }
}

const plain = (value) => number(value);
// Over the index, counted from 1; a logarithmic axis has no place for zeros and rounding.
const spectrum = (values) => {
  const y = values.filter((value) => value > 1e-6 * values[0]);
  return { x: y.map((_, at) => at + 1), y };
};
// A commit is known by its first letters; a time needs no zone where all are UTC.
const brief = (value) => (typeof value !== "string" ? shown(value)
  : /^[0-9a-f]{40}$/.test(value) ? value.slice(0, 8)
    : value.replace(/^(\d{4}-\d\d-\d\d)T(\d\d:\d\d).*$/, "$1 $2"));

const phase = (value) => (value && typeof value === "object"
  ? `${seconds(value.seconds)}, ${((value.peak_memory_bytes || 0) / 1e9).toFixed(2)} GB` : shown(value));

function flat(value, prefix) {
  if (value === null || typeof value !== "object" || Array.isArray(value))
    return [[prefix || "value", value]];
  return Object.entries(value).filter(([, entry]) => entry !== undefined)
    .flatMap(([key, entry]) => flat(entry, prefix ? `${prefix}.${key}` : key));
}

function commonStart(names) {
  if (names.length < 2) return "";
  let [first] = names;
  for (const name of names) while (!name.startsWith(first)) first = first.slice(0, -1);
  return first.slice(0, first.lastIndexOf(".") + 1);
}
