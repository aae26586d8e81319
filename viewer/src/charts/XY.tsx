/** Lines, bands, bars and points over real axes, with the values beside the pointer. */
import type { ComponentChildren } from "preact";
import { useState } from "preact/hooks";
import { short } from "../format";
import { useWidth } from "../parts/ui";
import { Figure, type Numbers } from "./Figure";
import { axis } from "./scales";

export interface Point {
  x: number;
  y: number | null;
  low?: number | null;
  high?: number | null;
  /** More about it, beside the pointer. */
  note?: string;
  /** Radius of its mark. */
  size?: number;
}

export interface Series {
  name: string;
  /** One of the eight colors of series, which the style sheet has for both themes. */
  color: number;
  points: Point[];
  kind?: "line" | "points" | "bars";
  dashed?: boolean;
  band?: "area" | "bars";
  /** Bars reach from x to x + width. */
  width?: number;
}

export interface Reference {
  name?: string;
  axis: "x" | "y";
  at: number;
  dashed?: boolean;
}

export interface XYProps {
  title: string;
  note?: ComponentChildren;
  summary: string;
  x: string;
  y: string;
  series: Series[];
  references?: Reference[];
  xEnds?: { from?: number; to?: number };
  yEnds?: { from?: number; to?: number };
  /** Where the x axis has its ticks, if not at round numbers. */
  xTicks?: number[];
  /** Whether x counts something, so that no tick is between two counts. */
  wholeX?: boolean;
  diagonal?: boolean;
  height?: number;
  numbers?: Numbers;
  xFormat?: (x: number) => string;
  yFormat?: (y: number) => string;
  onPick?: (x: number) => void;
}

const MARGIN = { left: 50, right: 22, top: 10, bottom: 40 };

export function XY(props: XYProps) {
  const { series, references = [], height = 260, xFormat = short, yFormat = short } = props;
  const [place, width] = useWidth<HTMLDivElement>();
  const [hover, setHover] = useState<number | null>(null);
  const xs = series.flatMap((one) => one.points.flatMap((point) => (one.width ? [point.x, point.x + one.width] : [point.x])));
  const ys = series.flatMap((one) => one.points.flatMap(({ y, low, high }) => [y, low ?? null, high ?? null])).filter((y): y is number => y !== null);
  const inner = { width: Math.max(40, width - MARGIN.left - MARGIN.right), height: height - MARGIN.top - MARGIN.bottom };
  const across = axis(xs, Math.max(2, inner.width / 80), props.xEnds);
  const up = axis([...ys, ...references.filter((line) => line.axis === "y").map((line) => line.at)], Math.max(2, inner.height / 45), props.yEnds);
  const px = (x: number) => MARGIN.left + (inner.width * (x - across.from)) / (across.to - across.from);
  const py = (y: number) => MARGIN.top + inner.height * (1 - (y - up.from) / (up.to - up.from));
  const marks = thin((props.xTicks ?? across.ticks).filter((x) => x >= across.from - 1e-9 && x <= across.to + 1e-9 && (!props.wholeX || Number.isInteger(x))), px);

  const stops = [...new Set(series.flatMap((one) => one.points.filter(({ y }) => y !== null).map(({ x }) => x + (one.width ?? 0) / 2)))].sort((a, b) => a - b);
  const onMove = (event: PointerEvent) => {
    const box = place.current?.getBoundingClientRect();
    if (!box || !stops.length) return;
    const at = event.clientX - box.left;
    setHover(stops.reduce((best, x) => (Math.abs(px(x) - at) < Math.abs(px(best) - at) ? x : best)));
  };
  const shown = hover === null ? [] : series.flatMap((one) => one.points.filter((point) => point.y !== null && Math.abs(point.x + (one.width ?? 0) / 2 - hover) < 1e-9).map((point) => ({ one, point })));

  return (
    <Figure
      title={props.title}
      note={props.note}
      summary={props.summary}
      {...(props.numbers ? { numbers: props.numbers } : {})}
      legend={(series.length > 1 || references.some((line) => line.name)) && (
        <>
          {series.map((one) => (
            <span class={`key c${one.color}`}><i class={one.dashed ? "dashed" : one.kind === "bars" ? "box" : ""} />{one.name}</span>
          ))}
          {references.filter((line) => line.name).map((line) => (
            <span class="key ref"><i class={line.dashed ? "dashed" : ""} />{line.name}</span>
          ))}
        </>
      )}
    >
      <div ref={place} class="xy" onPointerMove={onMove} onPointerLeave={() => setHover(null)} onClick={() => hover !== null && props.onPick?.(hover)}>
        {width > 0 && (
          <svg width={width} height={height} viewBox={`0 0 ${width} ${height}`} aria-hidden="true">
            {up.ticks.map((y) => (
              <g key={`y${y}`}>
                <line class="x-grid" x1={MARGIN.left} x2={width - MARGIN.right} y1={py(y)} y2={py(y)} />
                <text class="x-tick" x={MARGIN.left - 7} y={py(y)} text-anchor="end" dominant-baseline="central">{yFormat(y)}</text>
              </g>
            ))}
            {marks.map((x) => (
              <g key={`x${x}`}>
                <line class="x-axis" x1={px(x)} x2={px(x)} y1={height - MARGIN.bottom} y2={height - MARGIN.bottom + 4} />
                <text class="x-tick" x={px(x)} y={height - MARGIN.bottom + 15} text-anchor="middle">{xFormat(x)}</text>
              </g>
            ))}
            <line class="x-axis" x1={MARGIN.left} x2={width - MARGIN.right} y1={height - MARGIN.bottom} y2={height - MARGIN.bottom} />
            <text class="x-name" x={MARGIN.left + inner.width / 2} y={height - 6} text-anchor="middle">{props.x}</text>
            <text class="x-name" x={12} y={MARGIN.top + inner.height / 2} text-anchor="middle" transform={`rotate(-90 12 ${MARGIN.top + inner.height / 2})`}>{props.y}</text>
            {props.diagonal && <line class="x-reference" x1={px(Math.max(across.from, up.from))} y1={py(Math.max(across.from, up.from))} x2={px(Math.min(across.to, up.to))} y2={py(Math.min(across.to, up.to))} />}
            {references.map((line) =>
              line.axis === "y" ? (
                <line class={`x-reference ${line.dashed ? "dashed" : ""}`} x1={MARGIN.left} x2={width - MARGIN.right} y1={py(line.at)} y2={py(line.at)} />
              ) : (
                <line class={`x-reference ${line.dashed ? "dashed" : ""}`} x1={px(line.at)} x2={px(line.at)} y1={MARGIN.top} y2={height - MARGIN.bottom} />
              ),
            )}
            {series.map((one) => <Drawn key={one.name} one={one} px={px} py={py} base={py(Math.max(0, up.from))} />)}
            {hover !== null && (
              <g data-hover>
                <line class="x-cross" x1={px(hover)} x2={px(hover)} y1={MARGIN.top} y2={height - MARGIN.bottom} />
                {shown.map(({ one, point }) => one.kind !== "bars" && <circle class={`x-dot c${one.color}`} cx={px(point.x)} cy={py(point.y ?? 0)} r="5" />)}
              </g>
            )}
          </svg>
        )}
        {hover !== null && shown.length > 0 && (
          <div class="tip" style={{ left: `${Math.min(Math.max(px(hover), 90), Math.max(90, width - 90))}px` }}>
            <b>{props.x} {shown[0]?.one.width ? `${xFormat(shown[0].point.x)}–${xFormat(shown[0].point.x + shown[0].one.width)}` : xFormat(hover)}</b>
            {shown.map(({ one, point }) => (
              <div class={`key c${one.color}`}>
                <i class={one.kind === "bars" ? "box" : ""} />
                {one.name} <b>{yFormat(point.y ?? 0)}</b>
                {point.low != null && point.high != null && <span> [{yFormat(point.low)}, {yFormat(point.high)}]</span>}
                {point.note && <span> · {point.note}</span>}
              </div>
            ))}
          </div>
        )}
      </div>
    </Figure>
  );
}

