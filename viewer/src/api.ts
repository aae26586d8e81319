/**
 * What the server answers (its models are in `roentgen/view/schemas.py`), and the one function that asks for it.
 *
 * A page that was exported to a file has its answers inside (`file.ts`) and asks nobody. Everything else goes to `./api/…`, with
 * the token of the page's own URL.
 */
import { answerFromFile, inFile } from "./file";

export interface Interval {
  value: number | null;
  low: number | null;
  high: number | null;
  n: number;
}

export interface Source {
  id: string;
  kind: "run" | "session";
  name: string;
  path: string;
  model: string | null;
  problems: string | null;
  created: string | null;
  n_samples: number | null;
  expected: number | null;
  complete: boolean;
  accuracy: Interval | null;
  bytes: number | null;
  live: boolean;
  error: string | null;
}

export interface SourceList {
  version: string;
  sources: Source[];
}

export interface Key {
  key: string;
  layer: number | null;
  hook_point: string;
  width: number;
}

export interface Column {
  name: string;
  type: "text" | "number" | "bool" | "category";
  values?: string[];
}

export interface Probe {
  name: string;
  key: string;
  label: string;
  classes: string[];
}

export interface Estimate {
  value: number | null;
  low: number | null;
  high: number | null;
}

export interface Extractor extends Estimate {
  unparsable: number;
  differs_from_primary: number;
  verdicts: Record<string, number>;
}

export interface Failure {
  count: number;
  message: string;
  sample_id: string;
  advice: string;
}

export interface Difference {
  value: number | null;
  low: number | null;
  high: number | null;
}

export interface Variant {
  samples: number;
  accuracy: Estimate;
  truncated: number;
  unparsable: number;
  completion_tokens: number;
  against_first: Difference | null;
}

/** The part of `summary.json` that is shown. */
export interface Summary {
  extractor?: string;
  mode?: string;
  samples?: number;
  scored_problems?: number;
  expected_samples?: number | null;
  errors?: number;
  failures?: Failure[];
  truncated?: number;
  out_of_turns?: number;
  unparsable?: number;
  unread_but_right?: number;
  verdicts?: Record<string, number>;
  accuracy?: Estimate | null;
  several_samples?: { pass_at_k: Record<string, Estimate | null>; maj_at_k: Record<string, Estimate | null> } | null;
  extractors?: Record<string, Extractor>;
  agreement?: { extractors: [string, string]; same: number; only_first: number; only_second: number }[];
  variants?: Record<string, Variant>;
  prompt_tokens?: number;
  cached_tokens?: number;
  completion_tokens?: number;
  turns?: number;
  tool_calls?: number;
  timing?: { wall_seconds: number; tokens_per_second: number | null } | null;
}

export interface Overview {
  source: Source;
  config: Record<string, unknown> | null;
  summary: Summary | null;
  keys: Key[];
  columns: Column[];
  probes: Probe[];
  reports: string[];
  directions: string[];
  /** Why there is no logit lens; null if there is one. */
  lens: string | null;
}

export type Cell = string | number | boolean | null;
export type Row = Record<string, Cell>;
export type Op = "=" | "!=" | "<" | "<=" | ">" | ">=" | "in" | "contains";
export type Clause = [column: string, op: Op, value: Cell | Cell[]];

export interface Page {
  total: number;
  matched: number;
  offset: number;
  rows: Row[];
}

export interface Series {
  name: string;
  counts: number[];
}

export interface Histogram {
  edges: number[];
  series: Series[];
  values?: string[];
}

export interface ToolCall {
  id?: string;
  function?: { name?: string; arguments?: string };
}

export interface Message {
  role: string;
  content: unknown;
  name?: string | null;
  reasoning?: string | null;
  reasoning_content?: string | null;
  tool_calls?: ToolCall[] | null;
  tool_call_id?: string | null;
}

export interface Extracted {
  extractor: string;
  read: string | null;
  start: number | null;
  stop: number | null;
  verdict: string | null;
}

