"""How a report looks: light, dark, on a phone and on paper. Charts take their colours from here (charts.py)."""

from collections.abc import Mapping, Sequence

LIGHT = {
    "paper": "#ffffff",
    "panel": "#f5f6f8",
    "ink": "#1b1f24",
    "muted": "#5a6270",
    "line": "#dde1e6",
    "mark": "#ffe9a8",
    "series": ("#1f6fb4", "#c4500a", "#23803f", "#8243bd", "#946c00", "#b92c63", "#0a7a7a", "#5f5f5f"),
}
DARK = {
    "paper": "#14171b",
    "panel": "#1c2026",
    "ink": "#e6e9ed",
    "muted": "#a3acb8",
    "line": "#343b44",
    "mark": "#5c4a10",
    "series": ("#6cb2f0", "#f59a57", "#6cce8b", "#c39bf2", "#e0b84a", "#f07fa8", "#5cd0d0", "#b5b5b5"),
}
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif'

RULES = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 var(--font); }
main { max-width: 1120px; margin: 0 auto; padding: 20px 16px 60px; }
h1 { font-size: 1.6rem; margin: 8px 0 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 40px 0 12px; padding-top: 14px; border-top: 1px solid var(--line);
  overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 0 0 6px; }
p { margin: 6px 0; }
code, pre { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 0.87em; }
code { overflow-wrap: anywhere; }
pre { background: var(--panel); padding: 10px 12px; border-radius: 6px; overflow-x: auto; margin: 6px 0;
  white-space: pre-wrap; }
svg { display: block; width: 100%; height: auto; font-family: var(--font); }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure { margin: 0; min-width: 0; }
figcaption, .small, .note { color: var(--muted); font-size: 0.87rem; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 10px; margin: 16px 0; }
.tiles div { background: var(--panel); border-radius: 6px; padding: 10px 12px; }
.tiles b { display: block; overflow-wrap: anywhere; font-size: 1.15rem; }
.tiles span { color: var(--muted); font-size: 0.87rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 24px; }
.depth, .classes { grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.classes figure + figure { margin-top: 20px; }
.depth figure + figure svg { max-width: 420px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.92rem; min-width: 60%; }
th, td { text-align: left; padding: 3px 14px 3px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  font-weight: normal; }
thead th { color: var(--muted); font-size: 0.87rem; }
.facts td, .keys td { overflow-wrap: anywhere; }
.keys td { min-width: 7em; }
.facts th { color: var(--muted); white-space: nowrap; }
.figures td { white-space: nowrap; font-variant-numeric: tabular-nums; }
.bars { width: 100%; }
.bars td { white-space: nowrap; font-variant-numeric: tabular-nums; text-align: right; padding-right: 10px; }
.bars td:nth-child(2) { width: 45%; min-width: 60px; }
.bar { display: block; height: 11px; margin-top: 6px; background: var(--panel); border-radius: 2px; }
.bar span { display: block; height: 100%; background: var(--series-0); border-radius: 2px; }
mark { background: var(--mark); color: var(--ink); padding: 0 3px; border-radius: 3px; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 16px; padding: 0; margin: 8px 0 16px;
  font-size: 0.87rem; }
.legend li { overflow-wrap: anywhere; }
.swatch, .line { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px; }
.line { width: 20px; height: 4px; vertical-align: middle; }
.dashed { mask: repeating-linear-gradient(90deg, black 0 5px, transparent 5px 8px); }
.scene { margin: 10px 0 18px; }
.scene b { overflow-wrap: anywhere; }
.four { display: grid; grid-template-columns: repeat(4, 1fr); gap: 8px; }
.four img { display: block; width: 100%; height: auto; border-radius: 4px; }
summary { cursor: pointer; }
@media (max-width: 640px) {
  th, td { padding-right: 8px; font-size: 0.84rem; }
  .keys tr > :first-child { overflow-wrap: anywhere; min-width: 9em; }
  .bars td { padding-right: 6px; }
  .bars td:nth-child(2) { width: 22%; min-width: 36px; }
  .bars th { overflow-wrap: anywhere; }
  .four { grid-template-columns: repeat(2, 1fr); }
  .tiles { grid-template-columns: repeat(2, 1fr); }
}
@media print {
  @page { margin: 14mm; }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  .charts { grid-template-columns: repeat(2, 1fr); }
  .charts.depth, .charts.classes { grid-template-columns: 3fr 2fr; }
  .four { grid-template-columns: repeat(4, 1fr); }
  figure, article, tr, .tiles div { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .wide { overflow: visible; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


def css() -> str:
    """The whole style sheet. Paper is light, whatever the screen is."""
    series = "".join(f".series-{number} {{ background: var(--series-{number}); }}\n" for number in range(8))
    dark = f"@media screen and (prefers-color-scheme: dark) {{ {_variables(DARK)} }}\n"
    return f"{_variables(LIGHT)}\n{dark}{RULES}{series}"


def _variables(theme: Mapping[str, Sequence[str]]) -> str:
    found = [f"--font: {FONT}"]
    for name, value in theme.items():
        if isinstance(value, str):
            found.append(f"--{name}: {value}")
        else:
            found += [f"--{name}-{number}: {one}" for number, one in enumerate(value)]
    return f":root {{ {'; '.join(found)}; }}"
