"""What bench_ops.py leaves: the form of the record, its table in Markdown, the verdict."""

from __future__ import annotations

from typing import Any

import op_cases

from mnist_ops.lab import records

#: Those between compile and copy are other libraries, where they are installed.
CONTENDERS = ("mnist_ops", "eager", "compile", *op_cases.PEERS, "copy")
_BY_NAME = records.Kind(
    "numbers by name",
    lambda v: (
        isinstance(v, dict) and all(x is None or records.NUMBER.accepts(x) for x in v.values())
    ),
)
_TEXTS = records.Kind(
    "texts by name",
    lambda v: isinstance(v, dict) and all(isinstance(x, str) for x in v.values()),
)
_NUMBER = records.optional(records.NUMBER)
#: What ``bench_ops.run`` leaves, as far as tables and figures need it.
RECORD = {
    "machine": {
        "device": records.TEXT,
        "name": records.TEXT,
        "torch": records.TEXT,
        "threads": records.COUNT,
        "copy_gb_per_s": records.NUMBER,
        "launch_us": records.NUMBER,
        "?copy_gb_per_s_at_the_end": _NUMBER,
        "?launch_us_at_the_end": _NUMBER,
    },
    "rows": [
        {
            **dict.fromkeys(["setting", "family", "case", "dtype", "direction"], records.TEXT),
            "elements": records.COUNT,
            "sweep": records.ANY,
            "floor_us": records.NUMBER,
            "gb_per_s": _NUMBER,
            "percent_of_copy": _NUMBER,
            **dict.fromkeys(["us", "over_ours", "errors", "?launches", "?kernel_us"], _BY_NAME),
            "wrong": [records.TEXT],
            "failures": _TEXTS,
        }
    ],
    "left_out": [records.TEXT],
    "?failed": _TEXTS,
}


def brief(found: dict[str, Any]) -> str:
    """A row as a few words of progress."""
    parts = [f"{name} {us:.1f}" for name, us in found["us"].items()]
    marks = [f"WRONG {name}" for name in found["wrong"]]
    marks += [f"FAILED {name}" for name in found["failures"]]
    return f"{found['direction']} [us] {', '.join(parts)} {' '.join(marks)}".strip()


def table(record: dict[str, Any]) -> str:
    """The rows in Markdown, the failures, and what was left out."""
    machine = record["machine"]
    # Of the peers those that were measured.
    shown = [
        name
        for name in CONTENDERS[1:]
        if name not in op_cases.PEERS
        or any(name in found["over_ours"] or name in found["failures"] for found in record["rows"])
    ]
    end = [machine.get(f"{name}_at_the_end") for name in ("copy_gb_per_s", "launch_us")]
    lines = [
        f"{machine['name']}, torch {machine['torch']}, {machine['threads']} thread(s). A large "
        f"copy: {machine['copy_gb_per_s']:.0f} GB/s read and written, a tiny call: "
        f"{machine['launch_us']:.1f} µs"
        + (f"; at the end {end[0]:.0f} GB/s, {end[1]:.1f} µs." if None not in end else "."),
        "",
        f"{', '.join(shown[:-1])} and copy: their time over ours, medians of the rounds' ratios. "
        "launches and kernels µs, which leaves out the host: ours / eager / compile; kernels %: of "
        "the copy's bandwidth, ours.",
        "",
        f"| setting | direction | µs | GB/s | % of copy | {' | '.join(shown)} | launches "
        "| kernels µs | kernels % | error |",
        "|---|---" + "|--:" * (7 + len(shown)) + "|",
    ]
    for found in record["rows"]:
        cells = [found["setting"], found["direction"]]
        cells += [_number(found["us"].get("mnist_ops"), 1), _number(found["gb_per_s"], 1)]
        cells.append(_number(found["percent_of_copy"], 0))
        for contender in shown:
            failed = any(name.startswith(contender) for name in found["failures"])
            value = found["over_ours"].get(contender)
            cells.append("failed" if value is None and failed else _number(value, 2))
        launches = found.get("launches", {})
        counts = [_number(launches.get(name), 0) for name in CONTENDERS[:3]]
        cells.append(" / ".join(counts) if launches else "")
        kernels = found.get("kernel_us", {})
        times = [_number(kernels.get(name), 1) for name in CONTENDERS[:3]]
        ours = kernels.get("mnist_ops")
        cells.append(" / ".join(times) if kernels else "")
        cells.append(_number(found["floor_us"] / ours * 100 if ours else None, 0))
        error = found["errors"].get("mnist_ops")
        wrong = " WRONG" if "mnist_ops" in found["wrong"] else ""
        cells.append("failed" if error is None else f"{error:.0e}{wrong}")
        lines.append(f"| {' | '.join(cells)} |")
    failures = {
        f"{found['setting']}, {name}: {reason}"
        for found in record["rows"]
        for name, reason in found["failures"].items()
    } | {f"{name}: {reason}" for name, reason in record.get("failed", {}).items()}
    if failures:
        lines += ["", "Failed:", "", *(f"- {failure}" for failure in sorted(failures))]
    theirs = {
        f"{found['setting']}, {name}: {found['errors'][name]:.1e}"
        for found in record["rows"]
        for name in found["wrong"]
        if name != "mnist_ops" and found["errors"].get(name) is not None
    }
    if theirs:
        lines += ["", "Baselines beyond the tolerance:", "", *(f"- {t}" for t in sorted(theirs))]
    if record["left_out"]:
        lines += ["", f"Left out, {len(record['left_out'])} settings, for want of time:", ""]
        lines += [f"- {name}" for name in record["left_out"]]
    return "\n".join(lines) + "\n"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def verdict(record: dict[str, Any]) -> str:
    """One line about all of it."""
    rows = record["rows"]
    wrong = sum("mnist_ops" in [*row["wrong"], *row["failures"]] for row in rows)
    theirs = len({f"{row['setting']} {name}" for row in rows for name in row["failures"]})
    return (
        f"{len(rows)} rows, of which ours are wrong or failed in {wrong}; {theirs} contenders "
        f"and {len(record.get('failed', {}))} settings failed; {len(record['left_out'])} left out"
    )


def ours_failed(record: dict[str, Any]) -> bool:
    """Whether this library was wrong or failed anywhere, or a setting could not be measured."""
    wrong = any("mnist_ops" in [*row["wrong"], *row["failures"]] for row in record["rows"])
    return wrong or bool(record.get("failed"))
