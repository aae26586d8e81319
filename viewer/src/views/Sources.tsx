/** The runs and sessions that the command line named, and what lies in their folders. */
import type { ComponentChildren } from "preact";
import { useEffect, useMemo, useState } from "preact/hooks";
import { type Source, type SourceList, forget, url } from "../api";
import { useAsked } from "../ask";
import { bytes, count, when } from "../format";
import { useKeys } from "../keys";
import { oneLine, visible } from "../parts/text";
import { Accuracy, Await, Empty, Span, Table } from "../parts/ui";
import { change, go, hash } from "../route";

/** How often the list is read again while a run grows. */
const AGAIN_MS = 5_000;

export function SourcesView({ query }: { query: URLSearchParams }) {
  const [again, setAgain] = useState(0);
  const asked = useAsked<SourceList>(url(["sources"]), again);
  const live = asked.data?.sources.some((source) => source.live) ?? false;
  useEffect(() => {
    if (!live) return;
    const timer = setInterval(() => {
      forget();
      setAgain((times) => times + 1);
    }, AGAIN_MS);
    return () => clearInterval(timer);
  }, [live]);
  return (
    <div class="page">
      <h1>Runs</h1>
      <Await asked={asked}>{(data) => <List sources={data.sources} q={query.get("q") ?? ""} />}</Await>
      {asked.data && <p class="soft foot">Roentgen {asked.data.version}. Everything here is read from this machine; nothing is sent anywhere.</p>}
    </div>
  );
}

export function target(source: Source, ...more: string[]): string {
  return hash([source.kind, source.id, ...more]);
}

function List({ sources, q }: { sources: Source[]; q: string }) {
  const [marked, setMarked] = useState<string[]>([]);
  const [at, setAt] = useState(-1);
  const shown = useMemo(() => {
    const wanted = q.toLowerCase();
    return sources.filter(({ name, model, problems, path }) => [name, model, problems, path].some((text) => text?.toLowerCase().includes(wanted)));
  }, [sources, q]);
  const move = (by: number) => setAt(Math.max(0, Math.min(shown.length - 1, at + by)));
  useKeys({
    j: () => move(1),
    k: () => move(-1),
    Enter: () => {
      const source = shown[at];
      if (source) go(target(source));
    },
  });
  const toggle = (id: string, on: boolean) => setMarked(on ? [...marked.slice(-1), id] : marked.filter((other) => other !== id));
  const [a, b] = marked;
  if (!sources.length) return <Empty>No runs here. `roentgen eval` writes one, and `roentgen view FOLDER` shows those of a folder.</Empty>;
  return (
    <>
      <div class="controls">
        <input type="search" placeholder="Find a run" aria-label="Find a run" value={q} onInput={(event) => change({ q: event.currentTarget.value || null })} />
        <span class="soft">{count(shown.length)} of {count(sources.length)}</span>
        <button type="button" class="end" disabled={!a || !b} onClick={() => a && b && go(hash(["compare", a, b]))}>
          {a && b ? "Compare the two" : "Mark two to compare"}
        </button>
      </div>
      <Table label="Runs and sessions" class="list">
        <thead>
          <tr>
            <th scope="col"><span class="hidden">Compare</span></th>
            <th scope="col">Name</th>
            <th scope="col">Model</th>
            <th scope="col">Problems</th>
            <th scope="col">Accuracy, 95% interval</th>
            <th scope="col"><span class="hidden">Interval</span></th>
            <th scope="col" class="n">Samples</th>
            <th scope="col" class="n">Activations</th>
            <th scope="col">Begun</th>
          </tr>
        </thead>
        <tbody>
          {shown.map((source, row) => (
            <tr class={row === at ? "at" : ""} ref={(element) => { if (row === at) element?.scrollIntoView({ block: "nearest" }); }}>
              <td>
                {source.kind === "run" && (
                  <input type="checkbox" aria-label={`Mark ${source.name} to compare`} checked={marked.includes(source.id)} onChange={(event) => toggle(source.id, event.currentTarget.checked)} />
                )}
              </td>
              <th scope="row">
                <a href={target(source)} title={source.path}><bdi>{visible(source.name)}</bdi></a> {source.live && <span class="badge live">live</span>}
                {source.kind === "session" && <span class="badge">session</span>}
                {source.error && <div class="bad"><bdi>{visible(source.error)}</bdi></div>}
              </th>
              <td class="nowrap" title={source.model ?? ""}><bdi>{lastPart(source.model)}</bdi></td>
              <td class="nowrap" title={source.problems ?? ""}><bdi>{lastPart(source.problems)}</bdi></td>
              <td><Accuracy estimate={source.accuracy} /></td>
              <td>{source.accuracy && <Span estimate={source.accuracy} />}</td>
              <td class="n">
                {count(source.n_samples)}
                {source.expected !== null && source.expected !== source.n_samples && <span class="soft"> of {count(source.expected)}</span>}
                {source.live && source.expected !== null && <progress max={source.expected} value={source.n_samples ?? 0} aria-label={`Progress of ${source.name}`} />}
              </td>
              <td class="n">{source.bytes ? bytes(source.bytes) : "–"}</td>
              <td class="nowrap">{when(source.created)}</td>
            </tr>
          ))}
        </tbody>
      </Table>
    </>
  );
}

/** The end of a path, or of a model's name with its owner. */
function lastPart(text: string | null): ComponentChildren {
  return text === null ? "–" : oneLine(text.replace(/\/+$/, "").split("/").pop() ?? "", 48);
}
