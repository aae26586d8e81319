/** Numbers, times and names as the page writes them. */
import type { Cell, Estimate } from "./api";

const MINUS = "\u2212";
export const NONE = "\u2013";

/** A number with so many digits, with a true minus sign. */
export function fixed(value: number | null | undefined, digits = 2): string {
  if (value === null || value === undefined || !Number.isFinite(value)) return NONE;
  return value.toFixed(digits).replace("-", MINUS);
}

/** A number of any size with about three significant digits. */
export function short(value: number | null | undefined): string {
  if (value === null || value === undefined || !Number.isFinite(value)) return NONE;
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 10_000) return String(value).replace("-", MINUS);
  if (size >= 10_000 || (size > 0 && size < 0.001)) return value.toExponential(1).replaceAll("-", MINUS);
  return fixed(value, size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3);
}

/** A count with thin spaces between thousands. */
export function count(value: number | null | undefined): string {
  if (value === null || value === undefined) return NONE;
  return String(Math.round(value)).replace(/\B(?=(\d{3})+$)/g, "\u202f");
}

export function percent(value: number | null | undefined, digits = 1): string {
  return value === null || value === undefined || !Number.isFinite(value) ? NONE : `${fixed(100 * value, digits)}%`;
}

export function bytes(value: number | null | undefined): string {
  if (value === null || value === undefined) return NONE;
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let [size, unit] = [value, 0];
  while (size >= 1000 && unit < units.length - 1) [size, unit] = [size / 1000, unit + 1];
  return `${unit && size < 10 ? size.toFixed(1) : Math.round(size)}\u00a0${units[unit]}`;
}

export function seconds(value: number | null | undefined): string {
  if (value === null || value === undefined) return NONE;
  if (value < 60) return `${fixed(value, value < 10 ? 1 : 0)}\u00a0s`;
  if (value < 3600) return `${Math.floor(value / 60)}\u00a0min ${Math.round(value % 60)}\u00a0s`;
  return `${Math.floor(value / 3600)}\u00a0h ${Math.round((value % 3600) / 60)}\u00a0min`;
}

/** A time in the reader's zone. */
export function when(text: string | null): string {
  if (!text) return NONE;
  const time = new Date(text);
  if (Number.isNaN(time.getTime())) return text;
  const two = (value: number) => String(value).padStart(2, "0");
  return `${time.getFullYear()}-${two(time.getMonth() + 1)}-${two(time.getDate())} ${two(time.getHours())}:${two(time.getMinutes())}`;
}

/** `0.85 [0.73, 0.95]` */
export function interval(estimate: Estimate, digits = 2): string {
  const { value, low, high } = estimate;
  return low === null || high === null ? fixed(value, digits) : `${fixed(value, digits)} [${fixed(low, digits)}, ${fixed(high, digits)}]`;
}

/** A verdict or another name of a kind, with spaces. */
export function words(name: string): string {
  return name.replaceAll("_", " ");
}

export function cell(value: Cell | undefined): string {
  if (value === null || value === undefined) return NONE;
  if (typeof value === "number") return Number.isInteger(value) ? count(value) : short(value);
  return String(value);
}

/** A whole with its noun: `1 sample`, `2 samples`. */
export function several(value: number, noun: string): string {
  return `${count(value)} ${noun}${value === 1 ? "" : "s"}`;
}
