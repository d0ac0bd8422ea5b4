// One plot: lines with bands, points, a staircase. Values under the pointer, or by arrow keys.

const CHART = { height: 300, left: 62, right: 14, top: 12, bottom: 44 };

function ticks(low, high, log, wanted) {
  if (log) return logTicks(low, high, wanted);
  const raw = (high - low) / wanted;
  const base = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((times) => times * base).find((size) => size >= raw * 0.999);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at += 1)
    found.push(+(at * step).toPrecision(12));
  return found;
}

function logTicks(low, high, wanted) {
  const decades = Math.log10(high / low);
  const parts = decades > wanted ? [1] : decades > 1.5 ? [1, 3] : [1, 1.5, 2, 3, 4, 6, 8];
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1)
    for (const part of parts) {
      const value = +(part * 10 ** power).toPrecision(6);
      if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
    }
  const every = Math.ceil(found.length / (wanted + 2));
  return found.filter((_, index) => index % every === 0);
}

function tickText(value) {
  const size = Math.abs(value);
  if (value !== 0 && (size < 1e-3 || size >= 1e5))
    return value.toExponential().replace("e+", "e").replace("-", "−");
  return String(+value.toPrecision(6)).replace("-", "−");
}

const MARKS = [
  (x, y, r) => `M${x - r},${y}a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0z`,
  (x, y, r) => `M${x - r},${y - r}h${2 * r}v${2 * r}h${-2 * r}z`,
  (x, y, r) => `M${x},${y - 1.2 * r}l${1.2 * r},${2.1 * r}h${-2.4 * r}z`,
  (x, y, r) => `M${x},${y - 1.3 * r}l${1.3 * r},${1.3 * r}l${-1.3 * r},${1.3 * r}l${-1.3 * r},${-1.3 * r}z`,
  (x, y, r) => `M${x},${y + 1.2 * r}l${1.2 * r},${-2.1 * r}h${-2.4 * r}z`,
];

class Chart {
  // `figure` is what to_json in figure.py makes; `colourOf(series)` gives a CSS colour.
  constructor(figure, colourOf, dashes) {
    this.figure = figure;
    this.colourOf = colourOf;
    this.dashes = dashes;
    this.hidden = new Set();
    this.yLog = figure.yLog;
    this.optimisers = [...new Set(figure.series.map((series) => series.optimiser))];
    this.at = null;
    this.drawing = svg("svg", {
      class: "drawing", tabindex: "0", role: "img",
      "aria-label": `${figure.title}. ${figure.caption} Arrow keys read the values.`,
    });
    this.tip = el("div", { class: "tip", hidden: true });
    this.said = el("p", { class: "unseen", "aria-live": "polite" });
    this.stage = el("div", { class: "stage" }, this.drawing, this.tip);
    this.node = el("figure", { class: "chart", id: figure.id },
      el("div", { class: "chart-head" }, el("h3", {}, figure.title), this.logSwitch()),
      this.legend(), this.stage, this.said,
      figure.caption ? el("figcaption", {}, figure.caption) : null);
    this.drawing.addEventListener("pointermove", (event) => this.point(event));
    this.drawing.addEventListener("pointerdown", (event) => this.point(event));
    this.drawing.addEventListener("pointerleave", () => this.leave());
    this.drawing.addEventListener("blur", () => this.leave());
    this.drawing.addEventListener("keydown", (event) => this.key(event));
    this.watch = new ResizeObserver(() => {
      const width = Math.floor(this.stage.clientWidth);
      if (width && width !== this.width) {
        this.width = width;
        this.draw();
      }
    });
    this.watch.observe(this.stage);
  }

  visible() {
    return this.figure.series.filter((series) => !this.hidden.has(series.name));
  }

  legend() {
    const names = [...new Set(this.figure.series.map((series) => series.name))];
    // Lines of one colour, such as a run's layers, are told apart by pointing at them.
    if (names.length < 2 || this.figure.series.every((series) => series.faint)) return null;
    return el("div", { class: "legend", role: "group", "aria-label": "Lines shown" },
      names.map((name) => {
        const series = this.figure.series.find((one) => one.name === name);
        const button = el("button", { type: "button", "aria-pressed": "true", onclick: () => {
          const shown = this.hidden.delete(name);
          if (!shown) this.hidden.add(name);
          button.setAttribute("aria-pressed", String(shown));
          this.draw();
        } }, this.swatch(series), name);
        return button;
      }));
  }

