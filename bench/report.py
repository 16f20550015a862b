#!/usr/bin/python3
"""What run.py has measured as a text table and as a page with plots, beside crpc's targets. By hand,
to see the table again, or a page of it:

    bench/report.py build/bench/report.json [PAGE.html]
"""
import html
import json
import math
import sys

# --- targets --------------------------------------------------------------------------------

# (what, scenario, field of crpc's row, comparison, limit); a pair instead of a field: calls per second
# relative to those of that peer in that scenario.
TARGETS = [
    ("sync, one core: p50 x floor", "sync_1core", "vs_floor", "<=", 1.12),
    ("sync, a core each: p50 x floor", "sync_2core", "vs_floor", "<=", 1.04),
    ("64 outstanding, a core each: of the floor", "pipe64", "vs_floor", ">=", 0.60),
    ("64 outstanding, one core: of the floor", "pipe64_1core", "vs_floor", ">=", 0.25),
    ("64 outstanding: server CPU per call, us", "pipe64", "server_cpu_us", "<=", 0.8),
    ("half of that load: p99 x floor", "open_half", "vs_floor", "<=", 3.0),
    ("16 threads on one channel: of the floor", "threads16", "vs_floor", ">=", 0.80),
    ("16 threads: x libtirpc's 16 connections", "threads16", ("tirpc", "conns16"), ">=", 1.1),
    ("4 KiB messages: of the floor", "msg4k", "vs_floor", ">=", 0.60),
    ("1 MiB attachments: of the floor", "att1m", "vs_floor", ">=", 0.90),
    ("bytes per idle connection", "idle1k", "bytes_per_connection", "<=", 512),
    ("idle server: RSS, KB", "footprint", "rss_kb", "<=", 1536),
    ("idle server: anonymous memory, KB", "footprint", "anon_kb", "<=", 250),
    ("idle server: threads", "footprint", "threads", "<=", 1),
]


def by_scenario(rows):
    """{scenario: {peer: row}}, in the order of the rows."""
    found = {}
    for row in rows:
        found.setdefault(row["scenario"], {})[row["peer"]] = row
    return found


def targets(rows):
    """[(what, comparison, limit, figure, reached)] of those that were measured."""
    found, result = by_scenario(rows), []
    for what, scenario, field, comparison, limit in TARGETS:
        own = found.get(scenario, {}).get("crpc", {})
        if isinstance(field, tuple):
            other = found.get(field[1], {}).get(field[0])
            value = own["calls_per_s"] / other["calls_per_s"] if own and other else None
        else:
            value = own.get(field)
        if value is not None:
            reached = value <= limit if comparison == "<=" else value >= limit
            result.append((what, comparison, limit, value, reached))
    return result


# --- the table ------------------------------------------------------------------------------


def number(value):
    """Three digits, with k or M."""
    if value is None:
        return "-"
    for size, unit in (1e6, "M"), (1e4, "k"):
        if abs(value) >= size:
            value /= 1e6 if unit == "M" else 1e3
            return "%.*f%s" % (0 if value >= 100 else 1 if value >= 10 else 2, value, unit)
    return "%.0f" % value if abs(value) >= 100 else "%.3g" % value


LOAD_FIELDS = ["vs_floor", "p50_us", "p99_us", "p999_us", "calls_per_s", "mb_per_s",
               "server_cpu_us", "rss_kb", "spread"]
MEMORY_FIELDS = ["rss_kb", "anon_kb", "threads", "disk_kb"]
HEADS = {"vs_floor": "x floor", "p50_us": "p50 us", "p99_us": "p99 us", "p999_us": "p99.9 us",
         "calls_per_s": "calls/s", "mb_per_s": "MB/s", "server_cpu_us": "CPU us", "rss_kb": "RSS KB",
         "anon_kb": "anon KB", "threads": "threads", "disk_kb": "disk KB", "spread": "spread",
         "bytes_per_connection": "B/conn"}


def fields(scenario):
    if scenario == "footprint":
        return MEMORY_FIELDS
    return LOAD_FIELDS + (["bytes_per_connection"] if scenario.startswith("idle") else [])


def table(rows, about):
    lines = []
    for scenario, peers in by_scenario(rows).items():
        columns = fields(scenario)
        lines.append("%-17s" % scenario + "".join("%10s" % HEADS[c] for c in columns))
        for peer, row in peers.items():
            lines.append("  %-15s" % peer + "".join("%10s" % number(row.get(c)) for c in columns))
        lines.append("")
    lines.append("%-44s %10s %10s" % ("crpc's targets", "target", "measured"))
    for what, comparison, limit, value, reached in targets(rows):
        lines.append("  %-42s %2s %7g %10s%s" % (what, comparison, limit, number(value),
                                                 "" if reached else "   MISSED"))
    return "\n".join(lines + [""] + remarks(about))


