"""cluster.yaml and the KubeRay manifests, checked by Ray's own validator and for what they must say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.placement import GROWS, check, pack, share
from constellation import presets
from constellation.cli import main
from constellation.errors import ConfigError
from constellation.roster import ROLES

ROOT = Path(__file__).parent.parent
KUBERAY = sorted((ROOT / "deploy" / "kuberay").glob("*.yaml"))


@pytest.fixture(scope="module")
def launcher() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return found


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = manifest["spec"]
    inside = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}.get(manifest["kind"])
    return spec[inside] if inside else spec  # type: ignore[no-any-return]


def test_the_cluster_launcher_accepts_cluster_yaml(launcher: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(launcher)
    validate_config(config)
    assert config["head_node_type"] in config["available_node_types"]


def test_the_largest_cluster_holds_what_its_first_page_promises(launcher: dict[str, Any]) -> None:
    worker = launcher["available_node_types"]["gpu"]
    rooms = [worker["resources"]] * min(worker["max_workers"], launcher["max_workers"])
    bundles = [share(presets.preset("23m"))] * len(ROLES)
    check(bundles, rooms, "cluster.yaml")
    assert pack(bundles, rooms[:2]) is not None, "two machines are enough, says the comment"


def test_the_head_takes_no_kernels_and_says_that_nodes_can_come(launcher: dict[str, Any]) -> None:
    head = launcher["available_node_types"][launcher["head_node_type"]]["resources"]
    assert head["CPU"] == 0 and head["GPU"] == 0 and head[GROWS] == 1
    start = launcher["head_start_ray_commands"][-1]
    assert "--num-cpus=0" in start and json.loads(re.search(r"--resources='(.*?)'", start)[1]) == {GROWS: 1}  # type: ignore[index]


def test_every_start_of_ray_says_how_to_authenticate_and_keeps_the_dashboard_in(launcher: dict[str, Any]) -> None:
    starts = [
        c for key in ("head_start_ray_commands", "worker_start_ray_commands") for c in launcher[key] if "ray start" in c
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token ray start" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "~/.ray/auth_token" in launcher["file_mounts"]


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_a_manifest_asks_for_a_token_and_one_folder_for_all(path: Path) -> None:
    manifest = yaml.safe_load(path.read_text())
    assert manifest["apiVersion"] == "ray.io/v1" and manifest["kind"] in ("RayCluster", "RayJob", "RayService")
    spec = cluster_of(manifest)
    assert spec["authOptions"] == {"mode": "token"}
    head = spec["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert json.loads(json.loads(head["rayStartParams"]["resources"])) == {GROWS: 1}
    groups = [head, *spec["workerGroupSpecs"]]
    images, mounts = set(), set()
    for group in groups:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        images.add(container["image"])
        mounts |= {mount["mountPath"] for mount in container["volumeMounts"]}
        assert [v["name"] for v in pod["volumes"]] == [m["name"] for m in container["volumeMounts"]]
        assert container["resources"]["limits"] == container["resources"]["requests"]
    assert len(images) == 1 and mounts == {"/shared"}


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_a_manifest_grows_to_the_room_that_the_preset_needs(path: Path) -> None:
    (worker,) = cluster_of(yaml.safe_load(path.read_text()))["workerGroupSpecs"]
    limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
    room = {"CPU": float(limits["cpu"]), "GPU": float(limits["nvidia.com/gpu"])}
    check([share(presets.preset("23m"))] * len(ROLES), [room] * worker["maxReplicas"], path.name)


def test_the_job_runs_a_command_that_exists(capsys: pytest.CaptureFixture[str]) -> None:
    words = yaml.safe_load((ROOT / "deploy/kuberay/rayjob.yaml").read_text())["spec"]["entrypoint"].split()
    assert words[:2] == ["constellation", "train"] and "--resume" in words and "--address" in words
    with pytest.raises(SystemExit) as end:
        main([*words[1:], "--help"])
    assert end.value.code == 0 and "--resume" in capsys.readouterr().out


def test_the_service_deploys_an_application_that_exists_with_arguments_that_it_knows() -> None:
    from importlib import import_module

    from actors.serve_app import arguments

    config = yaml.safe_load(
        yaml.safe_load((ROOT / "deploy/kuberay/rayservice.yaml").read_text())["spec"]["serveConfigV2"]
    )
    (application,) = config["applications"]
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(import_module(module), name))
    found = arguments(application["args"])
    assert found["run"].startswith("/shared/") and int(found["replicas"]) >= 1
    for wrong, told in (({"rn": "/x"}, "'rn'"), ({}, "'run'"), ({"run": "/x", "replicas": "0"}, "replicas=0")):
        with pytest.raises(ConfigError, match=told):
            arguments(wrong)


def test_ray_accepts_the_configuration_of_the_service() -> None:
    try:
        from ray.serve.schema import ServeDeploySchema
    except ImportError as error:
        pytest.skip(f"ray[serve] is not installed: {error}")
    text = yaml.safe_load((ROOT / "deploy/kuberay/rayservice.yaml").read_text())["spec"]["serveConfigV2"]
    assert ServeDeploySchema.parse_obj(yaml.safe_load(text)).applications[0].route_prefix == "/"
