"use strict";
// The page of a frontier: two line charts that choose a budget, memory over the step, and the table of residuals.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const COLUMNS = [
  { key: "layer", title: "layer", text: true, name: true },
  { key: "residual", title: "residual", text: true, name: true },
  { key: "shape", title: "shape", text: true },
  { key: "codec", title: "codec", text: true },
  { key: "probes", title: "probes" },
  { key: "bits", title: "bits" },
  { key: "before", title: "bytes", show: (row) => bytes(row.before) },
  { key: "after", title: "held", show: (row) => bytes(row.after) },
  { key: "noise", title: "noise", show: (row) => (row.noise ? row.noise.toPrecision(2) : "") },
];
const state = { point: Number(byId("budget").value), graph: 0, sort: "before", down: true, column: null };

function bytes(size) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  for (; size >= 999.5 && unit < units.length - 1; unit++) size /= 1000;
  return `${unit === 0 ? Math.round(size) : size.toFixed(size < 9.995 ? 2 : size < 99.95 ? 1 : 0)} ${units[unit]}`;
}

const percent = (share) => (Math.abs(share) < 5e-4 ? "0" : `${share > 0 ? "+" : ""}${(100 * share).toFixed(Math.abs(share) < 0.0995 ? 1 : 0)}%`);
const noiseText = (noise) => (noise ? noise.toPrecision(2) : "exact");
const budgetText = (point) => (point.budget === null ? "none" : bytes(point.budget));

function element(name, attributes = {}, ...children) {
  const made = name.startsWith("svg:") ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// Round values within a range, about `count` of them.
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high * (1 + 1e-9); value += step) found.push(value);
  return found;
}

// ---- peak against a cost