export interface SampleInfo {
  sample_id: string;
  problem: string | null;
  epoch: number | null;
  variant: string | null;
  question: string | null;
  solution: string | null;
  gold: string | null;
  answers: Record<string, string | null>;
  correct_by: Record<string, boolean>;
  verdict: string | null;
  values: Record<string, unknown>;
  labels: Record<string, unknown>;
  error: string | null;
  finish_reason: string | null;
  response: string;
  messages: Message[];
  turns: Record<string, unknown>[];
  extracted: Extracted[];
}

export interface StoredTurn {
  turn: number;
  rollout_id: string;
  n_prompt: number | null;
  n_completion: number | null;
  keys: string[];
  stored: boolean;
  /** What `values` can be asked of. */
  values: string[];
}

export interface OneSample {
  sample: SampleInfo;
  rollouts: StoredTurn[];
  python: string;
  previous: string | null;
  next: string | null;
}

export interface TokenSegment {
  role: string;
  start: number;
  stop: number;
}

export interface Tokens {
  total: number;
  start: number;
  n_prompt: number;
  ids: number[];
  texts: string[];
  special: number[];
  segments: TokenSegment[];
  steps: number[];
}

export interface Values {
  of: string;
  start: number;
  values: (number | null)[];
  low: number | null;
  high: number | null;
  unit: string;
}

export interface Grid {
  layers: (number | null)[];
  hook_points: string[];
  values: (number | null)[][];
  texts?: (string | null)[][];
  missing: string | null;
}

export interface Verdict {
  sample_id: string;
  verdict: string | null;
  answer: string | null;
}

export interface Changed {
  problem: string;
  question: string;
  a: Verdict;
  b: Verdict;
}

export interface Mcnemar {
  p: number | null;
  only_a: number;
  only_b: number;
}

export interface Unmatched {
  a: number;
  b: number;
}

/** The difference is that of `b` less `a`. */
export interface Comparison {
  a: Source;
  b: Source;
  difference: Interval;
  mcnemar: Mcnemar;
  /** What was set otherwise: name, in `a`, in `b`. */
  configuration: [string, unknown, unknown][];
  changed: Changed[];
  unmatched: Unmatched;
}

/** A probe that was tried; `auroc` is the report's metric, whichever it is. */
export interface Candidate {
  name: string;
  key: string;
  layer: number | null;
  hook_point: string;
  position: string;
  auroc: Estimate;
  chosen: boolean;
}

export interface Best extends Estimate {
  keys: string[];
  metrics: Record<string, Estimate>;
}

export interface ScoresByClass {
  unit: string | null;
  classes: { name: string; values: number[] }[];
}

export interface ProbeReport {
  name: string;
  label: string;
  n: number;
  metric: string;
  facts: Record<string, Cell>;
  notes: string[];
  by_candidate: Candidate[];
  best: Best;
  baselines: Record<string, Estimate>;
  reliability: { predicted: number; observed: number; n: number }[];
  risk_coverage: { coverage: number; risk: number; low?: number | null; high?: number | null }[];
  scores: ScoresByClass;
  traces: { name: string; n?: number; x: number[]; mean: (number | null)[]; low: (number | null)[]; high: (number | null)[] }[];
  errors: { sample_id: string; label: Cell; score: number; [more: string]: Cell }[];
}

/** A saved probe's scores of the samples that arrive. */
export interface Monitor {
  probe: string;
  n: number;
  mean: number | null;
  /** Of samples with a score above zero. */
  share: number | null;
}

export interface Progress {
  n_samples: number;
  expected: number | null;
  accuracy: Interval | null;
  tokens_per_s: number | null;
  in_flight: number | null;
  failures: Record<string, number>;
  monitor: Monitor | null;
  complete: boolean;
}

/** The server said no, or was not there. */
export class ApiError extends Error {
  constructor(
    readonly status: number,
    message: string,
  ) {
    super(message);
  }
}

const TOKEN = new URLSearchParams(location.search).get("token");

function headers(): HeadersInit {
  return TOKEN === null ? {} : { Authorization: `Bearer ${TOKEN}` };
}

