"""The dashboard for Grafana: the committed file is current, and reads only metrics that a server serves."""
import importlib
import json
import re
import shutil
import subprocess

import pytest

from shared.chapters import first_with
from shared.commands import grafana

NAME = re.compile(r"\bstepserve_\w+")


def expressions():
    """Every PromQL expression of the committed file."""
    return [target["expr"] for panel in json.loads(grafana.OUT.read_text())["panels"] for target in panel["targets"]]


def served():
    """The type of each metric, by the name under which Prometheus stores it."""
    metrics = importlib.import_module(f"milestones.{first_with('metrics').name}.metrics")
    counted = metrics.Metrics(metrics.Goal())
    counted.answers["/health", "200"] += 1
    # Not from the samples alone: a family may be served before it has any.
    endings = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",), "info": ("_info",)}
    families = list(counted.collect())
    found = {family.name + ending: family.type for family in families for ending in endings[family.type]}
    assert {sample.name for family in families for sample in family.samples} == set(found)
    return found, {sample.name: set(sample.labels) for family in families for sample in family.samples}


def test_the_committed_dashboard_is_the_one_that_the_command_writes():
    assert grafana.OUT.read_text(encoding="utf-8") == grafana.text(), "run python -m shared.commands.grafana --write"


def test_every_metric_that_an_expression_names_is_served():
    types, labels = served()
    assert len(expressions()) > 20
    for expression in expressions():
        names = NAME.findall(expression)
        assert names and set(names) <= set(types), expression
        for by in re.findall(r"by \((\w+)\)", expression):
            assert all(by in labels[name] for name in names[:1]), expression


def test_counters_are_read_as_rates_and_gauges_as_they_are():
    types, _ = served()
    for expression in expressions():
        for match in NAME.finditer(expression):
            is_rate = expression[: match.start()].endswith("rate(")
            assert is_rate == (types[match.group()] != "gauge"), expression


def test_panels_do_not_overlap_and_take_their_data_source_from_the_variable():
    panels = grafana.dashboard()["panels"]
    cells = set()
    for panel in panels:
        place = panel["gridPos"]
        covered = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not covered & cells and max(x for x, _ in covered) < 24
        cells |= covered
        assert {source["uid"] for source in (panel["datasource"], *(target["datasource"] for target in panel["targets"]))} == {"${datasource}"}
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_promtool_accepts_every_expression(tmp_path):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian's package prometheus has it)")
    # Rules in JSON, which is YAML. Only Grafana knows the variable.
    rules = [{"record": f"stepserve:{number}", "expr": expression.replace(grafana.RANGE, "1m")} for number, expression in enumerate(expressions())]
    path = tmp_path / "rules.yml"
    path.write_text(json.dumps({"groups": [{"name": "stepserve", "rules": rules}]}))
    done = subprocess.run([promtool, "check", "rules", path], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and f"{len(rules)} rules found" in done.stdout, done.stdout + done.stderr
