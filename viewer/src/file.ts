/**
 * A page that was exported to a file: `<script type="application/json" id="data">` holds the view it opens with and the answers
 * of the server. Filters, order, windows and histograms of samples are made here from the rows that are in the file.
 */
import { ApiError, type Clause, type Histogram, type Row, type OneSample, type Page, type Tokens, type Values } from "./api";
import { byColumn, matches } from "./filter";

interface FileData {
  view: string;
  answers: Record<string, unknown>;
}

let data: FileData | null | undefined;

function read(): FileData | null {
  if (data === undefined) {
    const text = document.getElementById("data")?.textContent;
    data = text ? (JSON.parse(text) as FileData) : null;
  }
  return data;
}

/** Whether the page is a file. */
export function inFile(): boolean {
  return read() !== null;
}

/** The view that the file was made of. */
export function fileView(): string | null {
  return read()?.view ?? null;
}

function whole(path: string): unknown {
  return read()?.answers[path];
}

/** Answer as the server would have; an `ApiError` says that it is not in the file. */
export function answerFromFile(path: string): unknown {
  const exact = whole(path);
  const [place = "", text = ""] = path.split("?", 2);
  const query = new URLSearchParams(text);
  if (/\/samples$/.test(place)) return samples(place, query);
  if (exact !== undefined) return exact;
  if (/\/histogram$/.test(place)) return histogram(place, query);
  if (/\/samples\/[^/]+$/.test(place)) return detail(place, query);
  const [start, stop] = [Number(query.get("start") ?? 0), query.has("stop") ? Number(query.get("stop")) : Infinity];
  query.delete("start");
  query.delete("stop");
  const full = whole(`${place}?${query}`);
  if (full === undefined) throw new ApiError(404, "This is not in the file. It is in the run, for `roentgen view`.");
  if (place.endsWith("/tokens")) {
    const tokens = full as Tokens;
    return { ...tokens, start, ids: tokens.ids.slice(start, stop), texts: tokens.texts.slice(start, stop) };
  }
  if (place.endsWith("/values")) return { ...(full as Values), start, values: (full as Values).values.slice(start, stop) };
  return full;
}

function chosen(place: string, query: URLSearchParams): Row[] {
  const all = whole(place) as Page | undefined;
  const where = JSON.parse(query.get("where") ?? "[]") as Clause[];
  const rows = (all?.rows ?? []).filter((row) => matches(row, where, query.get("q")));
  const sort = query.get("sort");
  return sort ? rows.sort(byColumn(sort)) : rows;
}

function samples(place: string, query: URLSearchParams): Page {
  const all = whole(place) as Page | undefined;
  if (!all) throw new ApiError(404, "The samples are not in the file. They are in the run, for `roentgen view`.");
  const [rows, offset] = [chosen(place, query), Number(query.get("offset") ?? 0)];
  const filtered = query.has("q") || query.has("where");
  const limit = Number(query.get("limit") ?? Infinity);
  return { total: all.total, matched: filtered ? rows.length : Math.min(all.matched, all.rows.length), offset, rows: rows.slice(offset, offset + limit) };
}

function detail(place: string, query: URLSearchParams): OneSample {
  const found = whole(place) as OneSample | undefined;
  if (!found) throw new ApiError(404, "This sample is not in the file. It is in the run, for `roentgen view`.");
  const around = place.replace(/\/[^/]+$/, "");
  // Only samples that are in the file are next to one another.
  const ids = chosen(around, query)
    .map((row) => String(row["sample_id"]))
    .filter((id) => whole(`${around}/${encodeURIComponent(id)}`) !== undefined);
  const at = ids.indexOf(found.sample.sample_id);
  return { ...found, previous: ids[at - 1] ?? null, next: at < 0 ? null : (ids[at + 1] ?? null) };
}

const BINS = 24;

function histogram(place: string, query: URLSearchParams): Histogram {
  const column = query.get("column") ?? "";
  const by = query.get("by");
  const rows = chosen(place.replace(/\/histogram$/, "/samples"), query).filter((row) => typeof row[column] === "number");
  const values = rows.map((row) => Number(row[column]));
  if (!values.length) return { edges: [], series: [] };
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const width = Math.max(high - low, 1) / BINS;
  const size = values.every(Number.isInteger) ? Math.max(1, Math.ceil(width)) : width;
  const start = Math.floor(low / size) * size;
  const bins = Math.floor((high - start) / size) + 1;
  const series = new Map<string, number[]>();
  for (const row of rows) {
    const name = by ? String(row[by] ?? "none") : "all";
    if (!series.has(name)) series.set(name, new Array<number>(bins).fill(0));
    const counts = series.get(name);
    const bin = Math.floor((Number(row[column]) - start) / size);
    if (counts) counts[bin] = (counts[bin] ?? 0) + 1;
  }
  return {
    edges: Array.from({ length: bins + 1 }, (_, bin) => start + bin * size),
    series: [...series].map(([name, counts]) => ({ name, counts })),
  };
}
