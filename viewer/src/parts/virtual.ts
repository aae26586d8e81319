/**
 * A scrolled list of any number of rows of one height, of which only those in view are elements.
 *
 * Browsers cannot lay out elements of more than some ten million pixels, and a million rows are more. So the scrolled element has
 * at most `TALLEST` pixels; where that is less than the rows need, the scroll bar is a scaled one, and the wheel and the keys move
 * by true pixels.
 */
import { useLayoutEffect, useRef, useState } from "preact/hooks";

const TALLEST = 6_000_000;
const MORE = 8;

export interface Virtual {
  element: { current: HTMLDivElement | null };
  /** Pixels of the scrolled content. */
  height: number;
  from: number;
  to: number;
  /** Where row `from` begins, in the scrolled content. */
  offset: number;
  scrollTo: (row: number) => void;
  toTop: () => void;
}

export function useVirtual(rows: number, rowHeight: number, top: number): Virtual {
  const element = useRef<HTMLDivElement>(null);
  const position = useRef(0);
  const ours = useRef<number | null>(null);
  const [view, setView] = useState({ position: 0, height: 600 });
  const full = rows * rowHeight;
  const height = Math.min(full, TALLEST);
  const scaled = full > TALLEST;
  const room = (box: HTMLDivElement) => Math.max(1, box.clientHeight - top);
  const latest = useRef({ full, height, scaled, room });
  latest.current = { full, height, scaled, room };

  const place = (wanted: number) => {
    const box = element.current;
    if (!box) return;
    const now = latest.current;
    position.current = Math.max(0, Math.min(now.full - now.room(box), wanted));
    const at = now.scaled ? (position.current / (now.full - now.room(box))) * (now.height - now.room(box)) : position.current;
    box.scrollTop = at;
    ours.current = box.scrollTop;
    setView({ position: position.current, height: now.room(box) });
  };

  useLayoutEffect(() => {
    const box = element.current;
    if (!box) return;
    const onScroll = () => {
      const now = latest.current;
      if (ours.current !== null && Math.abs(box.scrollTop - ours.current) < 1) {
        ours.current = null;
        return; // the echo of `place`
      }
      ours.current = null;
      const range = Math.max(1, now.height - now.room(box));
      position.current = now.scaled ? Math.min(1, box.scrollTop / range) * (now.full - now.room(box)) : box.scrollTop;
      setView({ position: position.current, height: now.room(box) });
    };
    const onWheel = (event: WheelEvent) => {
      if (!latest.current.scaled || event.ctrlKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) return;
      event.preventDefault();
      place(position.current + event.deltaY * (event.deltaMode === 1 ? rowHeight : event.deltaMode === 2 ? latest.current.room(box) : 1));
    };
    const onKey = (event: KeyboardEvent) => {
      const step = { ArrowDown: rowHeight, ArrowUp: -rowHeight, PageDown: latest.current.room(box), PageUp: -latest.current.room(box) }[event.key];
      if (!latest.current.scaled || step === undefined || event.target !== box) return;
      event.preventDefault();
      place(position.current + step);
    };
    box.addEventListener("scroll", onScroll, { passive: true });
    box.addEventListener("wheel", onWheel, { passive: false });
    box.addEventListener("keydown", onKey);
    const observer = new ResizeObserver(() => setView({ position: position.current, height: latest.current.room(box) }));
    observer.observe(box);
    return () => {
      box.removeEventListener("scroll", onScroll);
      box.removeEventListener("wheel", onWheel);
      box.removeEventListener("keydown", onKey);
      observer.disconnect();
    };
  }, [rowHeight, top]);

  const most = Math.max(0, full - view.height);
  const at = Math.min(view.position, most);
  const from = Math.max(0, Math.floor(at / rowHeight) - MORE);
  const to = Math.min(rows, Math.ceil((at + view.height) / rowHeight) + MORE);
  const scrolled = scaled ? (most ? (at / most) * (height - view.height) : 0) : at;
  return {
    element,
    height,
    from,
    to,
    toTop: () => place(0),
    offset: scrolled - (at - from * rowHeight),
    scrollTo: (row) => {
      const box = element.current;
      if (!box) return;
      const [begin, visible] = [row * rowHeight, room(box)];
      if (begin < position.current) place(begin);
      else if (begin + rowHeight > position.current + visible) place(begin + rowHeight - visible);
    },
  };
}
