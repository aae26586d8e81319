/**
 * Values along the tokens, on a canvas: one column of pixels shows the lowest, the highest and the mean of the tokens that fall on
 * it, so that 200,000 tokens are drawn as quickly as 200. Ends of steps are ticks below; pointing shows a token, a click chooses it.
 */
import { useEffect, useRef, useState } from "preact/hooks";
import { type Scale, palette, strength } from "../colors";
import { count, short } from "../format";
import { useDark } from "../theme";
import { useWidth } from "../parts/ui";

export interface StripProps {
  label: string;
  total: number;
  values: (number | null)[];
  scale: Scale | null;
  steps: number[];
  nPrompt: number;
  selected: number | null;
  textAt: (position: number) => string;
  onPick: (position: number) => void;
}

const HEIGHT = 56;

export function Strip({ label, total, values, scale, steps, nPrompt, selected, textAt, onPick }: StripProps) {
  const [place, width] = useWidth<HTMLDivElement>();
  const canvas = useRef<HTMLCanvasElement>(null);
  const [hover, setHover] = useState<number | null>(null);
  const dark = useDark();

  useEffect(() => {
    const [element, context] = [canvas.current, canvas.current?.getContext("2d")];
    if (!element || !context || !width) return;
    const ratio = devicePixelRatio || 1;
    [element.width, element.height] = [Math.round(width * ratio), Math.round(HEIGHT * ratio)];
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, HEIGHT);
    const style = getComputedStyle(element);
    const [line, soft] = [style.getPropertyValue("--line"), style.getPropertyValue("--soft")];
    const colors = palette(dark);
    const bottom = HEIGHT - 9;
    const each = width / Math.max(1, total);
    if (nPrompt > 0 && nPrompt < total) {
      context.fillStyle = style.getPropertyValue("--code");
      context.fillRect(0, 0, nPrompt * each, bottom);
    }
    if (scale) {
      const middle = scale.kind === "diverging" ? bottom / 2 : bottom;
      const reach = scale.kind === "diverging" ? bottom / 2 : bottom;
      const columns = Math.min(total, Math.ceil(width));
      for (let column = 0; column < columns; column++) {
        const [from, to] = [Math.floor((column * total) / columns), Math.max(Math.floor((column * total) / columns) + 1, Math.floor(((column + 1) * total) / columns))];
        let [low, high, sum, number] = [0, 0, 0, 0];
        for (let position = from; position < to; position++) {
          const value = values[position];
          if (value == null) continue;
          const how = strength(value, scale);
          low = Math.min(low, how);
          high = Math.max(high, how);
          sum += how;
          number += 1;
        }
        const mean = sum / Math.max(1, number);
        const [x, wide] = [(column * width) / columns, Math.max(1, width / columns - (width / columns > 3 ? 1 : 0))];
        // Where many tokens share a column, what they reach is pale and their mean is not.
        context.globalAlpha = number > 2 ? 0.3 : 1;
        context.fillStyle = `rgb(${colors.positive.join(",")})`;
        if (high > 0) context.fillRect(x, middle - high * reach, wide, Math.max(1, high * reach));
        context.fillStyle = `rgb(${colors.negative.join(",")})`;
        if (low < 0) context.fillRect(x, middle, wide, Math.max(1, -low * reach));
        context.globalAlpha = 1;
        if (number <= 2) continue;
        context.fillStyle = `rgb(${(mean < 0 ? colors.negative : colors.positive).join(",")})`;
        context.fillRect(x, mean < 0 ? middle : middle - mean * reach, wide, Math.max(1, Math.abs(mean) * reach));
      }
      context.fillStyle = line;
      context.fillRect(0, middle, width, 1);
    }
    context.fillStyle = soft;
    context.globalAlpha = Math.min(1, width / (4 * Math.max(1, steps.length)));
    for (const step of steps) context.fillRect((step + 1) * each - 0.5, bottom + 2, 1, 6);
    context.globalAlpha = 1;
    for (const [position, color] of [[hover, soft], [selected, style.getPropertyValue("--accent")]] as const) {
      if (position === null) continue;
      context.strokeStyle = color;
      context.lineWidth = 1.5;
      context.strokeRect(position * each - 1, 0.75, Math.max(each, 1) + 2, bottom - 0.75);
    }
  }, [width, total, values, scale, steps, nPrompt, hover, selected, dark]);

  const position = (event: PointerEvent | MouseEvent): number => {
    const box = canvas.current?.getBoundingClientRect();
    return box ? Math.max(0, Math.min(total - 1, Math.floor(((event.clientX - box.left) / box.width) * total))) : 0;
  };
  const value = hover === null ? null : values[hover];
  return (
    <div ref={place} class="strip">
      <canvas
        ref={canvas}
        class="stripcanvas"
        role="img"
        aria-label={`${label} along ${count(total)} tokens${scale ? `, from ${short(scale.low)} to ${short(scale.high)}` : ""}; ${count(steps.length)} ends of steps`}
        onPointerMove={(event) => setHover(position(event))}
        onPointerLeave={() => setHover(null)}
        onClick={(event) => onPick(position(event))}
      />
      {hover !== null && (
        <div class="tip" style={{ left: `${Math.min(Math.max(((hover + 0.5) * width) / total, 90), Math.max(90, width - 90))}px` }}>
          <b>{JSON.stringify(textAt(hover))}</b> · {count(hover)} · {value == null ? "no value" : short(value)}
        </div>
      )}
    </div>
  );
}
