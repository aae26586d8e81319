/** The page: a bar above, one view below. Which view is in the hash. */
import "./app.css";
import { render } from "preact";
import { useEffect, useErrorBoundary, useState } from "preact/hooks";
import { type Overview, getFile, url } from "./api";
import { useAsked } from "./ask";
import { save } from "./charts/Figure";
import { inFile } from "./file";
import { HELP, useKeys } from "./keys";
import { oneLine } from "./parts/text";
import { Dialog, Problem } from "./parts/ui";
import { currentHash, go, hash, useRoute } from "./route";
import { toggleTheme, useDark } from "./theme";
import { CompareView } from "./views/Compare";
import { ProbesView } from "./views/Probes";
import { RunView } from "./views/Run";
import { SampleView } from "./views/Sample";
import { SamplesView } from "./views/Samples";
import { SourcesView } from "./views/Sources";

/** Views of one source: the last part of the hash, and its name. */
const TABS: [part: string, name: string][] = [
  ["", "Overview"],
  ["samples", "Samples"],
  ["probes", "Probes"],
];

function App() {
  const route = useRoute();
  const [kind = "", id = "", view = "", name = ""] = route.parts;
  const one = (kind === "run" || kind === "session") && id !== "";
  const detail = useAsked<Overview>(one ? url(["sources", id]) : null);
  const [help, setHelp] = useState(false);
  const source = detail.data?.source;
  const target = (part: string) => hash([kind, id, ...(part ? [part] : [])]);
  const shown = view === "sample" ? "samples" : view;

  useKeys({
    "?": () => setHelp(!help),
    d: toggleTheme,
    "g r": () => go("#/"),
    ...(one ? { "g o": () => go(target("")), "g s": () => go(target("samples")), "g p": () => go(target("probes")) } : {}),
    "/": () => document.querySelector<HTMLInputElement>("input[type=search]")?.focus(),
    Escape: () => (document.activeElement as HTMLElement | null)?.blur(),
  });
  useEffect(() => {
    const place = kind === "compare" ? "Compare" : view === "sample" ? name : (TABS.find(([part]) => part === view)?.[1] ?? "");
    document.title = [place && source?.name ? place : null, source?.name, "Roentgen"].filter(Boolean).join(" · ");
  }, [kind, view, name, source?.name]);
  // A new view begins at its top, and is announced by its heading.
  useEffect(() => scrollTo(0, 0), [kind, id, view, name]);

  return (
    <>
      <a class="skip" href="#main" onClick={(event) => { event.preventDefault(); document.getElementById("main")?.focus(); }}>To the content</a>
      <header class="bar">
        <nav aria-label="Place">
          <a class="brand" href="#/" aria-label="Roentgen: all runs"><Mark />Roentgen</a>
          {one && <span class="crumb" title={source?.path}><span aria-hidden="true">/ </span><bdi>{oneLine(source?.name ?? id, 60)}</bdi></span>}
          {kind === "compare" && <span class="crumb"><span aria-hidden="true">/ </span>Compare</span>}
        </nav>
        {one && (
          <nav class="tabs" aria-label="Views of the run">
            {TABS.map(([part, text]) => (
              <a href={target(part)} aria-current={part === shown ? "page" : undefined}>{text}</a>
            ))}
          </nav>
        )}
        <span class="tools">
          {!inFile() && kind !== "" && <Export />}
          <ThemeButton />
          <button type="button" class="icon" aria-label="Keyboard shortcuts" title="Keyboard shortcuts (?)" onClick={() => setHelp(true)}>?</button>
        </span>
      </header>
      <main id="main" tabIndex={-1}>
        <Boundary key={route.parts.join("/")}>
          {kind === "" ? (
            <SourcesView query={route.query} />
          ) : kind === "compare" ? (
            <CompareView a={id} b={view} />
          ) : !one ? (
            <Problem text="There is no such page." />
          ) : detail.error ? (
            <Problem text={detail.error.message} />
          ) : !detail.data ? (
            <p class="soft wait" role="status">Loading…</p>
          ) : view === "" ? (
            <RunView kind={kind} detail={detail.data} query={route.query} />
          ) : view === "samples" ? (
            <SamplesView kind={kind} detail={detail.data} query={route.query} />
          ) : view === "sample" ? (
            <SampleView kind={kind} detail={detail.data} id={name} query={route.query} />
          ) : view === "probes" ? (
            <ProbesView kind={kind} detail={detail.data} report={name || null} />
          ) : (
            <Problem text="There is no such page." />
          )}
        </Boundary>
      </main>
      {help && (
        <Dialog label="Keyboard shortcuts" onClose={() => setHelp(false)}>
          <h2>Keyboard</h2>
          <dl class="help">
            {HELP.map(([keys, what]) => (
              <div><dt><kbd>{keys}</kbd></dt><dd>{what}</dd></div>
            ))}
          </dl>
          <button type="button" onClick={() => setHelp(false)}>Close</button>
        </Dialog>
      )}
    </>
  );
}

/** A fault of one view is shown in its place, and the others still work. */
function Boundary({ children }: { children: preact.ComponentChildren }) {
  const [error] = useErrorBoundary((fault: unknown) => console.error(fault));
  if (error) return <Problem text={`This view failed: ${error instanceof Error ? error.message : String(error)}`} />;
  return <>{children}</>;
}

function Mark() {
  return (
    <svg viewBox="0 0 16 16" width="16" height="16" aria-hidden="true">
      <rect class="ground" x="0" y="0" width="16" height="16" rx="4" />
      <path class="ray" d="M4 12V4m4 8V6.5M12 12V9" />
    </svg>
  );
}

function ThemeButton() {
  const dark = useDark();
  return (
    <button type="button" class="icon" aria-label={dark ? "Light theme" : "Dark theme"} title={`${dark ? "Light" : "Dark"} theme (d)`} onClick={toggleTheme}>
      <svg viewBox="0 0 16 16" width="14" height="14" aria-hidden="true">
        <circle class="moon" cx="8" cy="8" r="6" />
        <path class="half" d="M8 2a6 6 0 0 1 0 12z" />
      </svg>
    </button>
  );
}

/** The view as one file, which the server puts together. */
function Export() {
  const [state, setState] = useState<"" | "busy" | string>("");
  const run = () => {
    setState("busy");
    getFile(url(["export"], { view: currentHash(), format: "html" })).then(
      (blob) => {
        // "Overview · first · Roentgen" becomes first-overview.html.
        const [place = "", name = "view"] = document.title.split(" · ");
        save(blob, `${`${name}-${place}`.replace(/[^\w.-]+/g, "_").toLowerCase()}.html`);
        setState("");
      },
      (error: Error) => setState(error.message),
    );
  };
  return (
    <>
      {state && state !== "busy" && <span class="bad" role="alert">{state}</span>}
      <button type="button" class="icon wide" disabled={state === "busy"} onClick={run} title="This view as one HTML file">
        {state === "busy" ? "Saving…" : "Export"}
      </button>
    </>
  );
}

const root = document.getElementById("app");
if (root) {
  root.replaceChildren();
  render(<App />, root);
}