def remarks(about):
    lines = ["skipped: %s (%s)" % item for item in about.get("skipped", {}).items()]
    lines += ["FAILED: %s in %s: %s" % (p, s, why) for s, p, why in about.get("failed", [])]
    if about.get("same_core"):
        lines.append("only one core may be used: a core each means the same one")
    if "took" in about:
        lines.append("medians of %d rounds of %.2g s each; %.0f s in all; load average %.1f before, "
                     "%.1f after" % (about["rounds"], about["seconds"], about["took"],
                                     about["load"], about["load_after"]))
        if about["load"] > 1:
            lines.append("the machine was not idle: compare ratios, and look at the spread")
    return lines


# --- the page -------------------------------------------------------------------------------

TITLES = {
    "crpc": "crpc", "floor": "raw sockets", "floor_window": "raw sockets, sliding window",
    "floor_lockstep": "raw sockets, lockstep", "floor_unbatched": "raw sockets, a send each",
    "tirpc": "libtirpc", "zmq": "ZeroMQ", "nng": "nng", "thrift": "Thrift c_glib",
    "grpc_cq": "gRPC C++, queue", "grpc_sync": "gRPC C++, sync", "capnp": "Cap'n Proto",
}

STYLE = """
:root { --ink: #1d2330; --soft: #667085; --line: #e2e6ee; --page: #fbfcfe; --card: #fff;
        --crpc: #0f766e; --floor: #aeb6c4; --peer: #7b8fb8; --bad: #b42318; --good: #0f766e; }
@media (prefers-color-scheme: dark) {
:root { --ink: #e6e9f0; --soft: #98a2b3; --line: #2b3240; --page: #12161e; --card: #1a202b;
        --crpc: #2dd4bf; --floor: #586274; --peer: #6d83b3; --bad: #f97066; --good: #2dd4bf; } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 1120px; background: var(--page);
       color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.9rem; margin: 0 } h2 { margin: 2.6rem 0 .2rem; font-size: 1.25rem }
p { color: var(--soft); margin: .2rem 0 1rem; max-width: 75ch }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 1rem }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
        padding: 1rem 1.1rem }
.card h3 { margin: 0; font-size: 1rem } .card p { margin: 0 0 .6rem; font-size: .85rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 1rem;
         margin-top: 1.5rem }
.tile b { display: block; font-size: 1.7rem; color: var(--crpc); line-height: 1.2 }
.tile span { color: var(--soft); font-size: .85rem }
svg { width: 100%; height: auto; display: block; font: 12px system-ui, sans-serif }
svg text { fill: var(--ink) } svg .soft { fill: var(--soft) }
svg .grid { stroke: var(--line) }
.crpc { fill: var(--crpc); stroke: var(--crpc) } .floor { fill: var(--floor); stroke: var(--floor) }
.peer { fill: var(--peer); stroke: var(--peer) } rect { stroke: none }
table { border-collapse: collapse; width: 100%; font-size: .85rem; background: var(--card) }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--line);
         font-variant-numeric: tabular-nums; white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { color: var(--soft); font-weight: 500 }
.good { color: var(--good) } .bad { color: var(--bad); font-weight: 600 }
tr.own td { font-weight: 600; color: var(--crpc) }
details { margin-top: 1rem } summary { cursor: pointer; color: var(--soft) }
.scroll { overflow-x: auto }
"""

WIDTH, LABEL, ROW = 520, 150, 24


def colour(peer):
    return "crpc" if peer == "crpc" else "floor" if peer.startswith("floor") else "peer"


def text(x, y, words, classes="", anchor="start"):
    return '<text x="%.1f" y="%.1f" class="%s" text-anchor="%s">%s</text>' % (
        x, y, classes, anchor, html.escape(words))


def svg(height, parts):
    return '<svg viewBox="0 0 %d %d" role="img">%s</svg>' % (WIDTH, height, "".join(parts))


def bars(values, describe):
    """Horizontal bars of [(peer, value)]; describe(peer, value) is what stands at the end."""
    largest, parts, room = max(v for _, v in values), [], WIDTH - LABEL - 110
    for i, (peer, value) in enumerate(values):
        y = i * ROW
        width = max(1.5, value / largest * room)
        parts += [text(LABEL - 8, y + 16, TITLES.get(peer, peer), anchor="end"),
                  '<rect x="%d" y="%d" width="%.1f" height="16" rx="2" class="%s"/>' % (
                      LABEL, y + 4, width, colour(peer)),
                  text(LABEL + width + 6, y + 16, describe(peer, value), "soft")]
    return svg(len(values) * ROW + 4, parts)


