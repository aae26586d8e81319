/** Rows of a table of samples, fetched in windows as they come into view. */
import { useEffect, useRef, useState } from "preact/hooks";
import { ApiError, type Row, type Page, get, url } from "../api";

const WINDOW = 100;
const MOST_WINDOWS = 60;
const WAIT_MS = 60;

export interface Rows {
  total: number | null;
  matched: number | null;
  error: string | null;
  loading: boolean;
  row: (index: number) => Row | undefined;
  /** Say which rows are in view. */
  show: (from: number, to: number) => void;
}

/** The samples of a source under a filter; only windows around what is shown are kept. */
export function useRows(source: string, parameters: Record<string, string | null>, again: number): Rows {
  const question = JSON.stringify([source, parameters]);
  const windows = useRef(new Map<number, Row[]>());
  const asked = useRef(new Set<number>());
  const stop = useRef(new AbortController());
  const current = useRef("");
  const inView = useRef<[number, number]>([0, 40]);
  const timer = useRef<ReturnType<typeof setTimeout>>(undefined);
  const [counts, setCounts] = useState<{ total: number | null; matched: number | null; error: string | null; loading: boolean }>({ total: null, matched: null, error: null, loading: true });
  const [, redraw] = useState(0);

  const load = () => {
    const [from, to] = inView.current;
    for (let number = Math.floor(from / WINDOW); number <= Math.floor(to / WINDOW); number++) {
      if (windows.current.has(number) || asked.current.has(number)) continue;
      asked.current.add(number);
      const mine = current.current;
      get<Page>(url(["sources", source, "samples"], { offset: number * WINDOW, limit: WINDOW, ...parameters }), stop.current.signal).then(
        (answer) => {
          if (mine !== current.current) return;
          asked.current.delete(number);
          windows.current.set(number, answer.rows);
          for (const oldest of windows.current.keys()) {
            if (windows.current.size <= MOST_WINDOWS) break;
            windows.current.delete(oldest);
          }
          setCounts({ total: answer.total, matched: answer.matched, error: null, loading: false });
          redraw((times) => times + 1);
        },
        (error: Error) => {
          if (mine !== current.current || error.name === "AbortError") return;
          asked.current.delete(number);
          setCounts((before) => ({ ...before, loading: false, error: error instanceof ApiError ? error.message : String(error) }));
        },
      );
    }
  };

  useEffect(() => {
    current.current = `${question} ${again}`;
    stop.current.abort();
    stop.current = new AbortController();
    windows.current.clear();
    asked.current.clear();
    setCounts((before) => ({ ...before, error: null, loading: true }));
    load();
    return () => stop.current.abort();
  }, [question, again]);

  return {
    ...counts,
    row: (index) => windows.current.get(Math.floor(index / WINDOW))?.[index % WINDOW],
    show: (from, to) => {
      inView.current = [Math.max(0, from), to];
      clearTimeout(timer.current);
      // While the scroll bar is dragged, only the places where it rests are asked for.
      timer.current = setTimeout(load, WAIT_MS);
    },
  };
}