  swatch(series) {
    const colour = this.colourOf(series);
    const sample = series.kind === "points"
      ? svg("path", { d: this.mark(series)(13, 6, 4), fill: colour })
      : svg("path", { d: "M1,6H25", stroke: colour, "stroke-width": 2.4, fill: "none",
        "stroke-dasharray": this.dash(series) });
    return svg("svg", { width: 26, height: 12, "aria-hidden": "true" }, sample);
  }

  mark(series) {
    return MARKS[Math.max(0, this.optimisers.indexOf(series.optimiser)) % MARKS.length];
  }

  dash(series) {
    if (series.kind === "front") return "4 3";
    const at = Math.max(0, this.optimisers.indexOf(series.optimiser));
    return this.dashes[at % this.dashes.length].join(" ") || null;
  }

  logSwitch() {
    const positive = this.figure.series.every((one) =>
      one.y.every((value) => value > 0) && (one.low || []).every((value) => value > 0));
    if (!positive) {
      this.yLog = false;
      return null;
    }
    return el("label", { class: "switch" },
      el("input", { type: "checkbox", checked: this.yLog, onchange: (event) => {
        this.yLog = event.target.checked;
        this.draw();
      } }), "log scale");
  }

  scales() {
    const shown = this.visible();
    const xs = shown.flatMap((series) => series.x);
    const ys = shown.flatMap((series) => [...series.y, ...(series.low || []), ...(series.high || [])]);
    const span = (values, log, pad) => {
      let [low, high] = [Infinity, -Infinity];
      for (const value of values) {
        if (log && value <= 0) continue;
        if (value < low) low = value;
        if (value > high) high = value;
      }
      if (!(low <= high)) return log ? [0.1, 1] : [0, 1];
      if (low === high) {
        const by = Math.abs(low) * 0.05 || 1;
        return log ? [low / 1.5, high * 1.5] : [low - by, high + by];
      }
      if (log) {
        const factor = (high / low) ** pad;
        return [low / factor, high * factor];
      }
      return [low - pad * (high - low), high + pad * (high - low)];
    };
    const pointed = shown.some((series) => series.kind === "points");
    return { x: span(xs, this.figure.xLog, pointed ? 0.05 : 0.01), y: span(ys, this.yLog, 0.05) };
  }

  draw() {
    if (!this.width) return;
    const { height, left, right, top, bottom } = CHART;
    const ranges = this.scales();
    const line = (value, [low, high], log) =>
      log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
    const inner = { w: this.width - left - right, h: height - top - bottom };
    this.x = (value) => left + inner.w * line(value, ranges.x, this.figure.xLog);
    this.y = (value) => top + inner.h * (1 - line(value, ranges.y, this.yLog));
    this.drawing.setAttribute("viewBox", `0 0 ${this.width} ${height}`);
    this.drawing.setAttribute("height", height);
    this.cursor = svg("g", { class: "cursor" });
    this.drawing.replaceChildren(
      this.axes(ranges, inner), ...this.visible().map((series) => this.shape(series)), this.cursor);
  }

  axes(ranges, inner) {
    const { height, left, top, bottom } = CHART;
    const group = svg("g", { class: "axes" });
    for (const value of ticks(...ranges.y, this.yLog, 5)) {
      const y = this.y(value);
      group.append(svg("path", { d: `M${left},${y}h${inner.w}`, class: "grid" }),
        svg("text", { x: left - 7, y: y + 4, "text-anchor": "end" }, tickText(value)));
    }
    const wanted = Math.max(3, Math.floor(inner.w / 80));
    for (const value of ticks(...ranges.x, this.figure.xLog, wanted)) {
      const x = this.x(value);
      group.append(svg("path", { d: `M${x},${top + inner.h}v5`, class: "tick" }),
        svg("text", { x, y: height - bottom + 19, "text-anchor": "middle" }, tickText(value)));
    }
    group.append(
      svg("path", { d: `M${left},${top + inner.h}h${inner.w}`, class: "tick" }),
      svg("text", { x: left + inner.w / 2, y: height - 6, "text-anchor": "middle", class: "name" },
        this.figure.xLabel),
      svg("text", { x: -(top + inner.h / 2), y: 13, transform: "rotate(-90)",
        "text-anchor": "middle", class: "name" }, this.figure.yLabel));
    return group;
  }

