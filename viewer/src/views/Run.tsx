/** One run at a glance: accuracy, how the answers were read, lengths, failures, variants; while it grows, live. */
import type { ComponentChildren } from "preact";
import { useEffect, useMemo, useState } from "preact/hooks";
import { type Histogram, type Interval, type Progress, type Overview, type SourceList, type Summary, follow, forget, get, url } from "../api";
import { useAsked } from "../ask";
import { Heat } from "../charts/Heat";
import { type Point, XY } from "../charts/XY";
import { bytes, count, fixed, NONE, percent, seconds, several, short, when, words } from "../format";
import { visible } from "../parts/text";
import { Card, Empty, Problem, Span, Table } from "../parts/ui";
import { change, hash } from "../route";
import { inOrder, nameOf } from "./Samples";

export function RunView({ kind, detail: first, query }: { kind: string; detail: Overview; query: URLSearchParams }) {
  const monitor = query.get("monitor");
  const live = useLive(first, monitor);
  const again = useAsked<Overview>(url(["sources", first.source.id]), live.settled);
  const detail = again.data ?? first;
  const { source, summary } = detail;
  const samples = (filter: Record<string, string>) => hash([kind, source.id, "samples"], new URLSearchParams(filter));
  return (
    <div class="page">
      <header class="head">
        <div class="title">
          <h1><bdi>{visible(source.name)}</bdi></h1>
          {source.live && <span class="badge live">live</span>}
          {!source.live && !source.complete && source.kind === "run" && <span class="badge">not complete</span>}
        </div>
        <p class="soft">
          {[source.model, source.problems, summary?.mode && words(summary.mode), source.created && `begun ${when(source.created)}`].filter(Boolean).map((text) => <span class="dotted"><bdi>{visible(String(text))}</bdi></span>)}
        </p>
      </header>
      {source.error && <Problem text={source.error} />}
      {source.live && <Live live={live} monitor={monitor} />}
      <Headline detail={detail} progress={live.progress} samples={samples} />
      <div class="columns">
        {summary?.extractors && <Extractors summary={summary} samples={samples} />}
        {summary?.variants && Object.keys(summary.variants).length > 1 && <Variants variants={summary.variants} samples={samples} />}
        {summary?.failures && summary.failures.length > 0 && <Failures kind={kind} id={source.id} failures={summary.failures} samples={samples} />}
        <Lengths detail={detail} again={live.settled} />
        {summary?.several_samples && <Several several={summary.several_samples} />}
        {summary?.agreement && summary.agreement.length > 1 && <Agreement agreement={summary.agreement} />}
        {detail.keys.length > 0 && <Keys detail={detail} />}
        <Config config={detail.config} path={source.path} />
      </div>
    </div>
  );
}

interface LiveState {
  progress: Progress | null;
  /** Accuracy so far by samples so far, as this page has seen it grow. */
  history: { n: number; accuracy: Interval | null; speed: number | null }[];
  /** Changes when the summary should be read again. */
  settled: number;
}

const AGAIN_MS = 5_000;

function useLive(detail: Overview, monitor: string | null): LiveState {
  const { source } = detail;
  const [state, setState] = useState<LiveState>({ progress: null, history: [], settled: 0 });
  useEffect(() => {
    if (!source.live) return;
    const stop = new AbortController();
    let read = performance.now();
    void follow(
      source.id,
      monitor,
      (progress) => {
        const due = progress.complete || performance.now() - read > AGAIN_MS;
        if (due) {
          read = performance.now();
          forget();
        }
        setState((before) => ({
          progress,
          history: before.history.at(-1)?.n === progress.n_samples ? before.history : [...before.history, { n: progress.n_samples, accuracy: progress.accuracy, speed: progress.tokens_per_s }],
          settled: before.settled + (due ? 1 : 0),
        }));
      },
      stop.signal,
    );
    return () => stop.abort();
  }, [source.id, source.live, monitor]);
  return state;
}

