"""One self-contained page: the tables that the terminal shows, and the plots. No script, nothing fetched.

Everything that a server sent is escaped.
"""

import html
import io

from rich.console import Console, RenderableType

from gear_loadtest.plots import svg
from gear_loadtest.report import Report
from gear_loadtest.search import Sweep
from gear_loadtest.table import describe_load, render, render_runs, render_sweep

_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1e293b; background: #f8fafc; margin: 2rem auto; max-width: 64rem;
  padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; margin: 0; }}
p.about {{ color: #64748b; margin: .2rem 0 1.5rem; }}
section {{ background: #fff; border: 1px solid #e2e8f0; border-radius: 8px; padding: 1rem; margin-bottom: 1.5rem;
  overflow-x: auto; }}
pre {{ font: 13px/1.35 ui-monospace, monospace; margin: 0; }}
svg {{ width: 100%; height: auto; }}
.invalid {{ background: #fef2f2; border-color: #dc2626; color: #991b1b; font-weight: 600; }}
</style>
<h1>{title}</h1>
<p class="about">{about}</p>
{sections}
</html>
"""


def run_page(report: Report) -> str:
    about = f"{report.model} at {report.url} · {describe_load(report.command)} · {report.date}"
    sections = [_section(html.escape(f"INVALID: {report.client.invalid}"), "invalid")] if report.client.invalid else []
    sections += [_section(_as_html(render(report))), _section(svg(report))]
    return _page(f"Load test of {report.model}", about, sections)


def sweep_page(result: Sweep) -> str:
    """The knee first, then every run by itself."""
    first = result.runs[0]
    sections = [_section(svg(result)), _section(_as_html(render_sweep(result)))]
    sections += [_section(_as_html(render_runs([run])) + svg(run)) for run in result.runs]
    return _page(f"Load tests of {first.model}", f"{first.model} at {first.url} · {first.date}", sections)


def _page(title: str, about: str, sections: list[str]) -> str:
    return _PAGE.format(title=html.escape(title), about=html.escape(about), sections="\n".join(sections))


def _section(content: str, style: str = "") -> str:
    return f'<section class="{style}">{content}</section>' if style else f"<section>{content}</section>"


def _as_html(renderable: RenderableType) -> str:
    console = Console(file=io.StringIO(), record=True, width=80, force_terminal=True, color_system="truecolor")
    console.print(renderable)
    return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