function lineChart(id, title, values, labels, yTicks, colour) {
  const width = 520, height = 250, left = 58, right = 14, top = 14, bottom = 44;
  const peaks = data.points.map((point) => point.peak);
  const span = [Math.min(...peaks), Math.max(...peaks)];
  const pad = 0.04 * (span[1] - span[0] || span[1]);
  const [x0, x1] = [span[0] - pad, span[1] + pad];
  const [y0, y1] = [Math.min(...values, yTicks[0].value), Math.max(...values, yTicks.at(-1).value)];
  const x = (peak) => left + ((peak - x0) / (x1 - x0)) * (width - left - right);
  const y = (value) => height - bottom - ((value - y0) / (y1 - y0 || 1)) * (height - top - bottom);
  const svg = element("svg:svg", { viewBox: `0 0 ${width} ${height}`, role: "radiogroup", "aria-label": title });
  for (const tick of yTicks) {
    svg.append(element("svg:line", { class: "grid", x1: left, x2: width - right, y1: y(tick.value), y2: y(tick.value) }));
    svg.append(element("svg:text", { x: left - 8, y: y(tick.value) + 4, "text-anchor": "end" }, tick.text));
  }
  for (const peak of ticks(x0, x1, 6).filter((value) => value >= x0)) {
    svg.append(element("svg:text", { x: x(peak), y: height - bottom + 18, "text-anchor": "middle" }, bytes(peak)));
  }
  svg.append(element("svg:line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
  svg.append(element("svg:text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, "predicted peak"));
  const path = data.points.map((point, i) => `${i ? "L" : "M"}${x(point.peak).toFixed(1)},${y(values[i]).toFixed(1)}`);
  svg.append(element("svg:path", { class: "curve", d: path.join(""), stroke: colour }));
  data.points.forEach((point, i) => {
    const label = `budget ${budgetText(point)}, peak ${bytes(point.peak)}, ${labels[i]}`;
    const dot = element("svg:circle", { class: "dot", cx: x(point.peak), cy: y(values[i]), r: 6, fill: colour, role: "radio",
      tabindex: -1, "aria-label": label, "data-point": i }, element("svg:title", {}, label));
    dot.addEventListener("click", () => choose(i));
    svg.append(dot);
  });
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    if (!move) return;
    event.preventDefault();
    choose(Math.min(Math.max(state.point + move, 0), data.points.length - 1));
    svg.querySelector(`[data-point="${state.point}"]`).focus();
  });
  byId(id).replaceChildren(svg);
}

function drawFrontier() {
  const slow = data.points.map((point) => point.slowdown);
  const slowTicks = ticks(Math.min(0, ...slow), Math.max(0.01, ...slow), 4);
  lineChart("time-chart", "Extra time of a step", slow, slow.map((s) => `time ${percent(s)}`),
    slowTicks.map((value) => ({ value, text: percent(value) })), "var(--accent)");
  const decades = data.points.map((point) => point.noise).filter((noise) => noise > 0).map(Math.log10);
  const low = decades.length ? Math.floor(Math.min(...decades)) : 0;
  const high = decades.length ? Math.ceil(Math.max(...decades)) : 1;
  const step = Math.max(1, Math.ceil((high - low) / 5));
  // No logarithm of nothing: exact plans are on a line of their own, below all others.
  const levels = data.points.map((point) => (point.noise > 0 ? Math.log10(point.noise) : low - step));
  const noiseTicks = [{ value: low - step, text: "exact" }];
  for (let value = low; value <= high; value += step) noiseTicks.push({ value, text: value < -3 ? `1e${value}` : String(10 ** value) });
  lineChart("noise-chart", "Noise of the gradients", levels, data.points.map((point) => `noise ${noiseText(point.noise)}`),
    decades.length ? noiseTicks : noiseTicks.slice(0, 1), "var(--noise)");
}

// ---- memory over the step

function stacks(graph) {
  const { fixed, rest, residuals } = graph.memory;
  const level = rest.map(() => fixed);
  const bands = [{ kind: "fixed", bottom: rest.map(() => 0), top: level.slice() }];
  const order = residuals.map((loads, index) => ({ loads, index })).filter((item) => item.loads.length);
  order.sort((a, b) => a.loads[0][0] - b.loads[0][0]);
  order.forEach(({ loads, index }, place) => {
    const bottom = level.slice();
    for (const [first, last, size] of loads) for (let t = first; t <= last; t++) level[t] += size;
    bands.push({ kind: "residual", index, share: place / order.length, odd: place % 2, bottom, top: level.slice() });
  });
  bands.push({ kind: "rest", bottom: level.slice(), top: level.map((size, t) => size + rest[t]) });
  return bands;
}

// The outline of a band, as steps; only of the columns where it has any height.
function outline(band, x, y) {
  let path = "";
  for (let t = 0; t < band.top.length; t++) {
    if (band.top[t] <= band.bottom[t]) continue;
    let end = t;
    while (end + 1 < band.top.length && band.top[end + 1] > band.bottom[end + 1]) end++;
    path += `M${x(t)},${y(band.bottom[t])}`;
    for (let s = t; s <= end; s++) path += `V${y(band.top[s])}H${x(s + 1)}`;
    for (let s = end; s >= t; s--) path += `V${y(band.bottom[s])}H${x(s)}`;
    path += "Z";
    t = end;
  }
  return path;
}

function drawMemory(point, graph) {
  const width = 1100, height = 380, left = 70, right = 12, top = 24, bottom = 22;
  const bands = stacks(graph);
  const total = bands.at(-1).top;
  const high = 1.04 * Math.max(...total, point.budget !== null ? point.budget : 0);
  const x = (t) => +(left + (t / total.length) * (width - left - right)).toFixed(2);
  const y = (size) => +(height - bottom - (size / high) * (height - top - bottom)).toFixed(2);
  const svg = element("svg:svg", { viewBox: `0 0 ${width} ${height}` });
  for (const size of ticks(0, high, 6)) {
    svg.append(element("svg:line", { class: "grid", x1: left, x2: width - right, y1: y(size), y2: y(size) }));
    svg.append(element("svg:text", { x: left - 8, y: y(size) + 4, "text-anchor": "end" }, bytes(size)));
  }
  for (const band of bands) {
    const area = element("svg:path", { d: outline(band, x, y), class: band.kind === "residual" ? "residual" : `area-${band.kind}` });
    if (band.kind === "residual") {
      const hue = (220 + 260 * band.share) % 360;
      area.style.fill = `hsl(${hue.toFixed(0)} 58% calc(var(--stack-light) + ${band.odd} * var(--stack-step)))`;
      area.dataset.row = band.index;
    }
    svg.append(area);
  }
  const phases = graph.memory.phases;
  phases.forEach(([name, start], i) => {
    const next = i + 1 < phases.length ? phases[i + 1][1] : total.length;
    if (start) svg.append(element("svg:line", { class: "axis", x1: x(start), x2: x(start), y1: top - 8, y2: height - bottom }));
    if (next - start > 0.06 * total.length) {
      svg.append(element("svg:text", { x: (x(start) + x(next)) / 2, y: 14, "text-anchor": "middle" }, name));
    }
  });
  if (point.budget !== null) {
    svg.append(element("svg:line", { class: "budget-line", x1: left, x2: width - right, y1: y(point.budget), y2: y(point.budget) }));
  }
  svg.append(element("svg:line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
  svg.append(element("svg:text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, "operations of the step, in order"));
  const cursor = element("svg:line", { class: "cursor", y1: top, y2: height - bottom });
  svg.append(cursor);
  const read = (t) => {
    state.column = t;
    cursor.setAttribute("x1", x(t + 0.5));
    cursor.setAttribute("x2", x(t + 0.5));
    byId("readout").textContent = describe(graph, bands, t);
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const place = (((event.clientX - box.left) / box.width) * width - left) / (width - left - right);
    if (place >= 0 && place < 1) read(Math.floor(place * total.length));
  });
  byId("memory-chart").onkeydown = (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1, PageDown: 10, PageUp: -10 }[event.key];
    if (!move) return;
    event.preventDefault();
    read(Math.min(Math.max(state.column + move, 0), total.length - 1));
  };
  byId("memory-chart").replaceChildren(svg);
  read(total.indexOf(Math.max(...total)));
}

function describe(graph, bands, t) {
  const { labels, phases, fixed } = graph.memory;
  const phase = phases.filter(([, start]) => start <= t).at(-1)[0];
  const holders = bands.filter((band) => band.kind === "residual" && band.top[t] > band.bottom[t]);
  const sizes = holders.map((band) => [graph.rows[band.index].layer, band.top[t] - band.bottom[t]]).sort((a, b) => b[1] - a[1]);
  const most = sizes.slice(0, 4).map(([layer, size]) => `${layer}: ${bytes(size)}`).join(", ");
  const total = bands.at(-1).top;
  const peak = total[t] === Math.max(...total) ? "The peak, " : "";
  const held = sizes.reduce((sum, [, size]) => sum + size, 0);
  const others = sizes.length > 4 ? ` and ${sizes.length - 4} more` : "";
  return `${peak}${bytes(total[t])} at ${labels[t]} (${phase}): parameters and inputs ${bytes(fixed)}, ` +
    `residuals ${bytes(held)}${sizes.length ? ` (${most}${others})` : ""}, other ${bytes(total[t] - fixed - held)}.`;
}

// ---- the table of residuals

function drawTable(graph) {
  const head = COLUMNS.map((column) => {
    const button = element("button", { type: "button" }, column.title);
    button.addEventListener("click", () => {
      state.down = state.sort === column.key ? !state.down : !column.text;
      state.sort = column.key;
      drawTable(graph);
      byId("residuals").querySelector("th[aria-sort] button").focus();
    });
    const cell = element("th", { scope: "col", class: column.text ? "text" : "" }, button);
    if (state.sort === column.key) cell.setAttribute("aria-sort", state.down ? "descending" : "ascending");
    return cell;
  });
  const rows = graph.rows.map((row, index) => ({ row, index }));
  const collator = new Intl.Collator("en", { numeric: true });
  const text = COLUMNS.find((column) => column.key === state.sort).text;
  rows.sort((a, b) => {
    const [one, other] = [a.row[state.sort], b.row[state.sort]];
    const order = text ? collator.compare(one, other) : (one ?? -1) - (other ?? -1);
    return (state.down ? -order : order) || a.index - b.index;
  });
  const body = rows.map(({ row, index }) => {
    const cells = COLUMNS.map((column) => {
      const shown = column.show ? column.show(row) : row[column.key] ?? "";
      const cell = element("td", { class: [column.text && "text", column.name && "name"].filter(Boolean).join(" ") });
      if (column.key === "codec") {
        const pill = element("span", { class: "codec" }, shown);
        pill.style.background = `var(--${shown.split(":")[0]})`;
        cell.append(pill);
      } else cell.append(String(shown));
      return cell;
    });
    const line = element("tr", { "data-row": index }, ...cells);
    line.addEventListener("pointerenter", () => light(index));
    line.addEventListener("pointerleave", () => light(null));
    return line;
  });
  byId("residuals").tHead.replaceChildren(element("tr", {}, ...head));
  byId("residuals").tBodies[0].replaceChildren(...body);
}

function light(row) {
  const svg = byId("memory-chart").querySelector("svg");
  svg.classList.toggle("dimmed", row !== null);
  for (const area of svg.querySelectorAll(".residual")) area.classList.toggle("lit", Number(area.dataset.row) === row);
}

// ---- choosing

function facts(point, graph) {
  const plain = data.points.at(-1);
  const less = plain.peak > point.peak ? `, ${(plain.peak / point.peak).toFixed(1)}x less` : "";
  const rows = [["predicted peak", bytes(point.peak) + less], ["extra time of a step", percent(point.slowdown)],
    ["noise", noiseText(point.noise)]];
  if (graph.slices > 1) rows.push(["slices of the batch", `${graph.slices}, ${graph.held_slices} held`]);
  return rows.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)));
}

function choose(index) {
  state.point = index;
  const point = data.points[index];
  state.graph = Math.min(state.graph, point.graphs.length - 1);
  const graph = point.graphs[state.graph];
  byId("budget").value = index;
  byId("budget").setAttribute("aria-valuetext", budgetText(point));
  byId("chosen").textContent = budgetText(point);
  byId("facts").replaceChildren(...facts(point, graph));
  byId("notes").replaceChildren(...graph.notes.map((note) => element("li", {}, note)));
  for (const dot of document.querySelectorAll(".dot")) {
    const chosen = Number(dot.dataset.point) === index;
    dot.setAttribute("aria-checked", chosen);
    dot.setAttribute("tabindex", chosen ? 0 : -1);
    dot.setAttribute("r", chosen ? 8 : 6);
  }
  byId("points").querySelectorAll("tbody tr").forEach((row, i) => row.setAttribute("aria-current", i === index));
  drawMemory(point, graph);
  drawTable(graph);
}

const graphs = data.points[0].graphs.length;
if (graphs > 1) {
  for (let i = 0; i < graphs; i++) byId("graph").append(element("option", { value: i }, `${i + 1} of ${graphs}`));
  byId("graph").hidden = byId("graph-label").hidden = false;
  byId("graph").addEventListener("change", (event) => {
    state.graph = Number(event.target.value);
    choose(state.point);
  });
}
byId("budget").addEventListener("input", (event) => choose(Number(event.target.value)));
byId("points").querySelectorAll("tbody tr").forEach((row, i) => row.addEventListener("click", () => choose(i)));
drawFrontier();
choose(state.point);