function Live({ live: { progress, history }, monitor }: { live: LiveState; monitor: string | null }) {
  if (!progress) return <p class="soft wait" role="status">Waiting for the run…</p>;
  const share = progress.expected ? progress.n_samples / progress.expected : null;
  const points: Point[] = history.filter(({ accuracy }) => accuracy !== null).map(({ n, accuracy }) => ({ x: n, y: accuracy?.value ?? null, low: accuracy?.low ?? null, high: accuracy?.high ?? null }));
  return (
    <Card title={progress.complete ? "This run has ended" : "Live"} actions={<MonitorChoice monitor={monitor} />}>
      <div class="stats" role="status">
        <Stat name="samples" value={count(progress.n_samples)} note={progress.expected === null ? "" : `of ${count(progress.expected)}`} />
        <Stat name="tokens a second" value={fixed(progress.tokens_per_s, 1)} note="" />
        <Stat name="in flight" value={count(progress.in_flight)} note="" />
        <Stat name="failures" value={count(Object.values(progress.failures).reduce((sum, n) => sum + n, 0))} note={Object.entries(progress.failures).map(([name, n]) => `${words(name)} ${n}`).join(", ")} />
        {progress.monitor && <Stat name={`mean score of ${progress.monitor.probe.split("/").slice(1).join("/")}`} value={short(progress.monitor.mean)} note={`${percent(progress.monitor.share, 0)} of the last ${count(progress.monitor.n)} above zero`} />}
      </div>
      {share !== null && <progress max={1} value={share} aria-label="Samples done">{percent(share)}</progress>}
      {points.length > 2 && (
        <XY
          title="Accuracy so far"
          summary={`Now ${percent(points.at(-1)?.y)}.`}
          x="samples"
          y="accuracy"
          height={180}
          wholeX
          series={[{ name: "accuracy", color: 0, points }]}
          yFormat={(y) => percent(y, 0)}
        />
      )}
    </Card>
  );
}

/** Saved probes of all runs that are shown: the one that grows seldom has some of its own yet. */
function MonitorChoice({ monitor }: { monitor: string | null }) {
  const [probes, setProbes] = useState<string[] | null>(null);
  const load = () => {
    if (probes) return;
    get<SourceList>(url(["sources"]))
      .then(({ sources }) => Promise.all(sources.filter(({ kind }) => kind === "run").map(({ id }) => get<Overview>(url(["sources", id])).catch(() => null))))
      .then((found) => setProbes(found.flatMap((one) => (one ? one.probes.map(({ name }) => `${one.source.id}/${name}`) : []))))
      .catch(() => setProbes([]));
  };
  const known = probes ?? (monitor ? [monitor] : []);
  return (
    <label class="select">Watch a probe
      <select value={monitor ?? ""} onFocus={load} onPointerDown={load} onChange={(event) => change({ monitor: event.currentTarget.value || null })}>
        <option value="">none</option>
        {known.map((name) => <option value={name}>{name}</option>)}
      </select>
    </label>
  );
}

function Stat({ name, value, note, href, lead = false, children }: { name: string; value: string; note: ComponentChildren; href?: string; lead?: boolean; children?: ComponentChildren }) {
  const body = (
    <>
      <span class="name">{name}</span>
      <b>{value}</b>
      <span class="soft">{note}</span>
      {children}
    </>
  );
  return href ? <a class={`stat ${lead ? "lead" : ""}`} href={href}>{body}</a> : <div class={`stat ${lead ? "lead" : ""}`}>{body}</div>;
}

