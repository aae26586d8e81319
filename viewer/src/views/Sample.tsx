/** One sample: what was said, as text or as tokens, and beside it how the answer was read and where the rows are. */
import { useEffect, useMemo, useState } from "preact/hooks";
import { type OneSample, type Overview, type SampleInfo, url } from "../api";
import { useAsked } from "../ask";
import { onlyFilter, parameters } from "../filter";
import { cell, count, words } from "../format";
import { useKeys } from "../keys";
import { visible } from "../parts/text";
import { Card, Choice, Copy, Problem, Table, Verdict } from "../parts/ui";
import { change, go, hash } from "../route";
import { Conversation } from "./Conversation";
import { TokensView } from "./Tokens";

interface Props {
  kind: string;
  detail: Overview;
  id: string;
  query: URLSearchParams;
}

export function SampleView({ kind, detail, id, query }: Props) {
  const { source, columns } = detail;
  const asked = useAsked<OneSample>(url(["sources", source.id, "samples", id], parameters(onlyFilter(query), columns)));
  const data = asked.data;
  const [marked, setMarked] = useState<string | null>(null);
  const showsTokens = query.get("show") === "tokens" || query.has("token");
  const turn = Number(query.get("turn") ?? data?.rollouts[0]?.turn ?? 0);

  const target = (sample: string) => {
    const kept = onlyFilter(query);
    for (const name of ["show", "color"]) {
      const value = query.get(name);
      if (value !== null) kept.set(name, value);
    }
    return hash([kind, source.id, "sample", sample], kept);
  };
  const up = hash([kind, source.id, "samples"], onlyFilter(query));
  const show = (tokens: boolean) => {
    change({ show: tokens ? "tokens" : null, token: null });
    scrollTo(0, 0);
  };
  useKeys({
    j: () => data?.next && go(target(data.next)),
    k: () => data?.previous && go(target(data.previous)),
    u: () => go(up),
    t: () => data?.rollouts.length && show(!showsTokens),
  });

  if (asked.error) return <Problem text={asked.error.message} />;
  if (!data) return <p class="soft wait" role="status">Loading…</p>;
  const { sample, rollouts } = data;
  const rollout = rollouts.find((one) => one.turn === turn) ?? rollouts[0];
  const answer = sample.extracted.find(({ extractor }) => extractor === detail.summary?.extractor)?.read ?? sample.answers[detail.summary?.extractor ?? ""];

  return (
    <div class="page sample">
      <header class="head">
        <div class="title">
          <h1><bdi>{visible(id)}</bdi></h1>
          <Verdict verdict={sample.verdict} />
          {sample.gold !== null && <span class="fact">gold <b class="mono"><bdi>{visible(sample.gold)}</bdi></b></span>}
          {answer != null && <span class="fact">read <b class="mono"><bdi>{visible(answer)}</bdi></b></span>}
        </div>
        <nav aria-label="Samples" class="around">
          <a href={up} title="To the table (u)">↑ Samples</a>
          <Step to={data.previous} target={target} label="Previous sample" sign="←" keys="k" />
          <Step to={data.next} target={target} label="Next sample" sign="→" keys="j" />
        </nav>
      </header>
      <div class="controls">
        <Choice label="Show as" value={showsTokens ? "tokens" : "text"} options={[["text", "Conversation"], ["tokens", "Tokens"]]} onChange={(name) => show(name === "tokens")} />
        {rollouts.length > 1 && showsTokens && (
          <label class="select">Turn
            <select value={String(turn)} onChange={(event) => change({ turn: event.currentTarget.value, token: null })}>
              {rollouts.map((one) => <option value={String(one.turn)}>{one.turn + 1} of {rollouts.length}</option>)}
            </select>
          </label>
        )}
      </div>
      {sample.error && <Problem text={sample.error} />}
      {showsTokens ? (
        rollout ? (
          <TokensView key={`${id} ${rollout.turn}`} detail={detail} sample={sample} rollout={rollout} query={query} />
        ) : (
          <Problem text="No activations were stored for this sample, so its tokens are not known." />
        )
      ) : (
        <Conversation sample={sample} marked={marked} />
      )}
      <div class="beside">
        <Readings sample={sample} onMark={setMarked} />
        <Facts sample={sample} />
        {data.python && (
          <Card title="These rows in Python" actions={<Copy text={data.python} />}>
            <pre class="code" tabIndex={0} aria-label="Python">{visible(data.python)}</pre>
          </Card>
        )}
      </div>
    </div>
  );
}

function Step({ to, target, label, sign, keys }: { to: string | null; target: (id: string) => string; label: string; sign: string; keys: string }) {
  if (to === null) return <span class="step soft" aria-hidden="true">{sign}</span>;
  return <a class="step" href={target(to)} aria-label={label} title={`${label} (${keys})`}>{sign}</a>;
}

function Readings({ sample, onMark }: { sample: SampleInfo; onMark: (extractor: string | null) => void }) {
  const found = useMemo(() => {
    const read = new Map(sample.extracted.map((one) => [one.extractor, one]));
    for (const [extractor, text] of Object.entries(sample.answers))
      if (!read.has(extractor)) read.set(extractor, { extractor, read: text, start: null, stop: null, verdict: null });
    return [...read.values()].map((one) => {
      const correct = sample.correct_by[one.extractor];
      return { ...one, verdict: one.verdict ?? (one.read === null ? "no_answer" : correct == null ? null : correct ? "correct" : "wrong") };
    });
  }, [sample]);
  if (!found.length) return null;
  return (
    <Card title="How the answer was read">
      <Table label="What each extractor read">
        <thead>
          <tr><th scope="col">extractor</th><th scope="col">read</th><th scope="col">verdict</th></tr>
        </thead>
        <tbody>
          {found.map((one) => (
            <tr onPointerEnter={() => onMark(one.extractor)} onPointerLeave={() => onMark(null)} class={one.start !== null ? "marks" : ""}>
              <th scope="row">{one.extractor}</th>
              <td class="mono"><bdi>{one.read === null ? "–" : visible(one.read.slice(0, 200))}</bdi></td>
              <td><Verdict verdict={one.verdict} /></td>
            </tr>
          ))}
        </tbody>
      </Table>
    </Card>
  );
}

function Facts({ sample }: { sample: SampleInfo }) {
  const rows: [string, string][] = [];
  for (const [name, value] of Object.entries({ ...sample.labels, ...sample.values }))
    rows.push([words(name), typeof value === "object" && value !== null ? JSON.stringify(value) : cell(value as string | number | boolean | null)]);
  sample.turns.forEach((turn, index) => {
    const tokens = `${count(Number(turn["prompt_tokens"] ?? 0))} read, ${count(Number(turn["completion_tokens"] ?? 0))} written, ${String(turn["finish_reason"] ?? "")}`;
    rows.push([sample.turns.length > 1 ? `turn ${index + 1}` : "tokens", tokens]);
  });
  if (sample.solution) rows.push(["solution", sample.solution]);
  const [open, setOpen] = useState(false);
  useEffect(() => setOpen(false), [sample.sample_id]);
  if (!rows.length) return null;
  const most = 12;
  return (
    <Card title="Facts">
      <dl class="facts">
        {rows.slice(0, open ? rows.length : most).map(([name, value]) => (
          <div><dt>{name}</dt><dd><bdi>{visible(value.slice(0, 2_000))}</bdi></dd></div>
        ))}
      </dl>
      {rows.length > most && !open && <button type="button" class="quiet" onClick={() => setOpen(true)}>{rows.length - most} more</button>}
    </Card>
  );
}
