"""Formats results as Markdown tables."""

import statistics
from collections.abc import Iterable, Sequence

from .competitors import BY_NAME
from .trial import Result

_HEAD = (
    "competitor", "msg/s", "ratio", "client µs", "ratio", "PostgreSQL µs", "broker µs",
    "rows/COMMIT", "MB", "rows stored / sent",
)  # fmt: skip


def _range(values: Iterable[float | None], places: int | None = None) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "-"
    low, high = min(known), max(known)
    if places is None:
        places = 0 if high >= 100 else 1 if high >= 10 else 2
    texts = [f"{v:,.{places}f}".replace(",", " ") for v in (low, high)]
    return texts[0] if texts[0] == texts[1] else " to ".join(texts)


def _verdict(runs: list[Result]) -> str:
    if all(r.stored is None for r in runs):
        return "-"
    faults = []
    lost, doubled = sum(r.lost for r in runs), sum(r.doubled for r in runs)
    unfinished = sum(r.unfinished for r in runs)
    if lost:
        faults.append(f"{lost} LOST")
    if doubled:
        faults.append(f"{doubled} DOUBLED")
    if unfinished:
        faults.append(f"stopped, {unfinished} not yet stored")
    totals = f"{sum(r.stored or 0 for r in runs)} / {sum(r.sent for r in runs)}"
    return totals + (f" ({', '.join(faults)})" if faults else " exact")


def line(result: Result) -> str:
    """Return a run as one line, for the terminal."""
    if result.idle_percent is not None:
        return f"{result.idle_percent:.2f} % CPU, {result.memory[-1]:.0f} MB"
    text = f"{result.rate:.0f} msg/s, client {result.client_us:.2f} µs"
    if result.database_us is not None:
        text += f", PostgreSQL {result.database_us:.2f} µs, {_verdict([result])}"
    text += f", broker {result.broker_us:.1f} µs, {result.memory[-1]:.0f} MB"
    if result.delay_ms:
        text += f", p50 {result.delay_ms[50]:.1f} ms, p99 {result.delay_ms[99]:.1f} ms"
    return text + f", others {result.cores_others:.2f} cores"


def _ratio(runs: list[Result], ours: list[Result], name: str) -> str:
    mine = statistics.median(getattr(r, name) for r in runs)
    base = statistics.median(getattr(r, name) for r in ours) if ours else 0
    if not base:
        return "-"
    return f"{mine / base:.2f}" if mine / base < 10 else f"{mine / base:.0f}"


def by_mode(results: list[Result]) -> dict[str, dict[str, list[Result]]]:
    """Group results: mode -> competitor -> runs, in their order."""
    groups: dict[str, dict[str, list[Result]]] = {}
    for result in results:
        groups.setdefault(result.mode, {}).setdefault(result.competitor, []).append(result)
    return groups


def _table(rows: Sequence[tuple[str, ...]], head: tuple[str, ...]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def failures(failed: list[str]) -> str:
    """List failed runs with their reasons, because they are missing from the tables."""
    if not failed:
        return ""
    return "\n".join(
        ["### Runs that failed, not in the tables", "", *(f"- {f}" for f in failed), ""]
    )


def tables(results: list[Result]) -> str:
    """Return a table for each mode. Ranges are from minimum to maximum, ratios are of medians."""
    lines = []
    for mode, competitors in by_mode(results).items():
        lines += [f"### {mode}", ""]
        if mode == "idle":
            lines += _idle(competitors)
            continue
        if mode == "memory":
            lines += _memory(competitors)
            continue
        ours = competitors.get("collector", [])
        head: tuple[str, ...] = _HEAD
        if paced := mode.endswith("/s"):
            head += ("p50 ms", "p99 ms", "max ms", "flush ms", "generator late ms")
        rows = []
        for name, runs in competitors.items():
            row: tuple[str, ...] = (
                BY_NAME[name].title,
                _range(r.rate for r in runs),
                _ratio(runs, ours, "rate"),
                _range(r.client_us for r in runs),
                _ratio(runs, ours, "client_us"),
                _range(r.database_us for r in runs),
                _range(r.broker_us for r in runs),
                _range(r.rows_per_commit for r in runs),
                _range((r.memory[-1] for r in runs), 0),
                _verdict(runs),
            )
            if paced:
                row += tuple(_range(r.delay_ms.get(p) for r in runs) for p in (50, 99, 100))
                row += (_range(r.flush_ms for r in runs),)
                row += (_range(r.generator_late_ms for r in runs),)
            rows.append(row)
        lines += _table(rows, head)
        if paced:
            lines += [
                "The lateness of the generator is part of the delays. Its maximum is shown.",
                "",
            ]
        offers = {BY_NAME[r.competitor].title: r.offered for rs in competitors.values() for r in rs}
        for title, offered in offers.items():
            if offered:
                lines += [f"{title} got only {offered:.0f} messages per second.", ""]
        others = [r.cores_others for runs in competitors.values() for r in runs]
        lines += [f"Meanwhile other programs on this machine used {_range(others, 2)} cores.", ""]
    return "\n".join(lines)


def _memory(competitors: dict[str, list[Result]]) -> list[str]:
    rows = [
        (
            BY_NAME[name].title,
            _range([r.rate]),
            _range([r.client_us]),
            *(f"{megabytes:.1f}" for megabytes in r.memory),
            _verdict([r]),
        )
        for name, runs in competitors.items()
        for r in runs
    ]
    head = ("competitor", "msg/s", "client µs", "MB after a tenth", "after half", "at the end")
    return _table(rows, (*head, "at most", "rows stored / sent"))


def _idle(competitors: dict[str, list[Result]]) -> list[str]:
    rows = [
        (
            BY_NAME[name].title,
            _range((r.idle_percent for r in runs), 2),
            _range((r.memory[-1] for r in runs), 0),
        )
        for name, runs in competitors.items()
    ]
    return _table(rows, ("competitor", "CPU % of a core", "MB"))