function Headline({ detail, progress, samples }: { detail: Overview; progress: Progress | null; samples: (filter: Record<string, string>) => string }) {
  const { source, summary } = detail;
  const accuracy = progress?.accuracy ?? summary?.accuracy ?? source.accuracy;
  const done = progress?.n_samples ?? source.n_samples ?? 0;
  const share = (n: number | undefined) => (n === undefined || !done ? "" : percent(n / done));
  return (
    <section class="stats headline" aria-label="Summary">
      {accuracy && accuracy.value !== null && (
        <Stat lead name={summary?.extractor ? `accuracy by ${summary.extractor}` : "accuracy"} value={percent(accuracy.value)} note={`${fixed(100 * (accuracy.low ?? NaN), 1)}–${fixed(100 * (accuracy.high ?? NaN), 1)}% with 95% confidence`} href={samples({ verdict: "correct" })}>
          <Span estimate={accuracy} />
        </Stat>
      )}
      <Stat name="samples" value={count(done)} note={source.expected !== null && source.expected !== done ? `of ${count(source.expected)}` : summary?.scored_problems ? several(summary.scored_problems, "problem") : ""} href={samples({})} />
      {summary?.truncated !== undefined && <Stat name="cut at the token limit" value={count(summary.truncated)} note={share(summary.truncated)} href={samples({ finish_reason: "length" })} />}
      {summary?.unparsable !== undefined && <Stat name="no answer found" value={count(summary.unparsable)} note={share(summary.unparsable)} href={samples({ verdict: "no_answer" })} />}
      {summary?.errors !== undefined && <Stat name="failed" value={count(summary.errors)} note={share(summary.errors)} href={samples({ verdict: "failed" })} />}
      {summary?.completion_tokens !== undefined && (
        <Stat name="tokens written" value={count(summary.completion_tokens)} note={`${count(summary.prompt_tokens)} read${summary.timing ? `; ${short(summary.timing.tokens_per_second)} a second, ${seconds(summary.timing.wall_seconds)}` : ""}`} />
      )}
      {source.bytes ? <Stat name="activations" value={bytes(source.bytes)} note={several(detail.keys.length, "key")} /> : null}
    </section>
  );
}

function Extractors({ summary, samples }: { summary: Summary; samples: (filter: Record<string, string>) => string }) {
  return (
    <Card title="How the answers were read" note={<>Each extractor on the same samples; <a href={samples({ disagree: "true" })}>where they disagree</a></>}>
      <Table label="Accuracy by extractor">
        <thead>
          <tr>
            <th scope="col">extractor</th><th scope="col" class="n">accuracy</th><th scope="col" class="n">95%</th><th scope="col"><span class="hidden">interval</span></th>
            <th scope="col" class="n" title="samples in which it found no answer">none</th><th scope="col" class="n" title="samples with another verdict than the primary extractor's">differs</th>
          </tr>
        </thead>
        <tbody>
          {Object.entries(summary.extractors ?? {}).map(([name, one]) => (
            <tr class={name === summary.extractor ? "strong" : ""}>
              <th scope="row">{name}{name === summary.extractor && <span class="soft"> primary</span>}</th>
              <td class="n">{percent(one.value)}</td>
              <td class="n soft">{fixed(100 * (one.low ?? NaN), 1)}–{fixed(100 * (one.high ?? NaN), 1)}</td>
              <td><Span estimate={one} /></td>
              <td class="n">{count(one.unparsable)}</td>
              <td class="n">{count(one.differs_from_primary)}</td>
            </tr>
          ))}
        </tbody>
      </Table>
      {(summary.unread_but_right ?? 0) > 0 && <p class="soft"><a href={samples({ verdict: "no_answer" })}>{several(summary.unread_but_right ?? 0, "sample")}</a> in which the primary extractor found nothing and another one the right answer</p>}
    </Card>
  );
}

function Agreement({ agreement }: { agreement: NonNullable<Summary["agreement"]> }) {
  const names = [...new Set(agreement.flatMap(({ extractors }) => extractors))];
  const values = names.map((row) => names.map((column) => {
    const pair = agreement.find(({ extractors: [a, b] }) => (a === row && b === column) || (a === column && b === row));
    if (!pair) return row === column ? 0 : null;
    return pair.only_first + pair.only_second;
  }));
  const most = Math.max(1, ...values.flat().map((value) => value ?? 0));
  return (
    <Card title="How often two extractors disagree" note="Samples with two verdicts">
      <Heat rows={names} columns={names} rowName="extractor" values={values} scale={{ kind: "sequential", low: 0, middle: 0, high: most }} format={(value) => count(value)} />
    </Card>
  );
}

