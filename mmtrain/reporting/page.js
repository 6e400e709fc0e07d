"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const form = document.getElementById("filters");
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const svgSpace = document.querySelector("svg").namespaceURI;

  // ---- filters: what is shown -------------------------------------------------------------------------------------
  const chosen = (name) => new Set(all(`input[name=${name}]:checked`, form).map((box) => box.value));
  const filter = { methods: new Set(), seeds: new Set(), words: [], reported: true, comparable: false };

  function readFilter() {
    filter.methods = chosen("method");
    filter.seeds = chosen("seed");
    filter.words = form.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean);
    filter.reported = form.elements.reported.checked;
    filter.comparable = form.elements.comparable.checked;
  }

  const known = new Set(data.methods);
  const showsMethod = (method) => !known.has(method) || filter.methods.has(method);
  const showsRun = (place) => showsMethod(data.runs[place].method) && filter.seeds.has(data.runs[place].seed);
  const showsText = (text) => filter.words.every((word) => text.includes(word));

  // ---- tables -----------------------------------------------------------------------------------------------------
  /** Hide columns and rows; returns the number of columns that are left. */
  function filterTable(details) {
    const columns = all("thead [data-place]", details);
    const shown = new Map(columns.map((head) => [Number(head.dataset.place), showsColumn(head)]));
    for (const head of columns) head.hidden = !shown.get(Number(head.dataset.place));
    for (const head of all("thead [data-group]", details)) {
      const count = head.dataset.group.split(" ").filter((place) => shown.get(Number(place))).length;
      head.hidden = !count;
      head.colSpan = count || 1;
    }
    const judged = new Map(columns.map((head) => [Number(head.dataset.place), head.dataset.direction]));
    for (const row of all("tbody tr", details)) {
      row.hidden = !filterRow(row, shown, judged, Number(details.dataset.error));
    }
    const count = [...shown.values()].filter(Boolean).length;
    details.hidden = !count || !details.querySelector("tbody tr:not([hidden])");
    return details.hidden ? 0 : count;
  }

  const showsColumn = (head) =>
    showsText(head.dataset.search) && (!filter.comparable || head.dataset.comparable === "1");

  function filterRow(row, shown, judged, error) {
    let hasSeed = !row.matches(".ours");
    [...row.cells].slice(1).forEach((cell, place) => {
      cell.hidden = !shown.get(place);
      if (cell.dataset.seeds) hasSeed = fill(cell, row, judged.get(place), error) || hasSeed;
    });
    if (row.matches(".reported") && !filter.reported) return false;
    return hasSeed && showsMethod(row.dataset.method);
  }

  /** Mean, interval and difference of the shown seeds; false if none of them is shown. */
  function fill(cell, row, direction, error) {
    const values = JSON.parse(cell.dataset.seeds).filter(([seed]) => filter.seeds.has(seed)).map(([, value]) => value);
    if (!values.length) return false;
    const digits = Number(cell.dataset.digits), count = values.length;
    const mean = values.reduce((sum, value) => sum + value, 0) / count;
    const spread = Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / Math.max(count - 1, 1));
    const half = count > 1 ? (data.quantiles[count] * spread) / Math.sqrt(count) : null;
    cell.replaceChildren(element("b", {}, mean.toFixed(digits)));
    if (half !== null) cell.append(" ", element("span", { class: "interval" }, `± ${half.toFixed(digits)}`));
    if (cell.dataset.interval) cell.append(" ", element("span", { class: "interval" }, cell.dataset.interval));
    if (cell.dataset.reported !== undefined && !cell.matches(".nocompare")) {
      cell.append(" ", difference(mean - Number(cell.dataset.reported), half, digits, direction, error, row));
    }
    return true;
  }

  function difference(value, half, digits, direction, error, row) {
    const rounded = Number(value.toFixed(digits));
    const sign = rounded > 0 ? "▲ +" : rounded < 0 ? "▼ −" : "";
    const isJudged = row.dataset.judged === "1" && direction && rounded && Math.abs(value) > error;
    const verdict = isJudged ? ((value > 0) === (direction === "higher") ? "better" : "worse") : "";
    const within = verdict && half !== null && Math.abs(value) <= half ? " within" : "";
    const span = element("span", { class: `difference ${verdict}${within}` }, sign + Math.abs(rounded).toFixed(digits));
    span.append(element("span", { class: "unseen" }, ` ${verdict}${within}`));
    return span;
  }

  // ---- curves -----------------------------------------------------------------------------------------------------
  const smoothing = document.getElementById("smooth");
  const size = { width: 360, height: 205, left: 46, right: 8, top: 8, bottom: 24 };
  const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
  const short = (value) => {
    const magnitude = Math.abs(value);
    if (magnitude && (magnitude < 1e-3 || magnitude >= 1e5)) return value.toExponential(1);
    return String(Number(value.toPrecision(4)));
  };

  function element(name, attributes, text) {
    const node = document.createElement(name);
    return dress(node, attributes, text);
  }
  const shape = (name, attributes, text) => dress(document.createElementNS(svgSpace, name), attributes, text);
  function dress(node, attributes, text) {
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  }

  /** Value of a curve at a step, on the line between its points; null outside of them. */
  function at({ steps, values }, step) {
    if (step < steps[0] || step > steps[steps.length - 1]) return null;
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= step) low = middle; else high = middle;
    }
    if (steps[low] === step || low === high) return values[low];
    return values[low] + ((values[high] - values[low]) * (step - steps[low])) / (steps[high] - steps[low]);
  }

  const union = (curves) => [...new Set(curves.flatMap((curve) => curve.steps))].sort((a, b) => a - b);

  /** Mean curve over the steps that all curves reach. */
  function mean(curves) {
    if (curves.length === 1) return curves[0];
    const first = Math.max(...curves.map((curve) => curve.steps[0]));
    const last = Math.min(...curves.map((curve) => curve.steps[curve.steps.length - 1]));
    const steps = union(curves).filter((step) => step >= first && step <= last);
    return { steps, values: steps.map((step) => curves.reduce((sum, curve) => sum + at(curve, step), 0) / curves.length) };
  }

  /** Centred moving average, over at most a sixth of the points and as many on either side: it lags behind nothing. */
  function smoothed({ steps, values }) {
    const sums = [0];
    for (const value of values) sums.push(sums[sums.length - 1] + value);
    const widest = Math.round((Number(smoothing.value) * values.length) / 12);
    const average = (value, place) => {
      const reach = Math.min(widest, place, values.length - 1 - place);
      return reach ? (sums[place + reach + 1] - sums[place - reach]) / (2 * reach + 1) : value;
    };
    return { steps, values: values.map(average) };
  }

  function ticks(low, high, count) {
    const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= raw * 0.999);
    const found = [];
    for (let place = Math.ceil(low / step); place * step <= high * (1 + 1e-12); place += 1) found.push(place * step);
    return found;
  }

  class Chart {
    constructor(spec) {
      this.spec = spec;
      this.curves = spec.curves.map(([run, steps, values]) => ({ run, steps: data.steps[steps], values }));
      this.node = element("figure", { class: "chart" });
      this.svg = shape("svg", { viewBox: `0 0 ${size.width} ${size.height}`, tabindex: 0, role: "img" });
      this.tip = element("div", { class: "tip", role: "status" });
      this.tip.hidden = true;
      this.node.append(element("figcaption", {}, spec.metric), this.svg, this.tip);
      this.node.chart = this;
      this.listen();
    }

    listen() {
      const point = (event) => {
        const box = this.svg.getBoundingClientRect();
        this.show(this.nearest(((event.clientX - box.left) / box.width) * size.width));
      };
      this.svg.addEventListener("pointermove", point);
      this.svg.addEventListener("pointerdown", point);
      this.svg.addEventListener("pointerleave", () => this.hide());
      this.svg.addEventListener("blur", () => this.hide());
      this.svg.addEventListener("keydown", (event) => {
        const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
        if (event.key === "Escape") this.hide();
        if (!move || !this.steps?.length) return;
        event.preventDefault();
        const start = this.place ?? (move > 0 ? -1 : this.steps.length);
        this.show(Math.min(Math.max(start + move, 0), this.steps.length - 1));
      });
    }

    update() {
      const curves = this.curves.filter((curve) => showsRun(curve.run));
      this.node.hidden = !curves.length || !showsText(this.spec.search);
      if (this.node.hidden) return false;
      this.isStale = true;
      if (this.isNear) this.draw(curves);
      return true;
    }

    draw(curves = this.curves.filter((curve) => showsRun(curve.run))) {
      this.isStale = false;
      this.hide();
      const byMethod = new Map();
      for (const curve of curves) {
        const { method } = data.runs[curve.run];
        byMethod.set(method, [...(byMethod.get(method) ?? []), curve]);
      }
      this.lines = [...byMethod].map(([method, seeds]) => ({ method, seeds, mean: mean(seeds) }));
      this.steps = union(curves);
      this.scale(curves);
      this.svg.replaceChildren(...this.axes());
      for (const line of this.lines) {
        const colour = `stroke: var(--method-${data.methods.indexOf(line.method)})`;
        if (line.seeds.length > 1) for (const seed of line.seeds) this.svg.append(this.path(seed, "seed", colour));
        const dash = data.dashes[data.methods.indexOf(line.method) % data.dashes.length];
        if (line.mean.steps.length) this.svg.append(this.path(smoothed(line.mean), "mean", colour, dash));
      }
      this.cursor = shape("line", { class: "cursor", y1: size.top, y2: size.height - size.bottom, visibility: "hidden" });
      this.svg.append(this.cursor);
      const ends = this.lines.map(({ method, mean: { values } }) => `${method} ${short(values[values.length - 1])}`);
      this.svg.setAttribute("aria-label", `${this.spec.metric} by step; last values: ${ends.join(", ")}`);
    }

    scale(curves) {
      const values = curves.flatMap((curve) => curve.values);
      let low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
      const room = (high - low) * 0.05 || Math.abs(high) * 0.1 || 1;
      [low, high] = [low - room, high + room];
      const first = this.steps[0], last = this.steps[this.steps.length - 1];
      const width = size.width - size.left - size.right, height = size.height - size.top - size.bottom;
      this.range = { low, high, first, last };
      this.x = (step) => size.left + ((step - first) / (last - first || 1)) * width;
      this.y = (value) => size.top + ((high - value) / (high - low)) * height;
    }

    axes() {
      const { low, high, first, last } = this.range, bottom = size.height - size.bottom, nodes = [];
      for (const value of ticks(low, high, 5)) {
        const y = this.y(value);
        nodes.push(shape("line", { class: "gridline", x1: size.left, x2: size.width - size.right, y1: y, y2: y }));
        nodes.push(shape("text", { x: size.left - 5, y: y + 4, "text-anchor": "end" }, short(value)));
      }
      for (const step of last > first ? ticks(first, last, 5) : [first]) {
        nodes.push(shape("text", { x: this.x(step), y: bottom + 16, "text-anchor": "middle" }, compact.format(step)));
      }
      return nodes;
    }

    path({ steps, values }, kind, style, dash = "") {
      const points = steps.map((step, place) => `${this.x(step).toFixed(1)} ${this.y(values[place]).toFixed(1)}`);
      return shape("path", { class: kind, d: `M${points.join("L")}`, style, "stroke-dasharray": dash });
    }

    nearest(x) {
      let best = 0;
      this.steps.forEach((step, place) => {
        if (Math.abs(this.x(step) - x) < Math.abs(this.x(this.steps[best]) - x)) best = place;
      });
      return best;
    }

    show(place) {
      this.place = place;
      const step = this.steps[place], x = this.x(step);
      dress(this.cursor, { x1: x, x2: x, visibility: "visible" });
      this.tip.replaceChildren(element("b", {}, `step ${step}`));
      for (const { method, seeds, mean: line } of this.lines) {
        const value = at(line, step);
        if (value === null) continue;
        const values = seeds.map((seed) => at(seed, step)).filter((one) => one !== null);
        const range = values.length > 1 ? ` (${short(Math.min(...values))} to ${short(Math.max(...values))})` : "";
        const row = element("div", {});
        row.append(element("i", { style: `background: var(--method-${data.methods.indexOf(method)})` }));
        row.append(`${method} ${short(value)}${range}`);
        this.tip.append(row);
      }
      this.tip.hidden = false;
      const wide = this.node.clientWidth, middle = (x / size.width) * wide;
      const left = middle > wide / 2 ? middle - this.tip.offsetWidth - 6 : middle + 18;
      this.tip.style.left = `${Math.max(2, Math.min(left, wide - this.tip.offsetWidth - 2))}px`;
      this.tip.style.top = "2.2rem";
    }

    hide() {
      this.place = undefined;
      this.tip.hidden = true;
      this.cursor?.setAttribute("visibility", "hidden");
    }
  }

  const near = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) {
        target.chart.isNear = isIntersecting;
        if (isIntersecting && target.chart.isStale) target.chart.draw();
      }
    },
    { rootMargin: "500px" },
  );
  const charts = all("[data-charts]").flatMap((grid) =>
    data.charts[grid.dataset.charts].map((spec) => {
      const chart = new Chart(spec);
      grid.append(chart.node);
      near.observe(chart.node);
      return chart;
    }),
  );

  // ---- everything at once -----------------------------------------------------------------------------------------
  function hideEmpty(selector, inner) {
    for (const node of all(selector)) node.hidden = !node.querySelector(`${inner}:not([hidden])`);
  }

  function apply() {
    readFilter();
    const columns = all("details.table").reduce((sum, details) => sum + filterTable(details), 0);
    const drawn = charts.filter((chart) => chart.update()).length;
    for (const node of all("[data-run]")) node.hidden = !showsRun(Number(node.dataset.run));
    for (const node of all("tr.claim")) {
      node.hidden = !JSON.parse(node.dataset.methods).every(showsMethod) || !showsText(node.dataset.search);
    }
    for (const node of all(".legend [data-method]")) node.hidden = !showsMethod(node.dataset.method);
    hideEmpty(".chart-group", ".chart");
    hideEmpty(".picture-group", "figure");
    for (const node of all(".picture-group")) node.hidden ||= !showsText(node.dataset.search);
    const runs = data.runs.filter((_, place) => showsRun(place)).length;
    form.querySelector("output").value =
      `${runs} of ${data.runs.length} runs · ${columns} columns · ${drawn} curves`;
  }

  form.addEventListener("input", apply);
  smoothing?.addEventListener("input", () => charts.forEach((chart) => chart.update()));
  form.addEventListener("reset", () => setTimeout(apply));
  form.addEventListener("submit", (event) => event.preventDefault());

  // ---- theme, large pictures --------------------------------------------------------------------------------------
  const button = document.getElementById("theme");
  const setTheme = (theme) => {
    document.documentElement.style.colorScheme = theme;
    button.textContent = theme === "dark" ? "Light theme" : "Dark theme";
  };
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  button.addEventListener("click", () => {
    setTheme(document.documentElement.style.colorScheme === "dark" ? "light" : "dark");
  });

  const dialog = document.querySelector("dialog");
  document.addEventListener("click", (event) => {
    const small = event.target.closest(".pictures button")?.querySelector("img");
    if (small) {
      dialog.querySelector("img").src = small.src;
      dialog.querySelector("img").alt = dialog.querySelector("span").textContent = small.alt;
      dialog.showModal();
    } else if (event.target === dialog) dialog.close();
  });

  apply();
})();
