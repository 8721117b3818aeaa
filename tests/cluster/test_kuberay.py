"""The manifests for Kubernetes: what the API server would say, and that they fit one another."""

import copy
import re

import kubernetes_validate
import pytest
import yaml
from kubernetes_validate import ValidationError
from ray.scripts.scripts import start
from ray.serve.schema import ServeDeploySchema

from deployments.app import REPLICA_CPUS, engine_resources
from deployments.flags import EVERY_NODE
from tests.cluster.documents import (
    CLUSTER,
    ROOT,
    args_of,
    check_on_an_a100,
    load,
    load_all,
    longest_answer_s,
)

KUBERAY = CLUSTER / "kuberay"
KUBERNETES = "1.34"
SERVICE = load(KUBERAY / "rayservice.yaml")
SPEC = SERVICE["spec"]
RAY = SPEC["rayClusterConfig"]
HEAD = RAY["headGroupSpec"]
(WORKERS,) = RAY["workerGroupSpecs"]
GROUPS = {"head": HEAD, "workers": WORKERS}
END_OF_RAY_S = 30.0
"""What Ray's processes may take to end once running answers have."""

# Names of KubeRay's API, v1.5.1 to v1.7. What is within pod templates is Kubernetes' own.
KNOWN = {
    "spec": "excludeHeadPodFromServeSvc rayClusterConfig rayClusterDeletionDelaySeconds "
    "serveConfigV2 serveService suspend upgradeStrategy",
    "cluster": "authOptions autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions "
    "headGroupSpec rayVersion workerGroupSpecs",
    "autoscaler": "env envFrom idleTimeoutSeconds image imagePullPolicy resources securityContext "
    "upscalingMode version volumeMounts",
    "head": "headService rayStartParams serviceType template",
    "workers": "groupName maxReplicas minReplicas numOfHosts rayStartParams replicas template",
}


def pod_template(group):
    return {"apiVersion": "v1", "kind": "PodTemplate", "template": group["template"]}


def pod(group):
    return group["template"]["spec"]


def container(group):
    (only,) = pod(group)["containers"]
    return only


def serve_config():
    return yaml.safe_load(SPEC["serveConfigV2"])


def environment(group):
    return {entry["name"]: entry["value"] for entry in container(group)["env"]}


def drain_s(group):
    return float(environment(group)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])


def built_in():
    """Every resource that is Kubernetes' own."""
    documents = [*load_all(KUBERAY / "flags.yaml"), *load_all(KUBERAY / "protection.yaml")]
    return [*documents, *(pod_template(group) for group in GROUPS.values())]