  shape(series) {
    const colour = this.colourOf(series);
    const places = series.x.map((value, index) => [this.x(value), this.y(series.y[index])]);
    const r = (value) => value.toFixed(1);
    if (series.kind === "points") {
      const size = series.faint ? 2.6 : 5.5;
      const d = places.map(([x, y]) => this.mark(series)(x, y, size)).join("");
      return svg("path", { d, fill: colour, class: series.faint ? "faint" : "spot" });
    }
    if (series.kind === "front") {
      const d = places.map(([x, y], index) =>
        index ? `H${r(x)}V${r(y)}` : `M${r(x)},${r(y)}`).join("");
      return svg("path", { d, class: "front" });
    }
    const group = svg("g", {});
    if ((series.low || []).length) {
      const above = series.x.map((value, index) => `${r(this.x(value))},${r(this.y(series.high[index]))}`);
      const below = series.x.map((value, index) => `${r(this.x(value))},${r(this.y(series.low[index]))}`);
      group.append(svg("path", { d: `M${above.join("L")}L${below.reverse().join("L")}z`,
        fill: colour, class: "band" }));
    }
    group.append(svg("path", { d: `M${places.map(([x, y]) => `${r(x)},${r(y)}`).join("L")}`,
      stroke: colour, class: series.faint ? "line thin" : "line",
      "stroke-dasharray": this.dash(series) }));
    if (places.length < 15)
      group.append(svg("path", { d: places.map(([x, y]) => this.mark(series)(x, y, 3)).join(""),
        fill: colour }));
    return group;
  }

  point(event) {
    const box = this.drawing.getBoundingClientRect();
    const [px, py] = [event.clientX - box.left, event.clientY - box.top];
    let best = null;
    this.visible().forEach((series, index) => {
      if (series.kind === "front") return;
      series.x.forEach((value, place) => {
        const dx = this.x(value) - px;
        const dy = this.y(series.y[place]) - py;
        const distance = dx * dx + dy * dy;
        if (!best || distance < best.distance) best = { distance, index, place };
      });
    });
    if (best) this.show(best.index, best.place);
  }

  key(event) {
    const shown = this.visible();
    const usable = shown.map((series, index) => [series, index])
      .filter(([series]) => series.kind !== "front").map(([, index]) => index);
    const moves = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
    if (event.key === "Escape") return this.leave();
    if (!moves[event.key] || !usable.length) return;
    event.preventDefault();
    let { index, place } = this.at || { index: usable[0], place: -moves[event.key][0] };
    const [along, across] = moves[event.key];
    const next = usable.indexOf(index) + across;
    index = usable[(next + usable.length) % usable.length];
    place = Math.min(Math.max(place + along, 0), shown[index].x.length - 1);
    this.show(index, place);
    this.said.textContent = this.tip.textContent;
  }

  show(index, place) {
    this.at = { index, place };
    const series = this.visible()[index];
    const [x, y] = [this.x(series.x[place]), this.y(series.y[place])];
    this.cursor.replaceChildren(
      svg("path", { d: `M${x},${CHART.top}V${CHART.height - CHART.bottom}`, class: "rule" }),
      svg("circle", { cx: x, cy: y, r: 5, fill: this.colourOf(series), class: "spot" }));
    const band = (series.low || []).length
      ? [el("br"), `${number(series.low[place])} to ${number(series.high[place])}`] : [];
    const label = (series.labels || [])[place];
    this.tip.replaceChildren(...[
      el("strong", {}, series.name), el("br"),
      ...(label ? [label, el("br")] : []),
      `${this.figure.xLabel} ${number(series.x[place])}`, el("br"),
      `${this.figure.yLabel} ${number(series.y[place])}`, ...band,
    ].map((part) => (part instanceof Node ? part : document.createTextNode(part + " "))));
    this.tip.hidden = false;
    const room = this.width - this.tip.offsetWidth - 4;
    this.tip.style.left = `${Math.max(4, Math.min(x + 14, room))}px`;
    this.tip.style.top = `${Math.max(0, y - this.tip.offsetHeight - 12)}px`;
    if (x + 14 > room && y - this.tip.offsetHeight - 12 < 0) this.tip.style.top = `${y + 14}px`;
  }

  leave() {
    this.at = null;
    this.tip.hidden = true;
    if (this.cursor) this.cursor.replaceChildren();
  }
}
