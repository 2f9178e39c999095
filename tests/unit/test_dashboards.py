"""Dashboards as Grafana is to get them: whole, laid out, of series that exist, the same every time."""

from __future__ import annotations

import json
import re

import pytest

from monitoring.dashboards import dashboards
from monitoring.dashboards.grafana import COLUMNS, as_dict, as_json
from monitoring.dashboards.panels import Dashboard, Panel, Row, Target
from monitoring.dashboards.query import of_run
from monitoring.series import PREFIX, RANK_SERIES, RUN_SERIES, exposed_names

ALL = dashboards()


def expressions(page: Dashboard) -> list[str]:
    return [target.expr for panel in page.panels() for target in panel.targets] + [a.expr for a in page.annotations]


def test_there_is_one_page_for_each_question() -> None:
    assert [page.uid for page in ALL] == [
        "orchestrator-fleet", "orchestrator-run", "orchestrator-ranks", "orchestrator-checkpoints",
    ]  # fmt: skip


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.uid)
def test_panels_lie_side_by_side_and_not_on_one_another(page: Dashboard) -> None:
    taken: set[tuple[int, int]] = set()
    panels = as_dict(page)["panels"]
    assert [panel["id"] for panel in panels] == list(range(1, len(panels) + 1))
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= COLUMNS
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.uid)
def test_every_panel_explains_itself_and_asks_the_chosen_source(page: Dashboard) -> None:
    for panel in as_dict(page)["panels"]:
        if panel["type"] == "row":
            continue
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
        letters = [target["refId"] for target in panel["targets"]]
        assert letters == sorted(set(letters))
        if panel["type"] != "table":
            assert all(target["legendFormat"] != "__auto" for target in panel["targets"]), panel["title"]


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.uid)
def test_pages_speak_of_series_that_exist(page: Dashboard) -> None:
    for expr in expressions(page):
        used = set(re.findall(rf"{PREFIX}[a-z_]+", expr))
        assert used <= set(exposed_names())
        assert used or "up{" in expr


def test_every_series_is_shown_somewhere() -> None:
    """What nobody looks at need not be collected; what is only for alerts or sums is said here."""
    shown = {name for page in ALL for expr in expressions(page) for name in re.findall(rf"{PREFIX}[a-z_]+", expr)}
    unseen = {s.name for s in (*RUN_SERIES, *RANK_SERIES) if not set(s.exposed) & shown}
    assert unseen == {
        "orchestrator_run_start_timestamp_seconds", "orchestrator_last_step_timestamp_seconds",
        "orchestrator_model_flops_total",
    }  # fmt: skip


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.uid)
def test_the_json_is_plain_and_the_same_every_time(page: Dashboard) -> None:
    text = as_json(page)
    assert text == as_json(page)
    content = json.loads(text)
    assert (content["uid"], content["title"]) == (page.uid, page.title)
    assert content["schemaVersion"] >= 39
    names = [variable["name"] for variable in content["templating"]["list"]]
    assert names[0] == "datasource"
    used = set(re.findall(r"\$(\w+)", " ".join(expressions(page)))) - {"__rate_interval", "__range", "__interval"}
    assert used <= set(names)
    if "run" in names:
        assert "label_values(orchestrator_run_info, run)" in text


def test_a_table_has_its_columns_in_order_and_no_others() -> None:
    (table,) = (panel for panel in as_dict(ALL[0])["panels"] if panel["type"] == "table")
    merge, keep, organize = table["transformations"]
    assert merge["id"] == "merge"
    names = keep["options"]["include"]["names"]
    assert names[:4] == ["run", "state", "Value #B", "Value #C"]
    titles = [organize["options"]["renameByName"][name] for name in names]
    assert titles[:4] == ["Run", "State", "Step", "Progress"]
    assert {override["matcher"]["options"] for override in table["fieldConfig"]["overrides"]} == set(titles)


def test_panels_wrap_where_the_width_is_used_up() -> None:
    wide = Panel("a", "b.", (Target("up", "c"),), width=16, height=5)
    page = Dashboard("u", "t", "d.", (Row("r", (wide, wide)), Row("s", (wide,))))
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in as_dict(page)["panels"]]
    assert places == [(0, 0), (0, 1), (0, 6), (0, 11), (0, 12)]


def test_a_series_that_does_not_exist_cannot_be_asked_for() -> None:
    with pytest.raises(KeyError, match="orchestrator_speed is no series"):
        of_run("speed")
