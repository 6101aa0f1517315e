// The panel beside the chat: figures → text, bars, squares and lines.

import { drawPool } from "./pool.js";

const HISTORY_S = 120;
const byId = (id) => document.getElementById(id);
const style = getComputedStyle(document.documentElement);
export const colour = (name) => style.getPropertyValue(`--${name}`).trim();

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const number = (value, digits) => (Number.isFinite(value) ? value.toFixed(digits) : "–");
const count = (value) => (Number.isFinite(value) ? whole.format(value) : "–");

export function bytes(value, digits) {
  if (!Number.isFinite(value)) return "–";
  let unit = 0;
  for (value = Math.max(0, value); value >= 1024 && unit < 4; unit++) value /= 1024;
  digits ??= unit && value < 100 ? (value < 10 ? 2 : 1) : 0;
  return `${value.toFixed(digits)} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`;
}

export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  return seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
}

export class Panel {
  #latest;
  #history = { atS: [], rate: [], gear: [], bf16: [] };
  #rateChart = chart(byId("rate-chart"), [["gear", true]], (rate) => String(rate), [2, 2, 2.5, 2]);
  #memoryChart = chart(byId("memory-chart"), [["bf16", false], ["gear", true]], (value) => bytes(value, 0), [1 << 20, 2]);

  constructor() {
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#draw());
    new ResizeObserver(() => this.#draw()).observe(byId("panel"));
  }

  show(figures) {
    this.#latest = figures;
    byId("no-metrics").hidden = true;
    byId("panel").classList.remove("stale");
    headline(figures);
    speed(figures);
    pages(figures.pages);
    memory(figures);
    this.#remember(figures);
    this.#draw();
  }

  /** Old figures stay readable, and faint. */
  miss(sentence) {
    byId("no-metrics").textContent = `No live figures. ${sentence}`;
    byId("no-metrics").hidden = false;
    byId("panel").classList.add("stale");
  }

  #remember({ atS, rate, gearBytes, bf16Bytes }) {
    const history = this.#history;
    const tooOld = history.atS.findIndex((at) => atS - at < HISTORY_S);
    for (const series of Object.values(history)) series.splice(0, Math.max(0, tooOld));
    history.atS.push(atS);
    history.rate.push(rate ?? null);
    history.gear.push(gearBytes);
    history.bf16.push(bf16Bytes);
  }

  #draw() {
    if (!this.#latest || !byId("details").offsetWidth) return;
    const { atS, rate, gear, bf16 } = this.#history;
    drawPool(byId("pool"), this.#latest.pages, colour, byId("pool-scale"));
    const window = { min: this.#latest.atS - HISTORY_S, max: this.#latest.atS };
    for (const [plot, series] of [[this.#rateChart, [rate]], [this.#memoryChart, [bf16, gear]]]) {
      plot.setSize({ width: plot.root.parentElement.clientWidth, height: plot.root.parentElement.clientHeight });
      plot.setData([atS, ...series], false);
      plot.setScale("x", window);
    }
  }
}

function headline({ tokensGear, tokensBf16, formatRatio, poolBytes, build }) {
  byId("tokens-gear").textContent = count(tokensGear);
  byId("tokens-bf16").textContent = count(tokensBf16);
  const most = Math.max(tokensGear, tokensBf16);
  for (const [kind, tokens] of [["gear", tokensGear], ["bf16", tokensBf16]]) {
    const share = most > 0 ? (100 * tokens) / most : 0;
    byId("fit-bars").querySelector(`.${kind}`).setAttribute("width", `${share}%`);
  }
  byId("fit-note").textContent =
    `${bytes(poolBytes)} of pages, ${build.preset}, ${number(formatRatio, 2)}× smaller than bf16, metadata included`;
}

function speed({ rate, ttftS, running, waiting }) {
  byId("rate").textContent = rate === 0 ? "0" : number(rate, rate < 100 ? 1 : 0);
  byId("ttft").textContent = duration(ttftS);
  byId("running").textContent = count(running);
  byId("waiting").textContent = count(waiting);
}

function pages(states) {
  for (const state of ["free", "open", "sealed", "cached", "swapped"]) byId(`pages-${state}`).textContent = count(states[state]);
  byId("pool").setAttribute(
    "aria-label",
    `Page pool of ${count(states.total)} pages: ${states.free} free, ${states.open} open, ` +
      `${states.sealed} sealed, ${states.cached} cached; ${states.swapped} swapped out`,
  );
}

function memory({ kvTokens, gearBytes, bf16Bytes, peakBytes }) {
  byId("kv-tokens").textContent = kvTokens > 0 ? `${count(kvTokens)} tokens` : "no tokens at the moment";
  byId("kv-gear").textContent = bytes(gearBytes);
  byId("kv-bf16").textContent = bytes(bf16Bytes);
  byId("kv-ratio").textContent = gearBytes > 0 && kvTokens > 0 ? `${number(bf16Bytes / gearBytes, 2)}×` : "–";
  const dearer = gearBytes > bf16Bytes && kvTokens > 0;
  byId("memory-note").textContent = dearer
    ? "Open pages are not compressed and rounded up: the saving begins when they are sealed."
    : peakBytes > 0 ? `Peak of the whole process: ${bytes(peakBytes)}` : "";
}

/** Lines over the last two minutes, without a legend: the figures above name the colours. */
function chart(element, lines, format, steps) {
  const options = {
    width: Math.max(element.clientWidth, 1),
    height: Math.max(element.clientHeight, 1),
    padding: [8, 0, 7, 1],
    legend: { show: false },
    cursor: { show: false },
    scales: { x: { time: false }, y: { range: (_, __, max) => [0, above(max ?? 0, steps)] } },
    axes: [
      { show: false },
      {
        side: 1, size: 54, gap: 8, font: `11px ${style.fontFamily}`, stroke: () => colour("muted"),
        ticks: { show: false }, grid: { stroke: () => colour("line"), width: 1 },
        splits: (_, __, ___, max) => [0, max / 2, max], values: (_, at) => at.map((value) => (value ? format(value) : "0")),
      },
    ],
    series: [
      {},
      ...lines.map(([name, filled]) => ({
        stroke: () => colour(name), width: 1.5, points: { show: false },
        ...(filled && { fill: () => colour(`${name}-wash`) }),
      })),
    ],
  };
  return new uPlot(options, [[], ...lines.map(() => [])], element);
}

/** The first round number that is not below `value`: 2, 4, 10, 20, 40 … or 1, 2, 4 … MiB. */
function above(value, [first, ...factors]) {
  let top = first;
  for (let i = 0; top < value; i++) top *= factors[i % factors.length];
  return top;
}
