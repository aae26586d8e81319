/** Rows × columns of values as colors, with the value beside the pointer and in the cell where there is room. */
import { useState } from "preact/hooks";
import { type Scale, palette, rgba } from "../colors";
import { short } from "../format";
import { useDark } from "../theme";
import { useWidth } from "../parts/ui";

/** Alpha of the strongest color; the numbers on it stay readable in both themes. */
const STRONGEST = 0.6;

export interface HeatProps {
  rows: string[];
  columns: string[];
  rowName: string;
  values: (number | null)[][];
  texts?: (string | null)[][] | null;
  scale: Scale | null;
  format?: (value: number) => string;
  selected?: [row: number, column: number] | null;
  onPick?: (row: number, column: number) => void;
  /** Least height of a row. */
  size?: number;
}

export function Heat({ rows, columns, rowName, values, texts, scale, format = short, selected, onPick, size = 22 }: HeatProps) {
  const [place, width] = useWidth<HTMLDivElement>();
  const [at, setAt] = useState<[number, number] | null>(null);
  const colors = palette(useDark());
  const left = Math.min(150, 16 + Math.max(...rows.map((name) => name.length), 4) * 6.4);
  const longest = Math.max(...columns.map((name) => name.length), 1);
  // Names that do not fit over their columns are slanted, and the last one needs room on the right.
  const overhang = longest * 6.4 > (width - left) / Math.max(1, columns.length) ? Math.min(110, longest * 5) : 2;
  const cell = Math.max(24, Math.min(160, (width - left - overhang) / Math.max(1, columns.length)));
  const slanted = longest * 6.4 > cell;
  const top = slanted ? Math.min(120, 14 + longest * 4) : 20;
  const [wide, high] = [Math.max(width, left + cell * columns.length + (slanted ? overhang : 0)), top + rows.length * size + 2];
  const written = (row: number, column: number): string | null => {
    const text = texts?.[row]?.[column];
    const value = values[row]?.[column];
    if (text != null) return text;
    return value == null ? null : format(value);
  };
  return (
    <div ref={place} class="heat">
      {width > 0 && (
        <div class="scroll" tabIndex={0} role="region" aria-label="heat map">
          <svg width={wide} height={high} viewBox={`0 0 ${wide} ${high}`} aria-hidden="true" onPointerLeave={() => setAt(null)}>
            {columns.map((name, column) => {
              const x = left + cell * (column + 0.5);
              return (
                <text class="x-tick" x={x} y={top - 6} text-anchor={slanted ? "start" : "middle"} transform={slanted ? `rotate(-35 ${x} ${top - 6})` : undefined}>
                  {name}
                </text>
              );
            })}
            {rows.map((name, row) => (
              <g key={name}>
                <text class="x-tick" x={left - 8} y={top + size * (row + 0.5)} text-anchor="end" dominant-baseline="central">{name}</text>
                {columns.map((_, column) => {
                  const value = values[row]?.[column] ?? null;
                  const label = cell >= 44 && size >= 18 ? written(row, column) : null;
                  const most = Math.floor(cell / 7);
                  const chosen = selected?.[0] === row && selected[1] === column;
                  return (
                    <g onPointerEnter={() => setAt([row, column])} onClick={() => onPick?.(row, column)}>
                      <rect
                        class={`x-cell ${value === null ? "none" : ""} ${chosen ? "chosen" : ""}`}
                        x={left + cell * column + 0.5}
                        y={top + size * row + 0.5}
                        width={cell - 1}
                        height={size - 1}
                        style={value === null || !scale ? {} : { fill: rgba(value, scale, colors, STRONGEST) }}
                      />
                      {label !== null && (
                        <text class="x-inside" x={left + cell * (column + 0.5)} y={top + size * (row + 0.5)} text-anchor="middle" dominant-baseline="central">
                          {label.length > most ? `${label.slice(0, Math.max(1, most - 1))}…` : label}
                        </text>
                      )}
                    </g>
                  );
                })}
              </g>
            ))}
          </svg>
        </div>
      )}
      <p class="soft readout" aria-live="polite">
        {at ? (
          <>
            {rowName} {rows[at[0]]}, {columns[at[1]]}: <b>{written(at[0], at[1]) ?? "nothing"}</b>
            {texts?.[at[0]]?.[at[1]] != null && values[at[0]]?.[at[1]] != null && <> · {format(values[at[0]]?.[at[1]] ?? 0)}</>}
          </>
        ) : (
          "\u00a0"
        )}
      </p>
      <div class="hidden">
      <table>
        <thead>
          <tr><th scope="col">{rowName}</th>{columns.map((name) => <th scope="col">{name}</th>)}</tr>
        </thead>
        <tbody>
          {rows.map((name, row) => (
            <tr><th scope="row">{name}</th>{columns.map((_, column) => <td>{written(row, column) ?? "none"}</td>)}</tr>
          ))}
        </tbody>
      </table>
      </div>
    </div>
  );
}
