/** Answers of the server as state of a component. */
import { useEffect, useState } from "preact/hooks";
import { get, known } from "./api";

export interface Asked<T> {
  data: T | undefined;
  /** Of the last question; data may be there all the same, from before. */
  error: Error | null;
  loading: boolean;
}

/**
 * Ask for a URL (null asks nothing) and again when `again` changes. While a new answer is awaited the former one stays, if its
 * URL has the same path, so that a page does not flicker when a filter changes.
 */
export function useAsked<T>(path: string | null, again: unknown = 0): Asked<T> {
  const [state, setState] = useState<{ path: string | null } & Asked<T>>(() => start<T>(path));
  useEffect(() => {
    if (path === null) {
      setState({ path, data: undefined, error: null, loading: false });
      return;
    }
    const stop = new AbortController();
    setState((before) => {
      const data = known<T>(path) ?? (place(before.path) === place(path) ? before.data : undefined);
      return { path, data, error: null, loading: true };
    });
    get<T>(path, stop.signal).then(
      (data) => stop.signal.aborted || setState({ path, data, error: null, loading: false }),
      (error: Error) => stop.signal.aborted || setState((before) => ({ path, data: before.data, error, loading: false })),
    );
    return () => stop.abort();
  }, [path, again]);
  // Between a new URL and its effect the former answer must not be shown as this one's.
  if (state.path !== path && place(state.path) !== place(path)) return start<T>(path);
  return state;
}

function start<T>(path: string | null): { path: string | null } & Asked<T> {
  return { path, data: path === null ? undefined : known<T>(path), error: null, loading: path !== null };
}

function place(path: string | null): string | null {
  return path === null ? null : (path.split("?")[0] ?? null);
}
