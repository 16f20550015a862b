"""What run.py has measured, as a text table and as a page with plots; and the targets."""
import html

# (what, scenario, how to find the figure in {peer: row}, how to compare, the limit)
def _of(key):
    return lambda rows: rows["crpc"].get(key)


TARGETS = [
    ("sync p50, one core, x floor", "sync_1core", _of("vs_floor"), "<=", 1.12),
    ("sync p50, a core each, x floor", "sync_2core", _of("vs_floor"), "<=", 1.04),
    ("64 outstanding, a core each, of floor", "pipe64", _of("vs_floor"), ">=", 0.60),
    ("64 outstanding, one core, of floor", "pipe64_1core", _of("vs_floor"), ">=", 0.25),
    ("server CPU per call, 64 outstanding, us", "pipe64", _of("server_cpu_us"), "<=", 0.8),
    ("p99 at half load, x floor", "open_half", _of("vs_floor"), "<=", 3.0),
    ("16 threads share a channel, of floor", "threads16", _of("vs_floor"), ">=", 0.80),
    ("16 threads, x libtirpc's 16 connections", "threads16", "tirpc conns16", ">=", 1.1),
    ("4 KiB messages, of floor", "msg4k", _of("vs_floor"), ">=", 0.60),
    ("1 MiB attachments, of floor", "att1m", _of("vs_floor"), ">=", 0.90),
    ("bytes per idle connection", "idle1k", _of("bytes_per_connection"), "<=", 512),
    ("idle server, RSS KB", "footprint", _of("rss_kb"), "<=", 1536),
    ("idle server, anonymous KB", "footprint", _of("anon_kb"), "<=", 250),
    ("idle server, threads", "footprint", _of("threads"), "<=", 1),
]


def by_scenario(rows):
    found = {}
    for row in rows:
        found.setdefault(row["scenario"], {})[row["peer"]] = row
    return found


def targets(rows):
    """[(what, comparison, limit, figure, reached)] of those that were measured."""
    found, result = by_scenario(rows), []
    for what, scenario, figure, comparison, limit in TARGETS:
        here = found.get(scenario, {})
        if figure == "tirpc conns16":
            other = found.get("conns16", {}).get("tirpc")
            value = here["crpc"]["calls_per_s"] / other["calls_per_s"] \
                if other and "crpc" in here else None
        else:
            value = figure(here) if "crpc" in here else None
        if value is not None:
            reached = value <= limit if comparison == "<=" else value >= limit
            result.append((what, comparison, limit, value, reached))
    return result


def number(value):
    if value is None:
        return "-"
    if value >= 1e6:
        return "%.2fM" % (value / 1e6)
    if value >= 10000:
        return "%.0fk" % (value / 1e3)
    return "%.0f" % value if value >= 100 else "%.3g" % value


def table(rows, about):
    lines = []
    for scenario, here in by_scenario(rows).items():
        if scenario == "footprint":
            head, keys = "%-16s %8s %8s %8s %8s", ["rss_kb", "anon_kb", "threads", "disk_kb"]
        else:
            head, keys = "%-16s" + " %8s" * 9, ["vs_floor", "p50_us", "p99_us", "p999_us",
                                                "calls_per_s", "mb_per_s", "server_cpu_us",
                                                "rss_kb", "spread"]
        names = [k.replace("_per_", "/").replace("calls/s", "calls/s") for k in keys]
        lines += [head % tuple([scenario] + [n[:8] for n in names])]
        for peer, row in here.items():
            lines.append(head % tuple(["  " + peer] + [number(row.get(k)) for k in keys]))
        lines.append("")
    lines.append("%-42s %10s %10s" % ("crpc's targets", "target", "measured"))
    for what, comparison, limit, value, reached in targets(rows):
        lines.append("  %-40s %2s %7g %10s  %s" % (what, comparison, limit, number(value),
                                                   "" if reached else "MISSED"))
    lines.append("")
    lines += ["skipped %s: %s" % item for item in about["skipped"].items()]
    lines += ["FAILED %s, %s: %s" % (peer, scenario, why)
              for scenario, peer, why in about["failed"]]
    lines.append("%d rounds of %g s each, %.0f s in all; load %.1f before, %.1f after" % (
        about["rounds"], about["seconds"], about["took"], about["load"], about["load_after"]))
    return "\n".join(lines)


def write_html(path, rows, about):
    with open(path, "w") as f:
        f.write("<!doctype html><pre>%s</pre>" % html.escape(table(rows, about)))
