// Loss, throughput and workers over time or steps, drawn by uPlot. One cursor for all; incidents as dashed lines.
/* global uPlot */
import { byId, clock, count, fixed, short } from "./format.js";

const STEP = 0, AT = 1, LOSS = 2, SPEED = 3, GENERATION = 4;
const narrow = () => window.innerWidth < 480;

export class Charts {
  constructor() {
    this.axis = "time";
    this.range = [0, 1];
    this.marks = [];
    this.plots = [];
    this.sync = uPlot.sync("run");
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.build());
    const observer = new ResizeObserver(() => this.fit());
    for (const id of ["plot-loss", "plot-speed", "plot-world"]) observer.observe(byId(id));
    this.build();
  }

  /** Draws a state. */
  show(state) {
    this.state = state;
    const byTime = this.axis === "time";
    const loss = [[], []], speed = [[], []];
    let previous = null;
    for (const row of state.points) {
      const x = byTime ? row[AT] : row[STEP] + 1;
      if (previous && previous[GENERATION] !== row[GENERATION]) {
        // Between generations nothing was trained: the line has a gap.
        const gap = (x + (byTime ? previous[AT] : previous[STEP] + 1)) / 2;
        for (const data of [loss, speed]) { data[0].push(gap); data[1].push(null); }
      }
      loss[0].push(x); loss[1].push(row[LOSS]);
      speed[0].push(x); speed[1].push(row[SPEED]);
      previous = row;
    }
    const world = this.world(state, byTime);
    const told = byTime && state.timeline.length ? state.timeline.at(-1).time - state.start : 0;
    const last = Math.max(loss[0].at(-1) ?? 0, world[0].at(-1) ?? 0, told, 10);
    const first = byTime ? 0 : Math.min(loss[0][0] ?? 0, world[0][0] ?? 0);
    this.range = [first, last];
    this.marks = state.timeline.filter((entry) => entry.kind === "incident")
      .map((entry) => (byTime ? (entry.at ?? entry.time) - state.start : entry.step)).filter((x) => x != null);
    [loss, speed, world].forEach((data, index) => this.plots[index].setData(data));
    this.describe(state);
  }

  setAxis(axis) {
    this.axis = axis;
    this.build();
  }

  world(state, byTime) {
    const xs = [], ys = [];
    for (const [at, step, workers] of state.world) {
      const x = byTime ? at : step;
      if (xs.length && xs.at(-1) >= x) { // Generations that never took a step, or a roll-back.
        while (xs.length && xs.at(-1) >= x) { xs.pop(); ys.pop(); }
      }
      xs.push(x); ys.push(workers);
    }
    const last = state.points.at(-1);
    const end = last ? (byTime ? last[AT] : last[STEP] + 1) : 0;
    if (xs.length && end > xs.at(-1)) { xs.push(end); ys.push(ys.at(-1)); }
    return [xs, ys];
  }

  build() {
    for (const plot of this.plots) plot.destroy();
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    const colours = { line: colour("line"), muted: colour("muted"), accent: colour("accent"), soft: colour("accent-soft"), bad: colour("bad") };
    const plot = (id, series, y) => new uPlot(this.options(id, series, y, colours), [[], []], byId(id));
    this.plots = [
      plot("plot-loss", { label: "loss", stroke: colours.accent, width: 1.5, value: (_, v) => fixed(v, 4) }, {
        range: (_, low, high) => (low == null ? [0, 1] : uPlot.rangeNum(low, high, 0.1, false)),
        values: (_, ticks) => ticks.map((t) => String(+t.toPrecision(6))),
      }),
      plot("plot-speed", { label: "tokens/s", stroke: colours.accent, fill: colours.soft, width: 1.25, value: (_, v) => short(v) }, {
        range: (_, low, high) => [0, (high || 1) * 1.1],
        values: (_, ticks) => ticks.map((t) => short(t)),
      }),
      plot("plot-world", { label: "workers", stroke: colours.accent, fill: colours.soft, width: 1.25, paths: uPlot.paths.stepped({ align: 1 }), points: { show: false }, value: (_, v) => count(v) }, {
        range: (_, low, high) => [0, (high || 1) * 1.2],
        values: (_, ticks) => ticks.map((t) => (Number.isInteger(t) ? String(t) : "")),
        incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000],
        space: 18,
      }),
    ];
    if (this.state) this.show(this.state);
  }

  options(id, series, y, colours) {
    const host = byId(id);
    const caption = host.parentElement.querySelector("figcaption");
    let readout = caption.querySelector(".readout");
    if (!readout) {
      readout = document.createElement("span");
      readout.className = "readout";
      caption.append(readout);
    }
    const font = `11px ${getComputedStyle(document.body).fontFamily}`;
    const axis = { stroke: colours.muted, font, grid: { stroke: colours.line, width: 1 }, ticks: { show: false } };
    return {
      width: host.clientWidth || 300,
      height: host.clientHeight || 200,
      padding: [8, 6, 0, 0],
      scales: { x: { time: false, range: () => this.range }, y: { range: y.range } },
      series: [{}, { spanGaps: false, points: { show: false }, ...series }],
      axes: [
        { ...axis, size: 24, gap: 4, grid: { show: false }, space: narrow() ? 60 : 80,
          incrs: this.axis === "time" ? [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400, 172800, 604800] : undefined,
          values: (_, ticks) => ticks.map((t) => (this.axis === "time" ? clock(t) : Number.isInteger(t) ? short(t) : "")) },
        { ...axis, size: 46, gap: 4, values: y.values, space: y.space ?? 32, ...(y.incrs ? { incrs: y.incrs } : {}) },
      ],
      cursor: { sync: { key: this.sync.key, scales: ["x", null] }, y: false, drag: { x: false, y: false }, points: { size: 7 } },
      legend: { show: false },
      hooks: {
        draw: [(plot) => this.drawMarks(plot, colours.bad)],
        setCursor: [(plot) => this.readOut(plot, readout, series)],
      },
    };
  }

  /** A dashed line with a wedge on top where an incident began. */
  drawMarks(plot, colour) {
    const { ctx, bbox } = plot;
    const ratio = devicePixelRatio;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = colour;
    ctx.lineWidth = ratio;
    ctx.setLineDash([4 * ratio, 3 * ratio]);
    for (const x of this.marks) {
      const left = Math.round(plot.valToPos(x, "x", true));
      if (left < bbox.left || left > bbox.left + bbox.width) continue;
      ctx.globalAlpha = 0.65;
      ctx.beginPath();
      ctx.moveTo(left, bbox.top);
      ctx.lineTo(left, bbox.top + bbox.height);
      ctx.stroke();
      ctx.globalAlpha = 1;
      ctx.beginPath();
      ctx.moveTo(left - 4 * ratio, bbox.top - 4 * ratio);
      ctx.lineTo(left + 4 * ratio, bbox.top - 4 * ratio);
      ctx.lineTo(left, bbox.top + 3 * ratio);
      ctx.fill();
    }
    ctx.restore();
  }

  readOut(plot, readout, series) {
    const index = plot.cursor.idx;
    const value = index == null ? null : plot.data[1][index];
    const x = index == null ? null : plot.data[0][index];
    readout.textContent = value == null ? "" : `${series.value(plot, value)} at ${this.axis === "time" ? clock(x) : `step ${count(x)}`}`;
  }

  describe(state) {
    const last = state.points.at(-1);
    const label = (id, text) => byId(id).setAttribute("aria-label", text);
    if (!last) return;
    label("plot-loss", `Loss over ${count(last[STEP] + 1)} steps, now ${fixed(last[LOSS], 4)}; ${this.marks.length} incidents marked`);
    label("plot-speed", `Throughput, now ${short(last[SPEED])} tokens per second`);
    label("plot-world", `Workers in the generation, now ${state.world.at(-1)?.[2] ?? "none"}`);
  }

  fit() {
    for (const plot of this.plots) {
      const host = plot.root.parentElement;
      const width = host.clientWidth, height = host.clientHeight;
      if (width && (width !== plot.width || height !== plot.height)) plot.setSize({ width, height });
    }
  }
}
