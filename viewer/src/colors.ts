/**
 * Colors of values. The diverging scale runs from orange to blue, which all common kinds of color blindness tell apart; its
 * middle is the page itself. Colors are rgba over the page, so that both themes share the scale and text stays readable on it.
 */

export type Rgb = readonly [number, number, number];

export interface Palette {
  negative: Rgb;
  positive: Rgb;
  /** Alpha at the end of the scale under text. */
  strongest: number;
}

const LIGHT: Palette = { negative: [214, 106, 0], positive: [26, 92, 200], strongest: 0.46 };
const DARK: Palette = { negative: [240, 140, 40], positive: [84, 150, 255], strongest: 0.5 };

export function palette(dark: boolean): Palette {
  return dark ? DARK : LIGHT;
}

/** How values become colors. A sequential scale may run downward: then `low` is the larger number. */
export interface Scale {
  kind: "diverging" | "sequential";
  low: number;
  middle: number;
  high: number;
}

/** The q-quantile of sorted numbers. */
export function quantile(sorted: number[], q: number): number {
  if (!sorted.length) return NaN;
  const at = q * (sorted.length - 1);
  const [below, above] = [sorted[Math.floor(at)] ?? NaN, sorted[Math.ceil(at)] ?? NaN];
  return below + (above - below) * (at - Math.floor(at));
}

/** What a value is: it has a sign, it is a size, or it is a log-probability, of which the lowest is the most surprising. */
export type ValueKind = "signed" | "size" | "surprise";

/**
 * A scale for these values. Its ends are the 2nd and the 98th percentile, since a few tokens (the first one above all) have norms
 * a hundred times those of the others, and all else would look alike.
 */
export function scaleFor(values: Iterable<number | null>, kind: ValueKind, middle: "zero" | "median"): Scale | null {
  const sorted = Float64Array.from([...values].filter((value): value is number => value !== null && Number.isFinite(value))).sort();
  if (!sorted.length) return null;
  const all = sorted as unknown as number[];
  const [low, high] = [quantile(all, 0.02), quantile(all, 0.98)];
  if (kind === "size") return { kind: "sequential", low, middle: low, high: high > low ? high : low + 1 };
  if (kind === "surprise") return { kind: "sequential", low: high, middle: high, high: low < high ? low : high - 1 };
  const center = middle === "zero" ? 0 : quantile(all, 0.5);
  const reach = Math.max(Math.abs(high - center), Math.abs(low - center)) || 1;
  return { kind: "diverging", low: center - reach, middle: center, high: center + reach };
}

/** From −1 to 1; from 0 to 1 on a sequential scale. */
export function strength(value: number, scale: Scale): number {
  if (scale.kind === "sequential") return Math.max(0, Math.min(1, (value - scale.low) / (scale.high - scale.low || 1)));
  const reach = value >= scale.middle ? scale.high - scale.middle : scale.middle - scale.low;
  return Math.max(-1, Math.min(1, (value - scale.middle) / (reach || 1)));
}

export function rgba(value: number, scale: Scale, colors: Palette, strongest = colors.strongest): string {
  const how = strength(value, scale);
  const [red, green, blue] = how < 0 ? colors.negative : colors.positive;
  return `rgba(${red},${green},${blue},${(Math.abs(how) * strongest).toFixed(3)})`;
}