/** Leave out ticks whose labels would touch. */
function thin(marks: number[], px: (x: number) => number): number[] {
  const kept: number[] = [];
  for (const mark of marks) {
    const before = kept.at(-1);
    if (before === undefined || px(mark) - px(before) >= 26) kept.push(mark);
  }
  return kept;
}

function Drawn({ one, px, py, base }: { one: Series; px: (x: number) => number; py: (y: number) => number; base: number }) {
  const solid = one.points.filter((point): point is Point & { y: number } => point.y !== null);
  if (one.kind === "bars") {
    return (
      <g class={`c${one.color}`}>
        {solid.filter((point) => point.y > 0).map((point) => {
          const [left, right, top] = [px(point.x), px(point.x + (one.width ?? 1)), py(point.y)];
          return <rect class="x-column" x={left + 0.5} y={Math.min(top, base - 1)} width={Math.max(1, right - left - 1)} height={Math.max(1, base - top)} />;
        })}
      </g>
    );
  }
  const banded = solid.filter((point) => point.low != null && point.high != null);
  const line = (points: { x: number; y: number }[]) => points.map(({ x, y }, index) => `${index ? "L" : "M"}${px(x).toFixed(1)} ${py(y).toFixed(1)}`).join("");
  return (
    <g class={`c${one.color}`}>
      {one.band !== "bars" && banded.length > 1 && (
        <path class="x-band" d={`${line(banded.map(({ x, high }) => ({ x, y: high ?? 0 })))}${line([...banded].reverse().map(({ x, low }) => ({ x, y: low ?? 0 }))).replace("M", "L")}Z`} />
      )}
      {(one.band === "bars" || banded.length === 1) && banded.map(({ x, low, high }) => <line class="x-whisker" x1={px(x)} x2={px(x)} y1={py(low ?? 0)} y2={py(high ?? 0)} />)}
      {one.kind !== "points" && <path class={`x-line ${one.dashed ? "dashed" : ""}`} d={line(solid)} />}
      {solid.length <= 64 && solid.map((point) => <circle class="x-mark" cx={px(point.x)} cy={py(point.y)} r={point.size ?? 3} />)}
    </g>
  );
}
