// The readings of a topic: a small chart for each name, with history and live values.

import { cut, element, isolated, number, visible } from "./text.js";

const MOST = 6000; // points in a chart
const COLOURS = 6;

export class Charts {
  constructor(place) {
    Object.assign(this, { place, charts: new Map(), start: 0, span: 3600 });
    new ResizeObserver(() => this.resize()).observe(place);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw());
  }

  clear() {
    for (const chart of this.charts.values()) chart.plot.destroy();
    this.charts.clear();
    this.place.replaceChildren();
  }

  // series: name -> points [time, value] or [time, mean, min, max]
  show(series, span) {
    this.clear();
    this.span = span;
    for (const name of Object.keys(series).sort()) this.add(name, series[name].map(p => p[0]), series[name].map(p => p[1]));
  }

  add(name, times, values) {
    const title = isolated(cut(visible(name), 80), "series-name"), last = element("span", "series-last");
    const box = element("div", "plot");
    const figure = element("figure", `chart colour-${this.charts.size % COLOURS}`, element("figcaption", "", title, last), box);
    this.place.append(figure);
    const chart = { name, times, values, figure, last, box };
    chart.plot = this.make(chart);
    this.charts.set(name, chart);
    this.label(chart);
  }

  make(chart) {
    const style = getComputedStyle(chart.figure), line = style.getPropertyValue("--series"), text = style.getPropertyValue("--muted"), grid = style.getPropertyValue("--line");
    const axis = { stroke: text, grid: { stroke: grid, width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    const options = {
      width: Math.max(200, chart.box.clientWidth), height: 150,
      legend: { show: false },
      cursor: { sync: { key: "readings" }, points: { size: 6 }, y: false },
      scales: { x: { range: () => this.range() }, y: { range: (_, low, high) => padded(low, high) } },
      axes: [
        { ...axis, size: 26, space: 70, values: (_, splits, _axis, _space, step) => splits.map(at => clock(at, step)) },
        { ...axis, size: 56, space: 26, values: (_, splits) => splits.map(number) },
      ],
      series: [{}, { stroke: line, width: 1.6, fill: `color-mix(in srgb, ${line} 12%, transparent)`, points: { show: chart.times.length < 60, size: 5, fill: line }, spanGaps: false }],
      hooks: { setCursor: [plot => this.label(chart, plot.cursor.idx)] },
    };
    return new uPlot(options, [chart.times, chart.values], chart.box);
  }

  // Adds new points: [[time, [[name, value]]]], the oldest first.
  append(messages) {
    const changed = new Set();
    for (const [at, readings] of messages) {
      for (const [name, value] of readings) {
        if (typeof value !== "number") continue;
        if (!this.charts.has(name)) {
          if (this.charts.size >= 8) continue;
          this.add(name, [], []);
        }
        const chart = this.charts.get(name), { times, values } = chart;
        // Inserted by time, because several collectors may store out of order.
        let place = times.length;
        while (place > 0 && times[place - 1] > at) place--;
        if (times[place - 1] === at && values[place - 1] === value) continue;
        times.splice(place, 0, at);
        values.splice(place, 0, value);
        if (times.length > MOST) { times.shift(); values.shift(); }
        changed.add(chart);
      }
    }
    for (const chart of changed) {
      chart.plot.setData([chart.times, chart.values]);
      this.label(chart);
    }
  }

  label(chart, index = null) {
    const at = index ?? chart.values.length - 1, value = chart.values[at];
    chart.last.textContent = value === undefined || value === null ? "" : number(value);
  }

  // The axis starts at the first point of all charts, so that new points are not squeezed together.
  range() {
    const now = Date.now() / 1000, first = Math.min(...Array.from(this.charts.values(), chart => chart.times[0] ?? now));
    return [Math.max(now - this.span, Math.min(first, now - 60)), now];
  }

  // Moves the time axis on.
  tick() {
    const [min, max] = this.range();
    for (const { plot } of this.charts.values()) plot.setScale("x", { min, max });
  }

  resize() {
    for (const { plot, box } of this.charts.values()) plot.setSize({ width: Math.max(200, box.clientWidth), height: 150 });
  }

  redraw() {
    for (const chart of this.charts.values()) {
      chart.plot.destroy();
      chart.plot = this.make(chart);
    }
  }
}

function clock(at, step) {
  const date = new Date(at * 1000);
  if (step >= 86400) return date.toLocaleDateString("en", { day: "numeric", month: "short" });
  return date.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit", second: step < 60 ? "2-digit" : undefined });
}

function padded(low, high) {
  if (low === null || low === undefined) return [0, 1];
  const room = (high - low || Math.abs(high) || 1) * 0.12;
  return [low - room, high + room];
}

const SVG = "http://www.w3.org/2000/svg";

// Draws a line without axes. Values are from old to new; `most` of them fit.
export function sparkline(place, values, most) {
  const width = 240, height = 40, top = Math.max(1e-9, ...values);
  const points = values.map((value, i) => [width * (most - values.length + i) / (most - 1), height - 2 - (height - 5) * value / top]);
  const draw = (d, name) => {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("d", d);
    path.setAttribute("class", name);
    return path;
  };
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", "Messages stored per second in the last 15 minutes");
  if (points.length > 1) {
    const line = "M" + points.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L");
    svg.append(draw(`${line}L${points.at(-1)[0].toFixed(1)} ${height}L${points[0][0].toFixed(1)} ${height}Z`, "area"), draw(line, "line"));
  }
  place.replaceChildren(svg);
}
