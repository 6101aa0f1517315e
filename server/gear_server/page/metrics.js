// /metrics, once a second while somebody looks: text → samples → what the panel shows. Knows nothing of the document.

import { request } from "./api.js";

const PERIOD_MS = 1000;
const RATE_WINDOW_S = 3; // long enough that steps of a second do not flicker
const TTFT_WINDOW_S = 60;

/** The samples of a scrape; models are added up, though a server has one. */
export class Scrape {
  constructor(text, atS) {
    this.atS = atS;
    this.samples = [];
    for (const line of text.split("\n")) {
      const match = /^(\w+)(?:\{(.*)\})? (\S+)/.exec(line);
      if (match) this.samples.push({ name: match[1], labels: labels(match[2] ?? ""), value: Number(match[3]) });
    }
  }

  /** The sum over samples with these labels; undefined if there is none. */
  get(name, wanted = {}) {
    const found = this.find(name, wanted);
    return found.length ? found.reduce((sum, sample) => sum + sample.value, 0) : undefined;
  }

  find(name, wanted = {}) {
    const fits = (sample) => Object.entries(wanted).every(([label, value]) => sample.labels[label] === value);
    return this.samples.filter((sample) => sample.name === name && fits(sample));
  }
}

function labels(text) {
  const unescape = (value) => value.replace(/\\(.)/g, (_, c) => (c === "n" ? "\n" : c));
  return Object.fromEntries([...text.matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map(([, name, value]) => [name, unescape(value)]));
}

/** Figures of one scrape; `earlier` are the scrapes before it, oldest first. */
export function figures(scrape, earlier) {
  const pages = pool(scrape);
  const gearBytes = scrape.get("gear_kv_bytes", { state: "sealed" }) + scrape.get("gear_kv_bytes", { state: "open" });
  return {
    atS: scrape.atS,
    build: scrape.find("gear_build_info")[0]?.labels ?? {},
    tokensGear: scrape.get("gear_kv_capacity_tokens", { format: "gear" }),
    tokensBf16: scrape.get("gear_kv_capacity_tokens", { format: "bf16" }),
    formatRatio: scrape.get("gear_kv_compression_ratio"),
    poolBytes: scrape.get("gear_memory_bytes", { kind: "pages" }),
    peakBytes: scrape.get("gear_peak_memory_bytes"),
    rate: rate(scrape, earlier),
    ttftS: meanTtft(scrape, earlier),
    running: scrape.get("gear_requests_running"),
    waiting: scrape.get("gear_requests_waiting"),
    pages,
    kvTokens: scrape.get("gear_kv_tokens"),
    gearBytes,
    bf16Bytes: gearBytes + scrape.get("gear_kv_saved_bytes"),
  };
}

/** Pages by what they hold. An open page lies in several slots; swapped ones lie in host memory, not in the pool. */
function pool(scrape) {
  const state = (name) => scrape.get("gear_pages", { state: name }) ?? 0;
  const total = state("free") + state("active") + state("cached");
  const pageBytes = scrape.get("gear_memory_bytes", { kind: "pages" }) / total;
  const slots = (bytes) => (pageBytes > 0 ? Math.round(bytes / pageBytes) : 0);
  const open = slots(scrape.get("gear_kv_bytes", { state: "open" }));
  return {
    free: state("free"), open, sealed: Math.max(0, state("active") - open), cached: state("cached"),
    swapped: slots(scrape.get("gear_kv_bytes", { state: "swapped" })), total,
  };
}

function rate(scrape, earlier) {
  const from = earlier.find((one) => scrape.atS - one.atS < RATE_WINDOW_S + PERIOD_MS / 2000);
  if (!from) return undefined;
  const name = "gear_generation_tokens_total";
  return Math.max(0, scrape.get(name) - from.get(name)) / (scrape.atS - from.atS); // a restart begins at 0
}

/** Of the requests of the last minute. */
function meanTtft(scrape, earlier) {
  const from = earlier.find((one) => scrape.atS - one.atS < TTFT_WINDOW_S);
  if (!from) return undefined;
  const delta = (part) => scrape.get(`gear_time_to_first_token_seconds_${part}`) - from.get(`gear_time_to_first_token_seconds_${part}`);
  return delta("count") > 0 ? delta("sum") / delta("count") : undefined;
}

/** Calls `onFigures` or `onError` after every scrape; sleeps while the tab is hidden. Returns what scrapes at once. */
export function watch(onFigures, onError) {
  let earlier = [];
  let timer;
  let scraping = false;

  async function scrapeNow() {
    clearTimeout(timer);
    if (document.hidden || scraping) return;
    scraping = true;
    try {
      const response = await request("metrics", { signal: AbortSignal.timeout(10_000) });
      const scrape = new Scrape(await response.text(), performance.now() / 1000);
      if (scrape.get("gear_requests_running") === undefined) throw new Error("The server's /metrics has no figures of GearServe.");
      onFigures(figures(scrape, earlier));
      earlier = [...earlier.filter((one) => scrape.atS - one.atS < TTFT_WINDOW_S), scrape];
    } catch (error) {
      earlier = [];
      onError(error);
    } finally {
      scraping = false;
      timer = setTimeout(scrapeNow, PERIOD_MS);
    }
  }

  document.addEventListener("visibilitychange", scrapeNow);
  scrapeNow();
  return scrapeNow;
}
