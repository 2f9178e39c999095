"""A dashboard as Grafana's JSON. The JSON is a function of the dashboard alone: same dashboard, same bytes.

The schema is that of Grafana's documentation ("Dashboard JSON model"); newer Grafanas migrate it when they load it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from monitoring.dashboards.panels import Annotation, Color, Column, Dashboard, Panel, Row, Target, Threshold, Variable

SCHEMA_VERSION = 41
COLUMNS = 24
"""Grafana's grid is this many units wide."""

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def as_dict(dashboard: Dashboard) -> dict[str, Any]:
    """Grafana's JSON model of it."""
    return {
        "annotations": {"list": [_annotation(annotation) for annotation in dashboard.annotations]},
        "description": dashboard.description,
        "editable": True,
        "fiscalYearStartMonth": 0,
        "graphTooltip": 1,
        "id": None,
        "links": [
            {
                "type": "dashboards", "title": "Orchestrator", "tags": ["orchestrator"], "asDropdown": False,
                "includeVars": True, "keepTime": True, "targetBlank": False, "icon": "external link",
                "tooltip": "", "url": "",
            }
        ],
        "panels": list(_panels(dashboard.rows)),
        "preload": False,
        "refresh": "10s",
        "schemaVersion": SCHEMA_VERSION,
        "tags": ["orchestrator"],
        "templating": {"list": [_DATASOURCE_VARIABLE, *(_variable(variable) for variable in dashboard.variables)]},
        "time": {"from": "now-1h", "to": "now"},
        "timepicker": {},
        "timezone": "browser",
        "title": dashboard.title,
        "uid": dashboard.uid,
        "version": 1,
        "weekStart": "",
    }  # fmt: skip


def as_json(dashboard: Dashboard) -> str:
    """The content of a file that Grafana reads."""
    return json.dumps(as_dict(dashboard), indent=2, sort_keys=True, allow_nan=False) + "\n"


_DATASOURCE_VARIABLE = {
    "name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "regex": "",
    "current": {}, "hide": 0, "includeAll": False, "multi": False, "options": [], "refresh": 1,
}  # fmt: skip


def _variable(variable: Variable) -> dict[str, Any]:
    query = f"label_values({variable.series}, {variable.label})"
    return {
        "name": variable.name, "label": variable.name.capitalize(), "type": "query", "datasource": DATASOURCE,
        "definition": query, "query": {"qryType": 1, "query": query, "refId": "PrometheusVariableQueryEditor"},
        "current": {}, "hide": 0, "includeAll": False, "multi": False, "options": [], "regex": "",
        "refresh": 2,  # When the time range changes: other runs were there then.
        "sort": 8,  # By name without regard to case, descending: the newest of runs of one name comes first.
    }  # fmt: skip


def _annotation(annotation: Annotation) -> dict[str, Any]:
    return {
        "name": annotation.name, "datasource": DATASOURCE, "enable": True, "hide": False,
        "iconColor": annotation.color, "expr": annotation.expr, "titleFormat": annotation.title, "step": "10s",
        "useValueForTime": False,
    }  # fmt: skip


def _panels(rows: tuple[Row, ...]) -> Iterator[dict[str, Any]]:
    """The panels with their places in the grid; a row's heading is a panel too."""
    number, y = 1, 0
    for row in rows:
        yield {
            "id": number, "type": "row", "title": row.title, "collapsed": False, "panels": [],
            "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1},
        }  # fmt: skip
        number, y, x, tallest = number + 1, y + 1, 0, 0
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            yield _panel(panel, number, {"x": x, "y": y, "w": panel.width, "h": panel.height})
            number, x, tallest = number + 1, x + panel.width, max(tallest, panel.height)
        y += tallest


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    result: dict[str, Any] = {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": place,
        "targets": [_target(target, index, panel) for index, target in enumerate(panel.targets)],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": [_override(column) for column in panel.columns]},
        "options": _heatmap_options(panel) if panel.kind == "heatmap" else _OPTIONS[panel.kind],
    }
    if panel.kind == "table":
        result["transformations"] = _merged(panel.columns)
    return result


def _target(target: Target, index: int, panel: Panel) -> dict[str, Any]:
    return {
        "refId": _letter(index), "datasource": DATASOURCE, "editorMode": "code", "expr": target.expr,
        "legendFormat": target.legend or "__auto", "instant": target.instant, "range": not target.instant,
        "format": "heatmap" if target.buckets else "table" if panel.kind == "table" else "time_series",
    }  # fmt: skip


def _letter(index: int) -> str:
    return chr(ord("A") + index)