function Variants({ variants, samples }: { variants: NonNullable<Summary["variants"]>; samples: (filter: Record<string, string>) => string }) {
  const reach = Math.max(0.05, ...Object.values(variants).flatMap(({ against_first: one }) => (one ? [Math.abs(one.low ?? 0), Math.abs(one.high ?? 0)] : [])));
  return (
    <Card title="Variants" note="Differences are to the first, on the same problems">
      <Table label="Accuracy by variant">
        <thead>
          <tr><th scope="col">variant</th><th scope="col" class="n">samples</th><th scope="col" class="n">accuracy</th><th scope="col" class="n">95%</th><th scope="col" class="n">difference, points</th><th scope="col"><span class="hidden">interval</span></th></tr>
        </thead>
        <tbody>
          {Object.entries(variants).map(([name, one]) => (
            <tr>
              <th scope="row"><a href={samples({ variant: name })}>{name}</a></th>
              <td class="n">{count(one.samples)}</td>
              <td class="n">{percent(one.accuracy.value)}</td>
              <td class="n soft">{fixed(100 * (one.accuracy.low ?? NaN), 1)}–{fixed(100 * (one.accuracy.high ?? NaN), 1)}</td>
              <td class="n">{one.against_first ? `${fixed(100 * (one.against_first.value ?? NaN), 1)} [${fixed(100 * (one.against_first.low ?? NaN), 1)}, ${fixed(100 * (one.against_first.high ?? NaN), 1)}]` : NONE}</td>
              <td>{one.against_first && <Span estimate={one.against_first} from={-reach} to={reach} zero={0} />}</td>
            </tr>
          ))}
        </tbody>
      </Table>
    </Card>
  );
}

function Failures({ kind, id, failures, samples }: { kind: string; id: string; failures: NonNullable<Summary["failures"]>; samples: (filter: Record<string, string>) => string }) {
  return (
    <Card title="Failures" note={<a href={samples({ verdict: "failed" })}>all failed samples</a>}>
      <Table label="Failures by kind">
        <thead><tr><th scope="col" class="n">samples</th><th scope="col">message of the first</th><th scope="col">sample</th></tr></thead>
        <tbody>
          {failures.map((one) => (
            <tr>
              <td class="n">{count(one.count)}</td>
              <td><bdi>{visible(one.message)}</bdi><div class="soft">{one.advice}</div></td>
              <td><a href={hash([kind, id, "sample", one.sample_id])}>{one.sample_id}</a></td>
            </tr>
          ))}
        </tbody>
      </Table>
    </Card>
  );
}

/** Colors of verdicts in histograms; all others in turn. */
const COLORS: Record<string, number> = { correct: 2, wrong: 3, no_answer: 1 };

