/** Two runs side by side, and the problems whose verdict is another. */
import { useMemo, useState } from "preact/hooks";
import { type Comparison, type Overview, type Source, type Verdict, url } from "../api";
import { useAsked } from "../ask";
import { bytes, count, fixed, percent, several, short, when } from "../format";
import { oneLine, visible } from "../parts/text";
import { Accuracy, Await, Card, Choice, Empty, Problem, Span, Table, Verdict as Shown } from "../parts/ui";
import { hash } from "../route";
import { target } from "./Sources";

export function CompareView({ a, b }: { a: string; b: string }) {
  const asked = useAsked<Comparison>(url(["compare"], { a, b }));
  const first = useAsked<Overview>(url(["sources", a]));
  const second = useAsked<Overview>(url(["sources", b]));
  return (
    <div class="page">
      <header class="head">
        <div class="title"><h1>Two runs</h1></div>
        <nav aria-label="Order"><a href={hash(["compare", b, a])}>Swap</a></nav>
      </header>
      <Await asked={asked}>{(data) => <Side data={data} first={first.data ?? null} second={second.data ?? null} />}</Await>
    </div>
  );
}

function Side({ data, first, second }: { data: Comparison; first: Overview | null; second: Overview | null }) {
  const { a, b, difference, mcnemar, unmatched } = data;
  const points = (value: number | null) => fixed(value === null ? null : 100 * value, 1);
  const reach = Math.max(0.05, Math.abs(difference.low ?? 0), Math.abs(difference.high ?? 0));
  const left = unmatched.a + unmatched.b;
  return (
    <>
      <section class="stats headline" aria-label="Difference">
        <div class="stat lead">
          <span class="name">accuracy of B less that of A</span>
          <b>{points(difference.value)} points</b>
          <span class="soft">{points(difference.low)} to {points(difference.high)} with 95% confidence, {several(difference.n, "problem")}</span>
          <Span estimate={difference} from={-reach} to={reach} zero={0} />
        </div>
        <div class="stat"><span class="name">only A is right</span><b>{count(mcnemar.only_a)}</b></div>
        <div class="stat"><span class="name">only B is right</span><b>{count(mcnemar.only_b)}</b></div>
        <div class="stat"><span class="name">McNemar’s p</span><b>{short(mcnemar.p)}</b><span class="soft">exact, two-sided</span></div>
      </section>
      {left > 0 && <p class="notes">{count(unmatched.a)} problems are only in A and {count(unmatched.b)} only in B; they are left out.</p>}
      <Card title="Side by side">
        <Table label="The two runs">
          <thead><tr><td /><th scope="col"><Which name="A" source={a} /></th><th scope="col"><Which name="B" source={b} /></th></tr></thead>
          <tbody>
            {facts(data, first, second).map(([name, one, other]) => (
              <tr class={one === other ? "soft" : ""}><th scope="row">{name}</th><td><bdi>{visible(one)}</bdi></td><td><bdi>{visible(other)}</bdi></td></tr>
            ))}
            <tr><th scope="row">accuracy</th><td><Accuracy estimate={a.accuracy} /></td><td><Accuracy estimate={b.accuracy} /></td></tr>
          </tbody>
        </Table>
      </Card>
      <Changes data={data} />
    </>
  );
}

function Which({ name, source }: { name: string; source: Source }) {
  return <><span class="badge">{name}</span> <a href={target(source)}><bdi>{visible(source.name)}</bdi></a></>;
}

function facts(data: Comparison, first: Overview | null, second: Overview | null): [string, string, string][] {
  const { a, b } = data;
  const rows: [string, string, string][] = [
    ["model", a.model ?? "–", b.model ?? "–"],
    ["problems", a.problems ?? "–", b.problems ?? "–"],
    ["samples", count(a.n_samples), count(b.n_samples)],
  ];
  const both = (name: string, read: (detail: Overview | null) => string) => first && second && rows.push([name, read(first), read(second)]);
  both("extractor", (detail) => detail?.summary?.extractor ?? "–");
  both("cut at the token limit", (detail) => count(detail?.summary?.truncated));
  both("no answer found", (detail) => count(detail?.summary?.unparsable));
  both("failed", (detail) => count(detail?.summary?.errors));
  both("tokens written", (detail) => count(detail?.summary?.completion_tokens));
  rows.push(["activations", bytes(a.bytes), bytes(b.bytes)], ["begun", when(a.created), when(b.created)]);
  // The extractor stands above.
  for (const [name, one, other] of data.configuration) if (name !== "extractor" && name !== "model") rows.push([name, setting(one), setting(other)]);
  return rows;
}

function setting(value: unknown): string {
  return value == null ? "–" : Array.isArray(value) && value.every((part) => typeof part !== "object") ? value.join(", ") : typeof value === "object" ? JSON.stringify(value) : String(value);
}

const SHOWN = 200;

function Changes({ data }: { data: Comparison }) {
  const [which, setWhich] = useState<"all" | "a" | "b">("all");
  const [most, setMost] = useState(SHOWN);
  const rows = useMemo(() => {
    const right = (one: Verdict) => one.verdict === "correct";
    return data.changed.filter((one) => which === "all" || (which === "a" ? right(one.a) && !right(one.b) : right(one.b) && !right(one.a)));
  }, [data, which]);
  const link = (source: Source, one: Verdict) => <a href={target(source, "sample", one.sample_id)} aria-label={`${one.sample_id} in ${source.name}`}><Shown verdict={one.verdict} /></a>;
  return (
    <Card
      title="Problems whose verdict changed"
      actions={<Choice label="Which" value={which} options={[["all", "All"], ["a", "Only A right"], ["b", "Only B right"]]} onChange={setWhich} />}
    >
      {rows.length ? (
        <Table label="Problems whose verdict changed">
          <thead><tr><th scope="col">problem</th><th scope="col">question</th><th scope="col">A</th><th scope="col">read</th><th scope="col">B</th><th scope="col">read</th></tr></thead>
          <tbody>
            {rows.slice(0, most).map((one) => (
              <tr>
                <th scope="row"><bdi>{oneLine(one.problem, 60)}</bdi></th>
                <td class="question"><bdi>{oneLine(one.question ?? "", 160)}</bdi></td>
                <td>{link(data.a, one.a)}</td><td class="mono"><bdi>{oneLine(one.a.answer ?? "–", 40)}</bdi></td>
                <td>{link(data.b, one.b)}</td><td class="mono"><bdi>{oneLine(one.b.answer ?? "–", 40)}</bdi></td>
              </tr>
            ))}
          </tbody>
        </Table>
      ) : (
        <Empty>None.</Empty>
      )}
      {rows.length > most && <button type="button" onClick={() => setMost(most + SHOWN)}>{count(rows.length - most)} more</button>}
      {!data.difference.n && <Problem text="These two have no problem in common." />}
      {data.difference.n > 0 && <p class="soft">{percent(data.changed.length / data.difference.n)} of {count(data.difference.n)} problems</p>}
    </Card>
  );
}