def _steps(thresholds: tuple[Threshold, ...], base: Color) -> dict[str, Any]:
    steps = [{"color": base, "value": None}]
    return {"mode": "absolute", "steps": steps + [{"color": t.color, "value": t.value} for t in thresholds]}


def _defaults(panel: Panel) -> dict[str, Any]:
    custom: dict[str, Any] = {}
    if panel.kind == "timeseries":
        custom = {
            "drawStyle": "line", "lineWidth": 1, "fillOpacity": 70 if panel.stacked else 5, "showPoints": "never",
            "spanNulls": False, "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "dashed" if panel.thresholds else "off"},
            "scaleDistribution": {"type": "log", "log": 10} if panel.logarithmic else {"type": "linear"},
        }  # fmt: skip
    elif panel.kind == "state-timeline":
        custom = {"fillOpacity": 80, "lineWidth": 0}
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "color": {"mode": "palette-classic" if panel.kind == "timeseries" else "thresholds"},
        "custom": custom,
        "mappings": [],
        "thresholds": _steps(panel.thresholds, panel.base),
    }
    if panel.states:
        options = {
            f"{value:g}": {"text": text, "color": color, "index": index}
            for index, (value, text, color) in enumerate(panel.states)
        }
        defaults["mappings"] = [{"type": "value", "options": options}]
    if panel.minimum is not None:
        defaults["min"] = panel.minimum
    if panel.maximum is not None:
        defaults["max"] = panel.maximum
    return defaults


def _override(column: Column) -> dict[str, Any]:
    properties: list[dict[str, Any]] = []
    if column.unit:
        properties.append({"id": "unit", "value": column.unit})
    if column.thresholds:
        properties.append({"id": "thresholds", "value": _steps(column.thresholds, column.base)})
        properties.append({"id": "color", "value": {"mode": "thresholds"}})
    if column.states:
        options = {
            text: {"text": text, "color": color, "index": index} for index, (text, color) in enumerate(column.states)
        }
        properties.append({"id": "mappings", "value": [{"type": "value", "options": options}]})
    if column.thresholds or column.states:
        properties.append({"id": "custom.cellOptions", "value": {"type": "color-text"}})
    return {"matcher": {"id": "byName", "options": column.title}, "properties": properties}


def _merged(columns: tuple[Column, ...]) -> list[dict[str, Any]]:
    """One line for each run out of the results of all targets, with the columns in order and no others."""
    names = [
        (column.source if column.source != column.source.upper() else f"Value #{column.source}") for column in columns
    ]
    return [
        {"id": "merge", "options": {}},
        {"id": "filterFieldsByName", "options": {"include": {"names": names}}},
        {
            "id": "organize",
            "options": {
                "excludeByName": {},
                "indexByName": {name: index for index, name in enumerate(names)},
                "renameByName": {name: column.title for name, column in zip(names, columns, strict=True)},
            },
        },
    ]


def _heatmap_options(panel: Panel) -> dict[str, Any]:
    """Lines of the series as they are (a rank or a bucket each), not counted into buckets once more."""
    buckets = any(target.buckets for target in panel.targets)
    color: dict[str, Any] = {
        "mode": "scheme", "scheme": "Blues" if buckets else "RdYlGn", "steps": 64,
        "reverse": panel.low_is_good and not buckets, "fill": "blue",
        "exponent": 0.5,
    }  # fmt: skip
    if panel.minimum is not None:
        color["min"] = panel.minimum
    if panel.maximum is not None:
        color["max"] = panel.maximum
    return {
        "calculate": False,
        "cellGap": 1,
        "cellValues": {"unit": "short" if buckets else panel.unit},
        "color": color,
        "filterValues": {"le": 1e-9} if buckets else {},
        "legend": {"show": True},
        "rowsFrame": {"layout": "auto", "value": "steps" if buckets else panel.title},
        "tooltip": {"mode": "single", "yHistogram": False, "showColorScale": True},
        "yAxis": {"axisPlacement": "left", "unit": panel.unit if buckets else "none", "reverse": not buckets},
    }


_REDUCE = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {
        "legend": {"calcs": ["lastNotNull"], "displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "colorMode": "value", "graphMode": "area", "justifyMode": "auto", "orientation": "auto",
        "reduceOptions": _REDUCE, "textMode": "auto",
    },
    "bargauge": {
        "displayMode": "gradient", "orientation": "horizontal", "reduceOptions": _REDUCE, "showUnfilled": True,
        "valueMode": "color",
    },
    "table": {"cellHeight": "sm", "showHeader": True, "footer": {"show": False}},
    "state-timeline": {
        "alignValue": "left", "mergeValues": True, "rowHeight": 0.8, "showValue": "auto",
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "single", "sort": "none"},
    },
}  # fmt: skip
