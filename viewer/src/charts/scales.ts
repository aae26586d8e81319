/** Scales and ticks of axes. */

export interface Axis {
  from: number;
  to: number;
  ticks: number[];
}

/** Round numbers that divide a range into about so many parts. */
export function ticks(from: number, to: number, about: number): number[] {
  if (!(to > from)) return [from];
  const rough = (to - from) / Math.max(1, about);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough * 0.999) ?? 10);
  const found: number[] = [];
  for (let tick = Math.ceil(from / step - 1e-9) * step; tick <= to + step * 1e-9; tick += step) found.push(Number(tick.toPrecision(12)));
  return found;
}

/** An axis that holds all values, with some room. */
export function axis(values: number[], about: number, ends: { from?: number | undefined; to?: number | undefined } = {}): Axis {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (!Number.isFinite(value)) continue;
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (low > high) [low, high] = [0, 1];
  if (low === high) [low, high] = [low - 0.5, high + 0.5];
  const room = 0.04 * (high - low);
  const from = ends.from ?? low - room;
  const to = ends.to ?? high + room;
  return { from, to, ticks: ticks(from, to, about) };
}
