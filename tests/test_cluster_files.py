"""cluster.yaml and the KubeRay manifests, checked by Ray's own validator and for what they must say."""

from __future__ import annotations

import json
import os
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
KUBERAY = sorted((ROOT / "deploy" / "kuberay").glob("ray*.yaml"))
VALUES = ROOT / "deploy" / "kuberay" / "values.yaml"
PUBLISHED = "CONSTELLATION_KUBERAY"  # a checkout of github.com/ray-project/kuberay, v1.6 or newer


@pytest.fixture(scope="module")
def launcher() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return found


@pytest.fixture(scope="module")
def machines() -> dict[str, Any]:
    """The launcher's file for machines that one has."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "onprem" / "cluster.yaml").read_text())
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


def test_ray_is_started_on_ones_own_machines_as_in_the_cloud(
    launcher: dict[str, Any], machines: dict[str, Any]
) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    for same in ("cluster_name", "head_start_ray_commands", "worker_start_ray_commands", "file_mounts"):
        assert machines[same] == launcher[same]
    in_the_cloud = iter(launcher["setup_commands"])
    assert all(command in in_the_cloud for command in machines["setup_commands"]), "the same, in the same order"
    workers = machines["provider"]["worker_ips"]
    assert machines["min_workers"] == machines["max_workers"] == len(set(workers))
    assert machines["provider"]["head_ip"] not in workers
    validate_config(prepare_config(machines))


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


def published(file: str) -> str:
    """A file of KubeRay's own repository, in which the schemas of the manifests have a megabyte each."""
    if PUBLISHED not in os.environ:
        pytest.skip(f"{PUBLISHED} names no checkout of KubeRay")
    return (Path(os.environ[PUBLISHED]) / file).read_text()


def strict(schema: Any) -> Any:
    """`schema` with every field that it does not name refused, as the API server warns of it before dropping it."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    if found.pop("x-kubernetes-int-or-string", False):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    if isinstance(found.get("properties"), dict) and not found.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    return found


def refused(manifest: dict[str, Any]) -> list[str]:
    """What KubeRay's published schema has against `manifest`."""
    from jsonschema import Draft202012Validator

    plural = f"{manifest['kind'].lower()}s"
    definition = yaml.load(published(f"helm-chart/kuberay-operator/crds/ray.io_{plural}.yaml"), yaml.CSafeLoader)
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in definition["spec"]["versions"] if v["name"] == "v1"]
    schema["properties"]["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return [
        f"{error.json_path}: {error.message}" for error in Draft202012Validator(strict(schema)).iter_errors(manifest)
    ]


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_a_manifest_is_what_the_published_schema_wants(path: Path) -> None:
    manifest = yaml.safe_load(path.read_text())
    assert refused(manifest) == []
    head = cluster_of(manifest)["headGroupSpec"]
    head["rayStartParam"] = head.pop("rayStartParams")
    assert any("rayStartParam" in line for line in refused(manifest)), "a slip is told"


def test_the_chart_reads_every_value_that_ours_sets() -> None:
    """A value is read whole (`.Values.head.resources`) or in parts; of the autoscaler's the manifest's schema knows."""
    templates = "".join(
        published(f"helm-chart/ray-cluster/templates/{name}") for name in ("raycluster-cluster.yaml", "_helpers.tpl")
    )
    read = set(re.findall(r"\.Values\.([\w.]+)", templates))
    values = yaml.safe_load(VALUES.read_text())

    def paths(value: Any, at: str) -> list[str]:
        if at in read or not isinstance(value, dict):
            return [at]
        return [path for key, inner in value.items() for path in paths(inner, f"{at}.{key}".lstrip("."))]

    assert [path for path in paths(values, "") if path not in read] == []
    assert paths({"head": {"imagine": 1}}, "") == ["head.imagine"] and "head.imagine" not in read


def test_the_values_are_the_cluster_of_the_manifest() -> None:
    values, cluster = (
        yaml.safe_load(VALUES.read_text()),
        yaml.safe_load((VALUES.parent / "raycluster.yaml").read_text()),
    )
    spec = cluster_of(cluster)
    (group,) = spec["workerGroupSpecs"]
    image = f"{values['image']['repository']}:{values['image']['tag']}"
    for own, theirs in ((values["head"], spec["headGroupSpec"]), (values["worker"], group)):
        pod = theirs["template"]["spec"]
        (container,) = pod["containers"]
        assert own.get("rayStartParams", {}) == theirs["rayStartParams"] and own["volumes"] == pod["volumes"]
        assert (image, own["resources"], own["volumeMounts"]) == tuple(
            container[key] for key in ("image", "resources", "volumeMounts")
        )
    same = ("groupName", "replicas", "minReplicas", "maxReplicas")
    assert [values["worker"][key] for key in same] == [group[key] for key in same]
    assert values["head"]["rayVersion"] == spec["rayVersion"]
    token = values["common"]["containerEnv"]
    assert token[0] == {"name": "RAY_AUTH_MODE", "value": "token"}
    assert values["head"]["autoscalerOptions"] == {**spec["autoscalerOptions"], "env": token}