@pytest.mark.parametrize("document", built_in(), ids=lambda document: document["kind"])
def test_kubernetes_accepts_it(document):
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_what_kubernetes_does_not_know_is_noticed():
    wrong = copy.deepcopy(pod_template(WORKERS))
    wrong["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_kuberay_knows_every_field():
    parts = {
        "spec": SPEC,
        "cluster": RAY,
        "autoscaler": RAY["autoscalerOptions"],
        "head": HEAD,
        "workers": WORKERS,
    }
    assert (SERVICE["apiVersion"], SERVICE["kind"]) == ("ray.io/v1", "RayService")
    for name, part in parts.items():
        assert part.keys() - set(KNOWN[name].split()) == set(), name


def test_ray_knows_every_start_parameter():
    options = {word.removeprefix("--") for option in start.params for word in option.opts}
    for group in GROUPS.values():
        assert group["rayStartParams"].keys() <= options
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_the_served_configuration_is_accepted(tmp_path, capsys):
    keys = tmp_path / "api-keys"
    keys.write_text("sk-test\n")
    keys.chmod(0o400)
    config = tmp_path / "serve_config.yaml"
    config.write_text(SPEC["serveConfigV2"])
    words = ("--set", f"ingress.api_keys_file={keys}")
    assert check_on_an_a100(config, *words) == 0, capsys.readouterr().err
    ServeDeploySchema(**serve_config())


def test_the_version_of_ray_is_the_pinned_one():
    (pin,) = re.findall(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pin == RAY["rayVersion"]


def test_head_and_workers_get_all_flags():
    (flags,) = load_all(KUBERAY / "flags.yaml")
    assert flags["data"] == EVERY_NODE
    for group in GROUPS.values():
        (source,) = container(group)["envFrom"]
        assert source["configMapRef"]["name"] == flags["metadata"]["name"]


def test_the_head_does_no_work():
    assert HEAD["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in container(HEAD)["resources"]["limits"]
    assert SPEC["excludeHeadPodFromServeSvc"]


def test_running_answers_may_end():
    longest_s = longest_answer_s(args_of(serve_config()))
    assert drain_s(WORKERS) > longest_s
    assert pod(WORKERS)["terminationGracePeriodSeconds"] >= drain_s(WORKERS) + END_OF_RAY_S
    assert SPEC["rayClusterDeletionDelaySeconds"] > longest_s
    assert drain_s(HEAD) == 0, "nothing moves from the head"


def test_probes_do_not_end_what_loads_a_model():
    for group in GROUPS.values():
        probe = container(group)["livenessProbe"]
        assert probe["httpGet"] == {"path": "/api/healthz", "port": 52365}, (
            "Ray's, not the server's"
        )
    ready = container(WORKERS)["readinessProbe"]["httpGet"]
    ports = {port["name"]: port["containerPort"] for port in container(WORKERS)["ports"]}
    assert (ready["path"], ports[ready["port"]]) == (
        "/-/healthz",
        serve_config()["http_options"]["port"],
    )


def test_pods_have_no_rights_that_they_do_not_need():
    for group in GROUPS.values():
        assert pod(group)["securityContext"]["runAsNonRoot"]
        assert pod(group)["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container(group)["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
    assert RAY["authOptions"] == {"mode": "token"}


def test_every_node_has_models_and_keys():
    """The application is built, and so checked, on any node."""
    args = args_of(serve_config())
    wanted = [args.ingress.api_keys_file, *(m.engine.model for m in args.models.values())]
    for group in GROUPS.values():
        mounts = container(group)["volumeMounts"]
        assert all(mount["readOnly"] for mount in mounts)
        assert {m["name"] for m in mounts} == {v["name"] for v in pod(group)["volumes"]}
        for path in wanted:
            assert any(path.startswith(f"{mount['mountPath']}/") for mount in mounts)
    (secret,) = load(KUBERAY / "kustomization.yaml")["secretGenerator"]
    (volume,) = [v["secret"] for v in pod(WORKERS)["volumes"] if "secret" in v]
    assert volume["secretName"] == secret["name"]
    assert args.ingress.api_keys_file.split("/")[-1] in secret["files"]
    assert volume["defaultMode"] == 0o400


def test_the_most_engines_fit_the_most_pods():
    args = args_of(serve_config())
    limits = container(WORKERS)["resources"]["limits"]
    (model,) = args.models.values()
    needs = engine_resources(model.engine, model.deployment, has_gpus=False)
    scaling = model.deployment.autoscaling
    assert needs["GPU"] == limits["nvidia.com/gpu"] == 1
    ingress_cpus = args.ingress.num_replicas * args.ingress.num_cpus
    assert needs["CPU"] + REPLICA_CPUS + ingress_cpus <= float(limits["cpu"])
    assert (WORKERS["minReplicas"], WORKERS["maxReplicas"]) == (
        scaling.min_replicas,
        scaling.max_replicas,
    )


def test_selectors_find_the_pods():
    labels = {
        kind: {**group["template"]["metadata"]["labels"], "ray.io/node-type": kind}
        for kind, group in (("head", HEAD), ("worker", WORKERS))
    }
    protection = load_all(KUBERAY / "protection.yaml")
    budgets = [d["spec"] for d in protection if d["kind"] == "PodDisruptionBudget"]
    for budget, kind in zip(budgets, ("worker", "head"), strict=True):
        assert budget["selector"]["matchLabels"].items() <= labels[kind].items()
        assert isinstance(budget["minAvailable"], int)
    (policy,) = [d["spec"] for d in protection if d["kind"] == "NetworkPolicy"]
    monitor = load(KUBERAY / "pod-monitor.yaml")["spec"]
    for selector in (policy["podSelector"], monitor["selector"]):
        for of_pod in labels.values():
            assert selector["matchLabels"].items() <= of_pod.items()


def test_prometheus_finds_a_port_on_every_pod():
    monitor = load(KUBERAY / "pod-monitor.yaml")
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    for group in GROUPS.values():
        assert endpoint["port"] in {port["name"] for port in container(group)["ports"]}


def test_kustomize_takes_every_manifest():
    named = set(load(KUBERAY / "kustomization.yaml")["resources"])
    files = {path.name for path in KUBERAY.glob("*.yaml")}
    assert named | {"kustomization.yaml", "pod-monitor.yaml", "alerts.yaml"} == files
