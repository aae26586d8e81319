/** A chart with its title, its numbers as a table for those who cannot see it, and itself as a file. */
import type { ComponentChildren } from "preact";
import { useRef } from "preact/hooks";

export interface Numbers {
  head: string[];
  rows: (string | number)[][];
}

export interface FigureProps {
  title: string;
  note?: ComponentChildren;
  /** What a reader would see, in a sentence. */
  summary: string;
  numbers?: Numbers;
  legend?: ComponentChildren;
  children: ComponentChildren;
}

const SHOWN_ROWS = 500;

export function Figure({ title, note, summary, numbers, legend, children }: FigureProps) {
  const place = useRef<HTMLDivElement>(null);
  const svg = () => place.current?.querySelector("svg") ?? null;
  return (
    <figure class="card figure">
      <figcaption>
        <h3>{title}</h3>
        {note && <div class="soft">{note}</div>}
        <span class="files">
          <button type="button" class="quiet" aria-label={`Save “${title}” as SVG`} onClick={() => saveSvg(svg(), title)}>SVG</button>
          <button type="button" class="quiet" aria-label={`Save “${title}” as PNG`} onClick={() => void savePng(svg(), title)}>PNG</button>
        </span>
      </figcaption>
      <div ref={place} class="plot" role="img" aria-label={`${title}. ${summary}`}>
        {children}
      </div>
      {legend && <div class="legend">{legend}</div>}
      {numbers && (
        <details class="numbers">
          <summary>Numbers</summary>
          <div class="scroll" tabIndex={0} role="region" aria-label={`Numbers of “${title}”`}>
            <table>
              <thead>
                <tr>{numbers.head.map((name) => <th scope="col">{name}</th>)}</tr>
              </thead>
              <tbody>
                {numbers.rows.slice(0, SHOWN_ROWS).map((row) => (
                  <tr>{row.map((value) => <td>{value}</td>)}</tr>
                ))}
              </tbody>
            </table>
          </div>
          {numbers.rows.length > SHOWN_ROWS && <p class="soft">and {numbers.rows.length - SHOWN_ROWS} more</p>}
        </details>
      )}
    </figure>
  );
}

const STYLES = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "stroke-opacity", "stroke-linecap", "opacity", "font-family", "font-size", "font-weight", "text-anchor", "dominant-baseline"];

/** The picture by itself: what the style sheet gives its parts stands in the file. */
function alone(svg: SVGSVGElement): SVGSVGElement {
  const copy = svg.cloneNode(true) as SVGSVGElement;
  const [from, to] = [[svg, ...svg.querySelectorAll("*")], [copy, ...copy.querySelectorAll("*")]];
  from.forEach((element, index) => {
    const [style, target] = [getComputedStyle(element), to[index]];
    for (const name of STYLES) target?.setAttribute(name, style.getPropertyValue(name));
    target?.removeAttribute("class");
    target?.removeAttribute("style");
  });
  copy.querySelectorAll("[data-hover]").forEach((element) => element.remove());
  const { width, height } = svg.getBoundingClientRect();
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.setAttribute("width", String(width));
  copy.setAttribute("height", String(height));
  const ground = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  ground.setAttribute("width", "100%");
  ground.setAttribute("height", "100%");
  ground.setAttribute("fill", getComputedStyle(svg.closest(".card") ?? document.body).backgroundColor);
  copy.prepend(ground);
  return copy;
}

export function save(blob: Blob, name: string): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function fileName(title: string, ending: string): string {
  return `${title.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "")}.${ending}`;
}

function saveSvg(svg: SVGSVGElement | null, title: string): void {
  if (svg) save(new Blob([new XMLSerializer().serializeToString(alone(svg))], { type: "image/svg+xml" }), fileName(title, "svg"));
}

const PIXELS = 2;

async function savePng(svg: SVGSVGElement | null, title: string): Promise<void> {
  if (!svg) return;
  const { width, height } = svg.getBoundingClientRect();
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(alone(svg)))}`;
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [Math.round(PIXELS * width), Math.round(PIXELS * height)];
  canvas.getContext("2d")?.drawImage(image, 0, 0, canvas.width, canvas.height);
  canvas.toBlob((blob) => blob && save(blob, fileName(title, "png")), "image/png");
}