def log_axis(low, high):
    """(value -> x, [(x, label)]) of a logarithmic axis."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    room = WIDTH - LABEL - 20
    place = lambda v: LABEL + (math.log10(v) - first) / (last - first) * room
    names = lambda e: "%g us" % 10 ** e if e < 3 else "%g ms" % 10 ** (e - 3) if e < 6 else \
        "%g s" % 10 ** (e - 6)
    return place, [(place(10.0 ** e), names(e)) for e in range(first, last + 1)]


def latencies(rows):
    """p50, p99 and p99.9 of each row on a logarithmic axis."""
    keys = ["p50_us", "p99_us", "p999_us"]
    rows = [r for r in rows if all(r.get(k, 0) > 0 for k in keys)]
    place, ticks = log_axis(min(r["p50_us"] for r in rows), max(r["p999_us"] for r in rows))
    bottom = len(rows) * ROW
    parts = ['<line x1="%.1f" x2="%.1f" y1="0" y2="%d" class="grid"/>' % (x, x, bottom)
             for x, _ in ticks]
    parts += [text(x, bottom + 15, label, "soft", "middle") for x, label in ticks]
    for i, row in enumerate(rows):
        y, own = i * ROW + 12, colour(row["peer"])
        xs = [place(row[k]) for k in keys]
        parts += [text(LABEL - 8, y + 4, TITLES.get(row["peer"], row["peer"]), anchor="end"),
                  '<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" stroke-width="2" class="%s" '
                  'opacity=".5"/>' % (xs[0], xs[2], y, y, own)]
        for x, key, radius in zip(xs, keys, (5.5, 4, 2.5)):
            parts.append('<circle cx="%.1f" cy="%d" r="%.1f" class="%s"><title>%s: %s us</title>'
                         '</circle>' % (x, y, radius, own, HEADS[key][:-3], number(row[key])))
    return svg(bottom + 22, parts)


def card(title, about, body):
    return '<div class="card"><h3>%s</h3><p>%s</p>%s</div>' % (html.escape(title),
                                                              html.escape(about), body)


def scenario_card(name, about, peers):
    rows = list(peers.values())
    ratio = lambda peer: "" if peers[peer].get("vs_floor") is None else \
        "  x%.2f" % peers[peer]["vs_floor"]
    if name.startswith("sync"):
        rows.sort(key=lambda r: r["p50_us"])
        plot = bars([(r["peer"], r["p50_us"]) for r in rows],
                    lambda p, v: number(v) + " us" + ratio(p))
        return card(name, about + ". p50; shorter is better", plot)
    if name == "open_half":
        rows.sort(key=lambda r: r["p99_us"])
        return card(name, about + ". p50, p99, p99.9 from the moment each call was due",
                    latencies(rows))
    megabytes = name in ("msg4k", "msg1m", "att1m")
    key, unit = ("mb_per_s", " MB/s") if megabytes else ("calls_per_s", "/s")
    rows.sort(key=lambda r: -r[key])
    plot = bars([(r["peer"], r[key]) for r in rows], lambda p, v: number(v) + unit + ratio(p))
    return card(name, about + ". Longer is better", plot)


def field_card(title, about, peers, key, unit):
    values = [(p, r[key]) for p, r in peers.items()
              if r.get(key) is not None and not p.startswith("floor_")]
    values.sort(key=lambda v: v[1])
    return card(title, about, bars(values, lambda p, v: number(v) + unit)) if values else ""


def tiles(rows):
    found = by_scenario(rows)
    own = lambda scenario, key: found.get(scenario, {}).get("crpc", {}).get(key)
    wanted = [("sync_1core", "vs_floor", "%.2f x", "the time of raw sockets, one call at a time"),
              ("pipe64", "calls_per_s", "%s/s", "calls on one connection, 64 outstanding"),
              ("pipe64", "server_cpu_us", "%.2f us", "of the server's CPU for such a call"),
              ("footprint", "rss_kb", "%d KB", "resident memory of an idle server"),
              ("idle1k", "bytes_per_connection", "%d B", "of memory for an idle connection")]
    result = []
    for scenario, key, form, words in wanted:
        value = own(scenario, key)
        if value is not None:
            value = number(value) if form.startswith("%s") else value
            result.append('<div class="card tile"><b>%s</b><span>%s</span></div>' % (
                form % value, words))
    return '<div class="tiles">%s</div>' % "".join(result)


def target_table(rows):
    lines = ["<tr><th>crpc's targets<th>target<th>measured<th></tr>"]
    for what, comparison, limit, value, reached in targets(rows):
        lines.append("<tr><td>%s<td>%s %g<td>%s<td class=%s>%s</tr>" % (
            html.escape(what), "≤" if comparison == "<=" else "≥", limit, number(value),
            "good" if reached else "bad", "reached" if reached else "missed"))
    return "<table>%s</table>" % "".join(lines)


def full_tables(rows):
    result = []
    for scenario, peers in by_scenario(rows).items():
        columns = fields(scenario)
        lines = ["<tr><th>%s%s</tr>" % (scenario, "".join("<th>" + HEADS[c] for c in columns))]
        for peer, row in peers.items():
            lines.append("<tr%s><td>%s%s</tr>" % (
                " class=own" if peer == "crpc" else "", html.escape(TITLES.get(peer, peer)),
                "".join("<td>" + number(row.get(c)) for c in columns)))
        result.append("<div class=scroll><table>%s</table></div><br>" % "".join(lines))
    return "".join(result)


def page(rows, about):
    found = by_scenario(rows)
    names = [(n, words) for n, words in about.get("scenarios", [(n, n) for n in found])
             if n in found and n != "footprint"]
    cards = lambda wanted: "".join(scenario_card(n, words, found[n]) for n, words in names
                                   if n.startswith(wanted))
    parts = ["<!doctype html><html lang=en><meta charset=utf-8><title>crpc bench</title>",
             '<meta name=viewport content="width=device-width"><style>%s</style>' % STYLE,
             "<h1>crpc beside its peers</h1>",
             "<p>Echo over loopback TCP. All peers were measured in one interleaved run; “x” "
             "is relative to the floor, plain sockets that frame, send and receive the same bytes "
             "in the best way known. %s</p>" % html.escape(
                 "%(cpu)s, %(cores)s cores, Linux %(kernel)s, %(date)s." % about
                 if "cpu" in about else ""),
             tiles(rows), "<h2>Targets</h2>", target_table(rows),
             "<h2>One call at a time</h2><p>What a call costs when nothing else goes on. On one "
             "core software alone decides; with a core each the wake-up of a sleeping core "
             "dominates.</p><div class=grid>", cards(("sync",))]
    for name in "sync_1core", "sync_2core":
        if name in found:
            parts.append(card(name + ": latency", "p50, p99 and p99.9; logarithmic",
                              latencies(sorted(found[name].values(), key=lambda r: r["p50_us"]))))
    parts += ["</div><h2>Many calls at a time</h2><p>One connection with 64 calls under way, and 16 "
              "threads.</p><div class=grid>",
              cards(("pipe", "conns", "threads", "open"))]
    if "pipe64" in found:
        parts.append(field_card("server CPU per call", "pipe64; microseconds, shorter is better",
                                found["pipe64"], "server_cpu_us", " us"))
    parts += ["</div><h2>Large messages</h2><div class=grid>", cards(("msg", "att")), "</div>",
              "<h2>Connections and memory</h2><div class=grid>"]
    if "footprint" in found:
        parts += [field_card("idle server: resident memory", "before the first call",
                             found["footprint"], "rss_kb", " KB"),
                  field_card("idle server: on disk", "stripped, with all libraries but libc",
                             found["footprint"], "disk_kb", " KB")]
    for name in "idle1k", "idle10k":
        if name in found:
            parts.append(field_card(name + ": memory for each connection",
                                    "bytes of the server's anonymous memory", found[name],
                                    "bytes_per_connection", " B"))
    parts += [cards(("idle", "storm")), "</div>"]
    if any(n.startswith("providers") for n in found):
        parts += ["<h2>Lists of providers</h2><div class=grid>", cards(("providers",)), "</div>"]
    parts += ["<h2>How it was measured</h2><p>%s</p>" % "<br>".join(map(html.escape,
                                                                       remarks(about))),
              "<p>Spread is the distance of the fastest and the slowest round, over the "
              "median.</p><details open><summary>All figures</summary>", full_tables(rows),
              "</details></html>"]
    return "\n".join(parts) + "\n"


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    with open(sys.argv[1]) as f:
        rows = json.load(f)
    print(table(rows, {}))
    if len(sys.argv) > 2:
        with open(sys.argv[2], "w") as f:
            f.write(page(rows, {}))


if __name__ == "__main__":
    main()
