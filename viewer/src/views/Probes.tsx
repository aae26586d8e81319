/** Reports of probes: how well each candidate reads its label, whether its probabilities are true, and where it errs. */
import { type Candidate, type Cell, type Estimate, type ProbeReport, type Overview, url } from "../api";
import { useAsked } from "../ask";
import { Heat } from "../charts/Heat";
import { type Series, XY } from "../charts/XY";
import { cell, count, fixed, interval, percent, several, short, words } from "../format";
import { Await, Card, Empty, Span, Table } from "../parts/ui";
import { go, hash } from "../route";

const METRICS: Record<string, string> = { auroc: "AUROC", auprc: "AUPRC", accuracy: "accuracy", brier: "Brier score", ece: "ECE", r2: "R²", spearman: "Spearman’s ρ", macro_auroc: "macro AUROC", balanced_accuracy: "balanced accuracy" };

function metricName(name: string): string {
  return METRICS[name] ?? words(name);
}

export function ProbesView({ kind, detail, report }: { kind: string; detail: Overview; report: string | null }) {
  const { source, reports } = detail;
  const name = report ?? reports[0] ?? null;
  const asked = useAsked<ProbeReport>(name ? url(["sources", source.id, "probes", name]) : null);
  if (!name) return <div class="page"><h1>Probes</h1><Empty>No probe has been trained on this run. `roentgen probe train {source.path} --label correct` trains some.</Empty></div>;
  return (
    <div class="page">
      {reports.length > 1 && (
        <label class="select">Report
          <select value={name} onChange={(event) => go(hash([kind, source.id, "probes", event.currentTarget.value]))}>
            {reports.map((one) => <option value={one}>{one}</option>)}
          </select>
        </label>
      )}
      <Await asked={asked}>{(data) => <Report kind={kind} id={source.id} data={data} />}</Await>
    </div>
  );
}

function Report({ kind, id, data }: { kind: string; id: string; data: ProbeReport }) {
  const metric = metricName(data.metric);
  return (
    <>
      <header class="head">
        <div class="title"><h1>Reading “{data.label}”</h1></div>
        <p class="soft">
          <span class="dotted">{count(data.n)} samples</span>
          {facts(data).map((fact) => <span class="dotted">{fact}</span>)}
        </p>
      </header>
      <section class="stats headline" aria-label="Summary">
        <div class="stat lead"><span class="name">best, chosen on inner folds: {metric}</span><b>{fixed(data.best.value)}</b><span class="soft">95% interval {fixed(data.best.low)} to {fixed(data.best.high)}</span><Span estimate={data.best} zero={0.5} /></div>
        {Object.entries(data.best.metrics).filter(([name]) => name !== data.metric).map(([name, one]) => (
          <div class="stat"><span class="name">{metricName(name)}</span><b>{fixed(one.value)}</b><span class="soft">{fixed(one.low)} to {fixed(one.high)}</span></div>
        ))}
      </section>
      {data.notes.length > 0 && <ul class="notes">{data.notes.map((note) => <li>{note}</li>)}</ul>}
      <div class="columns">
        <ByLayer data={data} metric={metric} />
        <Beside data={data} metric={metric} />
        <Grid data={data} metric={metric} />
        <Scores data={data} />
        <Reliability data={data} />
        <RiskCoverage data={data} />
        <Traces data={data} />
        <Candidates data={data} metric={metric} />
        <Errors kind={kind} id={id} data={data} />
      </div>
    </>
  );
}

/** What a report says of itself, as far as a reader asks at first; all of it is in `results.json`. */
function facts(data: ProbeReport): string[] {
  const known = data.facts;
  const told: [string, (value: Cell) => string][] = [
    ["n_problems", (value) => several(Number(value), "problem")],
    ["prevalence", (value) => `${percent(Number(value))} ${words(data.label)}`],
    ["kind", (value) => `${words(String(value))} probes`],
    ["positions", (value) => `at ${String(value)}`],
    ["n_folds", (value) => `${String(value)} folds by problem`],
    ["n_left_out", (value) => (value ? `${String(value)} left out` : "")],
    ["data_hash", (value) => `data ${String(value)}`],
  ];
  return told.flatMap(([name, tell]) => (known[name] == null ? [] : [tell(known[name] ?? null)])).filter(Boolean);
}

