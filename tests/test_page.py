"""The page: its map obeys E8, its files ask for nothing from elsewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from constellation import roster
from constellation.geometry import e8
from constellation.roster import ROLES
from router.decide.fisher_rao import FisherRaoRouter
from router.http import page


@pytest.fixture(scope="module")
def router(micro_run: Path) -> FisherRaoRouter:
    return FisherRaoRouter.load(micro_run / "router")


def test_the_coxeter_element_turns_its_plane_by_twelve_degrees() -> None:
    plane = page.coxeter_plane()
    np.testing.assert_allclose(plane @ plane.T, np.eye(2), atol=1e-12)
    mirrors = [page._mirror(root) for root in e8.simple_roots()]
    turned = [page._mirror(e8.roots()[i]) for i in page._TURNED]
    c, w = np.linalg.multi_dot(mirrors), np.linalg.multi_dot(turned)
    angle = 2 * np.pi / 30
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    np.testing.assert_allclose(np.linalg.matrix_power(c, 30), np.eye(8), atol=1e-9)
    away = plane @ w.T @ c  # the plane before it was turned, after one step
    assert min(np.abs(away - t @ plane @ w.T).max() for t in (turn, turn.T)) < 1e-9


def test_the_roots_lie_in_eight_rings_of_thirty_and_the_roles_apart() -> None:
    at = e8.roots() @ page.coxeter_plane().T
    radius, count = np.unique(np.hypot(*at.T).round(6), return_counts=True)
    assert len(radius) == 8 and set(count) == {30}
    for ring in radius:  # and in each ring evenly
        angle = np.sort(np.angle(at[np.abs(np.hypot(*at.T) - ring) < 1e-5] @ [1, 1j]))
        np.testing.assert_allclose(np.diff(angle), 2 * np.pi / 30, atol=1e-6)
    roles = e8.simple_roots() @ page.coxeter_plane().T
    apart = np.hypot(*(roles[:, None] - roles[None]).transpose(2, 0, 1))[np.triu_indices(8, 1)]
    assert apart.min() > 0.47


def test_the_map_says_where_kernels_and_edges_are(router: FisherRaoRouter) -> None:
    drawn = page.e8_map(router, ["route"])
    edges = np.array(drawn["edges"]).reshape(-1, 2)
    assert len(edges) == 240 * 56 // 2 and (edges[:, 0] < edges[:, 1]).all()
    np.testing.assert_allclose((e8.roots()[edges[:, 0]] * e8.roots()[edges[:, 1]]).sum(1), 1)
    assert [kernel["name"] for kernel in drawn["kernels"]] == list(ROLES)
    assert [kernel["root"] for kernel in drawn["kernels"]] == [roster.root_index(role) for role in ROLES]
    np.testing.assert_allclose(drawn["roots"], e8.roots() @ page.coxeter_plane().T, atol=1e-5)


def test_a_text_is_placed_by_the_rotation_that_gave_the_addresses(router: FisherRaoRouter) -> None:
    found = e8.match_roots(router.charts, among=e8.simple_indices())
    np.testing.assert_allclose(page.placing(router), np.sqrt(2) * page.coxeter_plane() @ found.rotation, atol=1e-9)
    drawn = page.e8_map(router, ["route"])
    choice = router.route([b"The import statement combines two operations; it searches for the named module."])[0]
    u = choice.z[:8] * np.array(drawn["scale"])  # as page.js does it
    at = np.array(drawn["view"]) @ (u / np.linalg.norm(u))
    chart = router.chart(choice.z.astype(np.float64)[None])[0]
    np.testing.assert_allclose(at, page.placing(router) @ chart, atol=1e-4)
    assert np.hypot(*at) <= np.sqrt(2) + 1e-4


def test_kernels_without_a_router_are_drawn_without_places() -> None:
    drawn = page.e8_map(None, ["ocean"])
    assert drawn["kernels"] == [] and drawn["view"] is None and len(drawn["roots"]) == 240


def test_the_files_are_whole_and_ask_for_nothing_from_elsewhere(router: FisherRaoRouter) -> None:
    files = page.files(router, ["route", "ocean"])
    assert set(files) == {"/", "/page/page.js", "/page/page.css", "/page/icon.svg", "/page/map.json"}
    html = files["/"].body.decode()
    for asked in re.findall(r'(?:src|href)="([^"]+)"', html):
        assert f"/{asked}" in files
    text = b"".join(file.body for path, file in files.items() if path != "/page/map.json").decode()
    assert not re.search(r"https?:|[\"'(]//", text.replace("http://www.w3.org/2000/svg", ""))
    assert not re.search(
        r"style=|<style|<script(?! src)|\son\w+=|innerHTML|eval\(", html + text
    )  # what the CSP forbids
    assert json.loads(files["/page/map.json"].body)["modes"] == ["route", "ocean"]


def test_every_control_has_a_label() -> None:
    html = page.files(None, [])["/"].body.decode()
    controls = re.findall(r'<(?:input|select|textarea)[^>]*?id="(\w+)"', html)
    assert len(controls) >= 10 and all(f'<label for="{control}">' in html for control in controls)
