/** Small pieces that all views share. */
import type { ComponentChildren } from "preact";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import type { Estimate } from "../api";
import type { Asked } from "../ask";
import { visible } from "./text";
import { fixed, percent, words } from "../format";

/** What was asked for, or that it is awaited, or why it does not come. */
export function Await<T>({ asked, children }: { asked: Asked<T>; children: (data: T) => ComponentChildren }) {
  if (asked.error) return <Problem text={asked.error.message} />;
  if (asked.data === undefined) return <p class="soft wait" role="status">Loading…</p>;
  return <>{children(asked.data)}</>;
}

export function Problem({ text }: { text: string }) {
  return <p class="problem" role="alert"><bdi>{visible(text)}</bdi></p>;
}

export function Empty({ children }: { children: ComponentChildren }) {
  return <p class="empty">{children}</p>;
}

const MARKS: Record<string, [sign: string, kind: string]> = {
  correct: ["✓", "good"],
  wrong: ["✗", "bad"],
  no_answer: ["∅", "warn"],
  error: ["!", "bad"],
  failed: ["!", "bad"],
};

/** A verdict as sign and word: never by color alone. */
export function Verdict({ verdict }: { verdict: string | null }) {
  if (verdict === null) return <span class="soft">–</span>;
  const [sign, kind] = MARKS[verdict] ?? ["·", "soft"];
  return (
    <span class={`verdict ${kind}`}>
      <span aria-hidden="true">{sign}</span> {words(verdict)}
    </span>
  );
}

/** An estimate with its interval on a line from `from` to `to`. */
export function Span({ estimate, from = 0, to = 1, zero }: { estimate: Estimate; from?: number; to?: number; zero?: number }) {
  const { value, low, high } = estimate;
  if (value === null) return null;
  const at = (x: number) => 100 * Math.max(0, Math.min(1, (x - from) / (to - from)));
  return (
    <svg class="span" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true">
      <line class="track" x1="0" x2="100" y1="6" y2="6" />
      {zero !== undefined && <line class="zero" x1={at(zero)} x2={at(zero)} y1="0" y2="12" />}
      {low !== null && high !== null && <line class="reach" x1={at(low)} x2={at(high)} y1="6" y2="6" />}
      <line class="value" x1={at(value)} x2={at(value)} y1="1" y2="11" />
    </svg>
  );
}

export function Accuracy({ estimate }: { estimate: Estimate | null | undefined }) {
  if (!estimate || estimate.value === null) return <span class="soft">–</span>;
  return (
    <span class="nowrap">
      <b>{percent(estimate.value)}</b>{" "}
      {estimate.low !== null && estimate.high !== null && (
        <span class="soft">
          {fixed(100 * estimate.low, 1)}–{fixed(100 * estimate.high, 1)}
        </span>
      )}
    </span>
  );
}

/** A table that scrolls sideways on its own, with a name for those who hear it. */
export function Table({ label, children, class: kind = "" }: { label: string; children: ComponentChildren; class?: string }) {
  return (
    <div class="scroll" tabIndex={0} role="region" aria-label={label}>
      <table class={kind}>
        <caption class="hidden">{label}</caption>
        {children}
      </table>
    </div>
  );
}

export function Card({ title, note, actions, children, id }: { title?: string; note?: ComponentChildren; actions?: ComponentChildren; children: ComponentChildren; id?: string }) {
  return (
    <section class="card" id={id} aria-label={title}>
      {title && (
        <header>
          <h2>{title}</h2>
          {note && <p class="soft">{note}</p>}
          {actions && <div class="actions">{actions}</div>}
        </header>
      )}
      {children}
    </section>
  );
}

/** Some of a few choices, of which one holds. */
export function Choice<T extends string>({ label, value, options, onChange }: { label: string; value: T; options: [T, string][]; onChange: (value: T) => void }) {
  return (
    <div class="choice" role="group" aria-label={label}>
      {options.map(([name, text]) => (
        <button key={name} type="button" aria-pressed={name === value} onClick={() => onChange(name)}>
          {text}
        </button>
      ))}
    </div>
  );
}

export function Toggle({ on, label, onChange }: { on: boolean; label: string; onChange: (on: boolean) => void }) {
  return (
    <button type="button" class="toggle" aria-pressed={on} onClick={() => onChange(!on)}>
      {label}
    </button>
  );
}

export function Copy({ text }: { text: string }) {
  const [done, setDone] = useState(false);
  const copy = () => {
    navigator.clipboard?.writeText(text).then(
      () => {
        setDone(true);
        setTimeout(() => setDone(false), 1_500);
      },
      () => setDone(false),
    );
  };
  return (
    <button type="button" class="quiet" onClick={copy}>
      {done ? "Copied" : "Copy"}
    </button>
  );
}

/** The width of an element, as it changes. */
export function useWidth<T extends HTMLElement>(): [{ current: T | null }, number] {
  const element = useRef<T>(null);
  const [width, setWidth] = useState(0);
  useLayoutEffect(() => {
    if (!element.current) return;
    setWidth(element.current.clientWidth);
    const observer = new ResizeObserver(([entry]) => entry && setWidth(Math.round(entry.contentRect.width)));
    observer.observe(element.current);
    return () => observer.disconnect();
  }, []);
  return [element, width];
}

/** A modal dialog that is open while it is there. */
export function Dialog({ label, onClose, children }: { label: string; onClose: () => void; children: ComponentChildren }) {
  const element = useRef<HTMLDialogElement>(null);
  useEffect(() => element.current?.showModal(), []);
  const onClick = (event: MouseEvent) => {
    if (event.target === element.current) onClose();
  };
  return (
    <dialog ref={element} aria-label={label} onClose={onClose} onClick={onClick}>
      {children}
    </dialog>
  );
}
