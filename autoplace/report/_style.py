"""The report's style sheet: light, responsive, printable; system fonts, nothing fetched."""

__all__ = ["STYLE"]

STYLE = """
:root { --ink: #22272e; --soft: #57606a; --line: #d8dee4; --kept: #00734f; --wash: #f6f8fa; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--wash); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
header { margin-bottom: 1.5rem; }
.brand { margin: 0; color: var(--soft); font-size: .85rem; letter-spacing: .04em; text-transform: uppercase; }
h1 { margin: .1rem 0 .4rem; font-size: 1.9rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 0 0 .8rem; font-size: 1.15rem; }
.lead { margin: 0; font-size: 1.1rem; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 1.2rem 1.4rem;
  margin-top: 1.1rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: .9rem; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: .9rem 1.1rem; }
.card p { margin: 0; color: var(--soft); font-size: .85rem; }
.card strong { display: block; font-size: 1.45rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
.card small { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th { text-align: left; font-weight: 600; color: var(--soft); border-bottom: 2px solid var(--line);
  white-space: nowrap; }
th, td { padding: .45rem .9rem .45rem 0; vertical-align: top; }
td { border-bottom: 1px solid #eaeef2; overflow-wrap: anywhere; min-width: 5rem; }
.candidates th:nth-child(3), .candidates th:nth-child(4),
.candidates td:nth-child(3), .candidates td:nth-child(4) { text-align: right; white-space: nowrap; }
.candidates td { font-variant-numeric: tabular-nums; }
.candidates td:nth-child(2), .candidates td:nth-child(7) { min-width: 11rem; }
.candidates td:nth-child(6) { white-space: nowrap; }
tr.kept td { color: var(--kept); font-weight: 600; background: #f0faf5; }
.caption, figcaption { color: var(--soft); font-size: .88rem; }
figure { margin: 0 0 1.8rem; }
figure:last-child { margin-bottom: 0; }
figure img { display: block; max-width: 100%; height: auto; }
dl { display: grid; grid-template-columns: minmax(9rem, max-content) 1fr; gap: .25rem 1.4rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
details { margin-top: .9rem; }
summary { cursor: pointer; color: #0072b2; }
details[open] summary { margin-bottom: .6rem; }
ul { margin: 0; padding-left: 1.2rem; }
@media (max-width: 640px) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } h1 { font-size: 1.5rem; } }
@media print { body { background: #fff; } section, .card { break-inside: avoid; } }
"""