/** A URL below `api/`, each part of its path encoded; parameters that are null or empty are left out. */
export function url(parts: (string | number)[], parameters: Record<string, string | number | null | undefined> = {}): string {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters))
    if (value !== null && value !== undefined && value !== "") query.set(name, String(value));
  const text = query.toString();
  return `api/${parts.map((part) => encodeURIComponent(part)).join("/")}${text ? `?${text}` : ""}`;
}

async function ask(path: string, signal?: AbortSignal): Promise<Response> {
  const reply = await fetch(`./${path}`, { headers: headers(), credentials: "omit", ...(signal ? { signal } : {}) }).catch((error) => {
    if (signal?.aborted) throw error;
    throw new ApiError(0, "The server does not answer. It ends with the command that started it.");
  });
  if (!reply.ok) {
    const body: unknown = await reply.json().catch(() => null);
    throw new ApiError(reply.status, told(body) ?? `The server answered ${reply.status}.`);
  }
  return reply;
}

function told(body: unknown): string | null {
  if (typeof body !== "object" || body === null) return null;
  const error = (body as Record<string, unknown>)["error"];
  if (typeof error === "string") return error;
  const message = typeof error === "object" && error !== null ? (error as Record<string, unknown>)["message"] : null;
  return typeof message === "string" ? message : null;
}

const FRESH_MS = 10_000;
const MOST = 200;
const cache = new Map<string, { at: number; answer: unknown }>();

/** Ask for a URL made by `url`. An answer is kept for ten seconds, so that going back and forth is at once. */
export async function get<T>(path: string, signal?: AbortSignal): Promise<T> {
  if (inFile()) return answerFromFile(path) as T;
  const known = cache.get(path);
  if (known && performance.now() - known.at < FRESH_MS) return known.answer as T;
  const answer: unknown = await (await ask(path, signal)).json();
  cache.delete(path);
  cache.set(path, { at: performance.now(), answer });
  for (const oldest of cache.keys()) {
    if (cache.size <= MOST) break;
    cache.delete(oldest);
  }
  return answer as T;
}

/** An answer that is at hand already, so that a page need not flicker. */
export function known<T>(path: string): T | undefined {
  const found = cache.get(path);
  return found && performance.now() - found.at < FRESH_MS ? (found.answer as T) : undefined;
}

/** Forget the answers, because a run has grown. */
export function forget(): void {
  cache.clear();
}

/** Return a whole file that the server makes. */
export async function getFile(path: string): Promise<Blob> {
  return (await ask(path)).blob();
}

/**
 * Follow a source's server-sent events until the signal aborts. They are read from a fetch, since an EventSource cannot send the
 * token in a header. `monitor` is a saved probe to read on what arrives, `RUN/LABEL/NAME`. A stream that ends is opened again after a pause, unless the run is complete.
 */
export async function follow(source: string, monitor: string | null, onProgress: (progress: Progress) => void, signal: AbortSignal): Promise<void> {
  if (inFile()) return;
  let pause = 1_000;
  while (!signal.aborted) {
    try {
      const reply = await ask(url(["events"], { source, monitor }), signal);
      const reader = reply.body?.pipeThrough(new TextDecoderStream()).getReader();
      let text = "";
      for (;;) {
        const part = await reader?.read();
        if (!part || part.done) break;
        pause = 1_000;
        text += part.value;
        const events = text.split(/\r?\n\r?\n/);
        text = events.pop() ?? "";
        for (const event of events) {
          const data = event
            .split(/\r?\n/)
            .filter((line) => line.startsWith("data:"))
            .map((line) => line.slice(5).trimStart())
            .join("\n");
          if (!data) continue;
          const progress = JSON.parse(data) as Progress;
          onProgress(progress);
          if (progress.complete) return;
        }
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof ApiError && error.status >= 400 && error.status < 500) return;
    }
    await new Promise((done) => setTimeout(done, pause));
    pause = Math.min(2 * pause, 30_000);
  }
}
