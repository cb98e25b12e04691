"""Tests of cluster/kuberay: schemas, privileges, network policies, no secrets, and that all references exist."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from manifests import Document, containers, pods, read, render, schema_error

from lmu_dist import __version__
from lmu_dist.cli import cli
from lmu_dist.config import load

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "cluster" / "kuberay"
LADDER = KUBERAY / "ladder.yaml"
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY")


@pytest.fixture(params=["dev", "prod"])
def documents(request: pytest.FixtureRequest) -> list[Document]:
    return [*render(KUBERAY / "overlays" / request.param), *read(LADDER.read_text())]


def named(documents: list[Document], kind: str) -> dict[str, Document]:
    """The documents of a kind, by name."""
    return {d["metadata"]["name"]: d for d in documents if d["kind"] == kind}


def test_every_document_is_valid(documents: list[Document]):
    assert {(d["kind"], d["metadata"]["name"]): e for d in documents if (e := schema_error(d))} == {}
    keys = [(d["kind"], d["metadata"]["name"]) for d in documents]
    assert len(keys) == len(set(keys))
    assert all(d["metadata"].get("namespace") == "lmu" for d in documents if d["kind"] != "Namespace")


@pytest.mark.parametrize("kind", sorted({d["kind"] for d in [*render(KUBERAY / "overlays/dev"), *read(LADDER.read_text())]}))
def test_unknown_field_is_found(kind: str):
    documents = [*render(KUBERAY / "overlays/dev"), *read(LADDER.read_text())]
    document = next(d for d in documents if d["kind"] == kind)
    (document["data"] if kind == "ConfigMap" else document.get("spec", document))["replica"] = 1
    assert schema_error(document)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("spec/authOptions/mode", "tokens"),
        ("spec/headGroupSpec/template/spec/containers/0/imagee", "x"),
        ("spec/workerGroupSpecs/0/maxReplicas", "many"),
        ("spec/workerGroupSpecs/0/template/spec/securityContext/runAsNonRot", True),
    ],
)
def test_mistake_deep_in_a_ray_cluster_is_found(where: str, value: object):
    cluster = named(render(KUBERAY / "overlays/prod"), "RayCluster")["lmu"]
    *path, key = where.split("/")
    node = cluster
    for part in path:
        node = node[int(part)] if part.isdigit() else node[part]
    node[key] = value
    assert schema_error(cluster)


@pytest.mark.parametrize("line", ["namePrefix: x-", "patches: [{path: raycluster.yaml}]", "kind: Component"])
def test_unsupported_kustomize_features_are_rejected(line: str, tmp_path: Path):
    header = "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources: []\n"
    text = header.replace("kind: Kustomization", line) if line.startswith("kind") else header + line
    (tmp_path / "kustomization.yaml").write_text(text)
    with pytest.raises(ValueError, match="not"):
        render(tmp_path)


@pytest.mark.parametrize("overlay", ["dev", "prod"])
def test_kubectl_renders_the_same_documents(overlay: str):
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl on PATH to compare with")
    folder = KUBERAY / "overlays" / overlay
    rendered = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=True, timeout=60).stdout

    def order(document: Document) -> tuple[str, str]:
        return document["kind"], document["metadata"]["name"]

    assert sorted(read(rendered), key=order) == sorted(render(folder), key=order)


def test_pods_have_minimal_privileges(documents: list[Document]):
    for name, pod in pods(documents):
        spec = pod["spec"]
        assert spec.get("serviceAccountName", "lmu") in named(documents, "ServiceAccount"), name
        assert spec["securityContext"]["runAsNonRoot"], name
        assert spec["securityContext"]["runAsUser"] > 0, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
    with_api_token = [name for name, pod in pods(documents) if pod["spec"].get("automountServiceAccountToken") is not False]
    assert with_api_token == ["RayCluster lmu"], "only the head's autoscaler needs the Kubernetes API"
    contexts = list(containers(documents))
    contexts.append(("autoscaler", named(documents, "RayCluster")["lmu"]["spec"]["autoscalerOptions"]))
    for name, container in contexts:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}, name
        assert {"cpu", "memory"} <= set(container["resources"]["limits"]), name
        assert not any("hostPort" in port for port in container.get("ports", [])), name


def test_ray_requires_a_token_and_the_head_runs_no_workers(documents: list[Document]):
    spec = named(documents, "RayCluster")["lmu"]["spec"]
    assert spec["authOptions"] == {"mode": "token", "secretName": "lmu-ray"}
    assert spec["rayVersion"] == version("ray")
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["enableInTreeAutoscaling"]
    [workers] = spec["workerGroupSpecs"]
    assert workers["minReplicas"] <= workers["replicas"] < workers["maxReplicas"]


def test_gpu_workers_scale_from_zero():
    [workers] = named(render(KUBERAY / "overlays/prod"), "RayCluster")["lmu"]["spec"]["workerGroupSpecs"]
    assert (workers["minReplicas"], workers["replicas"]) == (0, 0)
    [container] = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_documents_contain_no_secret(documents: list[Document]):
    assert not named(documents, "Secret")
    for name, container in containers(documents):
        for variable in container.get("env", []):
            if SECRET.search(variable["name"]):
                assert set(variable) == {"name", "valueFrom"}, f"{name}: {variable['name']}"
                assert "secretKeyRef" in variable["valueFrom"]
        assert not SECRET.search(" ".join(container.get("args", []))), name
    for data in named(documents, "ConfigMap").values():
        assert not any(SECRET.search(key) for key in data["data"])


def test_references_exist_or_are_created_in_the_readme(documents: list[Document]):
    readme = (ROOT / "cluster" / "README.md").read_text()
    commands = re.findall(r"generic (\S+) (.*)", readme)
    created = {name: set(re.findall(r"--from-file=([\w-]+)=", line)) for name, line in commands}
    assert named(documents, "RayCluster")["lmu"]["spec"]["authOptions"]["secretName"] in created
    assert "auth_token" in created["lmu-ray"]  # the key that KubeRay reads
    for name, container in containers(documents):
        for source in container.get("envFrom", []):
            assert source["configMapRef"]["name"] in named(documents, "ConfigMap"), name
        for variable in container.get("env", []):
            if "valueFrom" in variable:
                reference = variable["valueFrom"]["secretKeyRef"]
                assert reference["key"] in created[reference["name"]], name


def test_services_and_policies_select_existing_pods(documents: list[Document]):
    labels = [pod.get("metadata", {}).get("labels", {}) for _, pod in pods(documents)]
    labels += [{"ray.io/cluster": "lmu", "ray.io/node-type": kind} for kind in ("head", "worker")]  # set by KubeRay

    def selects_a_pod(selector: Document) -> bool:
        return any(selector.items() <= pod_labels.items() for pod_labels in labels)

    assert all(selects_a_pod(service["spec"]["selector"]) for service in named(documents, "Service").values())
    assert all(selects_a_pod(b["spec"]["selector"]["matchLabels"]) for b in named(documents, "PodDisruptionBudget").values())
    policies = named(documents, "NetworkPolicy")
    assert policies["nobody"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, policy in policies.items():
        assert selects_a_pod(policy["spec"]["podSelector"].get("matchLabels", {})), name
        for rule in policy["spec"].get("ingress", []):
            assert rule["from"], f"{name} admits every client"
            for peer in rule["from"]:
                if "namespaceSelector" not in peer and "matchLabels" in peer["podSelector"]:
                    assert selects_a_pod(peer["podSelector"]["matchLabels"]), name
    hosts = [v["value"] for _, c in containers(documents) for v in c.get("env", []) if v["name"] == "PGHOST"]
    assert set(hosts) <= set(named(documents, "Service"))


def test_mlflow_allows_the_host_names_of_its_clients(documents: list[Document]):
    [container] = named(documents, "Deployment")["mlflow"]["spec"]["template"]["spec"]["containers"]
    [hosts] = [arg.partition("=")[2].split(",") for arg in container["args"] if arg.startswith("--allowed-hosts=")]
    assert set(hosts) == {"mlflow:5000", "localhost:5000", "127.0.0.1:5000"}  # inside the cluster; by port-forward


def test_images_are_pinned_to_this_version(documents: list[Document]):
    for name, container in containers(documents):
        image, _, tag = container["image"].rpartition(":")
        assert image, f"{name}: {container['image']} has no tag"
        assert tag != "latest", name
        if image.endswith("/lmu-dist"):
            assert tag in (f"{__version__}-cpu", f"{__version__}-cuda"), name


def test_ray_job_runs_a_known_command_with_an_existing_configuration():
    [job] = read(LADDER.read_text())
    clusters = named(render(KUBERAY / "overlays/prod"), "RayCluster")
    assert job["spec"]["clusterSelector"]["ray.io/cluster"] in clusters
    program, command, path, *overrides = shlex.split(job["spec"]["entrypoint"])
    assert (program, command in cli.commands) == ("lmu-dist", True)
    home = re.findall(r"^WORKDIR (\S+)", (ROOT / "cluster" / "Dockerfile").read_text(), re.MULTILINE)[0]
    assert load(ROOT / Path(path).relative_to(home)).ladder
    storage = named(render(KUBERAY / "overlays/prod"), "ConfigMap")["lmu-storage"]["data"]
    assert load(ROOT / Path(path).relative_to(home), overrides).cluster.wait_seconds > 0  # GPU workers are started on demand
    assert "LMU_DIST_HOME" in storage


def changed_mlflow_container(change: Callable[[Document], None]) -> list[Document]:
    """The documents after a change of the MLflow container."""
    documents = [*render(KUBERAY / "overlays/prod"), *read(LADDER.read_text())]
    change(named(documents, "Deployment")["mlflow"]["spec"]["template"]["spec"]["containers"][0])
    return documents


def test_plain_text_password_is_found():
    documents = changed_mlflow_container(lambda c: c["env"].append({"name": "PGPASSWORD", "value": "hunter2"}))
    with pytest.raises(AssertionError, match="PGPASSWORD"):
        test_documents_contain_no_secret(documents)


def test_container_without_limits_is_found():
    with pytest.raises((AssertionError, KeyError)):
        test_pods_have_minimal_privileges(changed_mlflow_container(lambda c: c["resources"].pop("limits")))