function key(one: Candidate): string {
  return `${one.hook_point} at ${one.position}`;
}

function ByLayer({ data, metric }: { data: ProbeReport; metric: string }) {
  const layered = data.by_candidate.filter(({ layer }) => layer !== null);
  const names = [...new Set(layered.map(key))];
  const layers = [...new Set(layered.map(({ layer }) => layer ?? 0))].sort((a, b) => a - b);
  if (!layers.length) return null;
  const series: Series[] = names.slice(0, 8).map((name, index) => ({
    name,
    color: index,
    // Intervals of many series would hide one another.
    band: names.length > 3 ? "bars" : "area",
    points: layered.filter((one) => key(one) === name).sort((a, b) => (a.layer ?? 0) - (b.layer ?? 0)).map((one) => ({ x: one.layer ?? 0, y: one.auroc.value, low: one.auroc.low, high: one.auroc.high, ...(one.chosen ? { note: "chosen by a fold" } : {}) })),
  }));
  const best = layered.reduce<Candidate | null>((most, one) => ((one.auroc.value ?? 0) > (most?.auroc.value ?? -1) ? one : most), null);
  const strongest = strongestBaseline(data.baselines);
  return (
    <XY
      title={`${metric} by layer`}
      note={names.length > 8 ? `the first 8 of ${names.length} hook points and positions` : "on problems unseen in training"}
      summary={best ? `The highest is ${interval(best.auroc)} at layer ${best.layer}, ${key(best)}.` : ""}
      x="layer"
      y={metric}
      xTicks={layers}
      xFormat={(x) => String(Math.round(x))}
      series={series}
      references={[...(data.metric.includes("auroc") ? [{ axis: "y" as const, at: 0.5, name: "chance" }] : []), ...(strongest ? [{ axis: "y" as const, at: strongest[1].value ?? 0, name: `${words(strongest[0])} (${fixed(strongest[1].value)})`, dashed: true }] : [])]}
      yFormat={(y) => fixed(y)}
      numbers={{ head: ["layer", "hook point", "position", metric, "low", "high"], rows: layered.map((one) => [one.layer ?? "", one.hook_point, one.position, fixed(one.auroc.value, 3), fixed(one.auroc.low, 3), fixed(one.auroc.high, 3)]) }}
    />
  );
}

/** The highest baseline that reads no activations of the layers in question. */
function strongestBaseline(baselines: Record<string, Estimate>): [string, Estimate] | null {
  const fair = Object.entries(baselines).filter(([name]) => !["prevalence", "random_direction", "shuffled_labels", "first_layer"].includes(name));
  return fair.reduce<[string, Estimate] | null>((most, one) => ((one[1].value ?? -1) > (most?.[1].value ?? -1) ? one : most), null);
}

function Beside({ data, metric }: { data: ProbeReport; metric: string }) {
  const rows: [string, Estimate][] = [["best probe", data.best], ...Object.entries(data.baselines)];
  return (
    <Card title="Beside what is simpler" note="on the same folds">
      <Table label={`${metric} of the best probe and of baselines`}>
        <thead><tr><th scope="col">what reads it</th><th scope="col" class="n">{metric}</th><th scope="col" class="n">95%</th><th scope="col"><span class="hidden">interval</span></th></tr></thead>
        <tbody>
          {rows.map(([name, one], index) => (
            <tr class={index ? "" : "strong"}>
              <th scope="row">{words(name)}</th><td class="n">{fixed(one.value)}</td><td class="n soft">{fixed(one.low)}–{fixed(one.high)}</td><td><Span estimate={one} zero={0.5} /></td>
            </tr>
          ))}
        </tbody>
      </Table>
    </Card>
  );
}

