// Which page is shown, in which theme.

class Report {
  constructor() {
    this.data = JSON.parse(document.getElementById("data").textContent);
    this.main = document.getElementById("main");
    this.index = new Map(this.data.runs.rows.map((row, index) => [row[0], index]));
    this.theme = el("button", { type: "button", class: "theme", onclick: () => this.nextTheme() });
    document.getElementById("head").append(
      el("div", { class: "brand" }, el("h1", {}, el("a", { href: "#" }, this.data.title)),
        el("p", { class: "quiet" }, this.data.subtitle)),
      el("nav", { "aria-label": "Sections" }, el("a", { href: "#all-runs" }, "Runs"),
        el("a", { href: "#settings" }, "Settings"), el("a", { href: "#method" }, "How to read this"),
        this.theme));
    this.setTheme(new URLSearchParams(location.search).get("theme") || remembered() || "auto");
    this.overview = new Overview(this);
    addEventListener("hashchange", () => this.show());
    addEventListener("keydown", (event) => this.key(event));
    this.show();
  }

  // Colours are CSS variables, so that a change of theme needs no new drawing.
  colour(method) {
    if (!method) return "var(--muted)";
    const count = this.data.palette.light.length;
    return `var(--series-${(this.data.colours[method] ?? 7) % count})`;
  }

  dot(method) {
    return svg("svg", { width: 12, height: 12, class: "dot", "aria-hidden": "true" },
      svg("circle", { cx: 6, cy: 6, r: 5, fill: this.colour(method) }));
  }

  setTheme(theme) {
    const known = ["auto", "light", "dark"].includes(theme) ? theme : "auto";
    document.documentElement.dataset.theme = known;
    this.theme.textContent = { auto: "◐ auto", light: "○ light", dark: "● dark" }[known];
    this.theme.setAttribute("aria-label", `Theme: ${known}. Change it.`);
  }

  nextTheme() {
    const order = ["auto", "light", "dark"];
    const next = order[(order.indexOf(document.documentElement.dataset.theme) + 1) % 3];
    this.setTheme(next);
    try {
      localStorage.setItem("theme", next);
    } catch (error) {
      if (!(error instanceof DOMException)) throw error; // a browser may forbid storage
    }
  }

  async show() {
    const hash = location.hash.slice(1);
    if (hash.startsWith("run/")) return this.showRun(decodeURIComponent(hash.slice(4)));
    const returning = this.main.firstChild !== this.overview.node;
    if (returning) this.main.replaceChildren(this.overview.node);
    document.title = this.data.title;
    const target = hash && document.getElementById(hash);
    if (target) {
      if (target instanceof HTMLDetailsElement) target.open = true;
      target.scrollIntoView();
    } else if (returning && this.left !== undefined) scrollTo(0, this.left);
  }

  async showRun(name) {
    const index = this.index.get(name);
    if (index === undefined) {
      this.main.replaceChildren(el("p", { class: "note" }, `There is no run ${name}. `,
        el("a", { href: "#all-runs" }, "All runs")));
      return;
    }
    if (this.main.firstChild === this.overview.node) this.left = scrollY;
    if (document.readyState === "loading")
      await new Promise((done) => { addEventListener("DOMContentLoaded", done, { once: true }); });
    const order = this.overview.table.order.map((row) => row[0]);
    const at = order.indexOf(name);
    const neighbours = at < 0 ? [null, null] : [order[at - 1] ?? null, order[at + 1] ?? null];
    const page = new RunPage(this, index, await unpack(index), neighbours);
    this.main.replaceChildren(page.node);
    document.title = `${name} · ${this.data.title}`;
    scrollTo(0, 0);
    page.node.querySelector("h2").focus({ preventScroll: true });
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (event.key === "/" && !typing && this.overview.node.isConnected) {
      event.preventDefault();
      this.overview.query.focus();
      return;
    }
    const wanted = { j: "j", k: "k", Escape: "up" }[event.key];
    const link = wanted && !typing && this.main.querySelector(`.crumbs [data-key="${wanted}"]`);
    if (link) link.click();
  }
}

function remembered() {
  try {
    return localStorage.getItem("theme");
  } catch (error) {
    if (!(error instanceof DOMException)) throw error; // a browser may forbid storage
    return null;
  }
}

new Report();
