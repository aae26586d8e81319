/** Keyboard: one listener, a stack of handlers; the newest view that knows a key has it. */
import { useEffect, useRef } from "preact/hooks";

/** By what is pressed: `j`, `Enter`, `g r` (one after the other). */
export type Keys = Record<string, () => void>;

const stack: { current: Keys }[] = [];
let prefix: { key: string; at: number } | null = null;
const PREFIX_MS = 1_200;

function typing(target: EventTarget | null): boolean {
  return target instanceof HTMLElement && (target.isContentEditable || /^(INPUT|TEXTAREA|SELECT)$/.test(target.tagName));
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  if (typing(event.target) && event.key !== "Escape") return;
  // A control that has the focus answers these itself.
  if ((event.key === "Enter" || event.key === " ") && event.target instanceof HTMLElement && event.target.closest("a,button,summary,[role=button]")) return;
  if (document.querySelector("dialog[open]") && event.key !== "?") return;
  const pressed = prefix && event.timeStamp - prefix.at < PREFIX_MS ? `${prefix.key} ${event.key}` : event.key;
  prefix = event.key === "g" && pressed === "g" ? { key: "g", at: event.timeStamp } : null;
  for (const keys of [...stack].reverse()) {
    const act = keys.current[pressed];
    if (!act) continue;
    event.preventDefault();
    act();
    return;
  }
});

/** While the component is there, its keys work. */
export function useKeys(keys: Keys): void {
  const latest = useRef(keys);
  latest.current = keys;
  useEffect(() => {
    stack.push(latest);
    return () => {
      stack.splice(stack.indexOf(latest), 1);
    };
  }, []);
}

/** For the dialog of help. */
export const HELP: [keys: string, what: string][] = [
  ["g r", "runs"],
  ["g o", "overview of the run"],
  ["g s", "samples"],
  ["g p", "probes"],
  ["j / k", "next, previous (row or sample)"],
  ["Enter", "open the row"],
  ["u", "up: from a sample to the table"],
  ["/", "search"],
  ["t", "conversation or tokens"],
  ["[ / ]", "token before, after"],
  ["d", "dark or light"],
  ["Esc", "close, leave the field"],
  ["?", "this help"],
];
