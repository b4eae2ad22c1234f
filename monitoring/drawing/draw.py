"""Checks the dashboards against Grafana's types and draws them with its components, without a Grafana server.

    npm install --prefix monitoring/drawing --ignore-scripts=false
    python monitoring/drawing/draw.py check
    python monitoring/drawing/draw.py draw --prometheus http://127.0.0.1:9090 --seconds 120 --into build/drawn

`check` compares every dashboard and panel with @grafana/schema in TypeScript. `draw` queries a Prometheus for the
latest seconds and takes a screenshot of each dashboard in a headless Chromium. Both need Node.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BOARDS = HERE.parent / "grafana" / "dashboards"
PROGRAMS = HERE / "node_modules" / ".bin"
RAW = HERE / "node_modules" / "@grafana" / "schema" / "dist" / "types" / "raw"
PANELS = {"row": "Loose<RowPanel>", "timeseries": "Of<TimeOptions, TimeField>", "stat": "Of<StatOptions, {}>"}
WIDTH, ROW = 1500, 34  # as in board.jsx

# Grafana names the values of enumerations; JSON has the values themselves. The schema leaves the form of a query open.
TYPES = """
import type {Dashboard, Panel, RowPanel, FieldConfig, VariableModel} from '%(raw)s/dashboard/x/types.gen';
import type {Options as TimeOptions, FieldConfig as TimeField}
  from '%(raw)s/composable/timeseries/panelcfg/x/types.gen';
import type {Options as StatOptions} from '%(raw)s/composable/stat/panelcfg/x/types.gen';
type Loose<T> = T extends string ? `${T}` : T extends number ? number : T extends boolean ? boolean
  : T extends Array<infer U> ? Loose<U>[] : T extends object ? {[K in keyof T]: Loose<T[K]>} : T;
type Query = {refId: string; datasource: {type: 'prometheus'; uid: string}; expr: string; legendFormat: string;
  editorMode: 'code' | 'builder'; range: boolean};
type Of<O, F> = Loose<Omit<Panel, 'options' | 'fieldConfig' | 'targets'>> & {options: Loose<O>; targets: Query[];
  fieldConfig: {defaults: Loose<Omit<FieldConfig, 'custom'>> & {custom?: Loose<F>}; overrides: never[]}};
type Board = Loose<Omit<Dashboard, 'panels' | 'templating'>> & {templating: {list: Loose<VariableModel>[]}};
"""


def boards() -> dict[str, dict[str, Any]]:
    """The committed dashboards by file name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(BOARDS.glob("*.json"))}


def check() -> int:
    """The compiler's exit code; it prints the errors."""
    lines, count = [TYPES % {"raw": RAW}], 0
    for board in boards().values():
        panels = board.pop("panels")
        lines.append(f"export const board{count}: Board = {json.dumps(board)};")
        for panel in panels:
            lines.append(f"export const panel{count}: {PANELS[panel['type']]} = {json.dumps(panel)};")
            count += 1
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "check.ts"
        source.write_text("\n".join(lines))
        strict = ("--noEmit", "--strict", "--skipLibCheck", "--target", "es2022", "--module", "esnext")
        code = subprocess.run([PROGRAMS / "tsc", *strict, "--moduleResolution", "bundler", source]).returncode
    print(f"{count} panels of {len(boards())} dashboards: {'as @grafana/schema has them' if code == 0 else 'NOT so'}")
    return code


def answers(url: str, board: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The results of a dashboard's queries for the latest seconds."""
    end, found = time.time(), {}
    for expr in [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]:
        asked = expr.replace("$__rate_interval", "10s").replace("$__range", f"{seconds:.0f}s")
        asked = re.sub(r"\$(job|instance|run)\b", ".*", asked)
        query = urllib.parse.urlencode({"query": asked, "start": end - seconds, "end": end, "step": 1})
        with urllib.request.urlopen(f"{url}/api/v1/query_range?{query}", timeout=30) as answer:
            found[expr] = json.load(answer)["data"]["result"]
    return {"start": end - seconds, "end": end, "by_query": found}


def draw(url: str, seconds: float, into: Path, names: Sequence[str]) -> int:
    """Takes one screenshot per dashboard."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("Chromium is not installed")
    into.mkdir(parents=True, exist_ok=True)
    for name, board in boards().items():
        if names and name not in names:
            continue
        # Below this folder, where Node finds the packages.
        with tempfile.TemporaryDirectory(dir=HERE, prefix=".drawn-") as temp:
            folder = Path(temp)
            shutil.copy(HERE / "board.jsx", folder)
            (folder / "board.json").write_text(json.dumps(board))
            (folder / "answers.json").write_text(json.dumps(answers(url, board, seconds)))
            bundle(folder)
            rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
            photograph(browser, folder, into / f"{name}.png", ROW * rows + 10)
        print(into / f"{name}.png", flush=True)
    return 0


def bundle(folder: Path) -> None:
    """Writes page.html and its bundle."""
    assets = ("--loader:.ttf=empty", "--loader:.woff2=empty", "--loader:.svg=dataurl", "--loader:.png=dataurl")
    form = ("--bundle", "--jsx=automatic", '--define:process.env.NODE_ENV="production"', "--log-level=error")
    command = [PROGRAMS / "esbuild", folder / "board.jsx", f"--outfile={folder / 'app.js'}", *assets, *form]
    subprocess.run(command, check=True)
    page = '<!doctype html><meta charset="utf-8"><link rel="stylesheet" href="app.css"><body style="margin:0">'
    (folder / "page.html").write_text(f'{page}<div id="root"></div><script src="app.js"></script>')


def photograph(browser: str, folder: Path, picture: Path, height: int) -> None:
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files")
    places = (f"--user-data-dir={folder / 'browser'}", f"--window-size={WIDTH},{height}", "--virtual-time-budget=6000")
    command = [browser, *options, *places, f"--screenshot={picture.resolve()}", (folder / "page.html").as_uri()]
    subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="against @grafana/schema")
    drawing = commands.add_parser("draw", help="with Grafana's components")
    drawing.add_argument("--prometheus", default="http://127.0.0.1:9090")
    drawing.add_argument("--seconds", type=float, default=120, help="how far back")
    drawing.add_argument("--into", type=Path, default=Path("build/drawn"))
    drawing.add_argument("boards", nargs="*", help="names of dashboards (default: all)")
    options = parser.parse_args()
    if not PROGRAMS.is_dir():
        sys.exit(f"the packages are missing: npm install --prefix {HERE}")
    if options.command == "check":
        return check()
    return draw(options.prometheus.rstrip("/"), options.seconds, options.into, options.boards)


if __name__ == "__main__":
    sys.exit(main())