function Lengths({ detail, again }: { detail: Overview; again: number }) {
  const numbers = detail.columns.filter(({ type }) => type === "number").map(({ name }) => name);
  const [column, setColumn] = useState(numbers.includes("completion_tokens") ? "completion_tokens" : (numbers[0] ?? ""));
  const groups = detail.columns.filter(({ name, type, values }) => type === "bool" || (type === "category" && (values?.length ?? 0) > 1 && (values?.length ?? 0) <= 8 && name !== "sample_id")).map(({ name }) => name);
  const [chosen, setBy] = useState("verdict");
  const by = groups.includes(chosen) ? chosen : null;
  const asked = useAsked<Histogram>(column ? url(["sources", detail.source.id, "histogram"], { column, by }) : null, again);
  const data = asked.data;
  if (!numbers.length) return null;
  const wide = (data?.edges[1] ?? 1) - (data?.edges[0] ?? 0);
  const series = inOrder((data?.series ?? []).map(({ name }) => name)).flatMap((name) => data?.series.filter((one) => one.name === name) ?? []);
  // Kinds stand beside one another in a bar, so that none hides another.
  const part = wide / Math.max(1, series.length);
  return data?.edges.length ? (
    <XY
      title={column === "completion_tokens" ? "Lengths of the answers" : `Samples by ${nameOf(column)}`}
      note={
        <span class="selects">
          <select aria-label="Column" value={column} onChange={(event) => setColumn(event.currentTarget.value)}>
            {numbers.map((name) => <option value={name}>{nameOf(name)}</option>)}
          </select>
          <select aria-label="By" value={by ?? ""} onChange={(event) => setBy(event.currentTarget.value)}>
            {groups.map((name) => <option value={name}>by {nameOf(name)}</option>)}
            <option value="">together</option>
          </select>
        </span>
      }
      summary={series.map(({ name, counts }) => `${words(name)}: ${several(counts.reduce((sum, n) => sum + n, 0), "sample")}`).join("; ")}
      x={nameOf(column)}
      y="samples"
      yEnds={{ from: 0 }}
      series={series.map(({ name, counts }, index) => ({
        name: words(name),
        color: COLORS[name] ?? index,
        kind: "bars" as const,
        width: part,
        points: counts.map((n, bin) => ({ x: (data.edges[bin] ?? 0) + index * part, y: n })),
      }))}
      numbers={{ head: ["from", "to", ...series.map(({ name }) => words(name))], rows: data.edges.slice(0, -1).map((edge, bin) => [short(edge), short(data.edges[bin + 1]), ...series.map(({ counts }) => counts[bin] ?? 0)]) }}
    />
  ) : (
    <Card title="Lengths">{asked.error ? <Problem text={asked.error.message} /> : <Empty>Nothing to count yet.</Empty>}</Card>
  );
}

function Several({ several: found }: { several: NonNullable<Summary["several_samples"]> }) {
  const points = (of: Record<string, { value: number | null; low: number | null; high: number | null } | null>): Point[] =>
    Object.entries(of).flatMap(([k, one]) => (one ? [{ x: Number(k), y: one.value, low: one.low, high: one.high }] : []));
  const series = [
    { name: "pass@k", color: 0, points: points(found.pass_at_k) },
    { name: "maj@k", color: 1, points: points(found.maj_at_k), dashed: true },
  ].filter((one) => one.points.length);
  if (!series.length) return null;
  return (
    <XY
      title="Several samples of a problem"
      summary={series.map((one) => `${one.name} with ${one.points.at(-1)?.x} samples is ${percent(one.points.at(-1)?.y)}`).join("; ")}
      x="k"
      y="problems solved"
      series={series}
      xTicks={[...new Set(series.flatMap((one) => one.points.map(({ x }) => x)))].sort((a, b) => a - b)}
      yFormat={(y) => percent(y, 0)}
    />
  );
}

function Keys({ detail }: { detail: Overview }) {
  const byHook = useMemo(() => {
    const found = new Map<string, { layers: number[]; width: number }>();
    for (const { hook_point, layer, width } of detail.keys) {
      const entry = found.get(hook_point) ?? { layers: [], width };
      if (layer !== null) entry.layers.push(layer);
      found.set(hook_point, entry);
    }
    return [...found];
  }, [detail.keys]);
  return (
    <Card title="Stored activations">
      <Table label="Hook points and layers">
        <thead><tr><th scope="col">hook point</th><th scope="col">layers</th><th scope="col" class="n">width</th></tr></thead>
        <tbody>
          {byHook.map(([name, { layers, width }]) => (
            <tr><th scope="row">{name}</th><td>{layers.length ? [...layers].sort((a, b) => a - b).join(", ") : "model-wide"}</td><td class="n">{width}</td></tr>
          ))}
        </tbody>
      </Table>
    </Card>
  );
}

function Config({ config, path }: { config: Record<string, unknown> | null; path: string }) {
  return (
    <Card title="Configuration" note={<span class="mono"><bdi>{visible(path)}</bdi></span>}>
      {config && <details>
        <summary>As recorded</summary>
        <pre class="code" tabIndex={0} aria-label="Configuration">{visible(JSON.stringify(config, null, 2))}</pre>
      </details>}
    </Card>
  );
}