/** Layers × positions, where there are several positions. */
function Grid({ data, metric }: { data: ProbeReport; metric: string }) {
  const hooks = [...new Set(data.by_candidate.map(({ hook_point }) => hook_point))];
  const positions = [...new Set(data.by_candidate.map(({ position }) => position))];
  const layers = [...new Set(data.by_candidate.map(({ layer }) => layer))].sort((a, b) => (b ?? -1) - (a ?? -1));
  const columns = hooks.flatMap((hook) => positions.map((position) => [hook, position] as const));
  if (columns.length < 2 || layers.length < 2) return null;
  return (
    <Card title={`${metric} by layer and position`}>
      <Heat
        rows={layers.map((layer) => (layer === null ? "model" : String(layer)))}
        columns={columns.map(([hook, position]) => (hooks.length > 1 ? `${hook} ${position}` : position))}
        rowName="layer"
        values={layers.map((layer) => columns.map(([hook, position]) => data.by_candidate.find((one) => one.layer === layer && one.hook_point === hook && one.position === position)?.auroc.value ?? null))}
        scale={{ kind: "diverging", low: 0, middle: 0.5, high: 1 }}
        format={(value) => fixed(value)}
      />
    </Card>
  );
}

const BINS = 30;

function Scores({ data }: { data: ProbeReport }) {
  const all = data.scores.classes.flatMap(({ values }) => values);
  if (all.length < 2) return null;
  const [low, high] = all.reduce(([least, most], value) => [Math.min(least, value), Math.max(most, value)], [Infinity, -Infinity]);
  const width = (high - low) / BINS || 1;
  const classes = data.scores.classes.map(({ name, values }) => {
    const counts = new Array<number>(BINS).fill(0);
    for (const value of values) {
      const bin = Math.min(BINS - 1, Math.floor((value - low) / width));
      counts[bin] = (counts[bin] ?? 0) + 1;
    }
    return { name, n: values.length, shares: counts.map((n) => n / Math.max(1, values.length)) };
  });
  const part = width / classes.length;
  return (
    <XY
      title="Scores by class"
      note="as shares of the class"
      summary={classes.map(({ name, n }) => `${name}: ${count(n)} samples`).join("; ")}
      x={`score${data.scores.unit ? `, ${words(data.scores.unit)}` : ""}`}
      y="share"
      yEnds={{ from: 0 }}
      series={classes.map(({ name, n, shares }, index) => ({ name: `${name} (${count(n)})`, color: index, kind: "bars" as const, width: part, points: shares.map((share, bin) => ({ x: low + bin * width + index * part, y: share })) }))}
      yFormat={(y) => percent(y, 0)}
      numbers={{ head: ["from", ...classes.map(({ name }) => name)], rows: Array.from({ length: BINS }, (_, bin) => [fixed(low + bin * width), ...classes.map(({ shares }) => percent(shares[bin]))]) }}
    />
  );
}

function Reliability({ data }: { data: ProbeReport }) {
  if (!data.reliability.length) return null;
  return (
    <XY
      title="Reliability"
      note="the share that was true over the probability given"
      summary={`${data.reliability.length} groups of samples; on the diagonal, probabilities are true.`}
      x="probability given"
      y="share that was true"
      diagonal
      xEnds={{ from: 0, to: 1 }}
      yEnds={{ from: 0, to: 1.02 }}
      series={[{ name: "observed", color: 0, points: data.reliability.map(({ predicted, observed, n }) => ({ x: predicted, y: observed, note: `${n} samples`, size: 2.5 + Math.min(5, Math.sqrt(n) / 2) })) }]}
      xFormat={(x) => fixed(x)}
      yFormat={(y) => fixed(y)}
      numbers={{ head: ["probability given", "share that was true", "samples"], rows: data.reliability.map(({ predicted, observed, n }) => [fixed(predicted, 3), fixed(observed, 3), n]) }}
    />
  );
}

