// Builds the page of `roentgen view` into the Python package. The same sources give the same bytes: no dates, no hashes in names.
// `node build.mjs --check` writes nothing and fails if the files in the package are not those that the sources give.
import { readFile, mkdir, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const target = join(here, "..", "roentgen", "view", "static");

const result = await build({
  entryPoints: [join(here, "src", "app.tsx")],
  absWorkingDir: here,
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  jsx: "automatic",
  jsxImportSource: "preact",
  charset: "ascii", // a page that inlines the bundle may be read in any encoding
  legalComments: "none",
  loader: { ".css": "css" },
  outdir: target,
  write: false,
});
const files = new Map(result.outputFiles.map((file) => [file.path.slice(target.length + 1), Buffer.from(file.contents)]));
files.set("index.html", await readFile(join(here, "src", "index.html")));
files.set("LICENSES.txt", await readFile(join(here, "node_modules", "preact", "LICENSE")));

if (process.argv.includes("--check")) {
  const stale = [];
  for (const [name, bytes] of files) {
    const there = await readFile(join(target, name)).catch(() => null);
    if (there === null || !there.equals(bytes)) stale.push(name);
  }
  if (stale.length) {
    console.error(`roentgen/view/static is not what viewer/ gives (${stale.join(", ")}): run \`make viewer\` and commit it`);
    process.exit(1);
  }
} else {
  await mkdir(target, { recursive: true });
  for (const [name, bytes] of files) await writeFile(join(target, name), bytes);
  for (const [name, bytes] of files) console.log(`${name} ${bytes.length}`);
}
