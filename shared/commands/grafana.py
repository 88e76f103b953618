"""Write a dashboard for Grafana over the metrics that a server serves at /metrics.

    python -m shared.commands.grafana            # print it
    python -m shared.commands.grafana --write    # write docs/grafana.json, which Grafana imports

Writes: docs/grafana.json.
"""
import argparse
import json
from pathlib import Path
from typing import NamedTuple

from shared.chapters import ROOT

OUT = ROOT / "docs" / "grafana.json"
# Grafana replaces this by a range that spans at least four scrapes. With fewer than two of them a rate has no value.
RANGE = "$__rate_interval"
WIDTH, HEIGHT = 12, 8  # of a panel; Grafana's grid has 24 columns


class Panel(NamedTuple):
    """A plot: what it shows, and a PromQL expression for each legend."""

    title: str
    text: str
    unit: str  # Grafana's name of it
    curves: dict[str, str]  # PromQL by legend; {{label}} is replaced by the label's value
    stacked: bool = False
    highest: float | None = None  # where the axis ends


def rate(metric: str, by: str = "") -> str:
    """How fast a counter grows per second, over all servers. The rate comes first: a sum of counters would hide a restart."""
    return f"sum{f' by ({by})' if by else ''} (rate({metric}[{RANGE}]))"


def share(part: str, whole: str) -> str:
    """The part of a counter in another; no value while the other does not grow."""
    return f"{rate(part)} / ({rate(whole)} > 0)"


def percentiles(histogram: str, *percents: int) -> dict[str, str]:
    """Percentiles over all servers. Buckets can be added up; percentiles cannot."""
    return {f"p{percent}": f"histogram_quantile({percent / 100}, {rate(histogram + '_bucket', 'le')})" for percent in percents}


PANELS = (
    Panel(
        "Tokens per second",
        "Generated tokens, and prompt tokens that were computed rather than found in the prefix cache.",
        "short",
        {
            "generated": rate("stepserve_generation_tokens_total"),
            "prompts": rate("stepserve_prompt_tokens_total"),
        },
    ),
    Panel(
        "Requests",
        "Running: they take part in steps. Waiting: they have not started, some because their text is not tokenized yet. Preempted: they have started, and wait again.",
        "short",
        {
            "running": "sum(stepserve_requests_running)",
            "waiting": "sum(stepserve_requests_waiting)",
            "preempted": "sum(stepserve_requests_preempted)",
        },
        stacked=True,
    ),
    Panel(
        "Time to first token",
        "From a request's arrival, so it includes the time in the queue.",
        "s",
        percentiles("stepserve_time_to_first_token_seconds", 50, 90, 99),
    ),
    Panel(
        "Between tokens",
        "Each gap between two tokens of a request, not a request's mean.",
        "s",
        percentiles("stepserve_inter_token_latency_seconds", 50, 90, 99),
    ),
    Panel(
        "In the queue",
        "From a request's arrival to its first step.",
        "s",
        percentiles("stepserve_queue_seconds", 50, 90, 99),
    ),
    Panel(
        "A step's time, by part",
        "The mean of all steps. On a GPU, Python waits for the model's result in `choose`.",
        "s",
        {"{{part}}": f"{rate('stepserve_step_part_seconds_total', 'part')} / on () group_left () ({rate('stepserve_step_seconds_count')} > 0)"},
        stacked=True,
    ),
    Panel(
        "Blocks of the cache",
        "Used: a request holds them. Of the others, some can still be found by later prompts.",
        "short",
        {
            "{{state}}": "sum by (state) (stepserve_kv_blocks)",
            "can be found": "sum(stepserve_kv_blocks_findable)",
        },
    ),
    Panel(
        "Prefix cache: share of prompt tokens found",
        "A request counts once, however often it is preempted.",
        "percentunit",
        {"found": share("stepserve_prefix_cache_hits_total", "stepserve_prefix_cache_queries_total")},
        highest=1,
    ),
    Panel(
        "Preemptions per second",
        "Requests that had to give their blocks back. If there are many, the cache is too small for what runs.",
        "short",
        {"preemptions": rate("stepserve_preemptions_total")},
    ),
    Panel(
        "Goodput: share of requests that met the goals",
        "Of the requests that finished. The goals are --slo-ttft-ms and --slo-itl-ms; without them, every request meets them.",
        "percentunit",
        {
            "met": share("stepserve_goal_met_total", "stepserve_goal_requests_total"),
            "first token too late": share("stepserve_goal_first_missed_total", "stepserve_goal_requests_total"),
            "gap too long": share("stepserve_goal_gap_missed_total", "stepserve_goal_requests_total"),
        },
        highest=1,
    ),
    Panel(
        "Finished requests per second, by reason",
        "Abort: the client hung up. Error: a step failed, or its logits were not finite numbers.",
        "short",
        {"{{reason}}": rate("stepserve_requests_finished_total", "reason")},
        stacked=True,
    ),
    Panel(
        "HTTP responses per second, by status",
        "429: the queue was full. 499: the client had gone.",
        "short",
        {"{{status}}": rate("stepserve_http_responses_total", "status")},
        stacked=True,
    ),
    Panel(
        "Tokens that clients have not read",
        "They wait in the server. If there are many, the clients or the network are slow.",
        "short",
        {"unread": "sum(stepserve_tokens_unread)"},
    ),
    Panel(
        "Calls at the tokenizer",
        "They are counted as waiting, too.",
        "short",
        {"tokenizing": "sum(stepserve_requests_tokenizing)"},
    ),
)  # fmt: skip


def dashboard() -> dict:
    """The dashboard as Grafana imports it."""
    return {
        "uid": "stepserve",
        "title": "stepserve",
        "tags": ["stepserve"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,  # one crosshair for all panels
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [{"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}]},
        "panels": [panel_json(index, panel) for index, panel in enumerate(PANELS)],
    }


def panel_json(index: int, panel: Panel) -> dict:
    source = {"type": "prometheus", "uid": "${datasource}"}
    custom = {"fillOpacity": 30 if panel.stacked else 0, "stacking": {"mode": "normal" if panel.stacked else "none"}}
    axis = {"min": 0} if panel.highest is None else {"min": 0, "max": panel.highest}
    return {
        "id": index + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": source,
        "gridPos": {"x": index % 2 * WIDTH, "y": index // 2 * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": custom} | axis, "overrides": []},
        "options": {"tooltip": {"mode": "multi"}, "legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {"refId": chr(ord("A") + number), "datasource": source, "expr": expression, "legendFormat": legend}
            for number, (legend, expression) in enumerate(panel.curves.items())
        ],
    }


def text() -> str:
    """The file's content."""
    return json.dumps(dashboard(), indent=2) + "\n"


def write(path: Path = OUT) -> None:
    path.write_text(text(), encoding="utf-8")
    print(f"wrote {path.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a dashboard for Grafana.")
    parser.add_argument("--write", action="store_true", help="write docs/grafana.json (default: print it)")
    args = parser.parse_args()
    if args.write:
        write()
    else:
        print(text(), end="")


if __name__ == "__main__":
    main()
