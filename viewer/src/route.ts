/** The page's state is its hash: `#/run/ID/samples?verdict=wrong`. */
import { useEffect, useState } from "preact/hooks";
import { fileView } from "./file";

export interface Route {
  parts: string[];
  query: URLSearchParams;
}

/** The hash that is shown; a file without one shows the view that it was made of. */
export function currentHash(): string {
  return location.hash.length > 1 ? location.hash : (fileView() ?? "#/");
}

export function parseHash(hash: string): Route {
  const [path = "", query = ""] = hash.replace(/^#\/?/, "").split(/\?(.*)/s, 2);
  const decode = (part: string) => {
    try {
      return decodeURIComponent(part);
    } catch {
      return part; // typed by hand
    }
  };
  return { parts: path.split("/").filter(Boolean).map(decode), query: new URLSearchParams(query) };
}

/** A hash of parts and parameters. */
export function hash(parts: string[], query?: URLSearchParams): string {
  const text = query?.toString() ?? "";
  return `#/${parts.map(encodeURIComponent).join("/")}${text ? `?${text}` : ""}`;
}

/** Go to a hash: a step that the back button undoes, or in place of the present one. */
export function go(target: string, replace = false): void {
  if (target === location.hash) return;
  if (!replace) {
    location.hash = target;
    return;
  }
  history.replaceState(null, "", target);
  dispatchEvent(new HashChangeEvent("hashchange"));
}

/** Change parameters of the present hash; null takes one away. */
export function change(changes: Record<string, string | string[] | null>, replace = true): void {
  const { parts, query } = parseHash(currentHash());
  for (const [name, value] of Object.entries(changes)) {
    query.delete(name);
    for (const one of value === null ? [] : Array.isArray(value) ? value : [value]) query.append(name, one);
  }
  go(hash(parts, query), replace);
}

export function useRoute(): Route {
  const [shown, setShown] = useState(currentHash());
  useEffect(() => {
    const listen = () => setShown(currentHash());
    addEventListener("hashchange", listen);
    return () => removeEventListener("hashchange", listen);
  }, []);
  return parseHash(shown);
}