function RiskCoverage({ data }: { data: ProbeReport }) {
  if (!data.risk_coverage.length) return null;
  const full = data.risk_coverage.at(-1);
  return (
    <XY
      title="Risk and coverage"
      note="errors among the samples that the probe is surest of"
      summary={full ? `With all samples the risk is ${percent(full.risk)}.` : ""}
      x="coverage"
      y="risk"
      xEnds={{ from: 0, to: 1 }}
      yEnds={{ from: 0 }}
      series={[{ name: "risk", color: 0, points: data.risk_coverage.map(({ coverage, risk, low, high }) => ({ x: coverage, y: risk, low: low ?? null, high: high ?? null })) }]}
      xFormat={(x) => percent(x, 0)}
      yFormat={(y) => percent(y, 0)}
      numbers={{ head: ["coverage", "risk"], rows: data.risk_coverage.map(({ coverage, risk }) => [percent(coverage), percent(risk)]) }}
    />
  );
}

function Traces({ data }: { data: ProbeReport }) {
  if (!data.traces.length) return null;
  return (
    <XY
      title="Along the trace"
      note="mean score of each class, with 95% intervals"
      summary={data.traces.map(({ name, mean }) => `${name} ends at ${short(mean.at(-1))}`).join("; ")}
      x="from the end of the prompt (0) to the end of the answer (1)"
      y="score"
      references={[{ axis: "y", at: 0 }]}
      series={data.traces.map(({ name, n, x, mean, low, high }, index) => ({ name: n === undefined ? name : `${name} (${count(n)})`, color: index, dashed: index > 0, points: x.map((at, step) => ({ x: at, y: mean[step] ?? null, low: low[step] ?? null, high: high[step] ?? null })) }))}
      xFormat={(x) => fixed(x)}
      numbers={{ head: ["where", ...data.traces.map(({ name }) => name)], rows: (data.traces[0]?.x ?? []).map((at, step) => [fixed(at), ...data.traces.map(({ mean }) => fixed(mean[step]))]) }}
    />
  );
}

function Candidates({ data, metric }: { data: ProbeReport; metric: string }) {
  return (
    <Card title="Every candidate" note="each alone; those that folds chose are bold. The highest of them flatters, the best above does not">
      <div class="tall">
        <Table label="Candidates">
          <thead><tr><th scope="col">hook point</th><th scope="col" class="n">layer</th><th scope="col">position</th><th scope="col" class="n">{metric}</th><th scope="col" class="n">95%</th><th scope="col"><span class="hidden">interval</span></th></tr></thead>
          <tbody>
            {data.by_candidate.map((one) => (
              <tr class={one.chosen ? "strong" : ""}>
                <th scope="row">{one.hook_point}</th><td class="n">{one.layer ?? "–"}</td><td>{one.position}</td><td class="n">{fixed(one.auroc.value)}</td><td class="n soft">{fixed(one.auroc.low)}–{fixed(one.auroc.high)}</td><td><Span estimate={one.auroc} zero={0.5} /></td>
              </tr>
            ))}
          </tbody>
        </Table>
      </div>
    </Card>
  );
}

function Errors({ kind, id, data }: { kind: string; id: string; data: ProbeReport }) {
  if (!data.errors.length) return null;
  return (
    <Card title="Errors, the surest first" note="samples where the probe said otherwise than was so">
      <div class="tall">
        <Table label="Errors of the probe">
          <thead><tr><th scope="col">sample</th><th scope="col">{words(data.label)}</th><th scope="col" class="n">score</th></tr></thead>
          <tbody>
            {data.errors.slice(0, 200).map((one) => (
              <tr>
                <th scope="row"><a href={hash([kind, id, "sample", one.sample_id], new URLSearchParams({ show: "tokens" }))}>{one.sample_id}</a></th>
                <td>{cell(one.label)}</td><td class="n">{fixed(one.score)}</td>
              </tr>
            ))}
          </tbody>
        </Table>
      </div>
    </Card>
  );
}
