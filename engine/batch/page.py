"""The state of a batch as one HTML file: no scripts, nothing from elsewhere, for phones and screen readers too."""

import base64
from collections.abc import Iterable, Iterator
from datetime import datetime
from html import escape
from importlib.resources import files
from pathlib import Path

from engine import __version__
from engine.batch.catalog import Row, load_catalog
from engine.batch.report import Status, duration, summarize
from engine.batch.thumbnail import Thumbnail, after, before
from engine.errors import printable
from engine.outputs import BATCH
from engine.store import write_atomic

MOST_SHOWN = 120
"""Pictures before and after; spread evenly over all that are done."""
MOST_LISTED = 1000
"""Pictures that were not restored; the newest."""

_OPEN_UP_TO = 10
"""A list of at most so many is not folded."""


def write_html(out: Path) -> Path:
    """Writes `OUT/_batch/status.html` and gives its path; raises what `engine.batch.report.status` raises."""
    catalog = load_catalog(out)
    found = summarize(out, catalog)
    done = [row for row in catalog.rows.values() if row.status == "done"]
    shown = [done[index * len(done) // MOST_SHOWN] for index in range(MOST_SHOWN)] if len(done) > MOST_SHOWN else done
    parts = [_header(out, found), _figures(found), *_throughput(found), *_failures(found)]
    parts += _gallery(out, shown, len(done))
    path = out / BATCH / "status.html"
    style = files("engine.batch").joinpath("page.css").read_text(encoding="utf-8")
    text = _PAGE.format(title=_text(f"{_name(out)}: batch"), style=style, body="\n".join(parts), version=__version__)
    write_atomic(path, text.encode())
    return path


def _text(text: str) -> str:
    return escape(printable(text))


def _name(out: Path) -> str:
    return out.resolve().name or str(out)


def _moment(moment: datetime) -> str:
    return f'<time datetime="{moment:%Y-%m-%dT%H:%M:%SZ}">{moment:%Y-%m-%d %H:%M:%S} UTC</time>'


def _header(out: Path, found: Status) -> str:
    state = "running" if found.running else "not running"
    total = max(found.finished, found.total or 0)
    of = (
        f"{found.finished:,} of {total:,} pictures finished" if found.total else f"{found.finished:,} pictures finished"
    )
    share = f" ({100 * found.finished / total:.0f} %)" if found.total else ""
    waiting = total - found.finished
    counts = {**found.counts, "waiting": waiting}
    bars = "".join(f'<span class="{name}" style="flex-grow:{count}"></span>' for name, count in counts.items() if count)
    key = "".join(f'<li class="{name}">{count:,} {name}</li>' for name, count in counts.items() if count)
    damaged = [_text(path.name) for path in found.damaged]
    warning = (
        f'<p class="warning" role="alert">Damaged parts of the catalog, not read: {", ".join(damaged)}. '
        "<code>engine status OUT --rebuild</code> makes up for them.</p>"
        if damaged
        else ""
    )
    return (
        f'<header><h1>{_text(_name(out))}</h1><p><strong class="state">{state}</strong> · {of}{share} · '
        f"as of {_moment(found.at)}</p>"
        f'<div class="bar" aria-hidden="true">{bars}</div><ul class="key">{key}</ul>{warning}</header>'
    )


def _figures(found: Status) -> str:
    figures = [
        ("megapixels restored", f"{found.megapixels:,.0f}" if found.megapixels >= 100 else f"{found.megapixels:.2f}"),
        ("pictures a minute", f"{60 * found.rate:,.1f}"),
        ("megapixels a second", f"{found.megapixel_rate:,.2f}"),
        *([("time left", "unknown" if found.left_s is None else duration(found.left_s))] if found.running else []),
        *((f"reviews {name}", f"{count:,}") for name, count in found.reviews.items()),
    ]
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures)
    return f'<section aria-label="Figures"><dl class="figures">{cells}</dl></section>'


def _throughput(found: Status) -> Iterator[str]:
    if not found.series:
        return
    series, seconds = found.series, found.series[0].seconds
    most = max(span.done + span.not_done for span in series)
    bars: list[str] = []
    for index, span in enumerate(series):
        done, bad = 100 * span.done / most, 100 * span.not_done / most
        for name, height, base in (("done", done, 0.0), ("refused", bad, done)):
            if height:
                bars.append(
                    f'<rect class="{name}" x="{index + 0.1:.1f}" y="{100 - base - height:.2f}" width="0.8" '
                    f'height="{height:.2f}"/>'
                )
    first, last = series[0].begin, series[-1].begin
    days = "%Y-%m-%d %H:%M" if first.date() != last.date() else "%H:%M:%S"
    rows = "".join(
        f'<tr><th scope="row">{span.begin:%Y-%m-%d %H:%M:%S}</th><td>{span.done}</td><td>{span.not_done}</td></tr>'
        for span in series
    )
    yield (
        '<section aria-labelledby="throughput"><h2 id="throughput">Throughput</h2><figure class="chart">'
        f"<figcaption>Pictures finished per {duration(seconds)}; the highest bar is {most}</figcaption>"
        '<ul class="key"><li class="done">done</li><li class="refused">refused or failed</li></ul>'
        f'<svg viewBox="0 0 {len(series)} 100" preserveAspectRatio="none" role="img" '
        f'aria-label="Bars of pictures finished per {duration(seconds)}; the numbers are in the table below">'
        f'<path class="grid" d="M0 0H{len(series)}M0 50H{len(series)}M0 100H{len(series)}"/>{"".join(bars)}</svg>'
        f'<div class="axis" aria-hidden="true"><span>{first:{days}}</span><span>{last:{days}} UTC</span></div></figure>'
        "<details><summary>The same as a table</summary><table><thead><tr>"
        '<th scope="col">from (UTC)</th><th scope="col">done</th><th scope="col">refused or failed</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></details></section>"
    )


def _failures(found: Status) -> Iterator[str]:
    yield f'<section aria-labelledby="failures"><h2 id="failures">Not restored ({len(found.failures):,})</h2>'
    listed = found.failures[:MOST_LISTED]
    if len(listed) < len(found.failures):
        yield f"<p>The newest {len(listed):,} are listed here; the catalog holds all of them.</p>"
    if not listed:
        yield "<p>None.</p>"
    for reason, count in found.reasons.items():
        rows = [row for row in listed if (row.reason or "unknown") == reason]
        if rows:
            unfolded = " open" if count <= _OPEN_UP_TO else ""
            items = "".join(map(_failure, rows))
            heading = f"<summary><code>{_text(reason)}</code> {count:,}</summary>"
            yield f"<details{unfolded}>{heading}<ul>{items}</ul></details>"
    yield "</section>"


def _failure(row: Row) -> str:
    attempts = "" if row.attempts <= 1 else f" · {row.attempts} attempts"
    return (
        f"<li><strong>{_text(row.name)}</strong> <small>{row.status} · {_moment(row.finished)}{attempts}</small>"
        f"<p>{_text(row.message or '')}</p></li>"
    )


def _gallery(out: Path, rows: Iterable[Row], num_done: int) -> Iterator[str]:
    cards = [_card(out, row) for row in rows]
    if not cards:
        return
    yield '<section aria-labelledby="pictures"><h2 id="pictures">Before and after</h2>'
    if len(cards) < num_done:
        yield f"<p>{len(cards):,} of {num_done:,} restored pictures, spread evenly over the catalog.</p>"
    yield f'<ul class="gallery">{"".join(cards)}</ul></section>'


def _card(out: Path, row: Row) -> str:
    name = _text(row.name)
    share = "nothing was missing" if row.generated_share == 0 else f"{100 * row.generated_share:.2g} % generated"
    note = f'<p class="note">{_text(row.note)}</p>' if row.note else ""
    return (
        f'<li><h3>{name}</h3><div class="pair">{_shown(before(row), name, "before")}'
        f"{_shown(after(out, row), name, 'after')}</div><p>{row.megapixels:.2f} megapixels · {share} · "
        f'{duration(row.seconds)} · <span class="review {_text(row.review)}">review: {_text(row.review)}</span></p>'
        f"{note}</li>"
    )


def _shown(picture: Thumbnail | str, name: str, when: str) -> str:
    if isinstance(picture, str):
        return f'<figure><div class="missing">{_text(picture)}</div><figcaption>{when}</figcaption></figure>'
    data = base64.b64encode(picture.jpeg).decode()
    return (
        f'<figure><img src="data:image/jpeg;base64,{data}" width="{picture.size.w}" height="{picture.size.h}" '
        f'alt="{name}, {when}"><figcaption>{when}</figcaption></figure>'
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
<footer>
<p>Reviews come from a table with the columns <code>name</code>, <code>review</code> (pending, accepted or rejected) and
<code>note</code>: <code>engine status OUT --reviews FILE.csv</code>. Written by cra-srgan-engine {version}.</p>
</footer>
</body>
</html>
"""
